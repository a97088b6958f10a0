//! From register writes and CD toggles to ranges of leaves whose type changes.
//!
//! Invariant: a plan covers every page whose type, as decided for this vCPU, differs between
//! the old and the new registers. It may cover more, never less.

use crate::addr::GfnRange;
use crate::mtrr::{GeneralProtection, Msr, Mtrrs, VariableRange};
use crate::pat::X86Type;
use crate::policy::{CdQuirk, EptPolicy, VcpuTypes};

/// The fixed area and eight variable pairs.
const MAX_RANGES: usize = 9;

/// Ranges to zap; may be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct ZapPlan {
    ranges: [GfnRange; MAX_RANGES],
    len: usize,
}

impl ZapPlan {
    /// Nothing.
    pub const NONE: Self = Self {
        ranges: [GfnRange::ALL; MAX_RANGES],
        len: 0,
    };
    /// Everything.
    pub const ALL: Self = Self {
        ranges: [GfnRange::ALL; MAX_RANGES],
        len: 1,
    };

    /// The ranges, in no order; they may overlap.
    #[must_use]
    pub fn ranges(&self) -> &[GfnRange] {
        self.ranges.get(..self.len).unwrap_or(&self.ranges)
    }

    /// Adds a range; a plan that is full becomes everything.
    fn add(&mut self, range: GfnRange) {
        match self.ranges.get_mut(self.len) {
            Some(free) => {
                *free = range;
                self.len += 1;
            }
            None => *self = Self::ALL,
        }
    }

    fn with(mut self, range: Option<GfnRange>) -> Self {
        if let Some(range) = range {
            self.add(range);
        }
        self
    }
}

/// Stores a guest's write to a memory-type register and says what to zap.
///
/// # Errors
/// [`GeneralProtection`]; nothing has changed then.
pub fn write_msr(
    policy: &EptPolicy,
    noncoherent_dma: bool,
    vcpu: &mut VcpuTypes,
    msr: Msr,
    value: u64,
) -> Result<ZapPlan, GeneralProtection> {
    let old = vcpu.mtrrs.clone();
    vcpu.mtrrs.write(msr, value)?;
    // CD outranks MTRRs, and its toggles are always acted upon: under CD no type changes.
    let counts = policy.honoured_quirk(noncoherent_dma).is_some() && !vcpu.cd;
    Ok(if counts {
        changed_by_write(&old, &vcpu.mtrrs, msr)
    } else {
        ZapPlan::NONE
    })
}

fn changed_by_write(old: &Mtrrs, new: &Mtrrs, msr: Msr) -> ZapPlan {
    let enabled = new.enabled();
    match msr {
        Msr::Pat | Msr::Capability => ZapPlan::NONE,
        Msr::DefaultType => changed_by_default(old, new),
        _ if !enabled || old == new => ZapPlan::NONE,
        Msr::Fixed(_) if !new.fixed_enabled() => ZapPlan::NONE,
        Msr::Fixed(n) => ZapPlan::NONE.with(Msr::fixed_span(n)),
        Msr::VariableBase(n) | Msr::VariableMask(n) => {
            let span = |m: &Mtrrs| {
                let pair = m.variable().get(usize::from(n));
                pair.filter(|p| p.is_valid()).map(VariableRange::span)
            };
            // Where the pair was and where it is: moving a live range leaves stale leaves at
            // its old place.
            ZapPlan::NONE.with(span(old)).with(span(new))
        }
    }
}

fn changed_by_default(old: &Mtrrs, new: &Mtrrs) -> ZapPlan {
    let both_off = !old.enabled() && !new.enabled();
    if both_off || old == new {
        return ZapPlan::NONE;
    }
    let only_fixed = old.enabled() == new.enabled() && old.default_type() == new.default_type();
    if only_fixed {
        ZapPlan::NONE.with(FIXED_AREA)
    } else {
        ZapPlan::ALL
    }
}

/// The first MiB as one range: duplicates of it are easy to find.
const FIXED_AREA: Option<GfnRange> = GfnRange::new(0, 0x100);

/// Stores a guest's write of CR0.CD and says what to zap. Both directions have the same ranges,
/// because MTRRs do not change across the toggle.
pub fn set_cd(
    policy: &EptPolicy,
    noncoherent_dma: bool,
    vcpu: &mut VcpuTypes,
    cd: bool,
) -> ZapPlan {
    let changed = core::mem::replace(&mut vcpu.cd, cd) != cd;
    match policy.honoured_quirk(noncoherent_dma) {
        // Leaves under CD ignore PAT and are UC: nothing else looks like that.
        Some(CdQuirk::Uncached) if changed => ZapPlan::ALL,
        Some(CdQuirk::WriteBack) if changed => not_write_back(&vcpu.mtrrs),
        _ => ZapPlan::NONE,
    }
}

/// Where the MTRR type may differ from WB.
fn not_write_back(mtrrs: &Mtrrs) -> ZapPlan {
    let base_type = if mtrrs.enabled() {
        mtrrs.default_type()
    } else {
        mtrrs.disabled_type()
    };
    if base_type != X86Type::Wb {
        return ZapPlan::ALL;
    }
    let mut plan = ZapPlan::NONE;
    if !mtrrs.enabled() {
        return plan;
    }
    let wb = X86Type::Wb.byte();
    if mtrrs.fixed_enabled() && mtrrs.fixed_bytes().iter().any(|&b| b != wb) {
        plan = plan.with(FIXED_AREA);
    }
    // A WB range needs no look: where another type covers it, that range is here, too.
    for pair in mtrrs
        .variable()
        .iter()
        .filter(|p| p.is_valid() && p.kind() != X86Type::Wb)
    {
        plan.add(pair.span());
    }
    plan
}

#[cfg(test)]
mod tests;
