//! arm64: forced write-back where the CPU can, the guest's own type where a device needs it.

use stage2::{Combine, Device, MemType};

use super::{LeafType, MemTypePolicy, TypeQuery};
#[cfg(feature = "x86")]
use crate::pat::X86Type;
use crate::slot::{SlotFlags, SlotKind};

/// What stage 2 can say about cacheability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArmCaches {
    /// FEAT_S2FWB: a leaf can force write-back (Arm ARM D8.6, "Stage 2 memory type and
    /// Cacheability attributes when FEAT_S2FWB is implemented").
    ForcedWriteBack,
    /// A leaf can only weaken the guest's type; coherency is made by maintenance.
    Maintenance,
}

/// The policy of an arm64 VM.
///
/// | page | count 0, unflagged | count > 0 or flagged |
/// |---|---|---|
/// | RAM, FWB | MemAttr 6 | MemAttr 7 |
/// | RAM, no FWB | 0xF | 0xF |
/// | MMIO | 1 | 1 |
/// | MMIO, write combining | 5 | 5 |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmPolicy {
    /// What the CPUs can do; all of them alike.
    pub caches: ArmCaches,
}

impl ArmPolicy {
    fn decide(self, query: &TypeQuery) -> LeafType {
        let flagged = query.flags.contains(SlotFlags::NONCOHERENT_DMA);
        match query.kind {
            SlotKind::Mmio if query.flags.contains(SlotFlags::WRITE_COMBINING) => {
                LeafType::MmioWriteCombining
            }
            SlotKind::Mmio => LeafType::Mmio,
            SlotKind::Ram if flagged || query.noncoherent_dma => LeafType::HonourGuest,
            SlotKind::Ram => LeafType::ForceWb,
        }
    }
}

impl MemTypePolicy for ArmPolicy {
    type Vcpu = ();
    const VARIES_WITHIN_SLOT: bool = false;

    fn leaf_type(&self, query: &TypeQuery, _vcpu: &()) -> LeafType {
        self.decide(query)
    }

    fn slot_type(&self, query: &TypeQuery) -> Option<LeafType> {
        Some(self.decide(query))
    }

    /// Types are per slot here, and a block never leaves its slot.
    fn is_uniform(&self, _query: &TypeQuery, _vcpu: &(), _order: u32) -> bool {
        true
    }

    /// Without FWB both states of the count have the descriptor 0xF: nothing to rewrite.
    fn depends_on_noncoherent_dma(&self) -> bool {
        self.caches == ArmCaches::ForcedWriteBack
    }

    fn asks_vcpu(&self) -> bool {
        false
    }

    /// Decided by the leaf, not by the CPU's feature alone: with FWB a leaf that honours the
    /// guest needs maintenance as without.
    fn needs_maintenance(&self, leaf: LeafType) -> bool {
        match leaf {
            LeafType::Mmio | LeafType::MmioWriteCombining => false,
            LeafType::ForceWb => self.caches == ArmCaches::Maintenance,
            LeafType::HonourGuest | LeafType::ForceUncached => true,
            #[cfg(feature = "x86")]
            LeafType::GuestRange(_) => true,
        }
    }

    #[inline]
    fn encode(&self, leaf: LeafType) -> (MemType, Combine) {
        let fwb = self.caches == ArmCaches::ForcedWriteBack;
        let mem = match leaf {
            LeafType::ForceWb if fwb => return (MemType::WriteBack, Combine::ForceStage2),
            LeafType::ForceWb | LeafType::HonourGuest => MemType::WriteBack,
            LeafType::Mmio => MemType::Device(Device::NGnRE),
            LeafType::MmioWriteCombining | LeafType::ForceUncached => MemType::NonCacheable,
            #[cfg(feature = "x86")]
            LeafType::GuestRange(kind) => nearest(kind, fwb),
        };
        (mem, Combine::HonourGuest)
    }
}

