//! Trapped system registers and instructions, and what else is synchronous.

use abi::{Exit, VmCounter};
use memslot::toggle::CacheWatch;

use super::*;
use crate::exits::flush;
use crate::guest::sysreg::VmRegister;

const READ: u64 = 1;

/// ESR_EL2 of MSR (or MRS with [`READ`]) of S<op0>_<op1>_C<crn>_C<crm>_<op2> and x3.
const fn register((op0, op1, crn, crm, op2): (u64, u64, u64, u64, u64)) -> u64 {
    let iss = op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | 3 << 5 | crm << 1;
    0x18 << 26 | IL | iss
}

const SGI1R: u64 = register((3, 0, 12, 11, 5));
const SGI0R: u64 = register((3, 0, 12, 11, 7));
const PFR0: u64 = register((3, 0, 0, 4, 0));
const SCTLR: u64 = register((3, 0, 1, 0, 0));
const TTBR0: u64 = register((3, 0, 2, 0, 0));
const DC_CISW: u64 = register((1, 0, 7, 14, 2));
const CNTP_CTL: u64 = register((3, 3, 14, 2, 1));
const CNTP_CVAL: u64 = register((3, 3, 14, 2, 2));
const CNTPCT: u64 = register((3, 3, 14, 0, 1));
const VTTBR_EL2: u64 = register((3, 4, 2, 1, 0));
/// SCTLR_EL1.M and .C.
const CACHES_ON: u64 = 0b101;

fn trap(vcpu: &mut FakeVcpu<'_, '_>, esr: u64) -> Next {
    vcpu.esr = esr;
    handle(vcpu, SYNC)
}

#[test]
fn an_sgi_kicks_its_targets_and_not_its_sender() {
    on(PLAIN, |vcpu| {
        let vgic = &vcpu.vm.vgic;
        let _kicks = vgic.dist_write(0, 0, 4, 2);
        // GICR_IGROUPR0 and GICR_ISENABLER0 of both.
        for of in [0, 1] {
            let _kicks = vgic.redist_write(of, 0x1_0080, 4, 0xffff_ffff);
            let _kicks = vgic.redist_write(of, 0x1_0100, 4, 2);
        }
        // INTID 1 for the cores 0 and 1 of 0.0.0.
        vcpu.registers.set(3, 1 << 24 | 0b11);
        assert_eq!(trap(vcpu, SGI1R), Next::Refresh);
        assert_eq!(vcpu.take_did(), [Did::Skip, Did::Kick(1)]);
        assert_eq!((vcpu.pc, vcpu.exit), (RAM + 4, None));
        vcpu.registers.set(3, 1 << 24 | 0b10);
        assert_eq!(trap(vcpu, SGI1R), Next::Resume);
    });
}

#[test]
fn a_guest_of_a_gicv2_has_no_registers_for_it() {
    on(WITH_GICV2, |vcpu| {
        assert_eq!(trap(vcpu, SGI1R), Next::Resume);
        assert_injected(vcpu, IL);
    });
}

#[test]
fn an_sgi_of_group_0_goes_nowhere() {
    on(PLAIN, |vcpu| {
        assert_eq!(trap(vcpu, SGI0R), Next::Resume);
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM + 4, [Did::Skip].into()));
    });
}

#[test]
fn a_read_lands_in_its_register_and_in_no_other() {
    on(PLAIN, |vcpu| {
        let mut before = vcpu.registers;
        before.0[3] = vcpu.vm.ids.read(4, 0);
        assert_eq!(trap(vcpu, PFR0 | READ), Next::Resume);
        assert_eq!((vcpu.registers, vcpu.pc), (before, RAM + 4));
        assert_eq!(vcpu.take_did(), [Did::Skip]);
        assert_eq!(vcpu.counter(VmCounter::SystemRegisters), 1);
    });
}

#[test]
fn what_the_guest_does_not_have_is_undefined_there() {
    // A register of EL2, a write of an identification register.
    for esr in [VTTBR_EL2 | READ, PFR0] {
        on(PLAIN, |vcpu| {
            let before = vcpu.registers;
            vcpu.far = FAR;
            assert_eq!(trap(vcpu, esr), Next::Resume);
            // FAR_EL2 is another exception's.
            assert_eq!((vcpu.registers, vcpu.el1.far), (before, 0));
            assert_injected(vcpu, IL);
        });
    }
}

#[test]
fn an_instruction_that_the_guest_does_not_have_is_undefined_there() {
    // SMC, SVE, an illegal state, a class without a meaning.
    for class in [0x17, 0x19, 0x0e, 0x3f] {
        on(PLAIN, |vcpu| {
            assert_eq!(trap(vcpu, class << 26 | IL), Next::Resume);
            assert_injected(vcpu, IL);
        });
    }
}

#[test]
fn the_first_use_of_fp_is_repeated_with_the_guests_registers() {
    on(PLAIN, |vcpu| {
        assert_eq!(trap(vcpu, 0x07 << 26 | IL), Next::Resume);
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM, [Did::LendFp].into()));
    });
}

