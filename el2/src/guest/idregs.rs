//! Identification registers as a guest reads them: an allow-list over the hardware's.
//!
//! Invariant: a field shows the lower of what the core has and what EL2 handles; a field that no
//! list names reads as zero, so a feature of a core that is newer than this file stays hidden.
//! Protected and other guests see the same. Beyond pKVM's maxima are what needs neither state nor a trap:
//! FEAT_ECV, AFP, nTLBPA, TIDCP1, ECBHB, LSMAOC, LVA, CCIDX, TTST, RPRES, HBC, CONSTPACFIELD, CLRBHB, RPRFM, CSSC.
//!
//! Hidden, because their state is not switched or their traps are not handled: SVE, SME, MTE,
//! MPAM, AMU, RAS, PMU, SPE, trace and branch records, MOPS, LS64, WFxT (a WFI that EL2 traps
//! would lose its time-out), FEAT_TME, permission indirection and the other
//! registers of ID_AA64MMFR3_EL1, LORegions, 52-bit addresses with small granules (LPA2), NMI,
//! EL2, EL3, AArch32, and big-endian data (MMIO values are completed little-endian).
//!
//! Source: Arm ARM (DDI 0487) D24.2, ID_AA64*_EL1; D24.1.3 on signed and unsigned fields.

/// What the core's registers hold.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HardwareIds {
    /// ID_AA64PFR0_EL1.
    pub pfr0: u64,
    /// ID_AA64PFR1_EL1.
    pub pfr1: u64,
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
}

/// What the VM decides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Model {
    /// Size of the guest's physical address space in bits.
    pub ipa_bits: u8,
    /// The guest has a GICv3 and its system registers.
    pub gic_v3: bool,
}

/// What the guest reads; computed once per VM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GuestIds {
    values: HardwareIds,
}

/// How a field of four bits is limited.
#[derive(Clone, Copy, Debug)]
enum Limit {
    /// Unsigned: the lower of both.
    UpTo(u8),
    /// Signed, where 0xf means absent: negative values stay, others as with `UpTo`.
    AbsentOrUpTo(u8),
    /// Always this.
    Is(u8),
}
use Limit::{AbsentOrUpTo, Is, UpTo};

/// Position of a field's lowest bit, and its limit.
type Field = (u32, Limit);

/// EL0 and EL1 in AArch64 only; FP and AdvSIMD up to half precision; DIT, CSV2, CSV3. GIC is set
/// by the model.
const PFR0: &[Field] = &[
    (0, Is(1)),
    (4, Is(1)),
    (16, AbsentOrUpTo(1)),
    (20, AbsentOrUpTo(1)),
    (48, UpTo(1)),
    (56, UpTo(3)),
    (60, UpTo(1)),
];

/// BT, SSBS with its instructions.
const PFR1: &[Field] = &[(0, UpTo(1)), (4, UpTo(2))];

/// Debug architecture v8 with the fewest breakpoints and watchpoints there can be (two each; they
/// have no effect, see `sysreg`), no double lock, no PMU, no trace.
const DFR0: &[Field] = &[(0, Is(6)), (12, Is(1)), (20, Is(1)), (36, Is(0xf))];

/// AES, SHA1, SHA2, CRC32, Atomic, RDM, SHA3, SM3, SM4, DP, FHM, TS, TLB, RNDR.
const ISAR0: &[Field] = &[
    (4, UpTo(2)),
    (8, UpTo(1)),
    (12, UpTo(2)),
    (16, UpTo(1)),
    (20, UpTo(2)),
    (28, UpTo(1)),
    (32, UpTo(1)),
    (36, UpTo(1)),
    (40, UpTo(1)),
    (44, UpTo(1)),
    (48, UpTo(1)),
    (52, UpTo(2)),
    (56, UpTo(2)),
    (60, UpTo(1)),
];

/// DPB, APA, API, JSCVT, FCMA, LRCPC, GPA, GPI, FRINTTS, SB, SPECRES, BF16, DGH, I8MM, XS.
const ISAR1: &[Field] = &[
    (0, UpTo(2)),
    (4, UpTo(5)),
    (8, UpTo(5)),
    (12, UpTo(1)),
    (16, UpTo(1)),
    (20, UpTo(3)),
    (24, UpTo(1)),
    (28, UpTo(1)),
    (32, UpTo(1)),
    (36, UpTo(1)),
    (40, UpTo(2)),
    (44, UpTo(2)),
    (48, UpTo(1)),
    (52, UpTo(1)),
    (56, UpTo(1)),
];

/// RPRES, GPA3, APA3, BC, PAC_frac, CLRBHB, RPRFM, CSSC, ATS1A.
const ISAR2: &[Field] = &[
    (4, UpTo(1)),
    (8, UpTo(1)),
    (12, UpTo(5)),
    (20, UpTo(1)),
    (24, UpTo(1)),
    (28, UpTo(1)),
    (48, UpTo(1)),
    (52, UpTo(1)),
    (60, UpTo(1)),
];

