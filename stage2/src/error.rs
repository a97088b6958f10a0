//! The crate's errors. Outcomes that are not errors live with their operation.

use crate::addr::{Ipa, IpaRange, Pa, RangeError};
use crate::attr::{Combine, Device, MemType, Perms};
use crate::level::Level;

/// What a format cannot express.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// Fetching instructions from a device has side effects; KVM refuses it, so do we.
    #[error("device memory ({0:?}) cannot be executable")]
    ExecutableDevice(Device),
    /// Non-cacheable memory that a guest may execute, refused as in KVM.
    #[error("non-cacheable memory cannot be executable")]
    ExecutableNonCacheable,
    /// The memory type has no encoding in this format.
    #[error("memory type {0:?} has no encoding here")]
    UnsupportedType(MemType),
    /// The format cannot take the guest's say about this type.
    #[error("{0:?} cannot be combined as {1:?} here")]
    CannotCombine(MemType, Combine),
    /// The permissions have no encoding in this format.
    #[error("permissions {0:?} have no encoding here")]
    UnsupportedPerms(Perms),
    /// The format has no access flag to clear.
    #[error("this format has no access flag")]
    NoAccessFlag,
    /// The output address has bits below the entry's size.
    #[error("{pa:?} is not aligned for level {level:?}")]
    Misaligned {
        /// The address.
        pa: Pa,
        /// The level of the entry.
        level: Level,
    },
    /// The output address has more bits than the format or the machine.
    #[error("{pa:?} has more than {bits} bits")]
    OutOfRange {
        /// The address.
        pa: Pa,
        /// Output bits allowed.
        bits: u32,
    },
    /// Blocks do not exist at this level.
    #[error("no leaf at level {0:?}")]
    NoLeafAt(Level),
    /// Tables cannot be linked at the page level.
    #[error("no table below level {0:?}")]
    NoTableAt(Level),
    /// A broken entry is transient and not for callers to write.
    #[error("a broken entry cannot be encoded")]
    Transient,
    /// An importer of the exported root asked for these bits to stay zero.
    #[error("bits {0:#x} are reserved by an importer")]
    ReservedByImporter(u64),
}

/// Why an operation did nothing at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Not enough table memory. Nothing has changed; repeat with at least `needed` tables.
    #[error("{needed} table pages are needed")]
    NoMemory {
        /// Table pages the same call needs, at the time of asking.
        needed: usize,
    },
    /// An address or a size is not a multiple of the page size.
    #[error("{0:#x} is not a multiple of the page size")]
    Unaligned(u64),
    /// The range leaves the input addresses of the table.
    #[error("{0:?} is outside the input addresses")]
    OutOfInput(IpaRange),
    /// The range describes no memory.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The leaf cannot be expressed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The faulting address lies outside the window given with it.
    #[error("{0:?} is outside the window")]
    OutsideWindow(Ipa),
    /// Nothing is mapped there.
    #[error("nothing is mapped at {0:?}")]
    NotMapped(Ipa),
    /// The leaves below do not form one block.
    #[error("the leaves around {0:?} do not form one block")]
    NotUniform(Ipa),
}

/// Why a table cannot be described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Input address sizes run from 32 to 52 bits, above 48 only where the granule allows.
    #[error("{0} input bits are not possible")]
    InputBits(u8),
    /// Output address sizes run from 32 to 52 bits, above 48 only where the granule allows.
    #[error("{0} output bits are not possible")]
    OutputBits(u8),
    /// The input would be wider than the output.
    #[error("{input} input bits need as many output bits, not {output}")]
    InputBeyondOutput {
        /// Input bits asked for.
        input: u8,
        /// Output bits asked for.
        output: u8,
    },
    /// A walk of that input size cannot start there.
    #[error("a walk cannot start at level {0:?}")]
    StartLevel(Level),
}
