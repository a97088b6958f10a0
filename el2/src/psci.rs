//! PSCI 1.1 as EL2 serves it to its host: decoding, and the power state of each core.
//!
//! Invariant: a core that is off sits in EL2, or in firmware that gives it back to EL2's entry; it
//! reaches the host only through [`PowerSlot::take_order`], with an entry point that one `CPU_ON` wrote completely before.
//!
//! Source: Power State Coordination Interface (Arm DEN 0022 F), section 5.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// PSCI_VERSION's answer: 1.1.
pub const VERSION: u64 = 0x1_0001;

/// MIGRATE_INFO_TYPE: no trusted OS, or one that need not migrate (DEN 0022 5.9).
pub const MIGRATE_NOT_NEEDED: u64 = 2;

/// PSCI error codes (DEN 0022 5.2.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(i32)]
pub enum PsciError {
    /// Unknown or optional function.
    NotSupported = -1,
    /// No such CPU, level or state.
    InvalidParameters = -2,
    /// The CPU is on.
    AlreadyOn = -4,
    /// The CPU is being turned on.
    OnPending = -5,
    /// The CPU is broken.
    InternalFailure = -6,
    /// The entry point is no memory of the host.
    InvalidAddress = -9,
}

impl PsciError {
    /// The value for `x0`: sign-extended to 64 bits.
    #[must_use]
    pub fn to_register(self) -> u64 {
        i64::from(self as i32).cast_unsigned()
    }
}

/// A decoded call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Request {
    /// PSCI_VERSION.
    Version,
    /// PSCI_FEATURES of a function id.
    Features(u32),
    /// CPU_SUSPEND.
    CpuSuspend {
        /// The state loses the core's context: it resumes at `entry`.
        powerdown: bool,
        /// Where it resumes, if it loses its context.
        entry: u64,
        /// `x0` there.
        context: u64,
    },
    /// CPU_OFF of the caller.
    CpuOff,
    /// CPU_ON.
    CpuOn {
        /// Affinity of the target.
        mpidr: u64,
        /// Physical address of its entry point.
        entry: u64,
        /// `x0` there.
        context: u64,
    },
    /// AFFINITY_INFO.
    AffinityInfo {
        /// Affinity of the target.
        mpidr: u64,
        /// Lowest affinity level asked for.
        level: u64,
    },
    /// MIGRATE_INFO_TYPE.
    MigrateInfoType,
    /// SYSTEM_OFF.
    SystemOff,
    /// SYSTEM_RESET.
    SystemReset,
    /// Anything else in PSCI's range.
    Unknown,
}

/// Decodes the call with `id` in `w0` and `args` in `x1..x3`; 32-bit calls use their lower halves.
#[must_use]
#[inline(always)] // A request is looked at where it is made: it is never one in memory.
pub fn decode(id: u32, args: [u64; 3]) -> Request {
    let wide = id & (1 << 30) != 0;
    let [first, second, third] = args;
    // Only where an argument is used: most calls have none.
    let arg = |value: u64| if wide { value } else { value & 0xffff_ffff };
    match (id & 0x1f, wide) {
        (0x00, false) => Request::Version,
        (0x01, _) => Request::CpuSuspend {
            powerdown: first & (1 << 16) != 0,
            entry: arg(second),
            context: arg(third),
        },
        (0x02, false) => Request::CpuOff,
        (0x03, _) => Request::CpuOn {
            mpidr: arg(first),
            entry: arg(second),
            context: arg(third),
        },
        (0x04, _) => Request::AffinityInfo {
            mpidr: arg(first),
            level: arg(second),
        },
        (0x06, false) => Request::MigrateInfoType,
        (0x08, false) => Request::SystemOff,
        (0x09, false) => Request::SystemReset,
        (0x0a, false) => u32::try_from(arg(first)).map_or(Request::Unknown, Request::Features),
        _ => Request::Unknown,
    }
}

/// PSCI_FEATURES: 0 for what we serve; for CPU_SUSPEND that means the original state format and
/// no OS-initiated mode (DEN 0022 5.13).
#[must_use]
pub fn features(id: u32) -> u64 {
    let served = match id {
        crate::smc::SMCCC_VERSION_ID => true,
        _ if id & !0x4000_001f == 0x8400_0000 => decode(id, [0; 3]) != Request::Unknown,
        _ => false,
    };
    if served {
        0
    } else {
        PsciError::NotSupported.to_register()
    }
}

