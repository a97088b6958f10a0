//! What an Arm stage-2 table is built for: the CPU's features and the sizes chosen.

use crate::level::Level;

/// Size of a page and of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granule {
    /// 4 KiB.
    K4,
    /// 16 KiB.
    K16,
    /// 64 KiB.
    K64,
}

impl Granule {
    /// log2 of the page size.
    #[must_use]
    #[inline]
    pub const fn page_shift(self) -> u8 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }
}

/// Whether stage 2 can force write-back (FEAT_S2FWB with HCR_EL2.FWB set). It changes what the
/// memory type field means, so it must say what the CPU was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForceWriteBack {
    /// HCR_EL2.FWB is 1.
    On,
    /// HCR_EL2.FWB is 0.
    Off,
}

/// Whether execution can be split between EL1 and EL0 (FEAT_XNX).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execute {
    /// FEAT_XNX: each exception level on its own.
    Split,
    /// Both or none.
    Joint,
}

/// Whether 4 and 16 KiB tables carry 52-bit addresses (FEAT_LPA2 with VTCR_EL2.DS set).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WideAddresses {
    /// VTCR_EL2.DS is 1.
    On,
    /// VTCR_EL2.DS is 0.
    Off,
}

/// Facts about the CPU and how its registers are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmFeatures {
    /// Forced write-back.
    pub fwb: ForceWriteBack,
    /// Split execute permission.
    pub execute: Execute,
    /// 52-bit addresses with 4 and 16 KiB pages.
    pub wide: WideAddresses,
}

impl ArmFeatures {
    /// Armv8.0, as the Cortex-A72: none of them.
    pub const V8_0: Self = Self {
        fwb: ForceWriteBack::Off,
        execute: Execute::Joint,
        wide: WideAddresses::Off,
    };
}

/// What to build a table for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmConfig {
    /// Page and table size.
    pub granule: Granule,
    /// Bits of the input address, 32 to 52 and at most `output_bits`.
    pub input_bits: u8,
    /// Bits of the output address: the machine's physical address size, 32 to 52.
    pub output_bits: u8,
    /// The CPU's features.
    pub features: ArmFeatures,
    /// Where the walk starts; nothing picks the finest level that a root of at most 16
    /// concatenated tables allows, which is the shortest walk.
    pub start: Option<Level>,
}
