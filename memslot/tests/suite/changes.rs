//! Creating, deleting, moving and flagging slots.

use crate::kit::{
    A, A_BASE, A_FRAME, FLAG, FWB, LOG, NONE, PLAIN, RO, RW, Vm, config, empty_vm, gfn, pages,
    slot, vm, vm_with,
};
use memslot::error::{Error, ErrorKind};
use memslot::fault::Access;
use memslot::policy::ArmPolicy;
use memslot::slot::{LockGranule, Memslot, SlotFlags, SlotId, SlotLock};
use memslot::testing::{CacheModel, FakeFrames, ModelTable, View};
use memslot::vm::{GuestMemory, VmKind};
use stage2::Perms;
use std::sync::Arc;

#[test]
fn a_slot_outside_the_guests_addresses_is_refused() {
    let vm = vm();
    let limit = 1 << 24;
    let fits = slot(SlotId(3), limit - 1, 1, 0, NONE);
    let beyond = slot(SlotId(4), limit - 1, 2, 0, NONE);
    assert_eq!(vm.mem.create_slot(fits), Ok(()));
    vm.mem.delete_slot(SlotId(3)).unwrap();
    let refused = Error::BadRange {
        base: limit - 1,
        npages: 2,
    };
    assert_eq!(vm.mem.create_slot(beyond), Err(refused));
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    let refused = Error::BadRange {
        base: limit - 7,
        npages: 8,
    };
    assert_eq!(vm.mem.move_slot(A, gfn(limit - 7)), Err(refused));
}

#[test]
fn overlap_and_reuse_of_a_number_are_refused() {
    let vm = vm();
    let overlap = slot(SlotId(3), A_BASE + 7, 4, 0, NONE);
    assert_eq!(vm.mem.create_slot(overlap), Err(Error::Overlap(A)));
    let again = slot(A, 0x700, 4, 0, NONE);
    assert_eq!(vm.mem.create_slot(again), Err(Error::SlotExists(A)));
    assert_eq!(Error::Overlap(A).kind(), ErrorKind::Exists);
    let last = slot(SlotId(8), 0x700, 4, 0, NONE);
    assert_eq!(
        vm.mem.create_slot(last),
        Err(Error::SlotOutOfRange(SlotId(8)))
    );
}

#[test]
fn deleting_removes_the_leaves() {
    let vm = vm();
    vm.touch(A_BASE, Access::Read);
    vm.mem.delete_slot(A).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    assert_eq!(vm.mem.slot(A), None);
    assert_eq!(vm.mem.delete_slot(A), Err(Error::NoSuchSlot(A)));
}

/// The guest's own types were honoured there: what it wrote past the caches and what is cached must be one before the
/// frame is somebody else's, on a CPU that forces write-back elsewhere, too.
#[test]
fn deleting_a_flagged_slot_removes_its_leaves_and_cleans_its_memory() {
    let vm = vm_with(FWB, FLAG);
    vm.touch(A_BASE, Access::Write);
    let at = vm.memory(A_BASE);
    vm.caches.write(at, View::Cacheable, 7);
    assert_eq!(vm.caches.read(at, View::Uncached), 0);
    vm.mem.delete_slot(A).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    assert_eq!(vm.caches.read(at, View::Uncached), 7);
}

/// A number may be used again between a caller's look at it and the removal.
#[test]
fn deleting_gives_the_slot_that_went() {
    let vm = vm();
    let before = vm.mem.slot(A).unwrap();
    assert_eq!(vm.mem.delete_slot(A), Ok(before));
    let after = slot(A, A_BASE, 4, 0x7000, NONE);
    vm.mem.create_slot(after).unwrap();
    assert_eq!(vm.mem.delete_slot(A).unwrap().backing, 0x7000);
}

#[test]
fn moving_removes_the_old_leaves_and_keeps_the_frames() {
    let vm = vm();
    vm.touch(A_BASE, Access::Read);
    vm.mem.move_slot(A, gfn(0x104)).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    vm.touch(0x104, Access::Read);
    assert_eq!(vm.memory(0x104).get() >> 12, A_FRAME);
    assert_eq!(vm.mem.slot(A).unwrap().range, pages(0x104, 8));
}

