//! What a core can do, read once into a plain struct.
//!
//! Source: Arm ARM (DDI 0487) D24.2, ID_AA64*_EL1. Two settings can be tested in one host run.

use board::Gic;

/// Raw identification registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct IdRegisters {
    /// MIDR_EL1.
    pub midr: u64,
    /// ID_AA64PFR0_EL1.
    pub pfr0: u64,
    /// ID_AA64PFR1_EL1.
    pub pfr1: u64,
    /// ID_AA64PFR2_EL1.
    pub pfr2: u64,
    /// ID_AA64DFR0_EL1.
    pub dfr0: u64,
    /// ID_AA64ISAR0_EL1.
    pub isar0: u64,
    /// ID_AA64ISAR1_EL1.
    pub isar1: u64,
    /// ID_AA64ISAR2_EL1.
    pub isar2: u64,
    /// ID_AA64MMFR0_EL1.
    pub mmfr0: u64,
    /// ID_AA64MMFR1_EL1.
    pub mmfr1: u64,
    /// ID_AA64MMFR2_EL1.
    pub mmfr2: u64,
    /// ID_AA64MMFR3_EL1.
    pub mmfr3: u64,
    /// CTR_EL0.
    pub ctr: u64,
}

/// Decoded features.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Features {
    /// Size of a physical address in bits: 32 to 52 (56 is treated as 52).
    pub pa_bits: u8,
    /// 4 KiB granule at stage 2.
    pub granule_4k: bool,
    /// 16-bit VMIDs instead of 8-bit ones.
    pub vmid16: bool,
    /// FEAT_S2FWB.
    pub fwb: bool,
    /// FEAT_VHE.
    pub vhe: bool,
    /// FEAT_XNX.
    pub xnx: bool,
    /// Hardware sets the access flag (FEAT_HAFDBS).
    pub haf: bool,
    /// FEAT_PAN.
    pub pan: bool,
    /// FEAT_MTE2: tag checks and PSTATE.TCO.
    pub mte: bool,
    /// FEAT_CSV2_2: SCXTNUM_EL0 and SCXTNUM_EL1.
    pub scxtnum: bool,
    /// FEAT_RAS: error records.
    pub ras: bool,
    /// TLBI by range (FEAT_TLBIRANGE).
    pub tlbi_range: bool,
    /// Level hints in TLBI (FEAT_TTL).
    pub ttl: bool,
    /// Erratum 1286807, Cortex-A76 up to r3p0: a TLBI and its barrier must be issued twice.
    pub repeat_tlbi: bool,
    /// Errata 1319367 (Cortex-A72), 1319537 (A57), 1530924 (A53), 1530923 (A55), 1165522 (A76 up to
    /// r2p0): speculative walks may use the EL1 registers of one context and the stage 2 of another.
    pub speculative_at: bool,
    /// Pointer authentication: the guest has keys.
    pub pauth: bool,
    /// FEAT_SVE.
    pub sve: bool,
    /// FEAT_SME.
    pub sme: bool,
    /// FEAT_HCX: HCRX_EL2.
    pub hcx: bool,
    /// FEAT_FGT: fine-grained traps.
    pub fgt: bool,
    /// FEAT_FGT2.
    pub fgt2: bool,
    /// FEAT_TCR2.
    pub tcr2: bool,
    /// FEAT_SCTLR2.
    pub sctlr2: bool,
    /// FEAT_GCS: stacks of return addresses.
    pub gcs: bool,
    /// FEAT_MPAM, versions 0.1 and 1: memory partitioning, whose EL2 traps must be opened.
    pub mpam: bool,
    /// FEAT_AMUv1: activity monitors.
    pub amu: bool,
    /// FEAT_LOR: limited ordering regions.
    pub lor: bool,
    /// FEAT_ECV: enhanced counter virtualization.
    pub ecv: bool,
    /// Statistical profiling.
    pub spe: bool,
    /// Trace buffer.
    pub trbe: bool,
    /// FEAT_TRF: TRFCR_EL1, the filter of self-hosted trace.
    pub trace_filter: bool,
    /// FEAT_BRBE: records of branches.
    pub brbe: bool,
    /// A PMUv3 is there.
    pub pmu: bool,
    /// FEAT_PMUv3p1: MDCR_EL2.HPMD keeps the host's event counters from counting at EL2.
    pub pmu_v3p1: bool,
    /// FEAT_PMUv3p5: MDCR_EL2.HCCD keeps its cycle counter from doing so.
    pub pmu_v3p5: bool,
    /// FEAT_FPMR: modes of 8-bit floating point.
    pub fpmr: bool,
    /// System-register interface of GICv3 or later, to be used.
    pub gic_sysregs: bool,
    /// The core has it, but the board's controller is a GICv2: see [`Features::with_controller`].
    pub gic_legacy: bool,
    /// Data cache cleaning to PoU is not needed for instruction fetches.
    pub idc: bool,
    /// Instruction cache invalidation is not needed.
    pub dic: bool,
    /// Smallest data cache line in bytes.
    pub dcache_line: u32,
    /// Smallest instruction cache line in bytes.
    pub icache_line: u32,
}

