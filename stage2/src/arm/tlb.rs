//! Stage-2 invalidation (Arm ARM D8.17, D8.16.1, and rule ILRXYX for the two stages).
//!
//! For one address, broadcast: the stores are published (`dsb ishst`), the guest's VMID is
//! loaded if another is, `tlbi ipas2e1is`, `dsb ish`, `tlbi vmalle1is`, `dsb ish`, `isb`, and
//! what was loaded before comes back. Stage 1 goes *after* stage 2 is complete: an entry that
//! combines both stages is not tagged by IPA, so only `vmalle1is` reaches it, and one made from
//! the old stage-2 entry in between would survive.

use super::operand::{RangeOp, TlbiOps, ipa_operand};
use crate::addr::IpaRange;
use crate::format::Granule;
use crate::level::Level;
use crate::platform::{RangeOps, TlbCaps, TlbInvalidate};

/// Single instructions. Nothing here orders, waits, or computes.
pub trait ArmTlbOps {
    /// What selects a guest: VMID and root.
    type Context: Copy;
    /// What was loaded before.
    type Saved;

    /// `dsb ishst`
    #[track_caller]
    fn dsb_ishst(&self);
    /// `dsb ish`
    #[track_caller]
    fn dsb_ish(&self);
    /// `isb`
    #[track_caller]
    fn isb(&self);
    /// Loads the guest's context if another is loaded, with the CPU's errata around it (1319367,
    /// 1165522: no speculative walks while two contexts mix), and returns what was there.
    #[track_caller]
    fn enter(&self, context: Self::Context) -> Self::Saved;
    /// Loads back what `enter` returned, not what it was given.
    #[track_caller]
    fn leave(&self, saved: Self::Saved);
    /// `tlbi ipas2e1is, operand`
    #[track_caller]
    fn tlbi_ipas2e1is(&self, operand: u64);
    /// `tlbi ripas2e1is, operand`
    #[track_caller]
    fn tlbi_ripas2e1is(&self, operand: u64);
    /// `tlbi vmalle1is`
    #[track_caller]
    fn tlbi_vmalle1is(&self);
    /// `tlbi vmalls12e1is`
    #[track_caller]
    fn tlbi_vmalls12e1is(&self);
}

/// Whether TLBI takes level hints (FEAT_TTL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LevelHint {
    /// It does.
    Offered,
    /// The field is reserved.
    Missing,
}

/// Whether each invalidation is to be issued twice (erratum 1286807, Cortex-A76).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// Once.
    No,
    /// Twice, each with its barrier.
    Yes,
}

/// Facts about the CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmTlbFacts {
    /// Granule of the tables.
    pub granule: Granule,
    /// FEAT_TTL.
    pub hint: LevelHint,
    /// FEAT_TLBIRANGE; say missing for tables with VTCR_EL2.DS set.
    pub range_ops: RangeOps,
    /// Single operations beyond which the whole VMID is cheaper; to be measured.
    pub whole_beyond: u64,
    /// Erratum 1286807.
    pub repeat: Repeat,
}

/// [`TlbInvalidate`] over single instructions.
#[derive(Clone, Copy, Debug)]
pub struct ArmTlb<I> {
    ops: I,
    facts: ArmTlbFacts,
}

impl<I: ArmTlbOps> ArmTlb<I> {
    /// The sequences for these CPUs.
    pub const fn new(ops: I, facts: ArmTlbFacts) -> Self {
        Self { ops, facts }
    }

    /// The instructions underneath.
    pub const fn ops(&self) -> &I {
        &self.ops
    }

    fn issue_stage_2(&self, range: &IpaRange, level: Option<Level>) {
        let ArmTlbFacts { granule, hint, .. } = self.facts;
        if self.facts.range_ops == RangeOps::Offered {
            for op in TlbiOps::new(range, granule, level) {
                match op {
                    RangeOp::Page(operand) => self.ops.tlbi_ipas2e1is(operand),
                    RangeOp::Range(operand) => self.ops.tlbi_ripas2e1is(operand),
                }
            }
            return;
        }
        let index_bits = u32::from(granule.page_shift()) - 3;
        let height = level.map_or(0, Level::height);
        let stride = 1 << (u32::from(granule.page_shift()) + index_bits * height);
        let mut ipa = range.start().get() & !(stride - 1);
        while ipa < range.end().get() {
            self.ops
                .tlbi_ipas2e1is(ipa_operand(ipa, granule, level, hint));
            ipa += stride;
        }
    }

    fn rounds(&self) -> u32 {
        if self.facts.repeat == Repeat::Yes {
            2
        } else {
            1
        }
    }

    /// Publishes, runs `body` in the guest's context, and comes back.
    fn in_context(&self, context: I::Context, body: impl FnOnce()) {
        self.ops.dsb_ishst();
        let saved = self.ops.enter(context);
        self.ops.isb();
        body();
        self.ops.leave(saved);
        self.ops.isb();
    }
}

impl<I: ArmTlbOps> TlbInvalidate for ArmTlb<I> {
    type Context = I::Context;

    fn invalidate_range(&self, context: I::Context, range: IpaRange, level: Option<Level>) {
        self.in_context(context, || {
            for _ in 0..self.rounds() {
                self.issue_stage_2(&range, level);
                self.ops.dsb_ish();
            }
            for _ in 0..self.rounds() {
                self.ops.tlbi_vmalle1is();
                self.ops.dsb_ish();
            }
            self.ops.isb();
        });
    }

    fn invalidate_all(&self, context: I::Context) {
        self.in_context(context, || {
            for _ in 0..self.rounds() {
                self.ops.tlbi_vmalls12e1is();
                self.ops.dsb_ish();
            }
            self.ops.isb();
        });
    }

    fn caps(&self) -> TlbCaps {
        let ArmTlbFacts {
            range_ops,
            whole_beyond,
            ..
        } = self.facts;
        TlbCaps {
            range_ops,
            whole_beyond,
        }
    }
}

impl<I: ArmTlbOps> ArmTlbOps for &I {
    type Context = I::Context;
    type Saved = I::Saved;
    #[track_caller]
    fn dsb_ishst(&self) {
        I::dsb_ishst(self);
    }
    #[track_caller]
    fn dsb_ish(&self) {
        I::dsb_ish(self);
    }
    #[track_caller]
    fn isb(&self) {
        I::isb(self);
    }
    #[track_caller]
    fn enter(&self, context: I::Context) -> I::Saved {
        I::enter(self, context)
    }
    #[track_caller]
    fn leave(&self, saved: I::Saved) {
        I::leave(self, saved);
    }
    #[track_caller]
    fn tlbi_ipas2e1is(&self, operand: u64) {
        I::tlbi_ipas2e1is(self, operand);
    }
    #[track_caller]
    fn tlbi_ripas2e1is(&self, operand: u64) {
        I::tlbi_ripas2e1is(self, operand);
    }
    #[track_caller]
    fn tlbi_vmalle1is(&self) {
        I::tlbi_vmalle1is(self);
    }
    #[track_caller]
    fn tlbi_vmalls12e1is(&self) {
        I::tlbi_vmalls12e1is(self);
    }
}