/// The type of an x86 range register on Arm. There is no stage-2 write-through with FWB;
/// non-cacheable is the safe substitute: writes reach memory and reads are never stale.
#[cfg(feature = "x86")]
fn nearest(kind: X86Type, fwb: bool) -> MemType {
    match kind {
        X86Type::Wb => MemType::WriteBack,
        X86Type::Wt if !fwb => MemType::WriteThrough,
        _ => MemType::NonCacheable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::gfn;

    const FWB: ArmPolicy = ArmPolicy {
        caches: ArmCaches::ForcedWriteBack,
    };
    const PLAIN: ArmPolicy = ArmPolicy {
        caches: ArmCaches::Maintenance,
    };

    fn query(kind: SlotKind, flags: SlotFlags, noncoherent_dma: bool) -> TypeQuery {
        TypeQuery {
            gfn: gfn(0x100),
            kind,
            flags,
            noncoherent_dma,
        }
    }

    fn encoded(p: ArmPolicy, kind: SlotKind, flags: SlotFlags, ncd: bool) -> (MemType, Combine) {
        p.encode(p.leaf_type(&query(kind, flags, ncd), &()))
    }

    #[test]
    fn ram_without_noncoherent_dma_is_forced_write_back_with_fwb() {
        let t = encoded(FWB, SlotKind::Ram, SlotFlags::empty(), false);
        assert_eq!(t, (MemType::WriteBack, Combine::ForceStage2));
    }

    #[test]
    fn ram_with_noncoherent_dma_honours_the_guest_with_fwb() {
        let t = encoded(FWB, SlotKind::Ram, SlotFlags::empty(), true);
        assert_eq!(t, (MemType::WriteBack, Combine::HonourGuest));
    }

    #[test]
    fn a_flagged_slot_honours_the_guest_whatever_the_count() {
        for count in [false, true] {
            let t = encoded(FWB, SlotKind::Ram, SlotFlags::NONCOHERENT_DMA, count);
            assert_eq!(t, (MemType::WriteBack, Combine::HonourGuest));
        }
    }

    #[test]
    fn ram_without_fwb_is_the_same_in_every_state() {
        for flags in [SlotFlags::empty(), SlotFlags::NONCOHERENT_DMA] {
            for count in [false, true] {
                let t = encoded(PLAIN, SlotKind::Ram, flags, count);
                assert_eq!(t, (MemType::WriteBack, Combine::HonourGuest));
            }
        }
    }

    #[test]
    fn mmio_is_ngnre_and_write_combining_mmio_is_normal_nc() {
        for p in [FWB, PLAIN] {
            for count in [false, true] {
                let mmio = encoded(p, SlotKind::Mmio, SlotFlags::NONCOHERENT_DMA, count);
                assert_eq!(mmio, (MemType::Device(Device::NGnRE), Combine::HonourGuest));
                let wc = encoded(p, SlotKind::Mmio, SlotFlags::WRITE_COMBINING, count);
                assert_eq!(wc, (MemType::NonCacheable, Combine::HonourGuest));
            }
        }
    }

    #[test]
    fn only_fwb_depends_on_the_count() {
        assert!(FWB.depends_on_noncoherent_dma());
        assert!(!PLAIN.depends_on_noncoherent_dma());
    }

    #[test]
    fn maintenance_is_skipped_only_for_forced_leaves_and_devices() {
        let needs = |p: ArmPolicy| {
            [
                LeafType::ForceWb,
                LeafType::HonourGuest,
                LeafType::ForceUncached,
                LeafType::Mmio,
                LeafType::MmioWriteCombining,
            ]
            .map(|t| p.needs_maintenance(t))
        };
        assert_eq!(needs(FWB), [false, true, true, false, false]);
        assert_eq!(needs(PLAIN), [true, true, true, false, false]);
    }

    #[test]
    fn guest_ranges_map_to_the_nearest_safe_type() {
        let of = |p: ArmPolicy| X86Type::ALL.map(|t| p.encode(LeafType::GuestRange(t)).0);
        use MemType::{NonCacheable as Nc, WriteBack as Wb, WriteThrough as Wt};
        // UC, WC, WT, WP, WB.
        assert_eq!(of(FWB), [Nc, Nc, Nc, Nc, Wb]);
        assert_eq!(of(PLAIN), [Nc, Nc, Wt, Nc, Wb]);
        assert_eq!(FWB.encode(LeafType::ForceUncached).0, Nc);
    }

    #[test]
    fn any_block_is_uniform() {
        let q = query(SlotKind::Ram, SlotFlags::empty(), true);
        assert!(FWB.is_uniform(&q, &(), 18));
    }
}
