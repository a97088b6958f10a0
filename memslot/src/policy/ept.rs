//! x86: two profiles, chosen per VM at creation.

use stage2::{Combine, MemType};

use super::{LeafType, MemTypePolicy, TypeQuery};
use crate::mtrr::Mtrrs;
use crate::pat::X86Type;
use crate::slot::{SlotFlags, SlotKind};

/// What a set CR0.CD of the guest means while its memory types are honoured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CdQuirk {
    /// Write-back, weakened by PAT: firmware that turns MTRRs on late stays fast.
    #[default]
    WriteBack,
    /// Uncached, as on bare metal.
    Uncached,
}

/// Which rules decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Guest MTRRs are storage only; the guest's PAT counts while a device does not snoop (or
    /// always, if `ignore_pat` is off).
    Today {
        /// Ignore the guest's PAT while every device snoops.
        ignore_pat: bool,
    },
    /// Guest MTRRs and CR0.CD are folded into the leaf's type while a device does not snoop.
    GuestMtrr {
        /// Meaning of CR0.CD.
        cd_quirk: CdQuirk,
    },
}

/// The part of a vCPU that decides memory types. The guest's CD never reaches hardware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuTypes {
    /// Range registers and PAT.
    pub mtrrs: Mtrrs,
    /// CR0.CD.
    pub cd: bool,
}

impl VcpuTypes {
    /// State after reset, CD clear. Arguments as for [`Mtrrs::new`].
    #[must_use]
    pub fn new(phys_bits: u8, offered: bool) -> Self {
        Self {
            mtrrs: Mtrrs::new(phys_bits, offered),
            cd: false,
        }
    }
}

/// A decision as far as the slot and the VM make it.
enum Decision {
    /// Final.
    Is(LeafType),
    /// The vCPU's registers decide; the meaning of its CD.
    Registers(CdQuirk),
}

/// The policy of an x86 VM with EPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptPolicy {
    /// Which rules decide.
    pub profile: Profile,
}

impl EptPolicy {
    /// Today's rules: the default.
    pub const TODAY: Self = Self {
        profile: Profile::Today { ignore_pat: true },
    };

    /// Guest-MTRR rules with the given meaning of CR0.CD.
    #[must_use]
    pub const fn guest_mtrr(cd_quirk: CdQuirk) -> Self {
        Self {
            profile: Profile::GuestMtrr { cd_quirk },
        }
    }

    /// The meaning of CR0.CD if guest MTRRs count now; `None` if they do not.
    #[must_use]
    pub const fn honoured_quirk(&self, noncoherent_dma: bool) -> Option<CdQuirk> {
        match self.profile {
            Profile::GuestMtrr { cd_quirk } if noncoherent_dma => Some(cd_quirk),
            _ => None,
        }
    }

    /// First match wins: device, flagged slot, no non-snooping device, then the profile's rest.
    fn decide(&self, query: &TypeQuery) -> Decision {
        let flagged = query.flags.contains(SlotFlags::NONCOHERENT_DMA);
        Decision::Is(match self.profile {
            // PAT may lift UC to WC and to nothing else, so write combining needs no word here.
            _ if query.kind == SlotKind::Mmio => LeafType::Mmio,
            _ if flagged => LeafType::HonourGuest,
            Profile::Today { ignore_pat: true } | Profile::GuestMtrr { .. }
                if !query.noncoherent_dma =>
            {
                LeafType::ForceWb
            }
            Profile::Today { .. } => LeafType::HonourGuest,
            Profile::GuestMtrr { cd_quirk } => return Decision::Registers(cd_quirk),
        })
    }

    /// Rows R4 to R6 of the guest-MTRR profile.
    fn register_type(quirk: CdQuirk, query: &TypeQuery, vcpu: &VcpuTypes) -> LeafType {
        match (vcpu.cd, quirk) {
            (true, CdQuirk::WriteBack) => LeafType::HonourGuest,
            (true, CdQuirk::Uncached) => LeafType::ForceUncached,
            (false, _) => LeafType::GuestRange(vcpu.mtrrs.page_type(query.gfn)),
        }
    }
}

impl MemTypePolicy for EptPolicy {
    type Vcpu = VcpuTypes;

    const VARIES_WITHIN_SLOT: bool = true;

    fn leaf_type(&self, query: &TypeQuery, vcpu: &VcpuTypes) -> LeafType {
        match self.decide(query) {
            Decision::Is(leaf) => leaf,
            Decision::Registers(quirk) => Self::register_type(quirk, query, vcpu),
        }
    }

