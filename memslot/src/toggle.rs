//! Set/way operations and cache-enable changes of an arm64 guest.
//!
//! A guest that switches its caches expects maintenance by set and way to move data between
//! them and memory. Set/way acts on one CPU's caches and cannot be virtualised; so it traps
//! (HCR_EL2.TSW), and the whole stage 2 is cleaned and invalidated by address instead, once. From
//! then on writes of SCTLR_EL1 trap, too (HCR_EL2.TVM), and every switch of the caches does it
//! again, until they are on.
//!
//! | state | event | flush | next state |
//! |---|---|---|---|
//! | Watching | set/way | no: the coming switch does it | Watching |
//! | Watching | caches off → on | yes | Quiet |
//! | Watching | caches on → off | yes | Watching |
//! | Watching | no change | no | Watching; Quiet if they are on |
//! | Quiet | set/way | yes | Watching |
//!
//! A flush costs nothing for leaves that force write-back: the walker skips them.

/// Whether writes of SCTLR_EL1 trap on this vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheWatch {
    /// HCR_EL2.TVM is set. A vCPU starts so, with its caches off.
    #[default]
    Watching,
    /// HCR_EL2.TVM is clear.
    Quiet,
}

/// What to do for a trapped operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Flush {
    /// Clean and invalidate every page of the guest that needs it.
    All,
    /// Nothing.
    None,
}

/// SCTLR_EL1.M, the MMU, and SCTLR_EL1.C, data caches (Arm ARM D19.2, SCTLR_EL1).
const M: u64 = 0b001;
const C: u64 = 0b100;

/// Whether a guest with this SCTLR_EL1 uses its data caches.
#[must_use]
pub const fn caches_enabled(sctlr: u64) -> bool {
    sctlr & (M | C) == M | C
}

impl CacheWatch {
    /// The guest executed a data cache operation by set and way.
    pub fn set_way(&mut self) -> Flush {
        match core::mem::replace(self, Self::Watching) {
            Self::Watching => Flush::None,
            Self::Quiet => Flush::All,
        }
    }

    /// The guest's SCTLR_EL1 has changed from `old` to `new`.
    pub fn sctlr_written(&mut self, old: u64, new: u64) -> Flush {
        let (was_on, now_on) = (caches_enabled(old), caches_enabled(new));
        if now_on {
            *self = Self::Quiet;
        }
        if was_on == now_on {
            Flush::None
        } else {
            Flush::All
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: u64 = 0b101;

    #[test]
    fn caches_need_mmu_and_c() {
        assert!(caches_enabled(ON) && caches_enabled(0x30d0_1805));
        assert!(!caches_enabled(0b001) && !caches_enabled(0b100) && !caches_enabled(0));
    }

    #[test]
    fn turning_caches_on_flushes_once_and_stops_watching() {
        let mut w = CacheWatch::default();
        assert_eq!(w.sctlr_written(0b001, ON), Flush::All);
        assert_eq!(w, CacheWatch::Quiet);
    }

    #[test]
    fn turning_caches_off_flushes_and_keeps_watching() {
        let mut w = CacheWatch::Watching;
        assert_eq!(w.sctlr_written(ON, 0b001), Flush::All);
        assert_eq!(w, CacheWatch::Watching);
    }

    #[test]
    fn other_bits_of_sctlr_do_nothing() {
        let mut w = CacheWatch::Watching;
        assert_eq!(w.sctlr_written(0, 0b001), Flush::None);
        assert_eq!(w, CacheWatch::Watching);
        assert_eq!(w.sctlr_written(ON, ON | 0x1000), Flush::None);
        assert_eq!(w, CacheWatch::Quiet);
    }

    #[test]
    fn set_way_flushes_once_until_the_caches_are_on_again() {
        let mut w = CacheWatch::Quiet;
        assert_eq!(w.set_way(), Flush::All);
        assert_eq!(w, CacheWatch::Watching);
        assert_eq!(w.set_way(), Flush::None);
        assert_eq!(w.sctlr_written(0, ON), Flush::All);
        assert_eq!(w.set_way(), Flush::All);
    }
}
