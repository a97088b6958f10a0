//! Locks, first runs and flushes in steps: what may happen between two of them, and that the end is
//! the same.

use crate::kit::{A, FWB, NONE, PLAIN, R, RW, gfn, slot};
use crate::machine::{Real, arm};
use memslot::edge::Dma::{NonSnooping, Snooping};
use memslot::error::Error;
use memslot::fault::{Access, FaultKind};
use memslot::flush::OwedFlush;
use memslot::frames::FrameSource;
use memslot::lock::{LockRequest, LockState};
use memslot::pending::Work;
use memslot::policy::ArmPolicy;
use memslot::slot::{LockFlags, LockGranule, SlotFlags};
use memslot::steps::Progress::{self, Done, More};
use memslot::testing::View;
use memslot::toggle::Flush;
use stage2::Pa;

type Vm = Real<stage2::ArmStage2, ArmPolicy>;

/// Pages that are cleaned in one step.
const STEP: u64 = 512;
/// Pages that are mapped in one step when nothing else has to be done.
const FRESH: u64 = 32 * STEP;
/// The slot: the first fresh step maps eight pages of it, the second the rest.
const BASE: u64 = 3 * FRESH - 8;
const PAGES: u64 = 8 + 2 * STEP;
const FRAME: u64 = 0x10_0000;

fn vm(policy: ArmPolicy) -> Vm {
    let vm = arm(policy, PAGES, PAGES);
    let ram = slot(A, BASE, PAGES, FRAME, NONE);
    vm.mem.create_slot(ram).unwrap();
    // What locks map owes its maintenance until the first run.
    vm.machine.fake.expect_deferred(true);
    vm
}

/// Rules that were broken. Leaves that a lock replaces owe their cleaning until the first run, as all
/// of the slot does.
fn violations(vm: &Vm) -> Vec<String> {
    let deferred = |v: &String| !v.ends_with("left without cleaning");
    vm.violations().into_iter().filter(deferred).collect()
}

fn request(perms: LockFlags) -> LockRequest {
    LockRequest::new(A, perms)
}

/// One step of a lock.
fn lock(vm: &Vm, perms: LockFlags) -> Result<Progress, Error> {
    vm.mem.lock_in_steps(&request(perms), || false)
}

fn unlock(vm: &Vm) -> Result<Progress, Error> {
    vm.mem.unlock_in_steps(A, || false)
}

fn mapped(vm: &Vm) -> u64 {
    vm.pages().len() as u64
}

fn lines(vm: &Vm) -> u64 {
    vm.machine.caches.traffic().data_lines
}

#[test]
fn a_lock_in_steps_ends_as_one_in_one_go() {
    for policy in [PLAIN, FWB] {
        let (vm, at_once) = (vm(policy), vm(policy));
        at_once.mem.lock_slot(&request(RW)).unwrap();
        assert_eq!(lock(&vm, RW), Ok(More));
        assert_eq!(mapped(&vm), 8);
        assert_eq!(vm.mem.lock_state(A), Some(LockState::Unfinished));
        assert_eq!(lock(&vm, RW), Ok(Done));
        assert_eq!(vm.mem.lock_state(A), at_once.mem.lock_state(A));
        assert_eq!(vm.pages(), at_once.pages());
        assert_eq!(vm.mem.pending(), at_once.mem.pending());
        let account = |vm: &Vm| vm.mem.frames().account().locked();
        assert_eq!(account(&vm), account(&at_once));
        let pins = |vm: &Vm| vm.mem.frames().state().pins.values().sum::<u64>();
        assert_eq!(pins(&vm), pins(&at_once));
        assert_eq!(lock(&vm, RW), Err(Error::Locked(A)));
        assert_eq!(violations(&vm), [""; 0]);
    }
}