#[test]
fn read_only_and_noncoherent_are_fixed_at_creation() {
    let vm = vm();
    for flags in [RO, FLAG, RO | FLAG, RO | LOG] {
        let refused = vm.mem.set_slot_flags(A, flags);
        assert_eq!(refused, Err(Error::ImmutableFlags(flags - LOG)));
    }
    assert_eq!(Error::ImmutableFlags(RO).kind(), ErrorKind::Invalid);
    let flagged = vm_with(PLAIN, FLAG);
    assert_eq!(
        flagged.mem.set_slot_flags(A, NONE),
        Err(Error::ImmutableFlags(FLAG))
    );
}

#[test]
fn dirty_logging_may_be_toggled_on_a_flagged_slot() {
    let vm = vm_with(FWB, FLAG);
    assert_eq!(vm.mem.set_slot_flags(A, FLAG | LOG), Ok(()));
    assert_eq!(vm.mem.set_slot_flags(A, FLAG), Ok(()));
    assert_eq!(vm.mem.slot(A).unwrap().flags, FLAG);
}

#[test]
fn the_same_flags_change_nothing() {
    let vm = vm_with(PLAIN, RO);
    let (_, before) = vm.mem.find_slot(gfn(A_BASE)).unwrap();
    assert_eq!(vm.mem.set_slot_flags(A, RO), Ok(()));
    assert_eq!(vm.mem.find_slot(gfn(A_BASE)).unwrap().1, before);
}

#[test]
fn any_slot_may_be_flagged_noncoherent() {
    let vm = empty_vm(FWB, 4);
    assert_eq!(vm.mem.create_slot(slot(A, 0x100, 4, 0, FLAG | RO)), Ok(()));
    assert_eq!(
        vm.mem.create_slot(slot(SlotId(2), 0x200, 4, 0, FLAG | LOG)),
        Ok(())
    );
}

#[test]
fn starting_to_log_leaves_no_page_writable() {
    let vm = vm();
    vm.touch(A_BASE, Access::Write);
    vm.mem.set_slot_flags(A, LOG).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    vm.touch(A_BASE, Access::Read);
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
}

#[test]
fn stopping_to_log_makes_pages_writable_again() {
    let vm = vm_with(PLAIN, LOG);
    vm.touch(A_BASE, Access::Write);
    vm.mem.set_slot_flags(A, NONE).unwrap();
    assert_eq!(
        vm.mem.take_dirty_log(A, &mut [0]),
        Err(Error::NotLogging(A))
    );
    vm.touch(A_BASE + 1, Access::Read);
    assert_eq!(vm.perms(A_BASE + 1), Some(Perms::RW));
}

#[test]
fn a_log_that_starts_again_is_clean() {
    let vm = vm_with(PLAIN, LOG);
    vm.touch(A_BASE, Access::Write);
    vm.mem.set_slot_flags(A, NONE).unwrap();
    vm.mem.set_slot_flags(A, LOG).unwrap();
    let mut words = [1];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [0]);
}

#[test]
fn the_logs_buffer_must_have_the_right_size_and_no_bit_is_lost() {
    let vm = vm_with(PLAIN, LOG);
    vm.touch(A_BASE, Access::Write);
    assert_eq!(
        vm.mem.take_dirty_log(A, &mut [0, 0]),
        Err(Error::BadBuffer(1))
    );
    assert_eq!(vm.mem.take_dirty_log(A, &mut []), Err(Error::BadBuffer(1)));
    assert_eq!(
        vm.mem.take_dirty_log(SlotId(5), &mut [0]),
        Err(Error::NoSuchSlot(SlotId(5)))
    );
    let mut words = [0];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [1]);
}

/// A log of three words, the last one half used; pages at both ends of each are written.
fn three_words() -> (Vm<ArmPolicy>, [u64; 6]) {
    let vm = empty_vm(PLAIN, 64);
    vm.mem
        .create_slot(slot(A, A_BASE, 160, A_FRAME, LOG))
        .unwrap();
    let pages = [0, 63, 64, 127, 128, 159].map(|n| A_BASE + n);
    pages.iter().for_each(|p| vm.touch(*p, Access::Write));
    (vm, pages)
}

#[test]
fn one_word_of_the_log_is_handed_out_and_its_pages_alone_protected() {
    let (vm, pages) = three_words();
    let writable = || pages.map(|p| vm.perms(p) == Some(Perms::RW));
    assert_eq!(vm.mem.take_dirty_word(A, 1), Ok(0x8000_0000_0000_0001));
    assert_eq!(writable(), [true, true, false, false, true, true]);
    assert_eq!(vm.mem.take_dirty_word(A, 2), Ok(0x8000_0001));
    assert_eq!(writable(), [true, true, false, false, false, false]);
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(0x8000_0000_0000_0001));
    assert_eq!(writable(), [false; 6]);
    assert_eq!([0, 1, 2].map(|n| vm.mem.take_dirty_word(A, n)), [Ok(0); 3]);
}

