//! What a guest's exceptions mean, and who deals with them: EL2 itself, or the host.
//!
//! Nothing that a guest does ends EL2 or the VM: what can't be understood becomes an exception in
//! that guest.
//!
//! What decides is here; what only the machine has comes in through three traits ([`Core`],
//! [`Interrupts`], [`Guest`]), so that whole exits run on a developer's machine. After each exit
//! exactly one of these holds for the instruction that the guest was at:
//!
//! | outcome | the guest goes on |
//! | --- | --- |
//! | emulated here, or a store of which the host is told | behind it |
//! | a load that the host completes | behind it, with [`PendingLoad::complete`] |
//! | memory was, or will be, put behind its address | at it, once more |
//! | refused | in its own handler, with an exception that says so |

mod call;
mod fault;
mod gic;
mod interrupt;
mod loaded;
mod register;
#[cfg(any(test, feature = "testing"))]
#[cfg(not(loom))]
pub mod testing;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;

use abi::VmCounter;

use crate::esr::{self, Abort, Cause};
use crate::guest::mmio::{self, Decoded};
use crate::inject::{self, Entry};
use crate::vgic::Kicks;

pub use call::is_memory;
pub use loaded::{Core, Guest, Interrupts, Loaded, Oddity, Registers};
pub use register::flush;

/// The lower bits of the vectors of exceptions from a guest, of either width: 0 is a synchronous one.
const IRQ: u64 = 1;
const FIQ: u64 = 2;

/// Exception classes (Arm ARM D24.2.40): a trapped use of FP or SIMD, and those that come all the time.
const EC_FP: u8 = 0x07;
const EC_HVC: u8 = 0x16;
const EC_SYSTEM_REGISTER: u8 = 0x18;
const EC_DATA_ABORT: u8 = 0x24;

/// How the guest goes on after an exception.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// At once.
    Resume,
    /// After its interrupts have been looked at again.
    Refresh,
    /// Not before the host has done something: [`Guest::leave`] was told what.
    Leave,
}

/// A load that the host completes with the next run.
#[derive(Clone, Copy, Debug)]
pub struct PendingLoad {
    /// Syndrome of its abort, which says where the value goes. The host never sees it.
    esr: u64,
}

impl PendingLoad {
    /// Puts the host's value where the load wanted it; the PC and PSTATE behind the load, which is at
    /// `pc` with `pstate`.
    #[inline]
    #[must_use]
    pub fn complete(
        self,
        registers: &mut Registers,
        (pc, pstate): (u64, u64),
        value: u64,
    ) -> (u64, u64) {
        if let Decoded::Access(access) = mmio::decode(self.esr) {
            registers.set(access.rt(), access.loaded(value));
        }
        esr::behind(pc, pstate, self.esr)
    }
}

/// Handles one exception of the guest, which has come by this vector (0 to 15, as the table has them).
#[inline]
pub fn handle(run: &mut impl Loaded, vector: u64) -> Next {
    if vector.is_multiple_of(4) {
        synchronous(run)
    } else {
        asynchronous(run, vector)
    }
}

/// What a guest causes all the time is handled here; what it seldom does, behind a call.
#[inline]
fn synchronous(run: &mut impl Loaded) -> Next {
    let esr = run.esr();
    match esr::class(esr) {
        EC_HVC => call::call(run, esr::immediate(esr)),
        EC_DATA_ABORT => fault::data_abort(run, esr),
        EC_SYSTEM_REGISTER => register::register(run, esr::iss(esr)),
        _ => seldom(run, esr),
    }
}

#[inline(never)]
fn seldom(run: &mut impl Loaded, esr: u64) -> Next {
    match esr::decode(esr) {
        Cause::WaitFor => interrupt::wait(run),
        Cause::Abort(_) => fault::fault(run, esr),
        Cause::Other(EC_FP) => {
            run.count(VmCounter::FpSwitches);
            run.lend_fp();
            Next::Resume
        }
        // A guest has no EL3, says its ID_AA64PFR0_EL1.
        _ => undefined(run),
    }
}

#[inline]
fn asynchronous(run: &mut impl Loaded, vector: u64) -> Next {
    match vector & 3 {
        IRQ | FIQ => interrupt::interrupt(run),
        _ => interrupt::serror(run),
    }
}

/// Makes the guest continue in its own exception handler.
fn inject(run: &mut impl Loaded, entry: &Entry) -> Next {
    run.count(VmCounter::Injected);
    run.inject(entry);
    Next::Resume
}

#[cold]
fn undefined(run: &mut impl Loaded) -> Next {
    let entry = inject::undefined(&run.interrupted());
    inject(run, &entry)
}

#[cold]
fn external_abort(run: &mut impl Loaded, abort: &Abort, esr: u64) -> Next {
    let entry = inject::external_abort(&run.interrupted(), abort, esr);
    inject(run, &entry)
}

/// Kicks the other vCPUs; says whether this one has to look at its interrupts, too.
#[inline]
fn kick(run: &impl Loaded, kicks: Kicks) -> Next {
    let mut next = Next::Resume;
    for index in kicks.iter() {
        if index == run.index() {
            next = Next::Refresh;
        } else {
            run.kick(index);
        }
    }
    next
}
