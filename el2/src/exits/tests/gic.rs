//! Accesses to the virtual GIC's frames (IHI 0048B 4.3, IHI 0069H 12.9 and 12.11).

use abi::{Exit, VmCounter};

use super::*;
use crate::exits::Interrupts;

const GICD: u64 = 0x0800_0000;
const GICR: u64 = 0x080a_0000;
const GICD_CTLR: u64 = GICD;
const GICD_TYPER: u64 = GICD + 4;
const GICD_ISPENDR1: u64 = GICD + 0x204;
const GICD_SGIR: u64 = GICD + 0xf00;
const READ: u64 = DATA | WORD | rt(3) | TRANSLATION;
const STORE: u64 = READ | WRITE;

#[test]
fn a_read_stays_in_el2_and_lands_in_its_register() {
    on(PLAIN, |vcpu| {
        let mut before = vcpu.registers;
        assert_eq!(abort(vcpu, READ, GICD_TYPER), Next::Resume);
        before.0[3] = vcpu.vm.vgic.dist_read(0, 4, 4);
        // ITLinesNumber: 31 for 1020 interrupts.
        assert_eq!(before.0[3] & 31, 31);
        assert_eq!((vcpu.registers, vcpu.pc), (before, RAM + 4));
        assert_eq!((vcpu.exit, vcpu.take_did()), (None, [Did::Skip].into()));
        assert_eq!(vcpu.counter(VmCounter::MmioInEl2), 1);
    });
}

#[test]
fn a_signed_read_fills_its_register() {
    on(PLAIN, |vcpu| {
        // GICD_IPRIORITYR<8>, the first byte: INTID 32.
        let _kicks = vcpu.vm.vgic.dist_write(0, 0x420, 1, 0x80);
        let read = DATA | BYTE | SIGN | SF | rt(3) | TRANSLATION;
        assert_eq!(abort(vcpu, read, GICD + 0x420), Next::Resume);
        assert_eq!(vcpu.registers.get(3), 0xffff_ffff_ffff_ff80);
    });
}

#[test]
fn a_write_has_its_effect_and_looks_at_interrupts() {
    on(PLAIN, |vcpu| {
        vcpu.registers.set(3, 0xffff_ffff_0000_0002);
        assert_eq!(abort(vcpu, STORE, GICD_CTLR), Next::Refresh);
        assert_eq!(vcpu.vm.vgic.dist_read(0, 0, 4) & 2, 2);
        assert_eq!((vcpu.pc, vcpu.exit), (RAM + 4, None));
    });
}

#[test]
fn what_the_list_registers_hold_belongs_to_the_answer() {
    on(PLAIN, |vcpu| {
        vcpu.refresh_interrupts();
        assert_eq!(abort(vcpu, READ, GICD_TYPER), Next::Resume);
        assert!(vcpu.lists_loaded, "it shows nothing of them");
        assert_eq!(abort(vcpu, READ, GICD_ISPENDR1), Next::Resume);
        assert!(!vcpu.lists_loaded);
    });
}

#[test]
fn list_registers_are_taken_back_before_a_write() {
    on(PLAIN, |vcpu| {
        vcpu.refresh_interrupts();
        assert_eq!(abort(vcpu, STORE, GICD_TYPER), Next::Refresh);
        assert!(!vcpu.lists_loaded);
    });
}

#[test]
fn a_sgi_kicks_the_others_and_not_its_sender() {
    on(WITH_GICV2, |vcpu| {
        enable_sgi_1(vcpu);
        // To all but the sender (IHI 0048B 4.3.15, TargetListFilter 1), INTID 1.
        vcpu.registers.set(3, 1 << 24 | 1);
        assert_eq!(abort(vcpu, STORE, GICD_SGIR), Next::Refresh);
        assert_eq!(vcpu.take_did(), [Did::Skip, Did::Kick(1)]);
    });
}

/// The distributor forwards, and each vCPU has INTID 1 enabled.
fn enable_sgi_1(vcpu: &FakeVcpu<'_, '_>) {
    let vgic = &vcpu.vm.vgic;
    let _kicks = vgic.dist_write(0, 0, 4, 3);
    let _kicks = vgic.dist_write(0, 0x100, 4, 2);
    let _kicks = vgic.dist_write(1, 0x100, 4, 2);
}

#[test]
fn redistributors_are_one_for_each_vcpu() {
    on(PLAIN, |vcpu| {
        // GICR_TYPER: Processor_Number in bits 23:8, Last in bit 4.
        let read = DATA | DOUBLE | SF | rt(3) | TRANSLATION;
        for (frame, number, last) in [(GICR, 0, 0), (GICR + 0x2_0000, 1, 1)] {
            assert_eq!(abort(vcpu, read, frame + 8), Next::Resume);
            let typer = vcpu.registers.get(3);
            assert_eq!((typer >> 8 & 0xffff, typer >> 4 & 1), (number, last));
        }
    });
}

#[test]
fn behind_the_last_redistributor_is_the_host() {
    on(PLAIN, |vcpu| {
        let ipa = GICR + 0x4_0000;
        assert_eq!(abort(vcpu, READ, ipa), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MmioRead { ipa, size: 4 }));
    });
}

#[test]
fn a_gicv2_has_no_redistributors() {
    on(WITH_GICV2, |vcpu| {
        assert_eq!(abort(vcpu, READ, GICR), Next::Leave);
        let (ipa, size) = (GICR, 4);
        assert_eq!(vcpu.exit, Some(Exit::MmioRead { ipa, size }));
    });
}

#[test]
fn the_distributor_ends_where_the_cpu_interface_begins() {
    on(PLAIN, |vcpu| {
        assert_eq!(abort(vcpu, READ, GICD + 0xfffc), Next::Resume);
        let ipa = GICD + 0x1_0000;
        assert_eq!(abort(vcpu, READ, ipa), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MmioRead { ipa, size: 4 }));
    });
}

#[test]
fn what_cannot_be_emulated_aborts() {
    let [without_syndrome, on_walk] = [DATA | TRANSLATION, DATA | S1PTW | TRANSLATION];
    for (esr, ipa, walk) in [
        (without_syndrome, GICD, 0),
        (READ, GICD + 2, 0),
        (on_walk, GICD, 4),
    ] {
        on(PLAIN, |vcpu| {
            assert_eq!(abort(vcpu, esr, ipa), Next::Resume);
            assert_injected(vcpu, 0x25 << 26 | IL | 0b01_0000 | walk);
        });
    }
}

#[test]
fn an_address_in_a_frame_by_a_permission_fault_aborts() {
    on(PLAIN, |vcpu| {
        let store = DATA | WORD | rt(2) | WRITE;
        assert_eq!(permission_fault(vcpu, store, GICD), Next::Resume);
        assert_injected(vcpu, 0x25 << 26 | IL | WRITE | 0b01_0000);
    });
}

#[test]
fn maintenance_of_a_frame_is_stepped_over() {
    on(PLAIN, |vcpu| {
        let esr = DATA | CM | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, esr, GICD), Next::Resume);
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM + 4, [Did::Skip].into()));
    });
}

#[test]
fn no_guard_keeps_a_protected_guest_from_its_gic() {
    on(PROTECTED, |vcpu| {
        vcpu.vm.protection.as_ref().unwrap().guard.enroll();
        assert_eq!(abort(vcpu, READ, GICD_TYPER), Next::Resume);
        assert_eq!((vcpu.pc, vcpu.exit), (RAM + 4, None));
    });
}