/// ASIDBits, SNSMem, TGran16, TGran64, TGran4, ExS, ECV (the self-synchronised counters). PARange
/// is set by the model.
const MMFR0: &[Field] = &[
    (4, UpTo(2)),
    (12, UpTo(1)),
    (20, UpTo(1)),
    (24, AbsentOrUpTo(0)),
    (28, AbsentOrUpTo(0)),
    (44, UpTo(1)),
    (60, UpTo(1)),
];

/// HAFDBS, HPDS, PAN, ETS, AFP, nTLBPA, TIDCP1, CMOW, ECBHB.
const MMFR1: &[Field] = &[
    (0, UpTo(2)),
    (12, UpTo(2)),
    (20, UpTo(3)),
    (36, UpTo(3)),
    (44, UpTo(1)),
    (48, UpTo(1)),
    (52, UpTo(1)),
    (56, UpTo(1)),
    (60, UpTo(1)),
];

/// CnP, UAO, LSM, VARange, CCIDX, ST, AT, IDS, TTL, BBM, E0PD.
const MMFR2: &[Field] = &[
    (0, UpTo(1)),
    (4, UpTo(1)),
    (8, UpTo(1)),
    (16, UpTo(1)),
    (20, UpTo(1)),
    (28, UpTo(1)),
    (32, UpTo(1)),
    (36, UpTo(1)),
    (48, UpTo(1)),
    (52, UpTo(2)),
    (60, UpTo(1)),
];

/// ID_AA64PFR0_EL1.GIC.
const PFR0_GIC: u32 = 24;

impl GuestIds {
    /// Limits the hardware's registers.
    #[must_use]
    pub fn new(hardware: &HardwareIds, model: &Model) -> Self {
        let gic = u64::from(model.gic_v3 && field(hardware.pfr0, PFR0_GIC) != 0);
        let pa_range = field(hardware.mmfr0, 0).min(pa_range(model.ipa_bits));
        let values = HardwareIds {
            pfr0: limit(hardware.pfr0, PFR0) | gic << PFR0_GIC,
            pfr1: limit(hardware.pfr1, PFR1),
            isar0: limit(hardware.isar0, ISAR0),
            isar1: limit(hardware.isar1, ISAR1),
            isar2: limit(hardware.isar2, ISAR2),
            mmfr0: limit(hardware.mmfr0, MMFR0) | u64::from(pa_range),
            mmfr1: limit(hardware.mmfr1, MMFR1),
            mmfr2: limit(hardware.mmfr2, MMFR2),
        };
        Self { values }
    }

    /// The register `S3_0_C0_C<crm>_<op2>`. AArch32's (CRm 1 to 3) and reserved ones are zero.
    #[must_use]
    pub fn read(&self, crm: u8, op2: u8) -> u64 {
        match (crm, op2) {
            (4, 0) => self.values.pfr0,
            (4, 1) => self.values.pfr1,
            (5, 0) => limit(0, DFR0),
            (6, 0) => self.values.isar0,
            (6, 1) => self.values.isar1,
            (6, 2) => self.values.isar2,
            (7, 0) => self.values.mmfr0,
            (7, 1) => self.values.mmfr1,
            (7, 2) => self.values.mmfr2,
            _ => 0,
        }
    }

    /// The guest was told of the system registers of a GICv3.
    #[must_use]
    pub const fn has_gic_registers(&self) -> bool {
        field(self.values.pfr0, PFR0_GIC) != 0
    }

    /// The guest was told that branch predictors do not leak between contexts (CSV2).
    #[must_use]
    pub const fn has_csv2(&self) -> bool {
        field(self.values.pfr0, 56) != 0
    }
}

fn limit(register: u64, fields: &[Field]) -> u64 {
    fields
        .iter()
        .map(|&(shift, limit)| u64::from(limited(field(register, shift), limit)) << shift)
        .fold(0, |sum, part| sum | part)
}

fn limited(value: u8, limit: Limit) -> u8 {
    match limit {
        AbsentOrUpTo(_) if value & 8 != 0 => value,
        UpTo(most) | AbsentOrUpTo(most) => value.min(most),
        Is(fixed) => fixed,
    }
}

const fn field(register: u64, shift: u32) -> u8 {
    (register >> shift).to_le_bytes()[0] & 0xf
}

/// ID_AA64MMFR0_EL1.PARange of the largest size that is not above `bits`; 52 bits are not offered,
/// because they need LPA or LPA2.
const fn pa_range(bits: u8) -> u8 {
    match bits {
        0..36 => 0,
        36..40 => 1,
        40..42 => 2,
        42..44 => 3,
        44..48 => 4,
        _ => 5,
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "idregs_tests.rs"]
mod tests;