#[test]
fn what_must_know_how_far_a_lock_is_waits_for_it() {
    for policy in [PLAIN, FWB] {
        let vm = vm(policy);
        assert_eq!(lock(&vm, R), Ok(More));
        let unfinished = Error::Unfinished(A);
        assert_eq!(vm.mem.enter().map(drop), Err(unfinished));
        assert_eq!(vm.mem.reset(), Err(unfinished));
        for dma in [Snooping, NonSnooping] {
            assert_eq!(vm.mem.register_device(dma).map(drop), Err(unfinished));
        }
        assert_eq!(lock(&vm, RW), Err(Error::Locked(A)), "another lock");
        let blocks = LockRequest {
            granule: LockGranule::Blocks,
            ..request(R)
        };
        let other = vm.mem.lock_in_steps(&blocks, || true);
        assert_eq!(other, Err(Error::Locked(A)));
        assert_eq!(vm.mem.delete_slot(A).map(drop), Err(Error::Locked(A)));
        assert_eq!(vm.mem.move_slot(A, gfn(0)), Err(Error::Locked(A)));
        assert_eq!(lock(&vm, R), Ok(Done));
        drop(vm.mem.enter().unwrap());
    }
}

#[test]
fn a_lock_that_is_not_complete_can_be_taken_back() {
    let vm = vm(PLAIN);
    assert_eq!(lock(&vm, RW), Ok(More));
    assert_eq!(unlock(&vm), Ok(Done));
    assert_eq!(mapped(&vm), 0);
    assert_eq!(vm.mem.lock_state(A), Some(LockState::Unlocked));
    assert_eq!(vm.mem.frames().account().locked(), 0);
    assert!(vm.mem.frames().state().pins.values().all(|n| *n == 0));
    drop(vm.mem.enter().unwrap());
    assert_eq!(violations(&vm), [""; 0]);
}

#[test]
fn unlocking_goes_backwards_and_can_be_turned_round() {
    let vm = vm(PLAIN);
    vm.mem.lock_slot(&request(RW)).unwrap();
    assert_eq!(unlock(&vm), Ok(More));
    assert_eq!(mapped(&vm), 8 + STEP);
    assert_eq!(vm.mem.enter().map(drop), Err(Error::Unfinished(A)));
    assert_eq!(lock(&vm, RW), Ok(Done));
    assert_eq!(mapped(&vm), PAGES);
    for expected in [More, More, Done] {
        assert_eq!(unlock(&vm), Ok(expected));
    }
    assert_eq!(mapped(&vm), 0);
    assert_eq!(violations(&vm), [""; 0]);
}

/// The first run has cleaned some pages when the lock is taken back in part and made again: what
/// the host wrote meanwhile must reach the guest.
#[test]
fn pages_that_are_mapped_again_owe_their_maintenance_again() {
    let vm = vm(PLAIN);
    vm.mem.lock_slot(&request(RW)).unwrap();
    let run = |go_on: &dyn Fn() -> bool| vm.mem.enter_in_steps(go_on).map(|pass| pass.is_some());
    for _ in 0..2 {
        assert_eq!(run(&|| false), Ok(false));
    }
    assert_eq!(lines(&vm), (8 + STEP) * 64);
    for expected in [More, More] {
        assert_eq!(unlock(&vm), Ok(expected));
    }
    let second = Pa::new((FRAME + 9) << 12);
    vm.machine.caches.write(second, View::Cacheable, 7);
    assert_eq!(vm.mem.lock_in_steps(&request(RW), || true), Ok(Done));
    assert_eq!(run(&|| true), Ok(true));
    assert_eq!(vm.machine.caches.read(second, View::Uncached), 7);
    assert_eq!(violations(&vm), [""; 0]);
}

#[test]
fn a_step_that_lacks_tables_leaves_the_lock_where_it_was() {
    let vm = vm(PLAIN);
    assert_eq!(lock(&vm, RW), Ok(More));
    vm.machine.fake.allow_allocations(Some(0));
    assert!(matches!(lock(&vm, RW), Err(Error::NeedTables(_))));
    assert_eq!(mapped(&vm), 8);
    assert_eq!(vm.mem.lock_state(A), Some(LockState::Unfinished));
    vm.machine.fake.allow_allocations(None);
    assert_eq!(lock(&vm, RW), Ok(Done));
}

