//! Accesses to devices of the host.

use abi::{Exit, VmCounter};

use super::*;
use crate::exits::Registers;
use crate::exits::testing::GICC;

/// ESR_EL1: a data abort from EL1, external.
const ABORT: u64 = 0x25 << 26 | IL | 0b01_0000;

#[test]
fn a_store_shows_the_host_its_bytes_only() {
    let cases = [
        (BYTE, 1, 0x02),
        (HALF, 2, 0x0002),
        (WORD, 4, 0x3333_0002),
        (DOUBLE | SF, 8, 0x1111_2222_3333_0002),
    ];
    for (width, size, value) in cases {
        on(PLAIN, |vcpu| {
            let ipa = UART + 0x18;
            let esr = DATA | width | rt(2) | WRITE | TRANSLATION;
            assert_eq!(abort(vcpu, esr, ipa), Next::Leave);
            assert_eq!(vcpu.exit, Some(Exit::MmioWrite { ipa, size, value }));
            assert_eq!((vcpu.pc, vcpu.take_did()), (RAM + 4, [Did::Skip].into()));
            assert!(vcpu.load.is_none());
        });
    }
}

#[test]
fn a_store_of_the_zero_register_is_zero() {
    on(PLAIN, |vcpu| {
        let (ipa, size) = (UART, 4);
        let esr = DATA | WORD | rt(31) | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, esr, ipa), Next::Leave);
        let value = 0;
        assert_eq!(vcpu.exit, Some(Exit::MmioWrite { ipa, size, value }));
    });
}

#[test]
fn a_load_shows_the_host_no_register_and_waits_for_it() {
    on(PLAIN, |vcpu| {
        let before = vcpu.registers;
        let ipa = UART + 0x18;
        let esr = DATA | HALF | rt(7) | TRANSLATION;
        assert_eq!(abort(vcpu, esr, ipa), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MmioRead { ipa, size: 2 }));
        assert_eq!((vcpu.pc, vcpu.registers), (RAM, before));
        assert!(vcpu.load.is_some());
        assert_eq!(vcpu.counter(VmCounter::MmioInHost), 1);
    });
}

/// Registers behind a load of this kind into x7, for which the host gives a value.
fn loaded(kind: u64, value: u64) -> (Registers, Registers, u64) {
    let mut answer = None;
    on(PLAIN, |vcpu| {
        let before = vcpu.registers;
        let esr = DATA | kind | rt(7) | TRANSLATION;
        assert_eq!(abort(vcpu, esr, UART), Next::Leave);
        vcpu.complete(value);
        answer = Some((before, vcpu.registers, vcpu.pc));
    });
    answer.expect("it ran")
}

#[test]
fn a_load_completes_into_its_register_and_no_other() {
    let (mut before, after, pc) = loaded(WORD, 0x1_8765_4321);
    before.0[7] = 0x8765_4321;
    assert_eq!((after, pc), (before, RAM + 4));
}

#[test]
fn a_load_takes_its_width_of_what_the_host_gives() {
    let value = 0xfedc_ba98_7654_3210;
    let of = |kind| loaded(kind, value).1.get(7);
    assert_eq!(of(BYTE), 0x10);
    assert_eq!(of(HALF), 0x3210);
    assert_eq!(of(WORD), 0x7654_3210);
    assert_eq!(of(DOUBLE | SF), value);
}

#[test]
fn a_signed_load_fills_its_register() {
    assert_eq!(loaded(BYTE | SIGN, 0x80).1.get(7), 0xffff_ff80);
    let wide = loaded(WORD | SIGN | SF, 0x8000_0000).1.get(7);
    assert_eq!(wide, 0xffff_ffff_8000_0000);
}

#[test]
fn a_load_is_completed_once() {
    on(PLAIN, |vcpu| {
        let esr = DATA | WORD | rt(7) | TRANSLATION;
        assert_eq!(abort(vcpu, esr, UART), Next::Leave);
        vcpu.complete(1);
        vcpu.complete(2);
        assert_eq!((vcpu.registers.get(7), vcpu.pc), (1, RAM + 4));
    });
}

