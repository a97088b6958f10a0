//! LOCK: every check in its order, the action, and rollback at every step.

use crate::kit::{
    A, A_BASE, A_FRAME, A_PAGES, B, B_BASE, FWB, LIMIT, LOG, NONE, PLAIN, R, RO, RW, Vm, empty_vm,
    slot, vm, vm_with,
};
use memslot::account::Privilege;
use memslot::error::{Error, ErrorKind};
use memslot::fault::Access;
use memslot::frames::FrameSource;
use memslot::lock::{LockCall, LockRequest, LockState};
use memslot::pending::Work;
use memslot::policy::ArmPolicy;
use memslot::slot::{LockFlags, SlotId};
use memslot::testing::FailAt;
use stage2::Perms;

const LOCK: u64 = 1;
const UNLOCK: u64 = 2;

fn kind<T>(r: Result<T, Error>) -> Option<ErrorKind> {
    r.err().map(Error::kind)
}

#[test]
fn lock_call_has_exactly_one_action() {
    for action in [0, LOCK | UNLOCK, 4, LOCK | 4, 1 << 63] {
        assert_eq!(
            LockCall::parse(action, [1, 1, 0, 0]),
            Err(Error::BadLockRequest(action))
        );
    }
    let lock = LockCall::parse(LOCK, [1, 3, 0, 0]);
    assert_eq!(
        lock,
        Ok(LockCall::Lock {
            id: SlotId(1),
            perms: RW
        })
    );
    assert_eq!(
        LockCall::parse(UNLOCK, [1, 0, 0, 0]),
        Ok(LockCall::Unlock(SlotId(1)))
    );
}

#[test]
fn lock_call_refuses_unknown_bits_in_every_word() {
    assert_eq!(
        LockCall::parse(LOCK, [1, 5, 0, 0]),
        Err(Error::BadLockRequest(5))
    );
    assert_eq!(
        LockCall::parse(UNLOCK, [1, 4, 0, 0]),
        Err(Error::BadLockRequest(4))
    );
    assert_eq!(
        LockCall::parse(LOCK, [1 << 16, 1, 0, 0]),
        Err(Error::BadLockRequest(1 << 16))
    );
}

#[test]
fn lock_call_refuses_a_third_or_fourth_argument() {
    assert_eq!(
        LockCall::parse(LOCK, [1, 1, 9, 0]),
        Err(Error::BadLockRequest(9))
    );
    assert_eq!(
        LockCall::parse(LOCK, [1, 1, 0, 8]),
        Err(Error::BadLockRequest(8))
    );
    assert_eq!(
        kind(LockCall::parse(UNLOCK, [1, 0, 1, 0])),
        Some(ErrorKind::Invalid)
    );
}

#[test]
fn unlock_all_ignores_nothing_but_names_no_slot() {
    assert_eq!(
        LockCall::parse(UNLOCK, [7, 1, 0, 0]),
        Ok(LockCall::UnlockAll)
    );
}

#[test]
fn lock_r_maps_all_pages_readable_never_executable() {
    let vm = vm();
    assert_eq!(vm.lock(A, R), Ok(()));
    for page in A_BASE..A_BASE + A_PAGES {
        assert_eq!(vm.perms(page), Some(Perms::READ));
    }
    assert_eq!(vm.leaves().len(), 8);
}

#[test]
fn lock_rw_maps_all_pages_writable_never_executable() {
    let vm = vm();
    assert_eq!(vm.lock(A, RW), Ok(()));
    assert_eq!(vm.perms(A_BASE + 7), Some(Perms::RW));
    assert_eq!(vm.pinned(), 8);
    assert_eq!(vm.charged(), 8);
}

#[test]
fn lock_w_only_is_invalid() {
    assert_eq!(vm().lock(A, LockFlags::WRITE), Err(Error::LockNeedsRead));
    assert_eq!(vm().lock(A, LockFlags::empty()), Err(Error::LockNeedsRead));
    assert_eq!(Error::LockNeedsRead.kind(), ErrorKind::Invalid);
}

#[test]
fn lock_id_at_the_maximum_is_invalid() {
    assert_eq!(
        vm().lock(SlotId(8), R),
        Err(Error::SlotOutOfRange(SlotId(8)))
    );
    assert_eq!(kind(vm().lock(SlotId(8), R)), Some(ErrorKind::Invalid));
}

#[test]
fn lock_missing_id_is_invalid() {
    assert_eq!(vm().lock(SlotId(7), R), Err(Error::NoSuchSlot(SlotId(7))));
    assert_eq!(kind(vm().lock(SlotId(7), R)), Some(ErrorKind::Invalid));
}

#[test]
fn lock_w_of_a_read_only_slot_is_not_permitted() {
    let vm = vm_with(PLAIN, RO);
    assert_eq!(kind(vm.lock(A, RW)), Some(ErrorKind::NotPermitted));
    assert_eq!(vm.lock(A, R), Ok(()));
}