impl Features {
    /// Decodes the registers.
    #[must_use]
    pub fn decode(id: &IdRegisters) -> Self {
        Self {
            pa_bits: pa_bits(field(id.mmfr0, 0)),
            granule_4k: granule_4k(field(id.mmfr0, 40), field(id.mmfr0, 28)),
            vmid16: field(id.mmfr1, 4) == 2,
            fwb: field(id.mmfr2, 40) != 0,
            vhe: field(id.mmfr1, 8) != 0,
            xnx: field(id.mmfr1, 28) != 0,
            haf: field(id.mmfr1, 0) != 0,
            pan: field(id.mmfr1, 20) != 0,
            mte: field(id.pfr1, 8) >= 2,
            scxtnum: field(id.pfr0, 56) >= 2,
            ras: field(id.pfr0, 28) != 0,
            tlbi_range: field(id.isar0, 56) >= 2,
            ttl: field(id.mmfr2, 48) != 0,
            repeat_tlbi: is_a76_before_r4(id.midr),
            speculative_at: has_speculative_at(id.midr),
            pauth: id.isar1 & 0xff00_0ff0 != 0 || id.isar2 & 0xff00 != 0,
            sve: field(id.pfr0, 32) != 0,
            sme: field(id.pfr1, 24) != 0,
            hcx: field(id.mmfr1, 40) != 0,
            fgt: field(id.mmfr0, 56) != 0,
            fgt2: field(id.mmfr0, 56) >= 2,
            tcr2: field(id.mmfr3, 0) != 0,
            sctlr2: field(id.mmfr3, 4) != 0,
            gcs: field(id.pfr1, 44) != 0,
            // Version 0.1 has only the fraction (MPAM_frac).
            mpam: field(id.pfr0, 40) != 0 || field(id.pfr1, 16) != 0,
            amu: field(id.pfr0, 44) != 0,
            lor: field(id.mmfr1, 16) != 0,
            ecv: field(id.mmfr0, 60) != 0,
            spe: field(id.dfr0, 32) != 0,
            trbe: field(id.dfr0, 44) != 0,
            trace_filter: field(id.dfr0, 40) != 0,
            brbe: field(id.dfr0, 52) != 0,
            pmu: !matches!(field(id.dfr0, 8), 0 | 0xf),
            pmu_v3p1: matches!(field(id.dfr0, 8), 4..=0xe),
            pmu_v3p5: matches!(field(id.dfr0, 8), 6..=0xe),
            fpmr: field(id.pfr2, 32) != 0,
            gic_sysregs: field(id.pfr0, 24) != 0,
            gic_legacy: false,
            idc: id.ctr & (1 << 28) != 0,
            dic: id.ctr & (1 << 29) != 0,
            dcache_line: line_size(id.ctr, 16),
            icache_line: line_size(id.ctr, 0),
        }
    }
}

impl Features {
    /// What EL2 uses of them with this interrupt controller.
    ///
    /// Where the tree names a GICv2, a GICv3's registers of the core are not used: ICC_SRE_EL2.SRE would turn
    /// off the memory-mapped interfaces that host, guests and EL2 have there. Firmware for a GICv2 may also
    /// leave ICC_SRE_EL3.SRE clear: then SRE stays clear whatever EL2 writes, and ICH_HCR_EL2 and its like are
    /// undefined, at EL2, too (Arm IHI 0069H 12.4, ICC_SRE_EL2, ICH_HCR_EL2).
    #[must_use]
    pub const fn with_controller(self, gic: Option<&Gic>) -> Self {
        let has_both = self.gic_sysregs && matches!(gic, Some(Gic::V2 { .. }));
        Self {
            gic_sysregs: self.gic_sysregs && !has_both,
            gic_legacy: has_both,
            ..self
        }
    }
}