#[test]
fn a_load_into_the_zero_register_changes_none() {
    on(PLAIN, |vcpu| {
        let before = vcpu.registers;
        let esr = DATA | WORD | rt(31) | TRANSLATION;
        assert_eq!(abort(vcpu, esr, UART), Next::Leave);
        vcpu.complete(5);
        assert_eq!((vcpu.registers, vcpu.pc), (before, RAM + 4));
    });
}

#[test]
fn an_instruction_of_two_bytes_is_stepped_over_as_one() {
    on(PLAIN, |vcpu| {
        // EL0 in T32: AArch32, T.
        vcpu.pstate = 1 << 4 | 1 << 5;
        let esr = (DATA & !IL) | WORD | rt(2) | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, esr, UART), Next::Leave);
        assert_eq!(vcpu.pc, RAM + 2);
    });
}

#[test]
fn a_protected_guests_unguarded_access_aborts() {
    for kind in [WORD | rt(2), WORD | rt(2) | WRITE] {
        on(PROTECTED, |vcpu| {
            let guard = &vcpu.vm.protection.as_ref().unwrap().guard;
            guard.enroll();
            assert!(guard.map(UART + 0x1000, 1));
            let before = vcpu.registers;
            let esr = DATA | kind | TRANSLATION;
            assert_eq!(abort(vcpu, esr, UART + 0x18), Next::Resume);
            assert_injected(vcpu, ABORT | kind & WRITE);
            assert_eq!((vcpu.registers, vcpu.el1.far), (before, FAR | 0x18));
            assert!(vcpu.load.is_none());
        });
    }
}

#[test]
fn a_protected_guests_guarded_access_is_the_hosts() {
    on(PROTECTED, |vcpu| {
        let guard = &vcpu.vm.protection.as_ref().unwrap().guard;
        guard.enroll();
        assert!(guard.map(UART, 1));
        let (ipa, size, value) = (UART + 0xffc, 4, 0x3333_0002);
        let esr = DATA | WORD | rt(2) | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, esr, ipa), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MmioWrite { ipa, size, value }));
    });
}

#[test]
fn before_it_enrolls_a_protected_guest_reaches_every_device() {
    on(PROTECTED, |vcpu| {
        let esr = DATA | WORD | rt(2) | TRANSLATION;
        assert_eq!(abort(vcpu, esr, UART), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MmioRead { ipa: UART, size: 4 }));
    });
}

#[test]
fn an_access_without_a_syndrome_aborts() {
    for kind in [0, WRITE] {
        on(PLAIN, |vcpu| {
            assert_eq!(abort(vcpu, DATA | kind | TRANSLATION, UART), Next::Resume);
            assert_injected(vcpu, ABORT | kind);
        });
    }
}

#[test]
fn an_access_across_registers_aborts() {
    on(PLAIN, |vcpu| {
        let esr = DATA | WORD | rt(2) | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, esr, UART + 2), Next::Resume);
        assert_injected(vcpu, ABORT | WRITE);
    });
}

#[test]
fn maintenance_of_a_device_is_stepped_over() {
    on(PLAIN, |vcpu| {
        // DC CIVAC: CM and WnR.
        let esr = DATA | CM | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, esr, UART), Next::Resume);
        assert_eq!((vcpu.pc, vcpu.exit), (RAM + 4, None));
        assert_eq!(vcpu.take_did(), [Did::Skip]);
    });
}

#[test]
fn the_cpu_interface_of_a_gicv2_is_mapped() {
    on(WITH_GICV2, |vcpu| {
        let esr = DATA | WORD | rt(2) | TRANSLATION;
        assert_eq!(abort(vcpu, esr, GICC + 0xc), Next::Resume);
        assert!(vcpu.vm.reaches(GICC, true));
        assert_eq!((vcpu.pc, vcpu.exit), (RAM, None));
    });
}