#[test]
fn lock_w_with_dirty_logging_is_not_permitted() {
    let vm = vm_with(PLAIN, LOG);
    assert_eq!(kind(vm.lock(A, RW)), Some(ErrorKind::NotPermitted));
    assert_eq!(vm.lock(A, R), Ok(()));
}

#[test]
fn lock_memslot_twice_is_busy() {
    let vm = vm();
    vm.lock(A, R).unwrap();
    let before = vm.snapshot();
    assert_eq!(vm.lock(A, R), Err(Error::Locked(A)));
    assert_eq!(vm.lock(A, RW), Err(Error::Locked(A)));
    assert_eq!(kind(vm.lock(A, R)), Some(ErrorKind::Busy));
    assert_eq!(vm.snapshot(), before);
}

#[test]
fn lock_with_a_vcpu_running_is_busy() {
    let vm = vm();
    let inside = vm.mem.enter().unwrap();
    assert_eq!(vm.lock(A, R), Err(Error::VcpuRunning));
    assert_eq!(kind(vm.lock(A, R)), Some(ErrorKind::Busy));
    drop(inside);
    assert_eq!(vm.lock(A, R), Ok(()));
}

#[test]
fn lock_after_vcpus_have_run_is_allowed() {
    let vm = vm();
    vm.run();
    assert_eq!(vm.lock(A, R), Ok(()));
}

#[test]
fn checks_come_in_order() {
    // Each request is wrong in two ways; the earlier check answers.
    let vm = vm_with(PLAIN, RO);
    let inside = vm.mem.enter().unwrap();
    assert_eq!(
        vm.lock(SlotId(8), LockFlags::WRITE),
        Err(Error::SlotOutOfRange(SlotId(8)))
    );
    assert_eq!(
        vm.lock(SlotId(7), LockFlags::WRITE),
        Err(Error::LockNeedsRead)
    );
    assert_eq!(vm.lock(SlotId(7), R), Err(Error::VcpuRunning));
    drop(inside);
    vm.lock(A, R).unwrap();
    assert_eq!(vm.lock(A, RW), Err(Error::WriteLockRefused(A)));
}

#[test]
fn limit_that_fits_exactly_is_accepted() {
    let vm = empty_vm(PLAIN, 16);
    vm.mem
        .create_slot(slot(A, A_BASE, LIMIT, A_FRAME, NONE))
        .unwrap();
    assert_eq!(vm.lock(A, R), Ok(()));
    assert_eq!(vm.charged(), 64);
}

#[test]
fn limit_plus_one_is_no_memory() {
    let vm = empty_vm(PLAIN, 16);
    vm.mem
        .create_slot(slot(A, A_BASE, LIMIT + 1, A_FRAME, NONE))
        .unwrap();
    let before = vm.snapshot();
    let refused = Error::LockedLimit {
        wanted: 65,
        locked: 0,
        limit: 64,
    };
    assert_eq!(vm.lock(A, R), Err(refused));
    assert_eq!(refused.kind(), ErrorKind::NoMemory);
    assert_eq!(vm.snapshot(), before);
}

#[test]
fn what_is_locked_already_counts_against_the_limit() {
    let vm = vm();
    vm.mem
        .create_slot(slot(SlotId(3), 0x400, 57, 0xa000, NONE))
        .unwrap();
    vm.lock(A, R).unwrap();
    let refused = Error::LockedLimit {
        wanted: 57,
        locked: 8,
        limit: 64,
    };
    assert_eq!(vm.lock(SlotId(3), R), Err(refused));
}

#[test]
fn the_privileged_may_exceed_the_limit() {
    let vm = empty_vm(PLAIN, 16);
    vm.mem
        .create_slot(slot(A, A_BASE, LIMIT + 1, A_FRAME, NONE))
        .unwrap();
    let privilege = Privilege::MayExceedLimit;
    let request = LockRequest {
        privilege,
        ..LockRequest::new(A, R)
    };
    assert_eq!(vm.mem.lock_slot(&request), Ok(()));
    assert_eq!(vm.charged(), 65);
}

/// Slot A over frames in runs of one page: eight pins, eight maps.
fn paged() -> Vm<ArmPolicy> {
    let vm = empty_vm(PLAIN, 1);
    vm.mem
        .create_slot(slot(A, A_BASE, A_PAGES, A_FRAME, NONE))
        .unwrap();
    vm
}

#[test]
fn pin_failure_at_every_page_rolls_back() {
    for page in 0..A_PAGES {
        for run in [1, 3, 8] {
            let vm = empty_vm(PLAIN, run);
            vm.mem
                .create_slot(slot(A, A_BASE, A_PAGES, A_FRAME, NONE))
                .unwrap();
            let before = vm.snapshot();
            vm.mem.frames().fail_pin_at(Some(page));
            assert_eq!(vm.lock(A, RW), Err(Error::PinFailed(page)));
            assert_eq!(kind(vm.lock(A, RW)), Some(ErrorKind::NoMemory));
            assert_eq!(vm.snapshot(), before, "page {page}, runs of {run}");
        }
    }
}