/// How many taken branches EL2 executes when a lower level enters it, so that what that level has
/// left in the branch history does not steer EL2's indirect branches (CVE-2022-23960); 0 where the
/// core is not affected, 1 where CLRBHB does it alone.
///
/// The numbers are Arm's for each core ("Spectre-BHB: Speculative Target Reuse Attacks"). A core of
/// Arm's that is unknown gets the longest. Cortex-A73 and A75 need firmware's SMCCC_ARCH_WORKAROUND_3
/// instead, which EL2 calls between worlds.
#[must_use]
pub fn history(id: &IdRegisters) -> u8 {
    const LONGEST: u8 = 132;
    let not_steered = field(id.pfr0, 56) >= 3; // FEAT_CSV2_3
    let isolated = field(id.mmfr1, 60) != 0; // FEAT_ECBHB
    let clears = field(id.isar2, 28) != 0; // FEAT_CLRBHB
    match (id.midr >> 24 & 0xff, id.midr >> 4 & 0xfff) {
        _ if not_steered || isolated => 0,
        // A53, A35, A55, A510, A520: they do not predict by history. A73, A75: see above.
        (0x41, 0xd03 | 0xd04 | 0xd05 | 0xd46 | 0xd80 | 0xd09 | 0xd0a) => 0,
        _ if clears => 1,
        (0x41, 0xd07 | 0xd08) => 8,  // A57, A72
        (0x41, 0xd0b..=0xd0e) => 24, // A76, N1, A77, A76AE
        // V1, A78, A78AE, X1, A710, X2, N2, A78C, X1C
        (0x41, 0xd40 | 0xd41 | 0xd42 | 0xd44 | 0xd47 | 0xd48 | 0xd49 | 0xd4b | 0xd4c) => 32,
        (0x41, 0xd4d | 0xd81) => 38, // A715, A720
        (0xc0, 0xac3) => 11,         // AmpereOne
        _ => LONGEST,                // X3, V2, and those that we do not know
    }
}

/// Names the first field in which two cores differ.
macro_rules! differing {
    ($this:expr, $core:expr; equal: $($equal:ident),*; at_least: $($least:ident),*; no_more: $($no_more:ident),*) => {
        $(if $this.$equal != $core.$equal { return Some(stringify!($equal)); })*
        $(if $this.$least > $core.$least { return Some(stringify!($least)); })*
        $(if $this.$no_more < $core.$no_more { return Some(stringify!($no_more)); })*
    };
}

impl Features {
    /// What keeps a core with these features from running what was set up for the core that booted,
    /// if anything: the field's name.
    ///
    /// State that the other worlds must not see, and what has to be trapped, must be the same; what
    /// EL2 only uses must be there; errata that it does not work around must not.
    #[must_use]
    pub fn mismatch(&self, core: &Self) -> Option<&'static str> {
        differing!(self, core;
            equal: granule_4k, pan, mte, scxtnum, ras, pauth, sve, sme, hcx, fgt, fgt2, tcr2, sctlr2, gcs, mpam,
                amu, lor, ecv, spe, trbe, trace_filter, brbe, pmu, fpmr, gic_sysregs;
            at_least: pa_bits, vmid16, fwb, xnx, tlbi_range, ttl, idc, dic, pmu_v3p1, pmu_v3p5, dcache_line,
                icache_line;
            no_more: repeat_tlbi, speculative_at);
        None
    }
}

const fn field(register: u64, shift: u32) -> u8 {
    (register >> shift).to_le_bytes()[0] & 0xf
}

/// ID_AA64MMFR0_EL1.PARange; reserved values are taken as the largest that 4 KiB tables without
/// LPA2 can use, which is what the caller caps to anyway.
const fn pa_bits(range: u8) -> u8 {
    match range {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        5 => 48,
        _ => 52,
    }
}

/// TGRAN4_2 (0: as TGRAN4, 1: no, 2 and 3: yes), TGRAN4 (0 and 1: yes, 0xf: no).
const fn granule_4k(stage2: u8, stage1: u8) -> bool {
    match stage2 {
        0 => stage1 != 0xf,
        1 => false,
        _ => true,
    }
}

/// MIDR_EL1: implementer Arm, part 0xd0b, variant at most 3.
const fn is_a76_before_r4(midr: u64) -> bool {
    midr >> 24 & 0xff == 0x41 && midr >> 4 & 0xfff == 0xd0b && midr >> 20 & 0xf <= 3
}

/// MIDR_EL1: Cortex-A53 (0xd03), A55 (0xd05), A57 (0xd07) and A72 (0xd08) in all revisions, A76
/// (0xd0b) before r3p0.
const fn has_speculative_at(midr: u64) -> bool {
    if midr >> 24 & 0xff != 0x41 {
        return false;
    }
    match midr >> 4 & 0xfff {
        0xd03 | 0xd05 | 0xd07 | 0xd08 => true,
        0xd0b => midr >> 20 & 0xf < 3,
        _ => false,
    }
}

