//! The memory type of a leaf: what the VM asks for, in words both architectures share.
//!
//! A policy decides; a descriptor format encodes. [`LeafType`] is the neutral word in between.

mod arm;
#[cfg(feature = "x86")]
mod ept;

pub use arm::{ArmCaches, ArmPolicy};
#[cfg(feature = "x86")]
pub use ept::{CdQuirk, EptPolicy, Profile, VcpuTypes};

use crate::addr::Gfn;
#[cfg(feature = "x86")]
use crate::pat::X86Type;
use crate::slot::{Memslot, SlotFlags, SlotKind};

/// What is known about a page when its type is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeQuery {
    /// The page.
    pub gfn: Gfn,
    /// RAM or a device, by the host's memory map.
    pub kind: SlotKind,
    /// Flags of its slot.
    pub flags: SlotFlags,
    /// Whether any device of the VM accesses memory without snooping.
    pub noncoherent_dma: bool,
}

impl TypeQuery {
    /// The query for `gfn` in `slot`.
    #[must_use]
    pub fn of(slot: &Memslot, gfn: Gfn, noncoherent_dma: bool) -> Self {
        Self {
            gfn,
            kind: slot.kind,
            flags: slot.flags,
            noncoherent_dma,
        }
    }
}

/// A decision, before any format turns it into bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeafType {
    /// Write-back, whatever the guest says.
    ForceWb,
    /// Write-back, weakened by the guest as it likes.
    HonourGuest,
    /// Uncached, whatever the guest says.
    ForceUncached,
    /// Device memory.
    Mmio,
    /// Device memory in which the guest may combine writes.
    MmioWriteCombining,
    /// The type that the guest's range registers give, weakened by its PAT.
    #[cfg(feature = "x86")]
    GuestRange(X86Type),
}

/// Decides types. Pure: the same query and vCPU state give the same answer.
pub trait MemTypePolicy {
    /// What a vCPU contributes: its range registers and CR0.CD on x86, nothing on arm64.
    type Vcpu;

    /// The type of one page for a fault of `vcpu`.
    fn leaf_type(&self, query: &TypeQuery, vcpu: &Self::Vcpu) -> LeafType;

    /// The type of a page as far as no vCPU has a say; `None` if one has. Used for locked slots
    /// and for importers.
    fn slot_type(&self, query: &TypeQuery) -> Option<LeafType>;

    /// Whether pages of one slot may have different types, so that block sizes must be asked
    /// for.
    const VARIES_WITHIN_SLOT: bool;

    /// Whether all 2^`order` pages around the query's have the type of this one.
    fn is_uniform(&self, query: &TypeQuery, vcpu: &Self::Vcpu, order: u32) -> bool;

    /// Whether a change of the non-coherent count can change any answer; if not, an edge of the
    /// count removes nothing.
    fn depends_on_noncoherent_dma(&self) -> bool;

    /// Whether a vCPU may have a say in a page's type while a device or a slot is not coherent. An
    /// importer's access has no vCPU to ask, so there is none then.
    fn asks_vcpu(&self) -> bool;

    /// Whether pages that this leaf maps must be cleaned and invalidated to the point of
    /// coherency when they are mapped and unmapped.
    fn needs_maintenance(&self, leaf: LeafType) -> bool;

    /// The type in the page table's words.
    fn encode(&self, leaf: LeafType) -> (stage2::MemType, stage2::Combine);
}