#[test]
fn map_failure_at_every_page_rolls_back() {
    for page in 0..8 {
        let vm = paged();
        let before = vm.snapshot();
        vm.mem.with_table(|t| {
            t.fail_at(FailAt {
                map: Some(page),
                fault: None,
            })
        });
        assert_eq!(vm.lock(A, RW), Err(Error::NeedTables(7)));
        assert_eq!(vm.snapshot(), before, "page {page}");
    }
}

#[test]
fn a_lock_that_failed_can_be_repeated() {
    let vm = paged();
    vm.mem.with_table(|t| {
        t.fail_at(FailAt {
            map: Some(3),
            fault: None,
        })
    });
    assert!(vm.lock(A, RW).is_err());
    assert_eq!(vm.lock(A, RW), Ok(()));
    assert_eq!((vm.pinned(), vm.charged(), vm.leaves().len()), (8, 8, 8));
}

#[test]
fn a_limit_lowered_meanwhile_rolls_back() {
    let vm = paged();
    let before = vm.snapshot();
    vm.mem.frames().lower_limit_after(8, 7);
    let refused = Error::LockedLimit {
        wanted: 8,
        locked: 0,
        limit: 7,
    };
    assert_eq!(vm.lock(A, R), Err(refused));
    assert_eq!(vm.snapshot(), before);
}

#[test]
fn a_backing_that_moves_between_pin_and_map_is_again_and_rolls_back() {
    for pins in 1..=8 {
        let vm = paged();
        let before = vm.snapshot();
        vm.mem.frames().move_backing_after(pins);
        assert_eq!(vm.lock(A, R), Err(Error::BackingChanged));
        assert_eq!(vm.snapshot(), before);
    }
    assert_eq!(Error::BackingChanged.kind(), ErrorKind::Again);
}

#[test]
fn rollback_of_a_slot_that_was_touched_leaves_no_leaf_behind() {
    let vm = paged();
    vm.touch(A_BASE + 2, Access::Fetch);
    vm.mem.with_table(|t| {
        t.fail_at(FailAt {
            map: Some(5),
            fault: None,
        })
    });
    assert!(vm.lock(A, RW).is_err());
    assert_eq!(vm.leaves().len(), 0);
    assert_eq!((vm.pinned(), vm.charged()), (0, 0));
}

#[test]
fn rollback_leaves_other_slots_alone() {
    let vm = paged();
    vm.add_b();
    vm.lock(B, RW).unwrap();
    vm.run();
    let before = vm.snapshot();
    vm.mem.with_table(|t| {
        t.fail_at(FailAt {
            map: Some(5),
            fault: None,
        })
    });
    assert!(vm.lock(A, RW).is_err());
    assert_eq!(vm.snapshot(), before);
    assert!(vm.leaf(B_BASE).is_some());
}

#[test]
fn locking_does_no_cache_maintenance() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    assert_eq!(vm.data_lines(), 0);
}

#[test]
fn lock_sets_flush_without_forced_write_back() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    assert_eq!(vm.mem.lock_state(A), Some(LockState::LockedDirty));
}

#[test]
fn lock_sets_nothing_with_forced_write_back() {
    let vm = vm_with(FWB, NONE);
    vm.lock(A, RW).unwrap();
    assert_eq!(vm.mem.pending(), Work::empty());
    assert_eq!(vm.mem.lock_state(A), Some(LockState::LockedClean));
}

#[test]
fn lock_over_touched_pages_takes_execution_away() {
    let vm = vm();
    vm.touch(A_BASE, Access::Fetch);
    assert_eq!(vm.perms(A_BASE), Some(Perms::RWX));
    vm.lock(A, R).unwrap();
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
}

#[test]
fn accounting_does_not_care_for_shared_frames() {
    let vm = vm();
    vm.mem
        .create_slot(slot(SlotId(3), 0x400, A_PAGES, A_FRAME, NONE))
        .unwrap();
    vm.lock(A, R).unwrap();
    vm.lock(SlotId(3), R).unwrap();
    assert_eq!(vm.charged(), 16);
    assert_eq!(vm.mem.frames().state().pins[&A_FRAME], 2);
}

#[test]
fn a_lock_of_the_slot_changes_the_generation() {
    let vm = vm();
    let page = crate::kit::gfn(A_BASE);
    let (_, before) = vm.mem.find_slot(page).unwrap();
    vm.lock(A, R).unwrap();
    let (locked, after) = vm.mem.find_slot(page).unwrap();
    assert_eq!(after, before + 1);
    assert_eq!(locked.lock.map(|l| l.flags), Some(R));
    assert_eq!(vm.mem.frames().account().locked(), 8);
}