    fn slot_type(&self, query: &TypeQuery) -> Option<LeafType> {
        match self.decide(query) {
            Decision::Is(leaf) => Some(leaf),
            Decision::Registers(_) => None,
        }
    }

    /// Only rows that ask the range registers need one type per block. Elsewhere the CPU keeps
    /// TLB entries apart that differ by PAT inside one large leaf.
    fn is_uniform(&self, query: &TypeQuery, vcpu: &VcpuTypes, order: u32) -> bool {
        match self.decide(query) {
            Decision::Registers(_) if !vcpu.cd => vcpu.mtrrs.block_type(query.gfn, order).is_some(),
            _ => true,
        }
    }

    fn depends_on_noncoherent_dma(&self) -> bool {
        self.profile != Profile::Today { ignore_pat: false }
    }

    fn asks_vcpu(&self) -> bool {
        true
    }

    /// CPUs snoop each other and their own caches: x86 needs no maintenance.
    fn needs_maintenance(&self, _leaf: LeafType) -> bool {
        false
    }

    fn encode(&self, leaf: LeafType) -> (MemType, Combine) {
        match leaf {
            LeafType::ForceWb => (MemType::WriteBack, Combine::ForceStage2),
            LeafType::ForceUncached => (MemType::Uncached, Combine::ForceStage2),
            LeafType::HonourGuest => (MemType::WriteBack, Combine::HonourGuest),
            LeafType::Mmio | LeafType::MmioWriteCombining => {
                (MemType::Uncached, Combine::HonourGuest)
            }
            LeafType::GuestRange(t) => (mem_type(t), Combine::HonourGuest),
        }
    }
}

