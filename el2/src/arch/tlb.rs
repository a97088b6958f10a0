//! Single TLB instructions for stage 2, and nothing else: their order, operands and repetition are
//! `stage2::arm`'s, where a test fails for each step that is missing or swapped.

use core::arch::asm;

use el2::features::Features;
use stage2::arm::{ArmTlb, ArmTlbFacts, ArmTlbOps, LevelHint, Repeat};
use stage2::{Granule, RangeOps};

/// VMID of the host (design: 0; guests have their index in the VM table plus one).
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostVmid;

/// The instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TlbOps;

/// Entries beyond which the whole VMID is invalidated.
const WHOLE_BEYOND: u64 = 512;

/// Stage-2 invalidation for this machine's cores.
pub(crate) fn for_host(features: &Features) -> ArmTlb<TlbOps> {
    ArmTlb::new(
        TlbOps,
        ArmTlbFacts {
            granule: Granule::K4,
            hint: if features.ttl {
                LevelHint::Offered
            } else {
                LevelHint::Missing
            },
            range_ops: if features.tlbi_range {
                RangeOps::Offered
            } else {
                RangeOps::Missing
            },
            whole_beyond: WHOLE_BEYOND,
            repeat: if features.repeat_tlbi {
                Repeat::Yes
            } else {
                Repeat::No
            },
        },
    )
}

macro_rules! instruction {
    ($name:ident, $text:literal) => {
        fn $name(&self) {
            // SAFETY: a barrier, or an invalidation that loses nothing a walk does not bring back.
            unsafe { asm!($text, options(nostack, preserves_flags)) };
        }
    };
    ($name:ident, $text:literal, operand) => {
        fn $name(&self, operand: u64) {
            // SAFETY: an invalidation loses nothing that a walk does not bring back.
            unsafe { asm!($text, in(reg) operand, options(nostack, preserves_flags)) };
        }
    };
}

impl ArmTlbOps for TlbOps {
    type Context = HostVmid;
    type Saved = ();

    instruction!(dsb_ishst, "dsb ishst");
    instruction!(dsb_ish, "dsb ish");
    instruction!(isb, "isb");
    instruction!(tlbi_ipas2e1is, "tlbi ipas2e1is, {}", operand);
    // TLBI RIPAS2E1IS by its encoding: assemblers know the name only with FEAT_TLBIRANGE.
    instruction!(tlbi_ripas2e1is, "sys #4, c8, c0, #2, {}", operand);
    instruction!(tlbi_vmalle1is, "tlbi vmalle1is");
    instruction!(tlbi_vmalls12e1is, "tlbi vmalls12e1is");

    /// Nothing to load: while EL2 works for the host, and at boot from the moment its table
    /// exists, VTTBR_EL2 holds the host's VMID.
    fn enter(&self, _: HostVmid) {}

    fn leave(&self, (): ()) {}
}
