//! Cache maintenance by address (Arm ARM B2.4.6 and D7.5).

use crate::addr::{Pa, PaRange};
use crate::platform::CacheMaintenance;

/// Single instructions. The address is physical: the implementor knows where it maps it.
pub trait ArmCacheOps {
    /// `dc civac`: clean *and* invalidate, to the point of *coherency*.
    #[track_caller]
    fn dc_civac(&self, line: Pa);
    /// `dc cvau`: clean to the point of unification.
    #[track_caller]
    fn dc_cvau(&self, line: Pa);
    /// `ic ivau`
    #[track_caller]
    fn ic_ivau(&self, line: Pa);
    /// `ic ialluis`
    #[track_caller]
    fn ic_ialluis(&self);
    /// `dsb ishst`
    #[track_caller]
    fn dsb_ishst(&self);
    /// `dsb ish`
    #[track_caller]
    fn dsb_ish(&self);
    /// `dsb sy`: memory outside the inner-shareable domain sees it, too.
    #[track_caller]
    fn dsb_sy(&self);
    /// `isb`
    #[track_caller]
    fn isb(&self);
}

/// How instruction caches are invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchPolicy {
    /// Hardware keeps them coherent (CTR_EL0.DIC).
    Coherent,
    /// By line.
    ByLine,
    /// All of it: an aliasing (VIPT) cache holds a line at places an address does not name.
    Everything,
}

/// Facts from CTR_EL0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmCacheFacts {
    /// Smallest data cache line in bytes, a power of two (4 << DminLine).
    pub data_line: u64,
    /// Smallest instruction cache line in bytes, a power of two (4 << IminLine).
    pub fetch_line: u64,
    /// Whether fetches see data that was not cleaned to the point of unification (IDC).
    pub data_seen_by_fetch: bool,
    /// Instruction caches.
    pub fetch: FetchPolicy,
}

/// [`CacheMaintenance`] over single instructions.
#[derive(Clone, Copy, Debug)]
pub struct ArmCache<I> {
    ops: I,
    facts: ArmCacheFacts,
}

impl<I: ArmCacheOps> ArmCache<I> {
    /// The sequences for these caches.
    pub const fn new(ops: I, facts: ArmCacheFacts) -> Self {
        Self { ops, facts }
    }

    /// The instructions underneath.
    pub const fn ops(&self) -> &I {
        &self.ops
    }
}

/// Every line that holds a byte of the range.
fn lines(range: &PaRange, size: u64) -> impl Iterator<Item = Pa> {
    let first = range.start().get() & !(size - 1);
    let count = (range.end().get() - first).div_ceil(size);
    (0..count).map(move |n| Pa::new(first + n * size))
}

impl<I: ArmCacheOps> CacheMaintenance for ArmCache<I> {
    fn clean_invalidate_data(&self, range: PaRange) {
        for line in lines(&range, self.facts.data_line) {
            self.ops.dc_civac(line);
        }
        self.ops.dsb_sy();
    }

    fn invalidate_fetch(&self, range: PaRange) {
        if !self.facts.data_seen_by_fetch {
            for line in lines(&range, self.facts.data_line) {
                self.ops.dc_cvau(line);
            }
            self.ops.dsb_ish();
        }
        match self.facts.fetch {
            FetchPolicy::Coherent => {}
            FetchPolicy::ByLine => {
                for line in lines(&range, self.facts.fetch_line) {
                    self.ops.ic_ivau(line);
                }
                self.ops.dsb_ish();
            }
            FetchPolicy::Everything => {
                self.ops.ic_ialluis();
                self.ops.dsb_ish();
            }
        }
        self.ops.isb();
    }

    fn publish(&self) {
        self.ops.dsb_ishst();
    }
}

impl<I: ArmCacheOps> ArmCacheOps for &I {
    #[track_caller]
    fn dc_civac(&self, line: Pa) {
        I::dc_civac(self, line);
    }
    #[track_caller]
    fn dc_cvau(&self, line: Pa) {
        I::dc_cvau(self, line);
    }
    #[track_caller]
    fn ic_ivau(&self, line: Pa) {
        I::ic_ivau(self, line);
    }
    #[track_caller]
    fn ic_ialluis(&self) {
        I::ic_ialluis(self);
    }
    #[track_caller]
    fn dsb_ishst(&self) {
        I::dsb_ishst(self);
    }
    #[track_caller]
    fn dsb_ish(&self) {
        I::dsb_ish(self);
    }
    #[track_caller]
    fn dsb_sy(&self) {
        I::dsb_sy(self);
    }
    #[track_caller]
    fn isb(&self) {
        I::isb(self);
    }
}
