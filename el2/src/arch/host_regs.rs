//! The registers of EL2 that decide what the host can do, and those of EL1 it starts with.
//!
//! The host keeps all of the machine: nothing is trapped but SMC (HCR_EL2.TSC), what stage 2 refuses,
//! and what only this core has (HCR_EL2.TIDCP). Registers whose reset value is unknown are all written. Source: Arm ARM D24.2. The host
//! does not run on this core meanwhile.

use el2::features::Features;
use el2::fine_grained;

use super::controls::MPAM_HOST;
use super::instructions::{self, isb};
use super::profiling;
use super::regs::{self, mrs, msr};

/// HCR_EL2.VM: stage 2 on.
const VM: u64 = 1;
/// HCR_EL2.TSC: SMC from EL1 traps.
const TSC: u64 = 1 << 19;
/// HCR_EL2.TIDCP: IMPLEMENTATION DEFINED registers and operations trap. Some look behind every stage 2: by
/// RAMINDEX a Cortex-A57 or A72 shows EL1 what its caches hold of anybody's memory (100095_0002, 4.3.62 to 4.3.64).
const TIDCP: u64 = 1 << 20;
/// HCR_EL2.RW: EL1 is AArch64.
const RW: u64 = 1 << 31;
/// HCR_EL2.APK and API: pointer authentication is not trapped.
const POINTER_AUTH: u64 = 1 << 40 | 1 << 41;
/// HCR_EL2.EnSCXT: SCXTNUM_EL1 is not trapped. RES0 without FEAT_CSV2_2.
const SCXT: u64 = 1 << 53;
/// HCR_EL2.ATA: allocation tags are not trapped.
const ATA: u64 = 1 << 56;
/// SCTLR_EL1 of a core that starts: RES1 bits, MMU and caches off.
const SCTLR_EL1_START: u64 = 0x30d0_0800;

/// ICC_SRE_EL2 for the host: SRE, DFB, DIB, and Enable, so that its ICC_SRE_EL1 does not trap.
pub(crate) const SRE_HOST: u64 = 0xf;
/// ICC_SRE_EL2 with a GICv2: Enable alone. A host that asks ICC_SRE_EL1 reads that the registers are off.
const SRE_LEGACY: u64 = 0x8;

/// The host's stage 2 for the registers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stage2Regs {
    pub(crate) vtcr: u64,
    pub(crate) vttbr: u64,
}

/// Makes a stage 2 the current one without putting it in force (HCR_EL2.VM is clear on this core
/// until [`configure`]): TLB maintenance is for its VMID.
pub(crate) fn select(stage2: Stage2Regs) {
    msr!("vtcr_el2", stage2.vtcr);
    msr!("vttbr_el2", stage2.vttbr);
    isb();
}

/// Configures this core for the host, its stage 2 on.
pub(crate) fn configure(features: &Features, stage2: Stage2Regs) {
    traps(features);
    identity_and_time(features);
    fine_grained_traps(features);
    start_state(features);
    let tags = if features.mte { ATA } else { 0 };
    // The tables behind VTTBR are initialised and published (docs/host-stage2.md).
    msr!("vtcr_el2", stage2.vtcr);
    msr!("vttbr_el2", stage2.vttbr);
    regs::set_hcr(RW | TSC | TIDCP | VM | POINTER_AUTH | SCXT | tags);
    isb();
    // Whatever ran here before must not leave entries.
    instructions::tlbi_vmalls12e1();
    instructions::tlbi_alle1();
    instructions::dsb_nsh();
    isb();
}

/// MDCR_EL2.HPMD and HCCD: what the host counts does not count at EL2. RES0 in older PMUs.
fn blind_counters(features: &Features) -> u64 {
    const HPMD: u64 = 1 << 17;
    const HCCD: u64 = 1 << 23;
    let events = if features.pmu_v3p1 { HPMD } else { 0 };
    let cycles = if features.pmu_v3p5 { HCCD } else { 0 };
    events | cycles
}

