//! Pages taken out of a guest's reach, in slots that stay.

use crate::kit::{NONE, PLAIN, RW, gfn, pages, slot};
use crate::machine::{Real, arm};
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
