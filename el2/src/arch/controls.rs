//! What EL2 tells a core about EL1: of the host, which it always tells the same, and of a guest.
//!
//! Registers of EL2, which the host can't change and [`super::host_regs`] has set for good when the core
//! started: they are read once, before the first guest, not at each switch of the worlds. HSTR_EL2 and
//! VPIDR_EL2 are not here: a guest has the host's.

use el2::features::Features;

use super::profiling;
use super::regs::{self, mrs, msr};

unsafe extern "C" {
    static guest_vectors: u8;
    static forgetful_guest_vectors: u8;
    static vectors: u8;
}

/// Parts of the core that not every core has, or errata, with something to do at a switch: one word,
/// kept in a register meanwhile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts(u32);

macro_rules! parts {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $of:ident => $has:expr;)*) => {
        impl Parts {
            /// Those of a core with these features.
            pub(crate) fn of(features: &Features) -> Self {
                Self($({
                    let $of = features;
                    u32::from($has) << $bit
                })|*)
            }

            $($(#[$doc])*
            #[inline]
            pub(crate) const fn $name(self) -> bool {
                self.0 & 1 << $bit != 0
            })*
        }
    };
}

parts! {
    /// Pointer authentication.
    pauth = 0, of => of.pauth;
    /// SCXTNUM_EL0 and SCXTNUM_EL1.
    scxtnum = 1, of => of.scxtnum;
    /// HCRX_EL2.
    hcx = 2, of => of.hcx;
    /// Fine-grained traps.
    fgt = 3, of => of.fgt;
    /// More of them.
    fgt2 = 4, of => of.fgt && of.fgt2;
    /// Virtual SErrors with a syndrome.
    ras = 5, of => of.ras;
    /// Memory partitioning.
    mpam = 6, of => of.mpam;
    /// Streaming mode.
    sme = 7, of => of.sme;
    /// Speculative walks with registers of two worlds.
    speculative_at = 8, of => of.speculative_at;
    /// Statistical profiling, trace buffers or trace filters.
    profiles = 9, of => of.spe || of.trbe || of.trace_filter || of.brbe;
    /// Event counters.
    pmu = 10, of => of.pmu;
}

/// CPTR_EL2 of a guest that has not used FP yet: TCPAC (no trap of CPACR_EL1 is needed: clear),
/// TAM, TTA, TSM, TFP, TZ, RES1 bits (Arm ARM D24.2.33, without VHE).
pub(crate) const CPTR_GUEST: u64 = 0x22ff | 1 << 8 | 1 << 10 | 1 << 12 | 1 << 20 | 1 << 30;
/// CPTR_EL2.TFP.
const CPTR_TFP: u64 = 1 << 10;
/// CPTR_EL2 of a guest whose FP registers are in the core.
pub(crate) const CPTR_GUEST_WITH_FP: u64 = CPTR_GUEST & !CPTR_TFP;
/// MDCR_EL2 of a guest: TPMCR, TPM, TDE clear, TDA, TDOSA, TDRA, TDCC (Arm ARM D24.2.103). See
/// [`profiling::traps`] for the rest.
const MDCR_TRAPS: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 27;
/// What stays of the host's MDCR_EL2: HPMN, and HPMD and HCCD, for EL2 between the guest's exits.
const MDCR_KEPT: u64 = 0x1f | 1 << 17 | 1 << 23;
/// MPAM2_EL2 of the host: nothing traps (EnMPAMSM: nor does MPAMSM_EL1).
pub(crate) const MPAM_HOST: u64 = 1 << 50;
/// MPAM2_EL2 of a guest: its accesses to MPAM0_EL1, MPAM1_EL1 and MPAMSM_EL1, which keep the host's values,
/// trap, and those to MPAMIDR_EL1 (TIDR) where they can.
const MPAM_TRAPS: u64 = 1 << 58 | 1 << 49 | 1 << 48;
/// CNTHCTL_EL2: the physical counter can be read (EL1PCTEN), the physical timer traps.
const CNTHCTL_GUEST: u64 = 1;
/// VMPIDR_EL2: RES1 bit 31.
const MPIDR_RES1: u64 = 1 << 31;

/// A core's controls under the host, and what follows from them for guests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostControls {
    pub(crate) parts: Parts,
    cptr: u64,
    mdcr: u64,
    cnthctl: u64,
    cntvoff: u64,
    vmpidr: u64,
    vtcr: u64,
    vttbr: u64,
    hcr: u64,
    hcrx: u64,
    vectors: u64,
    /// MDCR_EL2 of a guest.
    guest_mdcr: u64,
    /// VBAR_EL2 while a guest is loaded.
    guest_vectors: u64,
    traps: FineTraps,
}

