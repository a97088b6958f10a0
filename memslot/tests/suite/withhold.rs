//! Pages taken out of a guest's reach, in slots that stay.

use std::sync::Arc;

use crate::kit::{NONE, PLAIN, RW, gfn, pages, slot};
use crate::machine::{Real, arm};
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::lock::LockRequest;
use memslot::policy::ArmPolicy;
use memslot::slot::{LockGranule, SlotId};
use stage2::{Annotation, ArmStage2};

const A: SlotId = SlotId(1);
const BASE: u64 = 0x4_0000;
const PAGES: u64 = 1024;
const FRAME: u64 = 0x10_0000;

fn locked() -> Real<ArmStage2, ArmPolicy> {
    let vm = arm(PLAIN, PAGES, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    vm.mem
        .lock_slot(&LockRequest {
            granule: LockGranule::Blocks,
            ..LockRequest::new(A, RW)
        })
        .unwrap();
    // What was deferred is done.
    drop(vm.mem.enter().unwrap());
    vm
}

/// Rules broken after the deferred maintenance.
fn violations(vm: &Real<ArmStage2, ArmPolicy>) -> Vec<String> {
    let mut found = vm.violations();
    found.retain(|what| !what.ends_with("mapped while dirty"));
    found
}

fn note(payload: u64) -> Annotation {
    Annotation::try_new(payload).unwrap()
}

#[test]
fn a_withheld_page_of_a_locked_block_is_gone_and_its_neighbours_stay() {
    let vm = locked();
    vm.mem.withhold(pages(BASE + 7, 1), note(1)).unwrap();
    assert!(vm.is_full(pages(BASE, 7)) && vm.is_full(pages(BASE + 8, PAGES - 8)));
    assert_eq!(vm.memory(BASE + 7), None);
    assert_eq!(violations(&vm), [""; 0]);
}

#[test]
fn no_fault_brings_a_withheld_page_back() {
    let vm = locked();
    vm.mem.withhold(pages(BASE + 7, 1), note(1)).unwrap();
    for access in [Access::Read, Access::Write, Access::Fetch] {
        let outcome = vm.fault(BASE + 7, access, FaultKind::Translation, &());
        assert_eq!(outcome, Ok(FaultOutcome::NoFrame(gfn(BASE + 7))));
    }
    assert_eq!(vm.memory(BASE + 7), None);
}

#[test]
fn a_released_page_is_faulted_in_again() {
    let vm = locked();
    vm.mem.withhold(pages(BASE + 7, 1), note(2)).unwrap();
    vm.mem.release(pages(BASE + 7, 1)).unwrap();
    let outcome = vm.fault(BASE + 7, Access::Read, FaultKind::Translation, &());
    assert_eq!(outcome, Ok(FaultOutcome::Resolved));
    assert_eq!(
        vm.memory(BASE + 7).map(|pa| pa.get() >> 12),
        Some(FRAME + 7)
    );
    assert_eq!(violations(&vm), [""; 0]);
}

#[test]
fn pages_beyond_the_guests_addresses_are_refused() {
    let vm = locked();
    let beyond = pages((1 << 52) - 1, 1);
    assert!(vm.mem.withhold(beyond, note(1)).is_err());
    assert!(vm.mem.release(beyond).is_err());
    assert!(vm.is_full(pages(BASE, PAGES)));
}

/// Taken away and given back by notes between look-up and install, the page must be looked up
/// again: it may be somebody else's by now.
#[test]
fn a_page_withheld_and_released_between_look_up_and_install_means_retry() {
    let vm = Arc::new(arm(PLAIN, PAGES, PAGES));
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    let other = Arc::clone(&vm);
    vm.mem.frames().after_next_look_up(move || {
        other.mem.withhold(pages(BASE, 1), note(1)).unwrap();
        other.mem.release(pages(BASE, 1)).unwrap();
    });
    let outcome = vm.fault(BASE, Access::Read, FaultKind::Translation, &());
    assert_eq!(outcome, Ok(FaultOutcome::Retry));
    assert_eq!(vm.memory(BASE), None);
}

#[test]
fn a_page_withheld_between_pin_and_map_means_again_and_stays_withheld() {
    let vm = Arc::new(arm(PLAIN, PAGES, PAGES));
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    let other = Arc::clone(&vm);
    vm.mem.frames().after_next_pin(move || {
        other.mem.withhold(pages(BASE + 7, 1), note(1)).unwrap();
    });
    let locked = vm.mem.lock_slot(&LockRequest::new(A, RW));
    assert_eq!(locked, Err(Error::BackingChanged));
    let outcome = vm.fault(BASE + 7, Access::Read, FaultKind::Translation, &());
    assert_eq!(outcome, Ok(FaultOutcome::NoFrame(gfn(BASE + 7))));
    assert_eq!(vm.mem.frames().state().pins.len(), 0);
}

#[test]
fn what_is_withheld_stays_so_over_reset_and_unlock() {
    let vm = locked();
    let withheld = |vm: &Real<_, _>| {
        let outcome = vm.fault(BASE + 7, Access::Read, FaultKind::Translation, &());
        assert_eq!(outcome, Ok(FaultOutcome::NoFrame(gfn(BASE + 7))));
    };
    vm.mem.withhold(pages(BASE + 7, 1), note(1)).unwrap();
    vm.mem.reset().unwrap();
    withheld(&vm);
    // Maintenance is pending, so the leaves go.
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.memory(BASE), None);
    withheld(&vm);
    vm.fault(BASE + 8, Access::Read, FaultKind::Translation, &())
        .map(drop)
        .unwrap();
    vm.mem.reset().unwrap();
    assert_eq!(vm.memory(BASE + 8), None);
    withheld(&vm);
}

#[test]
fn a_slot_with_a_withheld_page_cannot_be_locked() {
    let vm = arm(PLAIN, PAGES, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    vm.mem.withhold(pages(BASE + 7, 1), note(1)).unwrap();
    let locked = vm.mem.lock_slot(&LockRequest::new(A, RW));
    assert_eq!(locked, Err(Error::PinFailed(7)));
    assert_eq!(vm.mem.frames().state().pins.len(), 0);
    vm.mem.release(pages(BASE + 7, 1)).unwrap();
    assert_eq!(vm.lock(&LockRequest::new(A, RW)), Ok(()));
}
