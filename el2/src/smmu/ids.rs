//! What an SMMU can do (IHI 0070 6.3.1 to 6.3.6), and whether that is enough.

use thiserror::Error;

/// Identification registers, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ids {
    /// Stage 2 translation.
    pub stage2: bool,
    /// It walks tables of AArch64's format.
    pub aarch64: bool,
    /// Its walks and queue accesses see the CPUs' caches.
    pub coherent: bool,
    /// 16-bit VMIDs.
    pub vmid16: bool,
    /// Two-level stream tables.
    pub two_level: bool,
    /// Tables are little-endian, or may be.
    pub little_endian: bool,
    /// Bits of a stream number.
    pub stream_bits: u32,
    /// Base-two logarithm of the largest command queue.
    pub command_bits: u32,
    /// Base-two logarithm of the largest event queue.
    pub event_bits: u32,
    /// Queues or tables are at places fixed by hardware.
    pub preset: bool,
    /// Bits of an output address.
    pub output_bits: u8,
    /// 4 KiB granule.
    pub granule_4k: bool,
    /// Stage 2 can force write-back (the SMMU's counterpart of FEAT_S2FWB).
    pub fwb: bool,
    /// Invalidation by range.
    pub range: bool,
}

/// Why an SMMU can't be used.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum Unfit {
    /// Stage 1 only.
    #[error("it has no stage 2")]
    NoStage2,
    /// Only the 32-bit format, or big-endian tables.
    #[error("it can't walk the CPUs' tables")]
    Format,
    /// Its walks would miss what CPUs have in their caches.
    #[error("its walks are not coherent with the CPUs' caches")]
    NotCoherent,
    /// No 4 KiB granule.
    #[error("it has no 4 KiB granule")]
    Granule,
    /// There is RAM that its tables could not name.
    #[error("there is RAM beyond its addresses")]
    Reach,
    /// A stream table for so few streams, or queues so small, are of no use.
    #[error("its queues or stream numbers are too small")]
    TooSmall,
    /// Its queues are somewhere that hardware chose.
    #[error("its queues or tables are at fixed places")]
    Preset,
    /// EL2's memory is used up.
    #[error("EL2's memory does not hold its tables")]
    NoMemory,
    /// A register did not take its value.
    #[error("it does not answer")]
    Dead,
}

const fn bit(word: u32, at: u32) -> bool {
    word >> at & 1 != 0
}

impl Ids {
    /// From IDR0, IDR1, IDR3 and IDR5.
    #[must_use]
    pub const fn decode(idr0: u32, idr1: u32, idr3: u32, idr5: u32) -> Self {
        Self {
            stage2: bit(idr0, 0),
            aarch64: bit(idr0, 3),
            coherent: bit(idr0, 4),
            vmid16: bit(idr0, 18),
            two_level: idr0 >> 27 & 3 == 1,
            little_endian: matches!(idr0 >> 21 & 3, 0 | 2),
            stream_bits: idr1 & 0x3f,
            command_bits: idr1 >> 21 & 0x1f,
            event_bits: idr1 >> 16 & 0x1f,
            preset: bit(idr1, 29) || bit(idr1, 30),
            output_bits: match idr5 & 7 {
                0 => 32,
                1 => 36,
                2 => 40,
                3 => 42,
                4 => 44,
                5 => 48,
                _ => 52,
            },
            granule_4k: bit(idr5, 4),
            fwb: bit(idr3, 8),
            range: bit(idr3, 10),
        }
    }

    /// Whether EL2 can use it for RAM up to `ram_end`. `coherent`: what the device tree says of it.
    ///
    /// # Errors
    ///
    /// The first thing that it lacks.
    pub const fn check(&self, coherent: bool, ram_end: u64) -> Result<(), Unfit> {
        if !self.stage2 {
            Err(Unfit::NoStage2)
        } else if !self.aarch64 || !self.little_endian {
            Err(Unfit::Format)
        } else if !self.coherent || !coherent {
            Err(Unfit::NotCoherent)
        } else if !self.granule_4k {
            Err(Unfit::Granule)
        } else if ram_end > 1 << self.output_bits {
            Err(Unfit::Reach)
        } else if self.preset {
            Err(Unfit::Preset)
        } else if self.stream_bits < 1 || self.command_bits < 2 || self.event_bits < 1 {
            Err(Unfit::TooSmall)
        } else {
            Ok(())
        }
    }
}
