//! Asynchronous exceptions, and waiting for them.

use abi::{Exit, VmCounter};

use super::*;
use crate::exits::testing::Lines;
use crate::exits::{Interrupts, Oddity};
use crate::guest::timer::TimerRegister;

/// Vectors of exceptions from AArch64.
const IRQ: u64 = 9;
const FIQ: u64 = 10;
const SERROR: u64 = 11;
/// WFI: class 0x01, TI 0.
const WFI: u64 = 0x01 << 26 | IL;

#[test]
fn the_hosts_interrupt_is_the_hosts() {
    for vector in [IRQ, FIQ, IRQ + 4, FIQ + 4] {
        on(PLAIN, |vcpu| {
            assert_eq!(handle(vcpu, vector), Next::Leave);
            assert_eq!(vcpu.exit, Some(Exit::Interrupted));
            assert_eq!((vcpu.pc, vcpu.take_did()), (RAM, [].into()));
            assert_eq!(vcpu.counter(VmCounter::Interrupts), 1);
        });
    }
}

/// What an interrupt with these lines comes to.
fn interrupted(lines: Lines) -> (Next, Vec<Did>, Lines) {
    let mut answer = None;
    on(PLAIN, |vcpu| {
        vcpu.lines = lines;
        vcpu.refresh_interrupts();
        let next = handle(vcpu, IRQ);
        assert!(!vcpu.lists_loaded, "they are taken back first");
        answer = Some((next, vcpu.take_did(), vcpu.lines));
    });
    answer.expect("it ran")
}

#[test]
fn the_guests_timer_is_the_guests() {
    let (next, ..) = interrupted(Lines {
        virtual_timer: true,
        ..Lines::default()
    });
    assert_eq!(next, Next::Refresh);
}

#[test]
fn a_timer_that_the_guest_has_seen_is_not_what_interrupted() {
    let (next, ..) = interrupted(Lines {
        virtual_timer: true,
        timer_active: true,
        ..Lines::default()
    });
    assert_eq!(next, Next::Leave);
}

#[test]
fn the_virtual_interface_is_looked_after() {
    let (next, ..) = interrupted(Lines {
        maintenance: true,
        ..Lines::default()
    });
    assert_eq!(next, Next::Refresh);
}

#[test]
fn a_kick_of_the_guest_is_taken() {
    let (next, did, lines) = interrupted(Lines {
        kick: true,
        ..Lines::default()
    });
    assert_eq!((next, did, lines.kick), (Next::Refresh, [].into(), false));
}

#[test]
fn a_kick_of_the_host_is_sent_on() {
    let (next, did, lines) = interrupted(Lines {
        kick: true,
        host_kick: true,
        ..Lines::default()
    });
    assert_eq!((next, did), (Next::Leave, [Did::KickHost].into()));
    assert!(!lines.host_kick);
}

#[test]
fn a_mark_without_a_kick_is_kept() {
    let (next, did, lines) = interrupted(Lines {
        host_kick: true,
        ..Lines::default()
    });
    assert_eq!((next, did, lines.host_kick), (Next::Leave, [].into(), true));
}

#[test]
fn the_physical_timer_is_the_guests_when_it_is_due() {
    on(PLAIN, |vcpu| {
        vcpu.timer.write(TimerRegister::Cval, 500, 0);
        vcpu.timer.write(TimerRegister::Ctl, 1, 0);
        vcpu.now = 499;
        assert_eq!(handle(vcpu, IRQ), Next::Leave);
        vcpu.now = 500;
        assert_eq!(handle(vcpu, IRQ), Next::Refresh);
    });
}

#[test]
fn an_serror_is_the_guests() {
    for vector in [SERROR, SERROR + 4] {
        on(PLAIN, |vcpu| {
            assert_eq!(handle(vcpu, vector), Next::Resume);
            let said = Did::Report(Oddity::SError);
            assert_eq!(vcpu.take_did(), [said, Did::SError]);
            assert_eq!((vcpu.pc, vcpu.exit), (RAM, None));
        });
    }
}

fn wait(vcpu: &mut FakeVcpu<'_, '_>) -> Next {
    vcpu.esr = WFI;
    handle(vcpu, SYNC)
}

#[test]
fn a_wait_looks_at_the_list_registers_first() {
    on(PLAIN, |vcpu| {
        vcpu.refresh_interrupts();
        assert_eq!(wait(vcpu), Next::Leave);
        assert!(!vcpu.lists_loaded, "what is in them may end the wait");
    });
}

#[test]
fn a_wait_goes_to_the_host_until_the_next_timer() {
    on(PLAIN, |vcpu| {
        vcpu.virtual_deadline = 700;
        assert_eq!(wait(vcpu), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::WaitForInterrupt { until: 700 }));
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM + 4, [Did::Skip].into()));
        vcpu.timer.write(TimerRegister::Cval, 500, 0);
        vcpu.timer.write(TimerRegister::Ctl, 1, 0);
        assert_eq!(wait(vcpu), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::WaitForInterrupt { until: 500 }));
    });
}

#[test]
fn a_wait_without_timers_has_no_end() {
    on(PLAIN, |vcpu| {
        assert_eq!(wait(vcpu), Next::Leave);
        let until = u64::MAX;
        assert_eq!(vcpu.exit, Some(Exit::WaitForInterrupt { until }));
    });
}

#[test]
fn a_wait_for_what_is_there_is_none() {
    on(WITH_GICV2, |vcpu| {
        let vgic = &vcpu.vm.vgic;
        let _kicks = vgic.dist_write(0, 0, 4, 3);
        // The virtual timer's INTID 27 is enabled, and its line rises.
        let _kicks = vgic.dist_write(0, 0x100, 4, 1 << 27);
        vcpu.lines.virtual_timer = true;
        assert_eq!(wait(vcpu), Next::Refresh);
        assert_eq!((vcpu.pc, vcpu.exit), (RAM + 4, None));
    });
}

#[test]
fn a_wait_on_a_core_that_nobody_wants_stays_there() {
    on(PLAIN, |vcpu| {
        vcpu.waits_here = true;
        vcpu.lines.kick = true;
        assert_eq!(wait(vcpu), Next::Refresh);
        assert_eq!(vcpu.take_did(), [Did::Skip, Did::Wait]);
        assert_eq!(wait(vcpu), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::Interrupted));
    });
}
