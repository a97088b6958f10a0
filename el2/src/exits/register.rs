//! Trapped system registers and instructions.

use abi::VmCounter;
use memslot::steps::Progress;
use memslot::toggle::CacheWatch;

use super::interrupt::interrupt;
use super::{Loaded, Next, kick, undefined};
use crate::guest::sysreg::{self, Direction, Outcome, SgiGroup, Trapped, VmRegister};
use crate::guest::timer::TimerRegister;

/// A trapped system register or instruction.
#[inline]
pub(super) fn register(run: &mut impl Loaded, iss: u32) -> Next {
    run.count(VmCounter::SystemRegisters);
    // What a guest with several vCPUs writes all the time, first.
    match sysreg::sgi_written(iss) {
        Some(rt) if run.ids().has_gic_registers() => {
            let value = run.registers().get(rt);
            run.skip_instruction();
            send_sgi(run, value)
        }
        _ => other_register(run, iss),
    }
}

/// ICC_SGI1R_EL1.
#[inline]
fn send_sgi(run: &mut impl Loaded, value: u64) -> Next {
    let kicks = run.vgic().sgi1r(run.index(), value);
    kick(run, kicks)
}

#[inline]
fn other_register(run: &mut impl Loaded, iss: u32) -> Next {
    let trapped = Trapped::decode(iss);
    let value = run.registers().get(trapped.rt);
    let outcome = sysreg::decide(trapped, run.ids());
    if outcome == Outcome::Undefined {
        return undefined(run);
    }
    run.skip_instruction();
    match outcome {
        Outcome::Read(value) => {
            run.registers().set(trapped.rt, value);
            Next::Resume
        }
        Outcome::PhysicalCounter => {
            let now = run.ticks();
            run.registers().set(trapped.rt, now);
            Next::Resume
        }
        Outcome::WriteIgnored | Outcome::Sgi(SgiGroup::Zero) | Outcome::Deactivate => Next::Resume,
        Outcome::Sgi(SgiGroup::One) => send_sgi(run, value),
        Outcome::SetWay => {
            run.caches().set_way();
            watch(run)
        }
        Outcome::VmControl(register) => vm_control(run, register, value),
        Outcome::PhysicalTimer(register) => physical_timer(run, trapped, register, value),
        Outcome::Undefined => Next::Resume,
    }
}

#[inline(never)]
fn physical_timer(
    run: &mut impl Loaded,
    trapped: Trapped,
    register: TimerRegister,
    value: u64,
) -> Next {
    let now = run.ticks();
    match trapped.direction {
        Direction::Read => {
            let value = run.physical_timer().read(register, now);
            run.registers().set(trapped.rt, value);
            Next::Resume
        }
        Direction::Write => {
            run.physical_timer().write(register, value, now);
            Next::Refresh
        }
    }
}

/// Writes of SCTLR_EL1 are trapped while the guest's caches are off, or after set/way operations.
#[inline(never)]
fn vm_control(run: &mut impl Loaded, register: VmRegister, value: u64) -> Next {
    if register != VmRegister::Sctlr {
        run.write_vm_register(register, value);
        return Next::Resume;
    }
    let old = run.sctlr();
    run.write_vm_register(register, value);
    run.caches().sctlr_written(old, value);
    watch(run)
}

/// Makes the trap of SCTLR_EL1 what the watch says.
fn watch(run: &mut impl Loaded) -> Next {
    let watch: CacheWatch = run.caches().watch;
    run.watch_caches(watch);
    if run.caches().owed.is_owed() {
        return flush(run);
    }
    Next::Resume
}

/// Does the flush that the guest has asked for, before its next instruction. The host's interrupts
/// are not kept waiting for all of it: the vCPU leaves, and goes on with the flush when it runs again.
#[cold]
pub fn flush(run: &mut impl Loaded) -> Next {
    while run.caches().owed.is_owed() {
        let mut owed = core::mem::take(&mut run.caches().owed);
        let go_on = || !run.interrupt_pending();
        let progress = run.memory().flush_in_steps(&mut owed, go_on);
        run.caches().owed = owed;
        if progress == Progress::More {
            match interrupt(run) {
                Next::Leave => return Next::Leave,
                Next::Resume | Next::Refresh => run.refresh_interrupts(),
            }
        }
    }
    Next::Resume
}
