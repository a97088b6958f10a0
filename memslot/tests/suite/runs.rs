//! The first run, and reset.

use crate::kit::{A, A_BASE, A_PAGES, B, B_BASE, FWB, NONE, PLAIN, R, RW, vm, vm_with};
use memslot::error::Error;
use memslot::fault::Access;
use memslot::lock::LockState;
use memslot::pending::Work;
use memslot::slot::SlotFlags;
use stage2::Perms;

/// 64-byte lines of a page.
const LINES: u64 = 64;

#[test]
fn the_first_run_flushes_every_page_once_and_the_second_none() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    assert_eq!(vm.data_lines(), A_PAGES * LINES);
    assert_eq!(vm.mem.pending(), Work::empty());
    assert_eq!(vm.mem.lock_state(A), Some(LockState::LockedClean));
    vm.run();
    assert_eq!(vm.data_lines(), A_PAGES * LINES);
    assert_eq!(vm.mem.counters().pending_runs, 1);
}

#[test]
fn with_forced_write_back_not_one_line_is_touched() {
    let vm = vm_with(FWB, NONE);
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.mem.unlock_slot(A).unwrap();
    vm.mem
        .host_unmap(crate::kit::pages(A_BASE, A_PAGES))
        .unwrap();
    assert_eq!(vm.data_lines(), 0);
    assert_eq!(vm.mem.counters().slots_flushed, 0);
}

#[test]
fn with_forced_write_back_a_flagged_slot_is_flushed() {
    let vm = vm_with(FWB, SlotFlags::NONCOHERENT_DMA);
    vm.lock(A, RW).unwrap();
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    vm.run();
    assert_eq!(vm.data_lines(), A_PAGES * LINES);
}

#[test]
fn only_the_slot_that_needs_it_is_flushed() {
    let vm = vm();
    vm.add_b();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.lock(B, RW).unwrap();
    vm.run();
    assert_eq!(vm.data_lines(), (A_PAGES + 4) * LINES);
    assert_eq!(vm.mem.counters().slots_flushed, 2);
}

#[test]
fn a_closed_gate_keeps_vcpus_out() {
    let vm = vm();
    let inside = vm.mem.enter().unwrap();
    assert_eq!(vm.mem.reset(), Err(Error::VcpuRunning));
    drop(inside);
    assert_eq!(vm.mem.reset(), Ok(()));
}

#[test]
fn reset_sets_flush_and_icache_and_keeps_locked_leaves() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.mem.reset().unwrap();
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE | Work::INVAL_ICACHE);
    assert_eq!(vm.mem.lock_state(A), Some(LockState::LockedReset));
    assert_eq!(vm.leaves().len(), 8);
    assert_eq!((vm.pinned(), vm.charged()), (8, 8));
    vm.run();
    assert_eq!(vm.mem.lock_state(A), Some(LockState::LockedClean));
    assert_eq!(vm.data_lines(), 2 * A_PAGES * LINES);
}

#[test]
fn reset_with_forced_write_back_needs_the_icache_only() {
    let vm = vm_with(FWB, NONE);
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.mem.reset().unwrap();
    assert_eq!(vm.mem.pending(), Work::INVAL_ICACHE);
    vm.run();
    assert_eq!(vm.data_lines(), 0);
}

#[test]
fn reset_unmaps_slots_that_are_not_locked() {
    let vm = vm();
    vm.add_b();
    vm.lock(A, RW).unwrap();
    vm.touch(B_BASE, Access::Read);
    vm.run();
    vm.mem.reset().unwrap();
    assert!(vm.leaf(B_BASE).is_none());
    assert!(vm.leaf(A_BASE).is_some());
}

#[test]
fn reset_without_a_locked_slot_leaves_nothing_pending() {
    let vm = vm();
    vm.touch(A_BASE, Access::Read);
    vm.mem.reset().unwrap();
    assert_eq!(vm.mem.pending(), Work::empty());
    assert_eq!(vm.leaves().len(), 0);
}

#[test]
fn the_icache_is_invalidated_for_executable_pages_of_locked_slots() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.relax(A_BASE + 2, Access::Fetch);
    let before = vm.caches.traffic().fetch_lines;
    vm.mem.reset().unwrap();
    vm.run();
    assert_eq!(vm.caches.traffic().fetch_lines - before, LINES);
}

#[test]
fn a_vcpu_that_is_turned_off_and_on_sets_no_bits() {
    // CPU_OFF leaves the guest, CPU_ON enters it again: neither is a reset.
    let vm = vm();
    vm.lock(A, RW).unwrap();
    let other = vm.mem.enter().unwrap();
    let pass = vm.mem.enter().unwrap();
    drop(pass);
    let again = vm.mem.enter().unwrap();
    assert_eq!(vm.mem.pending(), Work::empty());
    assert_eq!(vm.data_lines(), A_PAGES * LINES);
    drop((again, other));
}

#[test]
fn unlock_after_reset_unmaps_because_maintenance_is_pending() {
    let vm = vm_with(PLAIN, NONE);
    vm.lock(A, R).unwrap();
    vm.run();
    vm.mem.reset().unwrap();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.leaves().len(), 0);
    assert_eq!(vm.mem.pending(), Work::empty());
}

#[test]
fn reset_keeps_permissions_of_locked_leaves() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.relax(A_BASE, Access::Fetch);
    vm.mem.reset().unwrap();
    assert_eq!(vm.perms(A_BASE), Some(Perms::RWX));
    assert_eq!(vm.perms(A_BASE + 1), Some(Perms::RW));
}
