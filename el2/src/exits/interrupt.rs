//! Asynchronous exceptions, and waiting for one.

use abi::{Exit, VmCounter};

use super::{Loaded, Next, Oddity};

/// A physical interrupt: a timer of the guest, EL2's own kick, the virtual GIC's maintenance
/// interrupt, or the host's.
#[inline(never)]
pub(super) fn interrupt(run: &mut impl Loaded) -> Next {
    run.count(VmCounter::Interrupts);
    let maintenance = run.maintenance_pending();
    run.save_interrupts();
    let timer = run.timer_may_fire() && run.virtual_timer_fired();
    if timer || maintenance || run.physical_timer_fired() {
        return Next::Refresh;
    }
    // Withdrawn before it is looked whom it was for. One that the host waits for is pending again, for it.
    if run.take_kick() {
        if !run.take_host_kick() {
            return Next::Refresh;
        }
        run.kick_host();
    }
    run.leave(Exit::Interrupted)
}

/// An asynchronous error while the guest ran: it is the guest's to deal with.
#[cold]
pub(super) fn serror(run: &mut impl Loaded) -> Next {
    run.report(Oddity::SError);
    run.count(VmCounter::Injected);
    run.pend_serror();
    Next::Resume
}

/// WFI; WFE does not trap.
pub(super) fn wait(run: &mut impl Loaded) -> Next {
    run.skip_instruction();
    run.count(VmCounter::Waits);
    sleep(run)
}

/// Waits for an interrupt: here if there is one, else in the host.
pub(super) fn sleep(run: &mut impl Loaded) -> Next {
    run.save_interrupts();
    run.refresh_timers();
    if run.vgic().has_pending(run.index()) {
        return Next::Refresh;
    }
    if run.waits_here() {
        // The host has nothing else for this core: whatever ends the wait is looked at as if it had
        // interrupted the guest, which may wake for nothing.
        run.wait_for_interrupt();
        return interrupt(run);
    }
    let virtual_timer = run.virtual_timer_deadline();
    let physical_timer = run.physical_timer().deadline().unwrap_or(u64::MAX);
    run.leave(Exit::WaitForInterrupt {
        until: virtual_timer.min(physical_timer),
    })
}