impl HostControls {
    /// Reads those of this core, which the host has.
    pub(crate) fn read(features: &Features) -> Self {
        let parts = Parts::of(features);
        let (mdcr, own) = (mrs!("mdcr_el2"), mrs!("vbar_el2"));
        Self {
            parts,
            cptr: mrs!("cptr_el2"),
            mdcr,
            cnthctl: mrs!("cnthctl_el2"),
            cntvoff: mrs!("cntvoff_el2"),
            vmpidr: mrs!("vmpidr_el2"),
            vtcr: mrs!("vtcr_el2"),
            vttbr: mrs!("vttbr_el2"),
            hcr: mrs!("hcr_el2"),
            hcrx: if parts.hcx() { mrs!("s3_4_c1_c2_2") } else { 0 },
            vectors: own,
            guest_mdcr: mdcr & MDCR_KEPT | MDCR_TRAPS | profiling::traps(features),
            guest_vectors: vectors_for_guest(own),
            traps: FineTraps::read(parts),
        }
    }

    /// Tells the core what a guest's vCPU with this number may, but stage 2 and HCR_EL2; `time_offset` is
    /// CNTVOFF_EL2.
    #[inline]
    pub(crate) fn load_guest(&self, index: u8, time_offset: u64) {
        msr!("mdcr_el2", self.guest_mdcr);
        msr!("cntvoff_el2", time_offset);
        msr!("cptr_el2", CPTR_GUEST);
        msr!("cnthctl_el2", CNTHCTL_GUEST);
        msr!("vmpidr_el2", MPIDR_RES1 | u64::from(index));
        let parts = self.parts;
        if parts.mpam() {
            msr!("s3_4_c10_c5_0", MPAM_TRAPS);
        }
        if parts.fgt() {
            FineTraps::default().write(parts);
        }
        if parts.hcx() {
            msr!("s3_4_c1_c2_2", 0); // HCRX_EL2
        }
    }

    /// Tells the core what the host may, but HCR_EL2.
    #[inline]
    pub(crate) fn load_host(&self) {
        let host = *self;
        msr!("cptr_el2", host.cptr);
        msr!("mdcr_el2", host.mdcr);
        msr!("cnthctl_el2", host.cnthctl);
        msr!("cntvoff_el2", host.cntvoff);
        msr!("vmpidr_el2", host.vmpidr);
        msr!("vtcr_el2", host.vtcr);
        msr!("vttbr_el2", host.vttbr);
        if host.parts.mpam() {
            msr!("s3_4_c10_c5_0", MPAM_HOST); // MPAM2_EL2
        }
        if host.parts.fgt() {
            host.traps.write(host.parts);
        }
        if host.parts.hcx() {
            msr!("s3_4_c1_c2_2", host.hcrx);
        }
    }

    /// The host's HCR_EL2, under which its exceptions come and its interrupts are its own.
    #[inline]
    pub(crate) fn load_hcr(&self) {
        regs::set_hcr(self.hcr);
    }

    /// Makes exceptions go where the world that is loaded needs them.
    #[inline]
    pub(crate) fn load_guest_vectors(&self) {
        regs::set_vectors(self.guest_vectors);
    }

    /// The same for the host.
    #[inline]
    pub(crate) fn load_host_vectors(&self) {
        regs::set_vectors(self.vectors);
    }
}

/// The vectors of a guest on a core whose own are these.
fn vectors_for_guest(own: u64) -> u64 {
    let plain = (&raw const vectors).addr() as u64;
    if own == plain {
        (&raw const guest_vectors).addr() as u64
    } else {
        (&raw const forgetful_guest_vectors).addr() as u64
    }
}

/// Fine-grained traps, where they exist. A guest's are all zero: what has a negative name traps.
#[derive(Clone, Copy, Debug, Default)]
struct FineTraps {
    registers: [u64; 5],
    second: [u64; 5],
}

impl FineTraps {
    fn read(parts: Parts) -> Self {
        let mut traps = Self::default();
        if parts.fgt() {
            traps.registers = [
                mrs!("s3_4_c1_c1_4"),
                mrs!("s3_4_c1_c1_5"),
                mrs!("s3_4_c1_c1_6"),
                mrs!("s3_4_c3_c1_4"),
                mrs!("s3_4_c3_c1_5"),
            ];
        }
        if parts.fgt2() {
            traps.second = [
                mrs!("s3_4_c3_c1_2"),
                mrs!("s3_4_c3_c1_3"),
                mrs!("s3_4_c3_c1_7"),
                mrs!("s3_4_c3_c1_0"),
                mrs!("s3_4_c3_c1_1"),
            ];
        }
        traps
    }

    /// Writes them; FEAT_FGT is there.
    #[inline]
    fn write(self, parts: Parts) {
        let [read, write, instructions, debug_read, debug_write] = self.registers;
        msr!("s3_4_c1_c1_4", read);
        msr!("s3_4_c1_c1_5", write);
        msr!("s3_4_c1_c1_6", instructions);
        msr!("s3_4_c3_c1_4", debug_read);
        msr!("s3_4_c3_c1_5", debug_write);
        if parts.fgt2() {
            let [read, write, instructions, debug_read, debug_write] = self.second;
            msr!("s3_4_c3_c1_2", read);
            msr!("s3_4_c3_c1_3", write);
            msr!("s3_4_c3_c1_7", instructions);
            msr!("s3_4_c3_c1_0", debug_read);
            msr!("s3_4_c3_c1_1", debug_write);
        }
    }
}
