//! The fault path: outcomes, permissions, locked slots, and what may move meanwhile.

use crate::kit::{
    A, A_BASE, A_FRAME, FWB, LOG, NONE, PLAIN, R, RO, RW, Vm, empty_vm, gfn, pages, slot, vm,
    vm_with,
};
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::policy::ArmPolicy;
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::testing::FailAt;
use stage2::{Combine, Device, MemType, Perms};
use std::sync::Arc;

use FaultKind::{AccessFlag, Permission, Translation};

#[test]
fn outside_of_slots_is_mmio() {
    assert_eq!(
        vm().fault(A_BASE - 1, Access::Read, Translation),
        Ok(FaultOutcome::Mmio)
    );
    assert_eq!(
        vm().fault(A_BASE + 8, Access::Write, Translation),
        Ok(FaultOutcome::Mmio)
    );
}

#[test]
fn a_write_to_a_read_only_slot_is_mmio_and_maps_nothing() {
    let vm = vm_with(PLAIN, RO);
    assert_eq!(
        vm.fault(A_BASE, Access::Write, Translation),
        Ok(FaultOutcome::Mmio)
    );
    assert_eq!(vm.leaves().len(), 0);
    vm.touch(A_BASE, Access::Read);
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
    assert_eq!(
        vm.fault(A_BASE, Access::Write, Permission),
        Ok(FaultOutcome::Mmio)
    );
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
}

#[test]
fn a_read_maps_writable_but_not_executable() {
    let vm = vm();
    vm.touch(A_BASE + 3, Access::Read);
    assert_eq!(vm.perms(A_BASE + 3), Some(Perms::RW));
    assert_eq!(vm.leaves().len(), 1);
}

#[test]
fn the_right_frame_is_mapped_in_every_run() {
    let vm = vm();
    for page in 0..8 {
        vm.touch(A_BASE + page, Access::Read);
    }
    let frames: Vec<u64> = vm
        .leaves()
        .values()
        .map(|l| (l.pa.get() >> 12) - A_FRAME)
        .collect();
    assert_eq!(frames, [0, 1, 2, 4, 5, 6, 8, 9]);
}

#[test]
fn a_fetch_adds_execution_once() {
    let vm = vm();
    vm.touch(A_BASE, Access::Read);
    vm.relax(A_BASE, Access::Fetch);
    assert_eq!(vm.perms(A_BASE), Some(Perms::RWX));
    let lines = vm.caches.traffic().fetch_lines;
    assert_eq!(lines, 64);
    vm.relax(A_BASE, Access::Fetch);
    assert_eq!(vm.caches.traffic().fetch_lines, lines);
}

#[test]
fn mapping_cleans_without_forced_write_back_and_not_with() {
    let plain = vm();
    plain.touch(A_BASE, Access::Read);
    assert_eq!(plain.data_lines(), 64);
    let fwb = vm_with(FWB, NONE);
    fwb.touch(A_BASE, Access::Read);
    assert_eq!(fwb.data_lines(), 0);
}

#[test]
fn a_missing_frame_goes_to_the_host() {
    let vm = vm();
    vm.mem.frames().take_frame(4);
    let outcome = vm.fault(A_BASE + 4, Access::Read, Translation);
    assert_eq!(outcome, Ok(FaultOutcome::NoFrame(gfn(A_BASE + 4))));
    assert_eq!(vm.leaves().len(), 0);
}

#[test]
fn missing_table_memory_changes_nothing_and_can_be_repeated() {
    let vm = vm();
    let before = vm.snapshot();
    vm.mem.with_table(|t| {
        t.fail_at(FailAt {
            map: None,
            fault: Some(0),
        })
    });
    assert_eq!(
        vm.fault(A_BASE, Access::Read, Translation),
        Err(Error::NeedTables(3))
    );
    assert_eq!(vm.snapshot(), before);
    vm.touch(A_BASE, Access::Read);
}