const fn mem_type(t: X86Type) -> MemType {
    match t {
        X86Type::Uc => MemType::Uncached,
        X86Type::Wc => MemType::NonCacheable,
        X86Type::Wt => MemType::WriteThrough,
        X86Type::Wp => MemType::WriteProtected,
        X86Type::Wb => MemType::WriteBack,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::gfn;
    use crate::mtrr::Msr;
    use CdQuirk::{Uncached, WriteBack};

    const ON: EptPolicy = EptPolicy::guest_mtrr(WriteBack);
    const OFF: EptPolicy = EptPolicy::guest_mtrr(Uncached);
    const NONE: SlotFlags = SlotFlags::empty();
    const FLAG: SlotFlags = SlotFlags::NONCOHERENT_DMA;

    fn ram(flags: SlotFlags, noncoherent_dma: bool) -> TypeQuery {
        TypeQuery {
            gfn: gfn(0x200),
            kind: SlotKind::Ram,
            flags,
            noncoherent_dma,
        }
    }

    fn mmio(flags: SlotFlags, noncoherent_dma: bool) -> TypeQuery {
        TypeQuery {
            kind: SlotKind::Mmio,
            ..ram(flags, noncoherent_dma)
        }
    }

    /// Default type WT, CD as given.
    fn vcpu(cd: bool) -> VcpuTypes {
        let mut v = VcpuTypes::new(40, true);
        v.mtrrs.write(Msr::DefaultType, 0x804).unwrap();
        v.cd = cd;
        v
    }

    /// The byte that the leaf gets: type in bits 5:3, ignore-PAT in bit 6.
    fn byte(p: EptPolicy, q: TypeQuery, v: &VcpuTypes) -> u8 {
        let (mem, combine) = p.encode(p.leaf_type(&q, v));
        let kind = match mem {
            MemType::Uncached => 0,
            MemType::NonCacheable => 1,
            MemType::WriteThrough => 4,
            MemType::WriteProtected => 5,
            MemType::WriteBack => 6,
            MemType::Device(_) => panic!("x86 has no device type"),
        };
        kind << 3 | u8::from(combine == Combine::ForceStage2) << 6
    }

    #[test]
    fn r1_mmio_is_uc_and_beats_the_flag_cd_and_the_count() {
        for flags in [NONE, FLAG] {
            for count in [false, true] {
                for cd in [false, true] {
                    assert_eq!(byte(ON, mmio(flags, count), &vcpu(cd)), 0x00);
                    assert_eq!(byte(OFF, mmio(flags, count), &vcpu(cd)), 0x00);
                }
            }
        }
    }

    #[test]
    fn r2_flagged_slot_is_wb_whatever_the_count_cd_and_mtrrs() {
        for count in [false, true] {
            for cd in [false, true] {
                assert_eq!(byte(ON, ram(FLAG, count), &vcpu(cd)), 0x30);
                assert_eq!(byte(OFF, ram(FLAG, count), &vcpu(cd)), 0x30);
            }
        }
    }

    #[test]
    fn r3_without_noncoherent_dma_is_wb_ignoring_pat_even_with_cd() {
        for cd in [false, true] {
            assert_eq!(byte(ON, ram(NONE, false), &vcpu(cd)), 0x70);
            assert_eq!(byte(OFF, ram(NONE, false), &vcpu(cd)), 0x70);
        }
    }

    #[test]
    fn r4_cd_with_the_quirk_is_wb_with_pat() {
        assert_eq!(byte(ON, ram(NONE, true), &vcpu(true)), 0x30);
    }

    #[test]
    fn r5_cd_without_the_quirk_is_uc_ignoring_pat() {
        assert_eq!(byte(OFF, ram(NONE, true), &vcpu(true)), 0x40);
    }

    #[test]
    fn r6_otherwise_the_mtrr_type_with_pat() {
        for (def, want) in [
            (0x800, 0x00),
            (0x801, 0x08),
            (0x804, 0x20),
            (0x805, 0x28),
            (0x806, 0x30),
        ] {
            let mut v = vcpu(false);
            v.mtrrs.write(Msr::DefaultType, def).unwrap();
            assert_eq!(byte(ON, ram(NONE, true), &v), want);
            assert_eq!(byte(OFF, ram(NONE, true), &v), want);
        }
    }

    #[test]
    fn n1_mmio_is_uc_today() {
        assert_eq!(byte(EptPolicy::TODAY, mmio(FLAG, true), &vcpu(true)), 0x00);
        assert_eq!(
            byte(EptPolicy::TODAY, mmio(NONE, false), &vcpu(false)),
            0x00
        );
    }

    #[test]
    fn n1b_flagged_slot_honours_pat_today() {
        assert_eq!(byte(EptPolicy::TODAY, ram(FLAG, false), &vcpu(false)), 0x30);
    }

    #[test]
    fn n2_without_noncoherent_dma_is_wb_ignoring_pat_today() {
        assert_eq!(byte(EptPolicy::TODAY, ram(NONE, false), &vcpu(true)), 0x70);
    }

    #[test]
    fn n3_otherwise_wb_with_pat_and_mtrrs_are_storage_only() {
        let always = EptPolicy {
            profile: Profile::Today { ignore_pat: false },
        };
        assert_eq!(byte(EptPolicy::TODAY, ram(NONE, true), &vcpu(true)), 0x30);
        assert_eq!(byte(always, ram(NONE, false), &vcpu(false)), 0x30);
        assert_eq!(byte(always, ram(NONE, true), &vcpu(false)), 0x30);
    }

    #[test]
    fn the_count_matters_unless_pat_is_always_honoured() {
        assert!(ON.depends_on_noncoherent_dma());
        assert!(EptPolicy::TODAY.depends_on_noncoherent_dma());
        let always = EptPolicy {
            profile: Profile::Today { ignore_pat: false },
        };
        assert!(!always.depends_on_noncoherent_dma());
    }

    #[test]
    fn uniformity_is_asked_only_where_mtrrs_decide() {
        // UC, 4 KiB at 2 MiB: the 2 MiB block is mixed.
        let mut v = vcpu(false);
        v.mtrrs.write(Msr::VariableBase(0), 0x20_0000).unwrap();
        v.mtrrs.write(Msr::VariableMask(0), 0xff_ffff_f800).unwrap();
        assert!(!ON.is_uniform(&ram(NONE, true), &v, 9));
        assert!(ON.is_uniform(&ram(NONE, true), &v, 0));
        assert!(ON.is_uniform(&ram(FLAG, true), &v, 9));
        assert!(ON.is_uniform(&mmio(NONE, true), &v, 9));
        assert!(ON.is_uniform(&ram(NONE, false), &v, 9));
        assert!(EptPolicy::TODAY.is_uniform(&ram(NONE, true), &v, 9));
        v.cd = true;
        assert!(ON.is_uniform(&ram(NONE, true), &v, 9));
    }

    #[test]
    fn no_leaf_needs_maintenance() {
        assert!(!ON.needs_maintenance(LeafType::HonourGuest));
    }
}
