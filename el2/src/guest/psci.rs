//! PSCI 1.1 for guests: every vCPU's power state, and what a call asks EL2 to do.
//!
//! vCPU n of a VM has Aff0 = n and all other affinities 0. Power states and their races are
//! [`crate::psci::PowerSlot`]'s; decoding of what the host may call as well is [`crate::psci`]'s.
//!
//! Source: Power State Coordination Interface (Arm DEN 0022 F), section 5.

use core::sync::atomic::{AtomicBool, Ordering};

use abi::MAX_VCPUS;

use crate::psci::{self, PowerSlot, PsciError, Request, StartOrder};

const SYSTEM_RESET2_32: u32 = 0x8400_0012;
const SYSTEM_RESET2_64: u32 = 0xc400_0012;
/// Power state: bits 31:26 and 23:17 must be zero (original format, DEN 0022 5.4.2).
const POWER_STATE_RESERVED: u64 = 0xfcfe_0000;
/// Affinity fields of a target: all of MPIDR_EL1's; the other bits must be zero (DEN 0022 5.6).
const AFFINITY: u64 = 0xff_00ff_ffff;
const SUCCESS: u64 = 0;

/// Power states of a VM's vCPUs.
#[derive(Debug)]
pub struct Power {
    slots: [PowerSlot; MAX_VCPUS as usize],
    vcpus: u8,
    /// The guest has turned the machine off, or wants a reset: no vCPU goes on.
    ended: AtomicBool,
}

/// What a call asks for. Where `x0` is not named, it is the caller's answer: nothing else is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Put this into `x0`.
    Return(u64),
    /// Put 0 into `x0`; vCPU `index` has an order, and has to be run.
    TurnedOn {
        /// Index of that vCPU.
        index: u8,
    },
    /// The caller is off: once nothing uses its registers any more, [`Power::off`].
    Off,
    /// As WFI: put 0 into `x0` when it goes on.
    Standby,
    /// As WFI, but when it goes on it starts over as after CPU_ON.
    PowerDown(StartOrder),
    /// End the VM.
    SystemOff,
    /// Reset the VM.
    SystemReset {
        /// By SYSTEM_RESET2.
        warm: bool,
    },
}

/// What a vCPU does with a run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Turn {
    /// It begins with an order.
    Starts(StartOrder),
    /// It goes on where it was.
    GoesOn,
    /// It is off.
    IsOff,
}

impl Power {
    /// A VM of `vcpus` vCPUs, 1 to [`MAX_VCPUS`] (more are cut), all off.
    #[must_use]
    pub fn new(vcpus: u8) -> Self {
        let power = Self {
            slots: core::array::from_fn(|_| PowerSlot::new()),
            vcpus: vcpus.min(MAX_VCPUS),
            ended: AtomicBool::new(false),
        };
        power.reset();
        power
    }

    /// All vCPUs are off. Only while none runs.
    pub fn reset(&self) {
        self.ended.store(false, Ordering::Release);
        for slot in self.present() {
            slot.park();
        }
    }

    /// SYSTEM_OFF and SYSTEM_RESET do not return (DEN 0022 5.10, 5.11): whatever the host does, no vCPU
    /// is entered again before a reset.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Orders the start of a vCPU that is off, for a guest's CPU_ON or the host's first start.
    ///
    /// # Errors
    ///
    /// [`PsciError::InvalidParameters`] without such a vCPU, else as [`PowerSlot::order`].
    pub fn order(&self, index: u8, order: StartOrder) -> Result<(), PsciError> {
        let slot = self.slot(index).ok_or(PsciError::InvalidParameters)?;
        slot.order(order)
    }

    /// Before a run: what vCPU `index` does. One that [`Turn::Starts`] is on from then.
    #[must_use]
    #[inline]
    pub fn turn(&self, index: u8) -> Turn {
        let slot = self
            .slot(index)
            .filter(|_| !self.ended.load(Ordering::Acquire));
        slot.map_or(Turn::IsOff, |slot| {
            if slot.affinity_info() == 0 {
                return Turn::GoesOn;
            }
            slot.take_order().map_or(Turn::IsOff, Turn::Starts)
        })
    }

    /// Whether the vCPU is on, or will be as soon as it is run.
    #[must_use]
    pub fn is_runnable(&self, index: u8) -> bool {
        self.slot(index)
            .is_some_and(|slot| slot.affinity_info() == 0 || slot.has_order())
    }

    /// The end of CPU_OFF, by the CPU that ran the vCPU. From here on another one can start it.
    pub fn off(&self, index: u8) {
        if let Some(slot) = self.slot(index) {
            slot.park();
        }
    }

    fn present(&self) -> &[PowerSlot] {
        self.slots.get(..usize::from(self.vcpus)).unwrap_or(&[])
    }

    fn slot(&self, index: u8) -> Option<&PowerSlot> {
        self.present().get(usize::from(index))
    }

    /// The vCPU with this affinity.
    fn target(&self, mpidr: u64) -> Option<u8> {
        u8::try_from(mpidr).ok().filter(|index| *index < self.vcpus)
    }

