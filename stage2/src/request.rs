//! What may be asked: a map of a range, a fault to resolve.

use crate::addr::{Ipa, IpaRange, Pa};
use crate::attr::LeafAttrs;
use crate::level::Level;

/// How large a leaf may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// As large as addresses and format allow.
    Largest,
    /// No coarser than this level.
    UpTo(Level),
    /// Pages only.
    Never,
}

/// When new leaves get their cache maintenance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CmoMode {
    /// Before they are made.
    Now,
    /// Not at all: the caller promises [`Stage2::flush`](crate::Stage2::flush) before the guest runs.
    Deferred,
}

/// What every request can be told besides.
macro_rules! options {
    ($request:ident) => {
        impl $request {
            /// The same with another limit on blocks.
            #[must_use]
            pub const fn with_blocks(mut self, blocks: Blocks) -> Self {
                self.blocks = blocks;
                self
            }

            /// The same with cache maintenance left to a later flush.
            #[must_use]
            pub const fn deferred(mut self) -> Self {
                self.cmo = CmoMode::Deferred;
                self
            }
        }
    };
}

options!(MapRequest);
options!(FaultRequest);

/// One map.
#[derive(Clone, Copy, Debug)]
pub struct MapRequest {
    /// First input address, page aligned.
    pub ipa: Ipa,
    /// Bytes, a multiple of the page size.
    pub size: u64,
    /// First output address, page aligned.
    pub pa: Pa,
    /// What the leaves say.
    pub attrs: LeafAttrs,
    /// How large they may be.
    pub blocks: Blocks,
    /// When caches are maintained.
    pub cmo: CmoMode,
}

impl MapRequest {
    /// A map by the largest blocks with maintenance now.
    #[must_use]
    pub const fn new(ipa: Ipa, size: u64, pa: Pa, attrs: LeafAttrs) -> Self {
        Self {
            ipa,
            size,
            pa,
            attrs,
            blocks: Blocks::Largest,
            cmo: CmoMode::Now,
        }
    }
}

/// What a map did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapOutcome {
    /// The range is mapped as asked; something changed.
    Mapped,
    /// It was mapped exactly so before; nothing changed.
    AlreadyMapped,
}

/// What the hardware met where it refused an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Met {
    /// An entry that is not valid: a translation fault, or an EPT violation without permissions.
    /// A hint that the entry is most likely still empty, so that it need not be read before it is
    /// taken. Caches are maintained for nothing where it is not.
    Nothing,
    /// A leaf, or it is not known.
    Anything,
}

/// One fault to resolve.
#[derive(Clone, Copy, Debug)]
pub struct FaultRequest {
    /// The address that faulted; need not be aligned.
    pub ipa: Ipa,
    /// Addresses for which `pa` and `attrs` hold, page aligned, around `ipa`: a memory slot, a
    /// memory bank, or the empty slot that a look-up showed. The leaf stays inside.
    pub window: IpaRange,
    /// Output address of the window's first byte, page aligned.
    pub pa: Pa,
    /// What the leaf says.
    pub attrs: LeafAttrs,
    /// How large it may be.
    pub blocks: Blocks,
    /// When caches are maintained.
    pub cmo: CmoMode,
    /// What the hardware met.
    pub met: Met,
}

impl FaultRequest {
    /// A fault for any reason that takes the largest block, with maintenance now.
    #[must_use]
    pub const fn new(ipa: Ipa, window: IpaRange, pa: Pa, attrs: LeafAttrs) -> Self {
        Self {
            ipa,
            window,
            pa,
            attrs,
            blocks: Blocks::Largest,
            cmo: CmoMode::Now,
            met: Met::Anything,
        }
    }

    /// The same for a fault that the hardware reports as a translation that is missing.
    #[must_use]
    pub const fn on_missing(mut self) -> Self {
        self.met = Met::Nothing;
        self
    }
}
