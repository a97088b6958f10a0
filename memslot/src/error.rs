//! What can go wrong, and the class that the hypercall layer turns into a code.

use stage2::ExportError;

use crate::slot::{SlotFlags, SlotId};

/// The class of an [`Error`]: what a caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request can never be right (EINVAL).
    Invalid,
    /// Something else holds what is needed; try again after it lets go (EBUSY).
    Busy,
    /// The request asks for more than the object allows (EPERM).
    NotPermitted,
    /// A limit or an allocator is exhausted; nothing has changed (ENOMEM).
    NoMemory,
    /// The world moved while the request was prepared; repeat it at once (EAGAIN).
    Again,
    /// The address range or the name is taken (EEXIST).
    Exists,
}

/// Why a request was refused. Nothing has changed when one of these comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The slot number is not below the VM's maximum.
    #[error("slot {0:?} is not below the maximum")]
    SlotOutOfRange(SlotId),
    /// There is no such slot.
    #[error("slot {0:?} does not exist")]
    NoSuchSlot(SlotId),
    /// A slot with this number exists already.
    #[error("slot {0:?} exists already")]
    SlotExists(SlotId),
    /// The range is empty, overflows, or ends beyond the VM's address space (values in frames).
    #[error("guest frames from {base:#x}, {npages:#x} pages: not a range of this VM")]
    BadRange {
        /// First frame asked for.
        base: u64,
        /// Pages asked for.
        npages: u64,
    },
    /// The range overlaps another slot.
    #[error("overlaps slot {0:?}")]
    Overlap(SlotId),
    /// Bits that this crate does not know, or a combination that makes no sense.
    #[error("unknown or contradictory bits {0:#x}")]
    BadBits(u64),
    /// Read-only and non-coherent are fixed at creation: delete the slot and create it anew.
    #[error("flags {0:?} cannot be changed after creation")]
    ImmutableFlags(SlotFlags),
    /// Dirty logging and non-coherent slots are not for memory that the host must not see.
    #[error("flags {0:?} are refused for a protected VM")]
    RefusedForProtected(SlotFlags),
    /// Neither or both of LOCK and UNLOCK were given, or a reserved word is not zero.
    #[error("malformed lock request, word {0:#x}")]
    BadLockRequest(u64),
    /// LOCK without READ.
    #[error("locking needs read permission")]
    LockNeedsRead,
    /// Memory tagging is not supported together with locked slots.
    #[error("memory tags are not supported")]
    TagsUnsupported,
    /// A vCPU is inside the guest, or another exclusive operation is under way.
    #[error("a vCPU is running")]
    VcpuRunning,
    /// The slot is locked.
    #[error("slot {0:?} is locked")]
    Locked(SlotId),
    /// A call has locked or unlocked part of the slot: repeat that call first.
    #[error("slot {0:?} is locked in part")]
    Unfinished(SlotId),
    /// A slot, a reset or a device has changed part of the memory: repeat that call first.
    #[error("a change of the memory is not complete")]
    ChangeUnfinished,
    /// The slot is not locked.
    #[error("slot {0:?} is not locked")]
    NotLocked(SlotId),
    /// WRITE was asked for a slot that is read-only or logs dirty pages.
    #[error("slot {0:?} refuses a write lock")]
    WriteLockRefused(SlotId),
    /// The locked-memory limit would be exceeded.
    #[error("{wanted} pages exceed the limit: {locked} of {limit} are locked")]
    LockedLimit {
        /// Pages asked for.
        wanted: u64,
        /// Pages locked already.
        locked: u64,
        /// The limit, in pages.
        limit: u64,
    },
    /// Bookkeeping memory is exhausted.
    #[error("out of memory")]
    OutOfMemory,
    /// Page-table pages are missing: the caller must supply this many and repeat the call.
    #[error("{0} table pages are missing")]
    NeedTables(usize),
    /// The backing of this frame could not be pinned.
    #[error("page {0:#x} of the slot cannot be pinned")]
    PinFailed(u64),
    /// The backing changed between pin and map.
    #[error("the backing changed")]
    BackingChanged,
    /// The page table refused.
    #[error("the page table refused: {0}")]
    Table(stage2::MapError),
    /// The root cannot be lent, or not to this importer.
    #[error("the export was refused: {0}")]
    Export(stage2::ExportError),
    /// The non-coherent count would go below zero or above its maximum.
    #[error("unbalanced change of the non-coherent count")]
    CountUnbalanced,
    /// A root is exported, or an asynchronous user of a locked slot is active.
    #[error("the address space is in use by {0} importers or devices")]
    InUse(u32),
    /// Not while a non-coherent device or slot is there.
    #[error("refused while memory may be accessed without snooping")]
    NonCoherent,
    /// The buffer does not have one bit per page of the slot.
    #[error("the buffer must have {0} words")]
    BadBuffer(usize),
    /// The slot's backing or flags do not allow these permissions.
    #[error("slot {0:?} does not allow these permissions")]
    PermsRefused(SlotId),
    /// There is no leaf for this page of the slot.
    #[error("page {0:#x} of the slot is not mapped")]
    NoLeaf(u64),
    /// The host has taken this page of the slot back already.
    #[error("page {0:#x} of the slot is not shared")]
    Unshared(u64),
    /// The host has taken pages of the slot back: they would be the guest's again.
    #[error("pages of slot {0:?} are not shared")]
    SomeUnshared(SlotId),
    /// The host has not taken this page of the slot back.
    #[error("page {0:#x} of the slot is shared")]
    Shared(u64),
    /// Memory of a protected VM is not the host's to take or to look after.
    #[error("refused for a protected VM")]
    NotTheHosts,
    /// The slot does not log dirty pages.
    #[error("slot {0:?} does not log dirty pages")]
    NotLogging(SlotId),
}

impl Error {
    /// The class of this error.
    #[must_use]
    pub fn kind(self) -> ErrorKind {
        use ErrorKind as K;
        match self {
            Self::VcpuRunning
            | Self::Locked(_)
            | Self::Unfinished(_)
            | Self::ChangeUnfinished
            | Self::InUse(_)
            | Self::Export(ExportError::Busy | ExportError::Full | ExportError::Imported(_)) => {
                K::Busy
            }
            Self::SlotOutOfRange(_)
            | Self::NoSuchSlot(_)
            | Self::BadRange { .. }
            | Self::BadBits(_)
            | Self::ImmutableFlags(_)
            | Self::RefusedForProtected(_)
            | Self::BadLockRequest(_)
            | Self::LockNeedsRead
            | Self::TagsUnsupported
            | Self::NotLocked(_)
            | Self::CountUnbalanced
            | Self::NonCoherent
            | Self::NoLeaf(_)
            | Self::Shared(_)
            | Self::BadBuffer(_)
            | Self::NotLogging(_)
            | Self::Table(_)
            | Self::Export(_) => K::Invalid,
            Self::WriteLockRefused(_) | Self::PermsRefused(_) | Self::NotTheHosts => {
                K::NotPermitted
            }
            Self::LockedLimit { .. }
            | Self::OutOfMemory
            | Self::NeedTables(_)
            | Self::PinFailed(_) => K::NoMemory,
            Self::BackingChanged => K::Again,
            Self::SlotExists(_) | Self::Overlap(_) | Self::Unshared(_) | Self::SomeUnshared(_) => {
                K::Exists
            }
        }
    }
}

impl From<ExportError> for Error {
    fn from(error: ExportError) -> Self {
        Self::Export(error)
    }
}

impl From<alloc::collections::TryReserveError> for Error {
    fn from(_: alloc::collections::TryReserveError) -> Self {
        Self::OutOfMemory
    }
}