#[test]
fn a_page_between_two_written_ones_stays_as_it_is() {
    let (vm, _) = three_words();
    vm.touch(A_BASE + 5, Access::Read);
    assert_eq!(vm.perms(A_BASE + 5), Some(Perms::READ));
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(0x8000_0000_0000_0001));
    assert_eq!(vm.perms(A_BASE + 5), Some(Perms::READ));
    vm.relax(A_BASE + 5, Access::Write);
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(1 << 5));
    // Nor does the next word's first page, which is still in the log.
    assert_eq!(vm.perms(A_BASE + 64), Some(Perms::RW));
}

#[test]
fn pages_of_the_word_before_stay_writable() {
    let vm = empty_vm(PLAIN, 64);
    vm.mem
        .create_slot(slot(A, A_BASE, 128, A_FRAME, LOG))
        .unwrap();
    vm.touch(A_BASE + 63, Access::Write);
    vm.touch(A_BASE + 127, Access::Write);
    assert_eq!(vm.mem.take_dirty_word(A, 1), Ok(1 << 63));
    assert_eq!(vm.perms(A_BASE + 63), Some(Perms::RW));
    assert_eq!(vm.perms(A_BASE + 127), Some(Perms::READ));
}

#[test]
fn a_word_that_the_slot_does_not_have_is_refused() {
    let (vm, _) = three_words();
    assert_eq!(vm.mem.take_dirty_word(A, 3), Err(Error::BadBuffer(3)));
    assert_eq!(
        vm.mem.take_dirty_word(A, u64::MAX),
        Err(Error::BadBuffer(3))
    );
    let id = SlotId(5);
    assert_eq!(vm.mem.take_dirty_word(id, 0), Err(Error::NoSuchSlot(id)));
    vm.mem.set_slot_flags(A, NONE).unwrap();
    assert_eq!(vm.mem.take_dirty_word(A, 0), Err(Error::NotLogging(A)));
}

#[test]
fn a_new_slot_is_unlocked_whatever_its_description_says() {
    let vm = empty_vm(PLAIN, 4);
    let lock = SlotLock {
        flags: RW,
        granule: LockGranule::BasePages,
    };
    let described = Memslot {
        lock: Some(lock),
        ..slot(A, A_BASE, 8, A_FRAME, NONE)
    };
    vm.mem.create_slot(described).unwrap();
    assert_eq!(vm.mem.slot(A).unwrap().lock, None);
    assert_eq!(vm.mem.delete_slot(A).map(|slot| slot.id), Ok(A));
}

#[test]
fn a_moved_slot_keeps_its_log() {
    let vm = vm_with(PLAIN, LOG);
    vm.touch(A_BASE + 3, Access::Write);
    vm.mem.move_slot(A, gfn(0x300)).unwrap();
    let mut words = [0];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [8]);
}

#[test]
fn a_deleted_slots_log_is_gone() {
    let vm = vm_with(PLAIN, LOG);
    vm.touch(A_BASE, Access::Write);
    vm.mem.delete_slot(A).unwrap();
    vm.mem
        .create_slot(slot(A, A_BASE, 8, A_FRAME, LOG))
        .unwrap();
    let mut words = [1];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [0]);
}

#[test]
fn a_protected_vm_refuses_logging_noncoherent_and_read_only_slots() {
    let caches = Arc::new(CacheModel::new());
    let table = ModelTable::new(caches);
    let frames = FakeFrames::new(4, 64);
    let mem = GuestMemory::new(config(VmKind::Protected), FWB, frames, table);
    for flags in [LOG, FLAG, LOG | FLAG, RO, RO | LOG] {
        let refused = mem.create_slot(slot(A, 0x100, 4, 0, flags));
        assert_eq!(refused, Err(Error::RefusedForProtected(flags)));
    }
    mem.create_slot(slot(A, 0x100, 4, 0, NONE)).unwrap();
    assert_eq!(
        mem.set_slot_flags(A, LOG),
        Err(Error::RefusedForProtected(LOG))
    );
}

#[test]
fn unknown_flag_bits_are_refused_where_they_come_in() {
    assert_eq!(SlotFlags::from_word(1 << 2), Err(Error::BadBits(4)));
}
