//! The host's statistical profiling and trace while a guest runs: off.
//!
//! Both write samples to virtual addresses that the host has chosen, in the translation regime of
//! the owner that MDCR_EL2.E2PB and E2TB name. With EL2 as owner (0b00) that is EL2's map, where any
//! address is memory that is not the host's; with EL1, while a guest is loaded, the guest's. So EL1
//! stays the owner, and before its registers change places both are off and what they hold is
//! written. Source: Arm ARM (DDI 0487), chapters "The Statistical Profiling Extension" and "The Trace
//! Buffer Extension".

use el2::features::Features;

use super::instructions::{self, isb};
use super::regs::{mrs, msr};

/// PMBLIMITR_EL1.E, TRBLIMITR_EL1.E.
const ENABLED: u64 = 1;
/// PMBIDR_EL1.P, TRBIDR_EL1.P: a higher exception level owns the buffer, and traps its registers.
const NOT_OURS: u64 = 1 << 4;
/// MDCR_EL2.E2PB = 0b10: EL1 owns the buffer, and its accesses trap.
const PROFILING_OF_EL1: u64 = 0b10 << 12;
/// MDCR_EL2.E2TB, the same.
const TRACE_OF_EL1: u64 = 0b10 << 24;
/// MDCR_EL2.TPMS: the controls of profiling trap.
const TPMS: u64 = 1 << 14;
/// MDCR_EL2.TTRF: so does the filter of the trace.
const TTRF: u64 = 1 << 19;

/// The bits of MDCR_EL2 under which a guest runs.
pub(crate) const fn traps(features: &Features) -> u64 {
    let spe = if features.spe {
        TPMS | PROFILING_OF_EL1
    } else {
        0
    };
    let trbe = if features.trbe { TRACE_OF_EL1 } else { 0 };
    let filter = if features.trace_filter { TTRF } else { 0 };
    spe | trbe | filter
}

/// What the host had on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Profiling {
    /// PMSCR_EL1 and PMBLIMITR_EL1.
    samples: Option<(u64, u64)>,
    /// TRFCR_EL1.
    filter: u64,
    /// TRBLIMITR_EL1.
    trace: Option<u64>,
    /// BRBCR_EL1: the records name no VMID, and would hold a guest's branches, too.
    branches: u64,
}

impl Profiling {
    /// Turns all of it off, buffers written. The host's EL1 and stage 2 are loaded.
    #[inline]
    pub(crate) fn stop(features: &Features) -> Self {
        let mut host = Self::default();
        if features.spe {
            host.samples = stop_samples();
        }
        if features.trace_filter {
            host.filter = mrs!("s3_0_c1_c2_1"); // TRFCR_EL1
            msr!("s3_0_c1_c2_1", 0);
        }
        if features.trbe {
            host.trace = stop_trace();
        }
        if features.brbe {
            host.branches = mrs!("s2_1_c9_c0_0");
            msr!("s2_1_c9_c0_0", 0);
        }
        host
    }

    /// Turns on again what was. The host's registers are loaded.
    #[inline]
    pub(crate) fn resume(&self, features: &Features) {
        if let Some((control, limit)) = self.samples {
            msr!("s3_0_c9_c10_0", limit);
            isb();
            msr!("s3_0_c9_c9_0", control);
        }
        if let Some(limit) = self.trace {
            msr!("s3_0_c9_c11_0", limit);
            isb();
        }
        if features.trace_filter {
            msr!("s3_0_c1_c2_1", self.filter);
        }
        if features.brbe {
            msr!("s2_1_c9_c0_0", self.branches);
        }
    }
}

/// Whether a higher exception level leaves profiling to us; FEAT_SPE is there.
fn samples_are_ours() -> bool {
    // PMBIDR_EL1 can always be read, the others perhaps not.
    mrs!("s3_0_c9_c10_7") & NOT_OURS == 0
}

/// PMSCR_EL2 of a core that starts: EL2 is not sampled; EL1 may sample physical addresses (PA) and the
/// physical counter (PCT = 0b01), as on the bare machine.
pub(crate) fn start_samples(features: &Features) {
    const PA: u64 = 1 << 4;
    const PCT: u64 = 1 << 6;
    if features.spe && samples_are_ours() {
        msr!("s3_4_c9_c9_0", PA | PCT);
    }
}

/// PMSCR_EL1 and PMBLIMITR_EL1, if the buffer was on.
fn stop_samples() -> Option<(u64, u64)> {
    if !samples_are_ours() {
        return None;
    }
    let limit = mrs!("s3_0_c9_c10_0");
    if limit & ENABLED == 0 {
        return None;
    }
    let control = mrs!("s3_0_c9_c9_0");
    msr!("s3_0_c9_c9_0", 0);
    isb();
    // What was sampled is written.
    instructions::psb_csync();
    instructions::dsb_nsh();
    msr!("s3_0_c9_c10_0", 0);
    isb();
    Some((control, limit))
}

/// TRBLIMITR_EL1, if the buffer was on. The trace filter is closed already.
fn stop_trace() -> Option<u64> {
    // TRBIDR_EL1, as above.
    if mrs!("s3_0_c9_c11_7") & NOT_OURS != 0 {
        return None;
    }
    let limit = mrs!("s3_0_c9_c11_0");
    if limit & ENABLED == 0 {
        return None;
    }
    isb();
    // What was traced is written.
    instructions::tsb_csync();
    instructions::dsb_nsh();
    msr!("s3_0_c9_c11_0", 0);
    isb();
    Some(limit)
}
