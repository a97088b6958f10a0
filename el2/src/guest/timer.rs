//! A timer that EL2 emulates: the guest's EL1 physical timer, whose registers trap.
//!
//! The real one keeps the host's time. Source: Arm ARM (DDI 0487) D12.2.4 "Operation of the
//! CompareValue views of the timers" and "TimerValue views", D24.10 CNTP_*_EL0.

/// Register of a timer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TimerRegister {
    /// CNTP_TVAL_EL0: signed 32-bit ticks from now.
    Tval,
    /// CNTP_CTL_EL0.
    Ctl,
    /// CNTP_CVAL_EL0.
    Cval,
}

const ENABLE: u64 = 1;
const IMASK: u64 = 1 << 1;
const ISTATUS: u64 = 1 << 2;

/// State of the timer. All times are in ticks of the counter it compares with, which the caller
/// gives as `now`: CNTPCT_EL0 if the guest reads that one directly.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct EmulatedTimer {
    ctl: u64,
    cval: u64,
}

impl EmulatedTimer {
    /// Off, as after reset.
    #[must_use]
    pub const fn new() -> Self {
        Self { ctl: 0, cval: 0 }
    }

    /// What the guest reads.
    #[must_use]
    pub const fn read(&self, register: TimerRegister, now: u64) -> u64 {
        match register {
            TimerRegister::Tval => self.cval.wrapping_sub(now) & 0xffff_ffff,
            TimerRegister::Cval => self.cval,
            TimerRegister::Ctl if self.condition_met(now) => self.ctl | ISTATUS,
            TimerRegister::Ctl => self.ctl,
        }
    }

    /// The guest writes; afterwards look at [`Self::asserted`] and [`Self::deadline`] again.
    pub const fn write(&mut self, register: TimerRegister, value: u64, now: u64) {
        match register {
            TimerRegister::Tval => self.cval = now.wrapping_add(sign_extend_32(value)),
            TimerRegister::Cval => self.cval = value,
            TimerRegister::Ctl => self.ctl = value & (ENABLE | IMASK),
        }
    }

    /// Level of the timer's interrupt.
    #[must_use]
    pub const fn asserted(&self, now: u64) -> bool {
        self.condition_met(now) && self.ctl & IMASK == 0
    }

    /// When the interrupt is asserted; it may lie in the past. `None`: not by time alone.
    #[must_use]
    pub const fn deadline(&self) -> Option<u64> {
        if self.ctl & (ENABLE | IMASK) == ENABLE {
            Some(self.cval)
        } else {
            None
        }
    }

    /// The comparison is unsigned: a compare value far ahead never wraps into the past.
    const fn condition_met(&self, now: u64) -> bool {
        self.ctl & ENABLE != 0 && now >= self.cval
    }
}

const fn sign_extend_32(value: u64) -> u64 {
    ((value << 32).cast_signed() >> 32).cast_unsigned()
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::TimerRegister::{Ctl, Cval, Tval};
    use super::*;

    #[test]
    fn fires_at_the_compare_value_and_not_before() {
        let mut timer = EmulatedTimer::new();
        timer.write(Cval, 1000, 0);
        assert_eq!(timer.deadline(), None);
        timer.write(Ctl, 1, 0);
        assert_eq!(timer.deadline(), Some(1000));
        assert!(!timer.asserted(999) && timer.asserted(1000));
        assert_eq!((timer.read(Ctl, 999), timer.read(Ctl, 1000)), (1, 5));
    }

    #[test]
    fn mask_hides_the_interrupt_but_not_its_status() {
        let mut timer = EmulatedTimer::new();
        timer.write(Ctl, 3, 0);
        assert!(!timer.asserted(5));
        assert_eq!((timer.read(Ctl, 5), timer.deadline()), (7, None));
    }

    #[test]
    fn status_and_reserved_bits_cannot_be_written() {
        let mut timer = EmulatedTimer::new();
        timer.write(Cval, u64::MAX, 0);
        timer.write(Ctl, u64::MAX, 0);
        assert_eq!(timer.read(Ctl, 0), 3);
    }

    #[test]
    fn timer_value_is_signed_and_32_bits_wide() {
        let mut timer = EmulatedTimer::new();
        timer.write(Tval, 0xffff_ffff, 100);
        assert_eq!(timer.read(Cval, 0), 99);
        timer.write(Tval, 0xdead_0000_0010, 100);
        assert_eq!(timer.read(Cval, 0), 116);
        assert_eq!(timer.read(Tval, 117), 0xffff_ffff);
    }

    #[test]
    fn a_compare_value_far_ahead_is_not_in_the_past() {
        let mut timer = EmulatedTimer::new();
        timer.write(Ctl, 1, 0);
        timer.write(Cval, u64::MAX, 0);
        assert!(!timer.asserted(1 << 62));
    }

    proptest! {
        /// TVAL read back at once is what was written.
        #[test]
        fn timer_values_survive(value: u32, now: u64) {
            let mut timer = EmulatedTimer::new();
            timer.write(Tval, u64::from(value), now);
            prop_assert_eq!(timer.read(Tval, now), u64::from(value));
        }
    }
}
