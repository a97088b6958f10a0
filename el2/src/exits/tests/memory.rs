//! Faults in memory.

use abi::{ErrorCode, Exit, VmCounter};
use memslot::error::Error;

use super::*;
use crate::exits::Oddity;
use crate::exits::fault::refused;
use crate::exits::testing::{DEVICE, OWNED_PAGES, READ_ONLY, TAKEN_PAGE};

/// ESR_EL1: a data abort from EL1, external; the same on a walk.
const ABORT: u64 = 0x25 << 26 | IL | 0b01_0000;
const ABORT_ON_WALK: u64 = 0x25 << 26 | IL | 0b01_0100;

#[test]
fn a_touched_page_is_mapped_and_touched_again() {
    on(PLAIN, |vcpu| {
        let read = DATA | WORD | rt(3) | TRANSLATION;
        assert_eq!(abort(vcpu, read, RAM + 0x5008), Next::Resume);
        assert!(vcpu.vm.reaches(RAM + 0x5008, false));
        assert_eq!((vcpu.pc, vcpu.exit), (RAM, None));
        assert_eq!(vcpu.take_did(), []);
        assert_eq!(vcpu.counter(VmCounter::Faults), 1);
    });
}

#[test]
fn a_fetched_page_is_mapped() {
    on(PLAIN, |vcpu| {
        assert_eq!(abort(vcpu, FETCH | TRANSLATION, RAM), Next::Resume);
        assert!(vcpu.vm.reaches(RAM, false));
        assert_eq!((vcpu.pc, vcpu.exit), (RAM, None));
    });
}

#[test]
fn a_page_of_tables_is_mapped_for_the_walk() {
    on(PLAIN, |vcpu| {
        let walk = DATA | S1PTW | TRANSLATION;
        assert_eq!(abort(vcpu, walk, RAM + 0x7000), Next::Resume);
        assert!(vcpu.vm.reaches(RAM + 0x7000, false));
        assert_eq!(vcpu.take_did(), []);
    });
}

#[test]
fn a_walk_for_a_store_reads_the_table() {
    on(PLAIN, |vcpu| {
        let walk = DATA | S1PTW | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, walk, READ_ONLY), Next::Resume);
        assert!(vcpu.vm.reaches(READ_ONLY, false));
        assert_eq!(vcpu.take_did(), []);
    });
}

#[test]
fn a_walk_that_stays_refused_may_write_the_table() {
    on(PROTECTED, |vcpu| {
        let ipa = RAM + 0x10_0000;
        let walk = DATA | S1PTW | PERMISSION;
        assert_eq!(abort(vcpu, walk, ipa), Next::Resume);
        assert!(vcpu.vm.reaches(ipa, true));
        // HPFAR_EL2 holds a table's address whatever the fault.
        assert_eq!(vcpu.take_did(), []);
    });
}

#[test]
fn an_access_flag_is_set_again() {
    on(PLAIN, |vcpu| {
        let read = DATA | WORD | ACCESS_FLAG;
        assert_eq!(abort(vcpu, read, RAM), Next::Resume);
        assert_eq!((vcpu.pc, vcpu.exit), (RAM, None));
    });
}

#[test]
fn a_permission_fault_is_where_stage_1_says() {
    on(PLAIN, |vcpu| {
        let store = DATA | WORD | rt(2) | WRITE;
        assert_eq!(
            permission_fault(vcpu, store, READ_ONLY + 0x124),
            Next::Leave
        );
        let (size, value) = (4, 0x3333_0002);
        let ipa = READ_ONLY + 0x124;
        assert_eq!(vcpu.exit, Some(Exit::MmioWrite { ipa, size, value }));
        assert_eq!(vcpu.take_did(), [Did::Translate(FAR | 0x124), Did::Skip]);
    });
}

#[test]
fn a_permission_fault_whose_translation_is_gone_is_repeated() {
    on(PLAIN, |vcpu| {
        (vcpu.esr, vcpu.far) = (DATA | WORD | WRITE | PERMISSION, FAR);
        assert_eq!(handle(vcpu, SYNC), Next::Resume);
        assert_eq!((vcpu.pc, vcpu.exit), (RAM, None));
        assert_eq!(vcpu.take_did(), [Did::Translate(FAR)]);
    });
}

#[test]
fn a_table_in_a_device_is_an_external_abort() {
    on(PLAIN, |vcpu| {
        let walk = DATA | S1PTW | PERMISSION;
        assert_eq!(abort(vcpu, walk, DEVICE), Next::Resume);
        assert_injected(vcpu, ABORT_ON_WALK);
        assert!(!vcpu.vm.reaches(DEVICE, false));
    });
}