/// CPTR, HSTR, MDCR and the vector length controls: nothing trapped. But the core's own controls, with
/// which EL1 could change how EL2's accesses behave, are not the host's (ACTLR_EL2), and EL2 is not
/// traced.
fn traps(features: &Features) {
    // CPTR_EL2 without VHE: RES1 bits 13, 9, 7:0; TZ (8) and TSM (12) are RES1 where there is no
    // SVE or SME.
    let no_sve = if features.sve { 0 } else { 1 << 8 };
    let no_sme = if features.sme { 0 } else { 1 << 12 };
    // MDCR_EL2: HPMN gives the host all event counters; E2PB and E2TB give it the profiling and
    // trace buffers, in its own translation regime.
    let counters = if features.pmu {
        mrs!("pmcr_el0") >> 11 & 0x1f
    } else {
        0
    };
    let profiling = if features.spe { 3 << 12 } else { 0 };
    let trace = if features.trbe { 3 << 24 } else { 0 };
    msr!("cptr_el2", 0x22ff | no_sve | no_sme);
    msr!("hstr_el2", 0);
    msr!("hacr_el2", 0);
    let blind = blind_counters(features);
    msr!("mdcr_el2", counters | profiling | trace | blind);
    msr!("actlr_el2", 0);
    if features.trace_filter {
        msr!("s3_4_c1_c2_1", 0); // TRFCR_EL2: no trace of EL2
    }
    if features.brbe {
        msr!("s2_4_c9_c0_0", 0); // BRBCR_EL2: no record of EL2's branches
    }
    profiling::start_samples(features);
    isb();
    if features.sve {
        msr!("s3_4_c1_c2_0", 0x1ff); // ZCR_EL2: the longest vectors
    }
    if features.sme {
        msr!("s3_4_c1_c2_6", 1 << 31 | 1 << 30 | 0xf); // SMCR_EL2: FA64, EZT0, longest
        msr!("s3_3_c4_c2_2", 0); // SVCR: streaming mode and ZA off
    }
    if features.fpmr {
        msr!("s3_3_c4_c4_2", 0); // FPMR
    }
    if features.mpam {
        // MPAMHCR_EL2 is there only if MPAMIDR_EL1.HAS_HCR (bit 17) says so.
        if mrs!("s3_0_c10_c4_4") & 1 << 17 != 0 {
            msr!("s3_4_c10_c4_0", 0);
        }
        msr!("s3_4_c10_c5_0", MPAM_HOST); // MPAM2_EL2
    }
    if features.lor {
        msr!("s3_0_c10_c4_3", 0); // LORC_EL1: limited ordering off
    }
}

/// What the host sees as its identity, its counters and its interrupt controller.
fn identity_and_time(features: &Features) {
    let (midr, mpidr) = (mrs!("midr_el1"), mrs!("mpidr_el1"));
    msr!("vpidr_el2", midr);
    msr!("vmpidr_el2", mpidr);
    msr!("cnthctl_el2", 3); // EL1PCTEN, EL1PCEN
    msr!("cntvoff_el2", 0);
    regs::stop_el2_timer(); // its interrupt is enabled, and what it does after a reset is unknown
    if features.vhe {
        msr!("s3_4_c14_c3_1", 0); // CNTHV_CTL_EL2: nobody's
    }
    if features.gic_sysregs {
        msr!("s3_4_c12_c9_5", SRE_HOST); // ICC_SRE_EL2
        isb();
        msr!("s3_4_c12_c11_0", 0); // ICH_HCR_EL2: no virtual interface
    }
    if features.gic_legacy {
        msr!("s3_4_c12_c9_5", SRE_LEGACY);
    }
}

/// HCRX_EL2 and the fine-grained traps: see [`fine_grained`].
fn fine_grained_traps(features: &Features) {
    use fine_grained::{
        DEBUG, DEBUG_2, HCRX, INSTRUCTIONS, INSTRUCTIONS_2, REGISTERS, REGISTERS_2,
    };
    if features.hcx {
        msr!("s3_4_c1_c2_2", HCRX); // HCRX_EL2
    }
    if features.fgt {
        msr!("s3_4_c1_c1_4", REGISTERS); // HFGRTR_EL2
        msr!("s3_4_c1_c1_5", REGISTERS); // HFGWTR_EL2
        msr!("s3_4_c1_c1_6", INSTRUCTIONS); // HFGITR_EL2
        msr!("s3_4_c3_c1_4", DEBUG); // HDFGRTR_EL2
        msr!("s3_4_c3_c1_5", DEBUG); // HDFGWTR_EL2
    }
    if features.fgt && features.amu {
        msr!("s3_4_c3_c1_6", 0); // HAFGRTR_EL2: activity monitors
    }
    if features.fgt2 {
        msr!("s3_4_c3_c1_2", REGISTERS_2); // HFGRTR2_EL2
        msr!("s3_4_c3_c1_3", REGISTERS_2); // HFGWTR2_EL2
        msr!("s3_4_c3_c1_7", INSTRUCTIONS_2); // HFGITR2_EL2
        msr!("s3_4_c3_c1_0", DEBUG_2); // HDFGRTR2_EL2
        msr!("s3_4_c3_c1_1", DEBUG_2); // HDFGWTR2_EL2
    }
}

/// EL1 as a core finds it that has just been turned on (DEN 0022 6.4: MMU and caches off), with nothing on
/// that a host which does not know the feature would not turn off.
fn start_state(features: &Features) {
    msr!("sctlr_el1", SCTLR_EL1_START);
    msr!("cpacr_el1", 0);
    msr!("mdscr_el1", 0);
    msr!("contextidr_el1", 0);
    msr!("cntkctl_el1", 0);
    if features.tcr2 {
        msr!("s3_0_c2_c0_3", 0); // TCR2_EL1
    }
    if features.sctlr2 {
        msr!("s3_0_c1_c0_3", 0); // SCTLR2_EL1
    }
    if features.gcs {
        msr!("s3_0_c2_c5_0", 0); // GCSCR_EL1
        msr!("s3_0_c2_c5_2", 0); // GCSCRE0_EL1
    }
}