#[test]
fn pages_that_are_mapped_already_are_replaced_in_small_steps() {
    let vm = vm(PLAIN);
    let touch = vm.fault(BASE + 8, Access::Read, FaultKind::Translation, &());
    touch.map(drop).unwrap();
    let mut steps = 0;
    while lock(&vm, RW) == Ok(More) {
        steps += 1;
    }
    assert_eq!(steps, 2, "8, 512 and 512 pages");
    assert_eq!(mapped(&vm), PAGES);
    assert_eq!(violations(&vm), [""; 0]);
}

#[test]
fn a_device_has_the_pages_of_a_lock_cleaned_in_small_steps() {
    let vm = vm(PLAIN);
    vm.mem.register_device(Snooping).map(drop).unwrap();
    for (expected, cleaned) in [(More, 8), (More, 8 + STEP), (Done, PAGES)] {
        assert_eq!(lock(&vm, RW), Ok(expected));
        assert_eq!(lines(&vm), cleaned * 64);
    }
}

#[test]
fn a_first_run_in_steps_cleans_everything_once() {
    let vm = vm(PLAIN);
    vm.mem.lock_slot(&request(RW)).unwrap();
    let mut runs = 1;
    while vm.mem.enter_in_steps(|| false).unwrap().is_none() {
        assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
        runs += 1;
    }
    assert_eq!(runs, 3);
    assert_eq!(lines(&vm), PAGES * 64);
    let counters = vm.mem.counters();
    assert_eq!((counters.pending_runs, counters.slots_flushed), (1, 1));
}

#[test]
fn a_reset_between_two_steps_of_a_first_run_starts_over() {
    let vm = vm(PLAIN);
    vm.mem.lock_slot(&request(RW)).unwrap();
    assert!(vm.mem.enter_in_steps(|| false).unwrap().is_none());
    vm.mem.reset().unwrap();
    let before = lines(&vm);
    drop(vm.mem.enter().unwrap());
    assert_eq!(lines(&vm) - before, PAGES * 64);
}

#[test]
fn a_flush_in_steps_reaches_every_page_once() {
    let vm = vm(PLAIN);
    vm.mem.lock_slot(&request(RW)).unwrap();
    drop(vm.mem.enter().unwrap());
    let before = lines(&vm);
    let mut owed = OwedFlush::default();
    assert_eq!(vm.mem.flush_in_steps(&mut owed, || false), Done);
    owed.owe(Flush::All);
    for pages in [8, 8 + STEP, PAGES] {
        assert_eq!(vm.mem.flush_in_steps(&mut owed, || false), More);
        assert_eq!(lines(&vm) - before, pages * 64);
    }
    assert_eq!(vm.mem.flush_in_steps(&mut owed, || false), Done);
    assert!(!owed.is_owed());
}

#[test]
fn a_vm_that_has_retired_takes_its_table_down_without_cleaning() {
    for (retires, cleaned) in [(true, 0), (false, PAGES * 64)] {
        let vm = vm(PLAIN);
        vm.mem.lock_slot(&request(RW)).unwrap();
        if retires {
            vm.mem.retire();
        }
        let caches = std::sync::Arc::clone(&vm.machine.caches);
        drop(vm);
        assert_eq!(caches.traffic().data_lines, cleaned);
    }
}

#[test]
fn a_dirty_log_that_begins_between_two_steps_is_kept() {
    let vm = vm(PLAIN);
    assert_eq!(lock(&vm, R), Ok(More));
    vm.mem.set_slot_flags(A, SlotFlags::DIRTY_LOG).unwrap();
    assert_eq!(lock(&vm, R), Ok(Done));
    drop(vm.mem.enter().unwrap());
    let write = vm.fault(BASE + 5, Access::Write, FaultKind::Permission, &());
    write.map(drop).unwrap();
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(1 << 5));
}