#[test]
fn a_table_where_nothing_is_is_an_external_abort() {
    on(PLAIN, |vcpu| {
        let walk = DATA | S1PTW | TRANSLATION;
        assert_eq!(abort(vcpu, walk, UART), Next::Resume);
        assert_injected(vcpu, ABORT_ON_WALK);
    });
}

#[test]
fn a_page_that_the_guest_does_not_have_is_asked_for_by_its_address_alone() {
    on(PROTECTED, |vcpu| {
        let ipa = RAM + OWNED_PAGES * 0x1000;
        let store = DATA | DOUBLE | SF | rt(1) | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, store, ipa + 0x238), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MemoryMissing { ipa }));
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM, [].into()));
    });
}

#[test]
fn a_page_that_the_host_took_is_an_external_abort() {
    on(PROTECTED, |vcpu| {
        let read = DATA | WORD | TRANSLATION;
        assert_eq!(abort(vcpu, read, RAM + TAKEN_PAGE * 0x1000), Next::Resume);
        assert_injected(vcpu, ABORT);
        assert_eq!(vcpu.el1.far, FAR);
        assert_eq!(vcpu.counter(VmCounter::Injected), 1);
    });
}

#[test]
fn missing_tables_are_asked_for_and_nothing_has_happened() {
    on(PLAIN, |vcpu| {
        vcpu.vm.allow_tables(Some(0));
        let read = DATA | WORD | TRANSLATION;
        assert_eq!(abort(vcpu, read, RAM), Next::Leave);
        assert!(matches!(vcpu.exit, Some(Exit::NeedPages { pages: 1.. })));
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM, [].into()));
        vcpu.vm.allow_tables(None);
        assert_eq!(abort(vcpu, read, RAM), Next::Resume);
        assert!(vcpu.vm.reaches(RAM, false));
    });
}

/// The only error of memory's that the guest can't cause.
const BROKEN: Error = Error::BadBits(1);

#[test]
fn an_exit_of_a_protected_vm_shows_no_syndrome() {
    on(PROTECTED, |vcpu| {
        assert_eq!(refused(vcpu, BROKEN, DATA | WORD | rt(9)), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::Broken { esr: 0 }));
        let said = Did::Report(Oddity::Fault(ErrorCode::Invalid));
        assert_eq!(vcpu.take_did(), [said]);
    });
}

#[test]
fn an_exit_of_another_vm_shows_it() {
    on(PLAIN, |vcpu| {
        let esr = DATA | WORD | rt(9);
        assert_eq!(refused(vcpu, BROKEN, esr), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::Broken { esr }));
    });
}

#[test]
fn memory_that_is_being_changed_is_waited_for_by_the_host() {
    on(PLAIN, |vcpu| {
        let busy = Error::VcpuRunning;
        assert_eq!(refused(vcpu, busy, DATA | WORD), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::Interrupted));
        assert_eq!(vcpu.take_did(), []);
    });
}

#[test]
fn an_abort_of_another_kind_is_the_guests() {
    // Address size, synchronous external, alignment, TLB conflict.
    for status in [0b00_0000, 0b01_0000, 0b10_0001, 0b11_0000] {
        on(PLAIN, |vcpu| {
            assert_eq!(abort(vcpu, DATA | WORD | status, RAM), Next::Resume);
            assert_injected(vcpu, ABORT);
            assert!(!vcpu.vm.reaches(RAM, false));
        });
    }
}

#[test]
fn without_an_address_only_the_page_counts() {
    on(PROTECTED, |vcpu| {
        let ipa = RAM + OWNED_PAGES * 0x1000;
        let read = DATA | WORD | FNV | TRANSLATION;
        assert_eq!(abort(vcpu, read, ipa + 0xffc), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MemoryMissing { ipa }));
    });
}

#[test]
fn code_is_not_fetched_from_a_device() {
    // From the VM's own device, the host's, and the distributor.
    for ipa in [DEVICE, UART, 0x0800_0000] {
        on(PLAIN, |vcpu| {
            // Bits that would be a load's syndrome are none of a fetch's.
            let fetch = FETCH | WORD | rt(3) | TRANSLATION;
            assert_eq!(abort(vcpu, fetch, ipa), Next::Resume);
            // An instruction abort from EL1, external.
            assert_injected(vcpu, 0x21 << 26 | IL | 0b01_0000);
        });
    }
}