#[test]
fn the_physical_counter_is_the_real_one() {
    on(PLAIN, |vcpu| {
        vcpu.now = 12345;
        assert_eq!(trap(vcpu, CNTPCT | READ), Next::Resume);
        assert_eq!((vcpu.registers.get(3), vcpu.pc), (12345, RAM + 4));
    });
}

#[test]
fn the_physical_timer_is_the_guests_own() {
    on(PLAIN, |vcpu| {
        vcpu.now = 1000;
        vcpu.registers.set(3, 1500);
        assert_eq!(trap(vcpu, CNTP_CVAL), Next::Refresh);
        vcpu.registers.set(3, 1);
        assert_eq!(trap(vcpu, CNTP_CTL), Next::Refresh);
        assert_eq!(vcpu.timer.deadline(), Some(1500));
        vcpu.now = 1500;
        assert_eq!(trap(vcpu, CNTP_CTL | READ), Next::Resume);
        // ENABLE and ISTATUS.
        assert_eq!((vcpu.registers.get(3), vcpu.pc), (0b101, RAM + 12));
    });
}

#[test]
fn a_trapped_write_of_el1s_registers_is_made() {
    on(PLAIN, |vcpu| {
        let value = vcpu.registers.get(3);
        assert_eq!(trap(vcpu, TTBR0), Next::Resume);
        let wrote = Did::Write(VmRegister::Ttbr0, value);
        assert_eq!(vcpu.take_did(), [Did::Skip, wrote]);
        assert!(!vcpu.caches.owed.is_owed());
    });
}

/// Turns the guest's caches on.
fn caches_on(vcpu: &mut FakeVcpu<'_, '_>) -> Next {
    vcpu.registers.set(3, CACHES_ON);
    trap(vcpu, SCTLR)
}

#[test]
fn caches_that_come_on_are_watched_no_more() {
    on(PLAIN, |vcpu| {
        assert_eq!(caches_on(vcpu), Next::Resume);
        let wrote = Did::Write(VmRegister::Sctlr, CACHES_ON);
        let watch = Did::Watch(CacheWatch::Quiet);
        assert_eq!(vcpu.take_did(), [Did::Skip, wrote, watch]);
        assert!(!vcpu.caches.owed.is_owed(), "the flush is done");
    });
}

#[test]
fn maintenance_by_set_and_way_watches_the_caches() {
    on(PLAIN, |vcpu| {
        assert_eq!(caches_on(vcpu), Next::Resume);
        let _did = vcpu.take_did();
        assert_eq!(trap(vcpu, DC_CISW), Next::Resume);
        let watch = Did::Watch(CacheWatch::Watching);
        assert_eq!(vcpu.take_did(), [Did::Skip, watch]);
    });
}

/// All of the guest's memory is mapped, and must be cleaned.
fn map_all(vcpu: &mut FakeVcpu<'_, '_>) {
    for ipa in [RAM, RAM + 0x20_0000] {
        let store = DATA | WORD | WRITE | TRANSLATION;
        assert_eq!(abort(vcpu, store, ipa), Next::Resume);
    }
}

#[test]
fn a_flush_is_left_for_an_interrupt_and_gone_on_with() {
    on(PLAIN, |vcpu| {
        map_all(vcpu);
        vcpu.lines.pending = true;
        assert_eq!(caches_on(vcpu), Next::Leave);
        assert_eq!(vcpu.exit.take(), Some(Exit::Interrupted));
        // The trap is what the watch says, though the flush is not done.
        let watch = Did::Watch(vcpu.caches.watch);
        assert!(vcpu.take_did().contains(&watch));
        // It is behind its write, but does not come to the next instruction.
        assert_eq!(vcpu.pc, RAM + 4);
        assert!(vcpu.caches.owed.is_owed());
        vcpu.lines.pending = false;
        assert_eq!(flush(vcpu), Next::Resume);
        assert!(!vcpu.caches.owed.is_owed());
    });
}

#[test]
fn a_flush_goes_on_behind_an_interrupt_of_the_guests() {
    on(PLAIN, |vcpu| {
        map_all(vcpu);
        vcpu.lines.kick = true;
        assert_eq!(caches_on(vcpu), Next::Resume);
        assert!(!vcpu.lines.kick && !vcpu.caches.owed.is_owed());
        assert!(vcpu.lists_loaded, "what the kick was for is delivered");
    });
}

#[test]
fn a_flush_behind_a_kick_is_left_for_the_hosts_interrupt() {
    on(PLAIN, |vcpu| {
        map_all(vcpu);
        vcpu.lines.pending = true;
        vcpu.lines.kick = true;
        assert_eq!(caches_on(vcpu), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::Interrupted));
        assert!(!vcpu.lines.kick && vcpu.caches.owed.is_owed());
    });
}