/// CTR_EL0.DminLine or IminLine: log2 of the number of 4-byte words.
const fn line_size(ctr: u64, shift: u32) -> u32 {
    4 << field(ctr, shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cortex-A72 and QEMU `max`, as measured (spec/arm.md 5.5).
    const A72: IdRegisters = IdRegisters {
        midr: 0x410f_d083,
        pfr0: 0x0000_2222,
        pfr1: 0,
        pfr2: 0,
        dfr0: 0x1030_5106,
        isar0: 0x0001_1120,
        isar1: 0,
        isar2: 0,
        mmfr0: 0x1124,
        mmfr1: 0,
        mmfr2: 0,
        mmfr3: 0,
        ctr: 0x8444_c004,
    };

    #[test]
    fn cortex_a72_is_a_plain_v8_0_core() {
        let features = Features::decode(&A72);
        assert_eq!(features.pa_bits, 44);
        assert!(features.granule_4k && features.pmu);
        assert!(!features.fwb && !features.xnx && !features.vhe && !features.vmid16);
        assert!(
            !features.ras
                && !features.scxtnum
                && !features.pan
                && !features.hcx
                && !features.fgt
                && !features.idc
        );
        assert_eq!((features.dcache_line, features.icache_line), (64, 64));
    }

    #[test]
    fn a_feature_rich_core_has_them_all() {
        let max = IdRegisters {
            mmfr0: 0x2100_0323_1020_1126,
            mmfr1: 0x0110_1120_1031_2122,
            mmfr2: 0x1221_0111_1201_1011,
            ctr: 0xb444_c004,
            isar0: 2 << 56,
            pfr0: 3 << 56 | 1 << 28 | 1 << 24 | 1 << 32 | 1 << 40,
            pfr1: 3 << 8 | 1 << 24,
            ..A72
        };
        let features = Features::decode(&max);
        assert_eq!(features.pa_bits, 52);
        assert!(features.fwb && features.xnx && features.vhe && features.vmid16);
        assert!(
            features.pan && features.hcx && features.fgt && !features.fgt2 && features.tlbi_range
        );
        assert!(features.ras && features.scxtnum);
        assert!(features.idc && features.dic && features.ttl && features.haf);
        assert!(features.sve && features.sme && features.mte && features.gic_sysregs);
    }

    #[test]
    fn counters_that_stop_at_el2_are_known_by_the_version() {
        let with = |version: u64| {
            let dfr0 = version << 8;
            let features = Features::decode(&IdRegisters { dfr0, ..A72 });
            (features.pmu, features.pmu_v3p1, features.pmu_v3p5)
        };
        assert_eq!(with(0), (false, false, false));
        assert_eq!(with(1), (true, false, false));
        assert_eq!(with(4), (true, true, false));
        assert_eq!(with(5), (true, true, false));
        assert_eq!(with(6), (true, true, true));
        assert_eq!(with(0xf), (false, false, false), "not Arm's");
    }

    #[test]
    fn memory_partitioning_of_either_version_is_known() {
        let with = |pfr0, pfr1| Features::decode(&IdRegisters { pfr0, pfr1, ..A72 }).mpam;
        assert!(!with(0, 0));
        assert!(with(1 << 40, 0) && with(1 << 40, 1 << 16), "1.0 and 1.1");
        assert!(with(0, 1 << 16), "0.1: no state of another world in it");
    }

    #[test]
    fn what_changes_the_meaning_of_el1s_registers_is_known() {
        let with = |pfr1, mmfr3| {
            let id = IdRegisters { pfr1, mmfr3, ..A72 };
            let features = Features::decode(&id);
            (features.gcs, features.tcr2, features.sctlr2)
        };
        assert_eq!(with(0, 0), (false, false, false));
        assert_eq!(with(1 << 44, 0), (true, false, false));
        assert_eq!(with(0, 1), (false, true, false));
        assert_eq!(with(0, 1 << 4), (false, false, true));
    }

    #[test]
    fn a_core_must_be_able_to_do_what_the_boot_core_does() {
        let boot = Features::decode(&A72);
        let core = |change: fn(&mut IdRegisters)| {
            let mut id = A72;
            change(&mut id);
            boot.mismatch(&Features::decode(&id))
        };
        assert_eq!(core(|_| ()), None);
        assert_eq!(
            core(|id| id.midr = 0x410f_d034),
            None,
            "A53: an erratum it shares"
        );
        assert_eq!(core(|id| id.mmfr2 = 1 << 40), None, "more than is used");
        assert_eq!(core(|id| id.mmfr0 = 0x1122), Some("pa_bits"));
        assert_eq!(core(|id| id.pfr0 |= 1 << 32), Some("sve"));
        assert_eq!(core(|id| id.dfr0 |= 1 << 44), Some("trbe"));
        assert_eq!(core(|id| id.ctr = 0x8443_c004), Some("dcache_line"));
    }

    #[test]
    fn a_gicv2_is_not_turned_off_by_a_gicv3s_registers() {
        let features = Features::decode(&IdRegisters {
            pfr0: 1 << 24,
            ..A72
        });
        let range = |start| board::AddrRange::with_size(start, 0x1000).unwrap();
        let (gicd, gicc, gicr) = (range(0x1000), range(0x2000), range(0x3000));
        let v2 = Gic::V2 {
            gicd,
            gicc,
            gich: None,
            gicv: None,
        };
        let v3 = Gic::V3 { gicd, gicr };
        // Which registers EL2 uses, and which it only leaves to the host, disabled.
        let uses = |features: Features, gic| {
            let features = features.with_controller(gic);
            (features.gic_sysregs, features.gic_legacy)
        };
        assert_eq!(uses(features, Some(&v2)), (false, true));
        assert_eq!(uses(features, Some(&v3)), (true, false));
        assert_eq!(uses(features, None), (true, false));
        for gic in [Some(&v2), Some(&v3), None] {
            assert_eq!(uses(Features::decode(&A72), gic), (false, false));
        }
    }

    #[test]
    fn errata_of_other_cores_are_no_surprise() {
        let with = |midr| Features::decode(&IdRegisters { midr, ..A72 });
        let (a76, a72) = (with(0x414f_d0b1), with(0x410f_d083));
        assert_eq!(a76.mismatch(&a72), Some("speculative_at"));
        assert_eq!(a72.mismatch(&a76), None);
    }

    #[test]
    fn branch_history_is_overwritten_where_the_core_needs_it() {
        let core = |midr: u64| history(&IdRegisters { midr, ..A72 });
        let counts = [
            0x410f_d083,
            0x414f_d0b1,
            0x413f_d0c1,
            0x410f_d402,
            0x410f_d4f1,
        ]
        .map(core);
        assert_eq!(counts, [8, 24, 24, 32, 132]);
        assert_eq!([0x410f_d034, 0x410f_d050].map(core), [0, 0], "A53, A55");
        let id = IdRegisters {
            midr: 0x414f_d0b1,
            ..A72
        };
        let with = |change: fn(&mut IdRegisters)| {
            let mut id = id;
            change(&mut id);
            history(&id)
        };
        assert_eq!(with(|id| id.pfr0 |= 3 << 56), 0, "FEAT_CSV2_3");
        assert_eq!(with(|id| id.pfr0 |= 2 << 56), 24, "FEAT_CSV2_2");
        assert_eq!(with(|id| id.mmfr1 |= 1 << 60), 0, "FEAT_ECBHB");
        assert_eq!(with(|id| id.isar2 |= 1 << 28), 1, "FEAT_CLRBHB");
    }

    #[test]
    fn only_early_a76_repeat_their_tlbi() {
        assert!(is_a76_before_r4(0x413f_d0b0));
        assert!(!is_a76_before_r4(0x414f_d0b1));
        assert!(!is_a76_before_r4(0x410f_d083));
    }

    #[test]
    fn cores_with_speculative_walks_across_contexts_are_known() {
        assert!(has_speculative_at(0x410f_d083) && has_speculative_at(0x411f_d070));
        assert!(has_speculative_at(0x410f_d034) && has_speculative_at(0x412f_d050));
        assert!(has_speculative_at(0x412f_d0b0) && !has_speculative_at(0x413f_d0b0));
        assert!(!has_speculative_at(0x410f_d0c1) && !has_speculative_at(0x420f_d083));
    }

    #[test]
    fn either_algorithm_of_pointer_authentication_counts() {
        let with = |isar1, isar2| {
            Features::decode(&IdRegisters {
                isar1,
                isar2,
                ..A72
            })
            .pauth
        };
        assert!(!with(0, 0) && with(1 << 4, 0) && with(1 << 8, 0) && with(1 << 28, 0));
        assert!(with(0, 1 << 12) && !with(0xf, 0xf));
    }

    #[test]
    fn granule_field_of_stage_2_wins() {
        assert!(granule_4k(0, 0));
        assert!(!granule_4k(0, 0xf));
        assert!(!granule_4k(1, 0));
        assert!(granule_4k(2, 0xf));
    }
}
