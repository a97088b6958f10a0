//! Steps in the source, and how they can go wrong.

use std::panic::Location;

/// Kinds of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// An entry is written.
    Store,
    /// An entry is written by compare-and-swap.
    Swap,
    /// Stores become visible to walkers.
    Publish,
    /// A range leaves the TLB.
    TlbRange,
    /// Everything leaves the TLB.
    TlbAll,
    /// Data cache to the point of coherency.
    Data,
    /// Instruction cache.
    Fetch,
    /// An importer is told.
    Notify,
    /// A barrier: stores, inner shareable.
    DsbIshst,
    /// A barrier: inner shareable.
    DsbIsh,
    /// A barrier: full system.
    DsbSy,
    /// Context synchronisation.
    Isb,
    /// A guest's context is loaded.
    Enter,
    /// The context before is loaded back.
    Leave,
    /// Stage 2, one address.
    TlbiIpa,
    /// Stage 2, a range.
    TlbiRange,
    /// Stage 1 of the context.
    TlbiStage1,
    /// Both stages of the context.
    TlbiBoth,
    /// Clean and invalidate to the point of coherency.
    DcCivac,
    /// Clean to the point of unification.
    DcCvau,
    /// Instruction cache by line.
    IcIvau,
    /// All instruction caches.
    IcAll,
}

/// A step in the source: what, and where it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Site {
    /// What.
    pub op: Op,
    /// File.
    pub file: &'static str,
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

impl Site {
    pub(super) fn new(op: Op, at: &'static Location<'static>) -> Self {
        Self {
            op,
            file: at.file(),
            line: at.line(),
            column: at.column(),
        }
    }
}

/// One step gone wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The step is not there.
    Drop(Site),
    /// The step comes behind the one that should follow it.
    Delay(Site),
}

impl Mutation {
    /// The step.
    #[must_use]
    pub const fn site(&self) -> &Site {
        match self {
            Self::Drop(site) | Self::Delay(site) => site,
        }
    }
}