#[test]
fn locked_write_fault_on_a_read_lock_adds_w() {
    let vm = vm();
    vm.lock(A, R).unwrap();
    vm.run();
    vm.relax(A_BASE + 1, Access::Write);
    assert_eq!(vm.perms(A_BASE + 1), Some(Perms::RW));
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
    assert_eq!(vm.mem.counters().unexpected_faults, 0);
}

#[test]
fn locked_exec_fault_adds_x_and_nothing_else_once() {
    let vm = vm();
    vm.lock(A, R).unwrap();
    vm.run();
    let before = vm.caches.traffic();
    vm.relax(A_BASE, Access::Fetch);
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ | Perms::EXEC));
    assert_eq!(vm.caches.traffic().fetch_lines - before.fetch_lines, 64);
    vm.relax(A_BASE, Access::Fetch);
    assert_eq!(vm.caches.traffic().fetch_lines - before.fetch_lines, 64);
    assert_eq!(vm.mem.counters().unexpected_faults, 0);
}

#[test]
fn a_write_lock_never_write_faults() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    for page in A_BASE..A_BASE + 8 {
        assert!(vm.perms(page).unwrap().contains(Perms::WRITE));
    }
    // If one came all the same, it is counted and handled.
    vm.relax(A_BASE, Access::Write);
    assert_eq!(vm.mem.counters().unexpected_faults, 1);
}

#[test]
fn faults_that_a_lock_rules_out_are_counted() {
    let vm = vm();
    vm.lock(A, R).unwrap();
    for (access, kind) in [
        (Access::Read, AccessFlag),
        (Access::Read, Translation),
        (Access::Write, Translation),
        (Access::Fetch, Translation),
        (Access::Read, Permission),
    ] {
        let before = vm.mem.counters().unexpected_faults;
        assert_eq!(vm.fault(A_BASE, access, kind), Ok(FaultOutcome::Resolved));
        assert_eq!(
            vm.mem.counters().unexpected_faults,
            before + 1,
            "{access:?} {kind:?}"
        );
    }
}

/// A fault whose frame has been looked up when `meanwhile` happens.
fn overtaken(meanwhile: fn(&Vm<ArmPolicy>)) -> Arc<Vm<ArmPolicy>> {
    let vm = Arc::new(vm());
    let other = Arc::clone(&vm);
    vm.mem
        .frames()
        .after_next_look_up(move || meanwhile(&other));
    let outcome = vm.fault(A_BASE, Access::Read, Translation);
    assert_eq!(outcome, Ok(FaultOutcome::Retry));
    vm
}

#[test]
fn a_slot_that_moves_between_look_up_and_install_means_retry() {
    let vm = overtaken(|vm| vm.mem.move_slot(A, gfn(0x300)).unwrap());
    assert_eq!(vm.leaves().len(), 0);
    let outcome = vm.fault(A_BASE, Access::Read, Translation);
    assert_eq!(outcome, Ok(FaultOutcome::Mmio));
    vm.touch(0x300, Access::Read);
}

#[test]
fn a_slot_that_is_locked_between_look_up_and_install_means_retry() {
    let vm = overtaken(|vm| vm.lock(A, R).unwrap());
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
    vm.mem.unlock_slot(A).unwrap();
}

#[test]
fn a_slot_that_starts_to_log_between_look_up_and_install_means_retry() {
    let vm = overtaken(|vm| vm.mem.set_slot_flags(A, LOG).unwrap());
    vm.touch(A_BASE, Access::Read);
    assert_eq!(vm.perms(A_BASE), Some(Perms::READ));
}

#[test]
fn a_backing_that_changes_between_look_up_and_install_means_retry() {
    let vm = overtaken(|vm| {
        vm.mem.frames().move_backing(0x1000);
        vm.mem.host_unmap(pages(A_BASE, 1)).unwrap();
    });
    assert_eq!(vm.leaves().len(), 0);
    vm.touch(A_BASE, Access::Read);
    assert_eq!(vm.memory(A_BASE).get() >> 12, A_FRAME + 0x1000);
}

