//! Single TLB instructions for stage 2, and nothing else: their order, operands and repetition are
//! `stage2::arm`'s, where a test fails for each step that is missing or swapped.

use core::sync::atomic::{AtomicU64, Ordering};

use el2::features::Features;
use stage2::arm::{ArmTlb, ArmTlbFacts, ArmTlbOps, LevelHint, Repeat};
use stage2::{Granule, RangeOps};

use super::host_regs::Stage2Regs;
use super::instructions;
use super::regs::{mrs, msr};

/// What translations are tagged with. The instructions work for the VMID in VTTBR_EL2, which
/// [`TlbOps`] loads, so there is nothing to say here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tagged;

/// The instructions, for the translations of one stage 2.
#[derive(Debug)]
pub(crate) struct TlbOps {
    /// VTTBR_EL2 that selects it; 0 while it has no root: then nothing is loaded and nothing can
    /// be cached.
    vttbr: AtomicU64,
    vtcr: u64,
    /// See [`Features::speculative_at`].
    speculative_at: bool,
}

impl TlbOps {
    /// Makes `vttbr` what the instructions work for, once there is a root.
    pub(crate) fn set_root(&self, vttbr: u64) {
        self.vttbr.store(vttbr, Ordering::Release);
    }
}

/// What was loaded before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loaded {
    stage2: Stage2Regs,
    tcr: u64,
    sctlr: u64,
}

/// Entries beyond which the whole VMID is invalidated.
const WHOLE_BEYOND: u64 = 512;

/// TCR_EL1.EPD0 and EPD1: no walks with either root.
pub(crate) const NO_WALKS: u64 = 1 << 7 | 1 << 23;
/// SCTLR_EL1.M: with the MMU on, EPD0 and EPD1 do forbid walks.
pub(crate) const MMU_ON: u64 = 1;

/// Stage-2 invalidation for this machine's cores.
pub(crate) fn invalidation(features: &Features, vtcr: u64) -> ArmTlb<TlbOps> {
    let ops = TlbOps {
        vttbr: AtomicU64::new(0),
        vtcr,
        speculative_at: features.speculative_at,
    };
    let offered = |yes| {
        if yes {
            RangeOps::Offered
        } else {
            RangeOps::Missing
        }
    };
    ArmTlb::new(
        ops,
        ArmTlbFacts {
            granule: Granule::K4,
            hint: if features.ttl {
                LevelHint::Offered
            } else {
                LevelHint::Missing
            },
            range_ops: offered(features.tlbi_range),
            whole_beyond: WHOLE_BEYOND,
            repeat: if features.repeat_tlbi {
                Repeat::Yes
            } else {
                Repeat::No
            },
        },
    )
}

/// Writes registers that only govern EL1 and EL0, and waits. Nothing runs at EL1 on this core until
/// what was loaded is back.
macro_rules! switch {
    ($($name:literal = $value:expr),+) => {
        $(msr!($name, $value);)+
        instructions::isb();
    };
}

macro_rules! instruction {
    ($name:ident) => {
        fn $name(&self) {
            instructions::$name();
        }
    };
    ($name:ident, operand) => {
        fn $name(&self, operand: u64) {
            instructions::$name(operand);
        }
    };
}

impl ArmTlbOps for TlbOps {
    type Context = Tagged;
    type Saved = Option<Loaded>;

    instruction!(dsb_ishst);
    instruction!(dsb_ish);
    instruction!(isb);
    instruction!(tlbi_ipas2e1is, operand);
    instruction!(tlbi_ripas2e1is, operand);
    instruction!(tlbi_vmalle1is);
    instruction!(tlbi_vmalls12e1is);

    /// Loads the root, too, not just the VMID: a walk that the core makes ahead must find the
    /// tables that belong to it.
    fn enter(&self, _: Tagged) -> Option<Loaded> {
        let wanted = self.vttbr.load(Ordering::Acquire);
        let vttbr = mrs!("vttbr_el2");
        if wanted == 0 || vttbr == wanted {
            return None;
        }
        let loaded = Loaded {
            stage2: Stage2Regs {
                vttbr,
                vtcr: mrs!("vtcr_el2"),
            },
            tcr: mrs!("tcr_el1"),
            sctlr: mrs!("sctlr_el1"),
        };
        if self.speculative_at {
            switch!("tcr_el1" = loaded.tcr | NO_WALKS);
            switch!("sctlr_el1" = loaded.sctlr | MMU_ON);
        }
        switch!("vtcr_el2" = self.vtcr, "vttbr_el2" = wanted);
        Some(loaded)
    }

    fn leave(&self, loaded: Option<Loaded>) {
        let Some(loaded) = loaded else { return };
        let Stage2Regs { vtcr, vttbr } = loaded.stage2;
        switch!("vtcr_el2" = vtcr, "vttbr_el2" = vttbr);
        if self.speculative_at {
            switch!("sctlr_el1" = loaded.sctlr);
            switch!("tcr_el1" = loaded.tcr);
        }
    }
}
