//! UNLOCK, and what a lock forbids while it lasts.

use crate::kit::{
    A, A_BASE, A_FRAME, B, B_BASE, FWB, LOG, NONE, PLAIN, R, RO, RW, cleans, gfn, pages, vm,
    vm_with,
};
use memslot::error::{Error, ErrorKind};
use memslot::fault::Access;
use memslot::lock::LockState;
use memslot::pending::Work;
use memslot::slot::{SlotFlags, SlotId};
use stage2::Perms;

#[test]
fn unlock_of_a_slot_that_is_not_locked_is_invalid() {
    assert_eq!(vm().mem.unlock_slot(A), Err(Error::NotLocked(A)));
    assert_eq!(Error::NotLocked(A).kind(), ErrorKind::Invalid);
    assert_eq!(
        vm().mem.unlock_slot(SlotId(7)),
        Err(Error::NoSuchSlot(SlotId(7)))
    );
    assert_eq!(
        vm().mem.unlock_slot(SlotId(8)),
        Err(Error::SlotOutOfRange(SlotId(8)))
    );
}

#[test]
fn unlock_before_run_unmaps() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    assert_eq!(vm.mem.pending(), Work::empty());
    assert_eq!(vm.mem.lock_state(A), Some(LockState::Unlocked));
}

#[test]
fn unlock_after_run_keeps_the_leaves() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.leaves().len(), 8);
}

#[test]
fn unlock_before_run_with_nothing_pending_keeps_the_leaves() {
    let vm = vm_with(FWB, NONE);
    vm.lock(A, RW).unwrap();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.leaves().len(), 8);
}

#[test]
fn unlock_unpins_and_uncharges() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!((vm.pinned(), vm.charged()), (0, 0));
}

#[test]
fn unlock_marks_pages_dirty_only_for_a_write_lock() {
    let read = vm();
    read.lock(A, R).unwrap();
    read.mem.unlock_slot(A).unwrap();
    assert!(read.mem.frames().state().dirtied.is_empty());
    let write = vm();
    write.lock(A, RW).unwrap();
    write.mem.unlock_slot(A).unwrap();
    // Runs of three pages with a gap of one frame: 0..3, 4..7, 8..10.
    let frames: Vec<u64> = [0, 1, 2, 4, 5, 6, 8, 9].map(|n| A_FRAME + n).to_vec();
    assert!(write.mem.frames().state().dirtied.iter().eq(frames.iter()));
}

#[test]
fn unlock_of_one_slot_keeps_what_is_pending_for_another() {
    let vm = vm();
    vm.add_b();
    vm.lock(A, RW).unwrap();
    vm.lock(B, RW).unwrap();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    assert!(vm.leaf(B_BASE).is_some());
    vm.mem.unlock_slot(B).unwrap();
    assert_eq!(vm.mem.pending(), Work::empty());
}

#[test]
fn unlock_all_unlocks_all_and_clears_pending_work() {
    let vm = vm();
    vm.add_b();
    vm.lock(A, RW).unwrap();
    vm.lock(B, R).unwrap();
    assert_eq!(vm.mem.unlock_all(), Ok(()));
    assert_eq!(vm.mem.pending(), Work::empty());
    assert_eq!((vm.pinned(), vm.charged()), (0, 0));
    assert_eq!(vm.mem.lock_state(A), Some(LockState::Unlocked));
    assert_eq!(vm.mem.lock_state(B), Some(LockState::Unlocked));
}

#[test]
fn unlock_all_with_nothing_locked_succeeds() {
    assert_eq!(vm().mem.unlock_all(), Ok(()));
}

#[test]
fn an_unlocked_slot_can_be_locked_again() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.lock(A, R), Ok(()));
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
}

#[test]
fn a_locked_slot_cannot_be_deleted_moved_or_flagged() {
    for perms in [R, RW] {
        let vm = vm();
        vm.lock(A, perms).unwrap();
        let before = vm.snapshot();
        assert_eq!(vm.mem.delete_slot(A), Err(Error::Locked(A)));
        assert_eq!(vm.mem.move_slot(A, gfn(0x900)), Err(Error::Locked(A)));
        assert_eq!(vm.mem.set_slot_flags(A, RO), Err(Error::Locked(A)));
        assert_eq!(
            vm.mem.set_slot_flags(A, SlotFlags::NONCOHERENT_DMA),
            Err(Error::Locked(A))
        );
        assert_eq!(vm.snapshot(), before);
    }
    assert_eq!(Error::Locked(A).kind(), ErrorKind::Busy);
}

#[test]
fn dirty_logging_on_a_read_lock_is_allowed_and_keeps_the_lock() {
    let vm = vm();
    vm.lock(A, R).unwrap();
    vm.run();
    vm.relax(A_BASE, Access::Write);
    assert_eq!(vm.perms(A_BASE), Some(Perms::RW));
    assert_eq!(vm.mem.set_slot_flags(A, LOG), Ok(()));
    assert_eq!(vm.leaves().len(), 8);
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
    assert_eq!(vm.mem.lock_state(A), Some(LockState::LockedClean));
    assert_eq!((vm.pinned(), vm.charged()), (8, 8));
    assert_eq!(vm.mem.unlock_slot(A), Ok(()));
    assert_eq!((vm.pinned(), vm.charged()), (0, 0));
}

#[test]
fn dirty_logging_on_a_write_lock_is_busy() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    let before = vm.snapshot();
    assert_eq!(vm.mem.set_slot_flags(A, LOG), Err(Error::Locked(A)));
    assert_eq!(vm.snapshot(), before);
}

#[test]
fn dirty_logging_off_on_a_read_lock_is_allowed() {
    let vm = vm_with(PLAIN, LOG);
    vm.lock(A, R).unwrap();
    assert_eq!(vm.mem.set_slot_flags(A, NONE), Ok(()));
    assert_eq!(vm.leaves().len(), 8);
}

#[test]
fn the_host_cannot_unmap_a_locked_range_not_even_one_page_of_it() {
    let vm = vm();
    vm.lock(A, R).unwrap();
    assert_eq!(
        vm.mem.host_unmap(pages(A_BASE + 7, 1)),
        Err(Error::Locked(A))
    );
    assert_eq!(vm.mem.host_unmap(pages(0, 0x101)), Err(Error::Locked(A)));
    assert_eq!(vm.leaves().len(), 8);
    assert_eq!(vm.mem.host_unmap(pages(A_BASE + 8, 1)), Ok(()));
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.mem.host_unmap(pages(A_BASE + 7, 1)), Ok(()));
}

#[test]
fn teardown_unmaps_then_unpins_and_uncharges() {
    let vm = vm();
    vm.add_b();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.touch(B_BASE, Access::Read);
    assert_eq!(vm.mem.empty(), Ok(()));
    assert_eq!((vm.leaves().len(), vm.pinned(), vm.charged()), (0, 0, 0));
    assert_eq!(vm.mem.pending(), Work::empty());
}

#[test]
fn teardown_is_refused_while_a_vcpu_could_fault_leaves_in_again() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    let inside = vm.mem.enter().unwrap();
    assert_eq!(vm.mem.empty(), Err(Error::VcpuRunning));
    assert_eq!((vm.leaves().len(), vm.pinned()), (8, 8));
    drop(inside);
    assert_eq!(vm.mem.empty(), Ok(()));
}

#[test]
fn unlock_itself_cleans_nothing() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    let lines = cleans(&vm);
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(cleans(&vm), lines);
}