#[test]
fn device_memory_is_never_executable_and_gets_no_maintenance() {
    let vm = empty_vm(PLAIN, 4);
    let kind = SlotKind::Mmio;
    let device = Memslot::new(SlotId(4), gfn(0x500), 4, 0xf000, NONE, kind).unwrap();
    vm.mem.create_slot(device).unwrap();
    assert_eq!(
        vm.fault(0x500, Access::Fetch, Translation),
        Ok(FaultOutcome::Abort)
    );
    vm.touch(0x500, Access::Write);
    let leaf = vm.leaf(0x500).unwrap();
    assert_eq!(
        (leaf.mem, leaf.combine),
        (MemType::Device(Device::NGnRE), Combine::HonourGuest)
    );
    assert_eq!(leaf.perms, Perms::RW);
    assert_eq!(vm.data_lines(), 0);
}

#[test]
fn write_combining_device_memory_is_normal_non_cacheable() {
    let vm = empty_vm(FWB, 4);
    let flags = SlotFlags::WRITE_COMBINING;
    let device = Memslot::new(SlotId(4), gfn(0x500), 4, 0xf000, flags, SlotKind::Mmio).unwrap();
    vm.mem.create_slot(device).unwrap();
    vm.touch(0x501, Access::Read);
    let leaf = vm.leaf(0x501).unwrap();
    assert_eq!((leaf.mem, leaf.perms), (MemType::NonCacheable, Perms::RW));
    assert_eq!(vm.data_lines(), 0);
}

#[test]
fn a_write_to_a_logged_slot_sets_its_bit_and_a_read_maps_read_only() {
    let vm = vm_with(PLAIN, LOG);
    vm.touch(A_BASE + 2, Access::Read);
    assert_eq!(vm.perms(A_BASE + 2), Some(Perms::READ));
    vm.relax(A_BASE + 2, Access::Write);
    vm.touch(A_BASE + 5, Access::Write);
    assert_eq!(vm.perms(A_BASE + 2), Some(Perms::RW));
    let mut words = [0];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [0b10_0100]);
}

#[test]
fn taking_the_log_makes_pages_read_only_again() {
    let vm = vm_with(PLAIN, LOG);
    vm.touch(A_BASE + 5, Access::Write);
    let mut words = [0];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(vm.perms(A_BASE + 5), Some(Perms::READ));
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [0]);
    vm.relax(A_BASE + 5, Access::Write);
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [0b10_0000]);
}

#[test]
fn the_log_of_a_slot_of_several_words_protects_each_page_it_hands_out() {
    let vm = empty_vm(PLAIN, 200);
    vm.mem
        .create_slot(slot(A, 0x300, 130, A_FRAME, LOG))
        .unwrap();
    for index in [0, 63, 64, 100, 127, 128, 129] {
        vm.touch(0x300 + index, Access::Write);
    }
    let mut words = [0; 3];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words, [1 << 63 | 1, 1 << 63 | 1 << 36 | 1, 3]);
    assert!(vm.leaves().values().all(|l| l.attrs.perms == Perms::READ));
    assert_eq!(vm.leaves().len(), 7);
}

#[test]
fn a_changed_backing_is_picked_up_after_the_old_leaf_is_gone() {
    let vm = vm();
    vm.touch(A_BASE, Access::Read);
    // The same slot deleted and created with other frames has lost its leaves.
    vm.mem.delete_slot(A).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    vm.mem
        .create_slot(slot(A, A_BASE, 8, 0xc000, NONE))
        .unwrap();
    vm.touch(A_BASE, Access::Read);
    assert_eq!(vm.memory(A_BASE).get(), 0xc00_0000);
}

#[test]
fn an_unmapped_page_comes_back_by_a_fault() {
    let vm = vm();
    vm.touch(A_BASE + 1, Access::Read);
    vm.mem.host_unmap(pages(A_BASE, 8)).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    vm.touch(A_BASE + 1, Access::Write);
    assert_eq!(vm.leaves().len(), 1);
}
