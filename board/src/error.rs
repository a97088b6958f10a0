//! Errors of reading and of editing a device tree.

use dtoolkit::error::FdtParseError;
use thiserror::Error;

/// Why a device tree can't be used.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum BoardError {
    /// The register that should hold the tree's address holds something else (an ATAG list, zero).
    #[error("no device tree at {address:#x} (found {found:#010x}, not 0xd00dfeed)")]
    NotADeviceTree {
        /// Address that the firmware passed.
        address: u64,
        /// The first word found there, 0 if nothing was read.
        found: u32,
    },
    /// The header gives a size outside `0x40..=0x20_0000` bytes (2 MiB: the arm64 boot protocol's limit).
    #[error(
        "device tree header gives a size of {0:#x} bytes, more than 2 MiB or less than a header"
    )]
    BadSize(u32),
    /// The blob's structure is broken.
    #[error("device tree is corrupt: {0}")]
    Corrupt(#[from] FdtParseError),
    /// No memory node with a usable range.
    #[error("device tree lists no usable memory")]
    NoMemory,
    /// No CPU node.
    #[error("device tree lists no CPU")]
    NoCpus,
    /// A list of the tree is longer than we can hold.
    #[error("device tree has more than {limit} {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many fit.
        limit: usize,
    },
    /// No free range is large enough.
    #[error("no free memory range of {0} KiB")]
    NoRoom(u64),
}

/// Why a device tree can't be edited.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum EditError {
    /// The tree's structure is broken.
    #[error("device tree is corrupt")]
    Structure,
    /// The buffer is too small for the edited tree.
    #[error("no room for {needed} more bytes in the device tree's buffer")]
    NoRoom {
        /// Bytes that did not fit; there may be more.
        needed: usize,
    },
    /// The node to be edited is not there.
    #[error("device tree has no node {0}")]
    NoNode(&'static str),
    /// `/reserved-memory` does not have the root's cell sizes, or they are neither 1 nor 2: what is
    /// reserved there would not be seen.
    #[error("/reserved-memory can't be read with {0} and {1} cells")]
    Cells(u32, u32),
}