const OFF: u32 = 0;
/// Someone is writing the order.
const CLAIMED: u32 = 1;
const ON_PENDING: u32 = 2;
const ON: u32 = 3;
/// The core never came up.
const DEAD: u32 = 4;

/// What a core starts with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StartOrder {
    /// Physical address of the first instruction at EL1.
    pub entry: u64,
    /// `x0` there.
    pub context: u64,
}

/// The power state of one core, changed by compare-and-swap only.
#[derive(Debug)]
pub struct PowerSlot {
    state: AtomicU32,
    entry: AtomicU64,
    context: AtomicU64,
}

impl Default for PowerSlot {
    fn default() -> Self {
        Self::new()
    }
}

impl PowerSlot {
    /// A core that never came up.
    #[must_use]
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self {
            state: AtomicU32::new(DEAD),
            entry: AtomicU64::new(0),
            context: AtomicU64::new(0),
        }
    }

    /// A core that never came up.
    #[must_use]
    #[cfg(loom)]
    pub fn new() -> Self {
        Self {
            state: AtomicU32::new(DEAD),
            entry: AtomicU64::new(0),
            context: AtomicU64::new(0),
        }
    }

    /// The core itself says that it is parked.
    pub fn park(&self) {
        self.state.store(OFF, Ordering::Release);
    }

    /// The boot core, on from the start.
    pub fn start_on(&self) {
        self.state.store(ON, Ordering::Release);
    }

    /// Whether an order waits for the core.
    #[must_use]
    pub fn has_order(&self) -> bool {
        self.state.load(Ordering::Acquire) == ON_PENDING
    }

    /// Whether the core came up at all.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.state.load(Ordering::Acquire) != DEAD
    }

    /// Whether the core is off and can be turned on.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.state.load(Ordering::Acquire) == OFF
    }

    /// CPU_ON: leaves an order for the core. The caller then sends an event.
    ///
    /// # Errors
    ///
    /// [`PsciError::AlreadyOn`], [`PsciError::OnPending`] or [`PsciError::InternalFailure`];
    /// nothing changed.
    pub fn order(&self, order: StartOrder) -> Result<(), PsciError> {
        let claimed =
            self.state
                .compare_exchange(OFF, CLAIMED, Ordering::Acquire, Ordering::Acquire);
        match claimed {
            Ok(_) => {}
            Err(ON) => return Err(PsciError::AlreadyOn),
            Err(DEAD) => return Err(PsciError::InternalFailure),
            Err(_) => return Err(PsciError::OnPending),
        }
        self.entry.store(order.entry, Ordering::Relaxed);
        self.context.store(order.context, Ordering::Relaxed);
        // Release: the core that sees ON_PENDING sees the whole order.
        self.state.store(ON_PENDING, Ordering::Release);
        Ok(())
    }

    /// The parked core takes its order, if there is one, and is on from then.
    #[must_use]
    pub fn take_order(&self) -> Option<StartOrder> {
        if self.state.load(Ordering::Acquire) != ON_PENDING {
            return None;
        }
        let order = StartOrder {
            entry: self.entry.load(Ordering::Relaxed),
            context: self.context.load(Ordering::Relaxed),
        };
        // Release: a later CPU_ON must not overwrite what is still being read.
        self.state.store(ON, Ordering::Release);
        Some(order)
    }

    /// AFFINITY_INFO's answer: 0 on, 1 off, 2 on pending (DEN 0022 5.7).
    #[must_use]
    #[inline]
    pub fn affinity_info(&self) -> u64 {
        match self.state.load(Ordering::Acquire) {
            ON => 0,
            OFF | DEAD => 1,
            _ => 2,
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const ORDER: StartOrder = StartOrder {
        entry: 0x4020_0000,
        context: 7,
    };

    #[test]
    fn calls_decode_in_both_widths() {
        let wide = decode(0xc400_0003, [1 << 32, 0x1_0000_0000, u64::MAX]);
        let on = |mpidr, entry, context| Request::CpuOn {
            mpidr,
            entry,
            context,
        };
        assert_eq!(wide, on(1 << 32, 0x1_0000_0000, u64::MAX));
        let narrow = decode(0x8400_0003, [1 << 32 | 3, 0x1_0000_1000, u64::MAX]);
        assert_eq!(narrow, on(3, 0x1000, 0xffff_ffff));
        assert_eq!(decode(0x8400_0000, [0; 3]), Request::Version);
        assert_eq!(decode(0xc400_0000, [0; 3]), Request::Unknown);
        assert_eq!(decode(0x8400_0005, [0; 3]), Request::Unknown);
        assert_eq!(decode(0x8400_0009, [0; 3]), Request::SystemReset);
    }

    #[test]
    fn suspend_state_bit_16_says_powerdown() {
        let Request::CpuSuspend { powerdown, .. } = decode(0xc400_0001, [1 << 16, 4, 5]) else {
            panic!("not a suspend");
        };
        assert!(powerdown);
        let Request::CpuSuspend { powerdown, .. } = decode(0xc400_0001, [0, 4, 5]) else {
            panic!("not a suspend");
        };
        assert!(!powerdown);
    }

    #[test]
    fn features_lists_exactly_what_is_served() {
        for id in [
            0x8400_0000,
            0x8400_0001,
            0xc400_0001,
            0x8400_0002,
            0xc400_0003,
            0xc400_0004,
            0x8400_0006,
            0x8400_0008,
            0x8400_0009,
            0x8400_000a,
            0x8000_0000,
        ] {
            assert_eq!(features(id), 0, "{id:#x}");
        }
        for id in [0x8400_0005, 0xc400_000e, 0x8400_0012, 0x8600_0000, 0] {
            assert_eq!(features(id), u64::MAX, "{id:#x}");
        }
    }

    /// EL2 has a memory overwrite request of its own, which the host can't take back; firmware's would be
    /// the host's to turn off, and has addresses for arguments.
    #[test]
    fn mem_protect_is_neither_served_nor_listed_nor_forwarded() {
        for id in [0x8400_0013, 0x8400_0014, 0xc400_0014] {
            assert_eq!(decode(id, [1, 0x1000, 0]), Request::Unknown, "{id:#x}");
            assert_eq!(features(id), PsciError::NotSupported.to_register());
            assert_eq!(crate::smc::judge(0, id.into()), crate::smc::Verdict::Psci);
        }
    }

    #[test]
    fn a_core_goes_off_on_and_off_again() {
        let slot = PowerSlot::new();
        assert_eq!(slot.order(ORDER), Err(PsciError::InternalFailure));
        slot.park();
        assert_eq!(slot.affinity_info(), 1);
        assert_eq!(slot.take_order(), None);
        assert_eq!(slot.order(ORDER), Ok(()));
        assert_eq!(slot.affinity_info(), 2);
        assert_eq!(slot.order(ORDER), Err(PsciError::OnPending));
        assert_eq!(slot.take_order(), Some(ORDER));
        assert_eq!(slot.affinity_info(), 0);
        assert_eq!(slot.order(ORDER), Err(PsciError::AlreadyOn));
        slot.park();
        assert_eq!(slot.order(ORDER), Ok(()));
    }

    #[test]
    fn error_codes_are_sign_extended() {
        assert_eq!(
            PsciError::InvalidAddress.to_register(),
            0xffff_ffff_ffff_fff7
        );
    }
}

#[cfg(test)]
#[cfg(loom)]
mod models {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// Two CPU_ONs race for a parked core: exactly one wins, and the core sees its whole order.
    #[test]
    fn one_of_two_racing_orders_wins_and_is_seen_whole() {
        loom::model(|| {
            let slot = Arc::new(PowerSlot::new());
            slot.park();
            let rivals: std::vec::Vec<_> = [1u64, 2]
                .into_iter()
                .map(|id| {
                    let slot = Arc::clone(&slot);
                    thread::spawn(move || {
                        slot.order(StartOrder {
                            entry: id,
                            context: id,
                        })
                        .is_ok()
                    })
                })
                .collect();
            let early = slot.take_order();
            let wins = rivals.into_iter().map(|r| r.join().unwrap());
            let wins = wins.filter(|won| *won).count();
            let order = early.or_else(|| slot.take_order()).unwrap();
            assert_eq!(order.entry, order.context);
            assert_eq!(wins, 1);
        });
    }
}