    /// AFFINITY_INFO: on (0) if one of the vCPUs that share the affinity from `level` up is on,
    /// else on-pending (2) if one is, else off (1).
    #[inline(never)]
    fn affinity_info(&self, mpidr: u64, level: u64) -> Result<u64, PsciError> {
        let missing = PsciError::InvalidParameters;
        if mpidr & !AFFINITY != 0 || level > 3 {
            return Err(missing);
        }
        if level == 0 {
            let index = self.target(mpidr).ok_or(missing)?;
            return self
                .slot(index)
                .map(PowerSlot::affinity_info)
                .ok_or(missing);
        }
        // Every vCPU has Aff1 to Aff3 = 0; the fields below `level` are ignored.
        let ignored = [0, 0xff, 0xffff, 0xff_ffff];
        let ignored = usize::try_from(level).ok().and_then(|l| ignored.get(l));
        if mpidr & !ignored.copied().unwrap_or(0) != 0 {
            return Err(missing);
        }
        let is = |state| self.present().iter().any(|s| s.affinity_info() == state);
        Ok(if is(0) {
            0
        } else if is(2) {
            2
        } else {
            1
        })
    }
}

/// PSCI_FEATURES for a guest: 0 for what is served (for CPU_SUSPEND: original state format, no
/// OS-initiated mode), else NOT_SUPPORTED.
#[must_use]
#[inline(never)]
pub fn features(id: u32) -> u64 {
    match id {
        SYSTEM_RESET2_32 | SYSTEM_RESET2_64 => SUCCESS,
        _ => psci::features(id),
    }
}

/// Performs or decides the call `id` with arguments `x1` to `x3` of a vCPU of this VM.
///
/// `is_memory` says whether an IPA is RAM of the guest.
#[inline]
pub fn call(id: u32, args: [u64; 3], power: &Power, is_memory: impl Fn(u64) -> bool) -> Action {
    let valid = |entry, context| start_order(entry, context, &is_memory);
    let [first, ..] = args;
    match psci::decode(id, args) {
        Request::Version => Action::Return(psci::VERSION),
        Request::Features(id) => Action::Return(features(id)),
        Request::CpuSuspend { entry, context, .. } => {
            or_error(suspend(first, || valid(entry, context)))
        }
        Request::CpuOff => Action::Off,
        Request::CpuOn {
            mpidr,
            entry,
            context,
        } => or_error(turn_on(power, mpidr, || valid(entry, context))),
        Request::AffinityInfo { mpidr, level } => {
            or_error(power.affinity_info(mpidr, level).map(Action::Return))
        }
        Request::MigrateInfoType => Action::Return(psci::MIGRATE_NOT_NEEDED),
        Request::SystemOff => Action::SystemOff,
        Request::SystemReset => Action::SystemReset { warm: false },
        Request::Unknown if matches!(id, SYSTEM_RESET2_32 | SYSTEM_RESET2_64) => {
            or_error(reset2(first))
        }
        Request::Unknown => or_error(Err(PsciError::NotSupported)),
    }
}

#[inline]
fn or_error(action: Result<Action, PsciError>) -> Action {
    action.unwrap_or_else(|error| Action::Return(error.to_register()))
}

/// CPU_ON.
#[inline(never)] // As the other calls that do something: who only asks needs no frame for them.
fn turn_on(
    power: &Power,
    mpidr: u64,
    order: impl FnOnce() -> Result<StartOrder, PsciError>,
) -> Result<Action, PsciError> {
    let index = power.target(mpidr).ok_or(PsciError::InvalidParameters)?;
    power.order(index, order()?)?;
    Ok(Action::TurnedOn { index })
}

/// Entry points must be RAM and aligned to an instruction.
fn start_order(
    entry: u64,
    context: u64,
    is_memory: impl Fn(u64) -> bool,
) -> Result<StartOrder, PsciError> {
    if entry & 3 != 0 || !is_memory(entry) {
        return Err(PsciError::InvalidAddress);
    }
    Ok(StartOrder { entry, context })
}

/// CPU_SUSPEND: the state type (bit 16) says whether the context is lost. There is one power level
/// with more than one CPU behind it, and it never goes down: levels are accepted as they come.
#[inline(never)]
fn suspend(
    state: u64,
    order: impl FnOnce() -> Result<StartOrder, PsciError>,
) -> Result<Action, PsciError> {
    let state = state & 0xffff_ffff;
    if state & POWER_STATE_RESERVED != 0 {
        return Err(PsciError::InvalidParameters);
    }
    if state & 1 << 16 == 0 {
        return Ok(Action::Standby);
    }
    order().map(Action::PowerDown)
}

/// SYSTEM_RESET2: the architectural warm reset is type 0; there is no other (DEN 0022 5.15).
fn reset2(kind: u64) -> Result<Action, PsciError> {
    match kind & 0xffff_ffff {
        0 => Ok(Action::SystemReset { warm: true }),
        _ => Err(PsciError::InvalidParameters),
    }
}

#[cfg(test)]
#[path = "psci_tests.rs"]
mod tests;
