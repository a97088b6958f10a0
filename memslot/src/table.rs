//! What this crate asks of a page table.
//!
//! The rule of the core holds here, too: `&self` may run beside faults, `&mut self` excludes
//! them. [`stage2::Stage2`] is the table of every machine; tests put others in its place to
//! fail at a chosen step and to look inside.

use stage2::{
    Blocks, Entry, FaultOutcome, FaultRequest, Ipa, IpaRange, LeafAttrs, Level, MapError,
    MapRequest, Pa, PaRange, Platform, Stage2, TableFormat,
};

use crate::addr::GfnRange;

/// Consecutive leaves that say the same about consecutive memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafRun {
    /// Guest addresses.
    pub range: IpaRange,
    /// Memory behind the first of them.
    pub pa: Pa,
    /// What each leaf says.
    pub attrs: LeafAttrs,
    /// Level of each leaf.
    pub level: Level,
}

impl LeafRun {
    /// The memory, if the run describes any.
    #[must_use]
    pub fn memory(&self) -> Option<PaRange> {
        PaRange::new(self.pa, self.range.len()).ok()
    }
}

/// A second-stage page table with its machine.
pub trait GuestTable {
    /// Installs a leaf, or adds permissions to the one that is there.
    ///
    /// # Errors
    /// The table's; nothing has changed then.
    fn fault(&self, request: &FaultRequest) -> Result<FaultOutcome, MapError>;

    /// Maps a range, replacing what stands there.
    ///
    /// # Errors
    /// The table's; nothing has changed then.
    fn map(&mut self, request: &MapRequest) -> Result<(), MapError>;

    /// Removes leaves and tables of a range, completely before it returns.
    ///
    /// # Errors
    /// The table's; nothing has changed then.
    fn unmap(&mut self, range: IpaRange) -> Result<(), MapError>;

    /// Removes leaves of a range, completely before it returns; tables stay.
    ///
    /// # Errors
    /// The table's; nothing has changed then.
    fn zap(&self, range: IpaRange) -> Result<(), MapError>;

    /// The leaf at `ipa`, with the addresses it maps.
    fn leaf(&self, ipa: Ipa) -> LeafOrGap;

    /// Cleans and invalidates memory to the point of coherency.
    fn clean_invalidate_data(&self, range: PaRange);

    /// Makes memory fit to be fetched from.
    fn invalidate_fetch(&self, range: PaRange);
}

/// What stands at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafOrGap {
    /// A leaf and all it maps.
    Leaf(LeafRun),
    /// Nothing up to this address, which lies behind the one asked for.
    GapUntil(Ipa),
}

impl<F: TableFormat, P: Platform> GuestTable for Stage2<F, P> {
    fn fault(&self, request: &FaultRequest) -> Result<FaultOutcome, MapError> {
        Self::fault(self, request)
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), MapError> {
        Self::map(self, request).map(|_| ())
    }

    fn unmap(&mut self, range: IpaRange) -> Result<(), MapError> {
        Self::unmap(self, range)
    }

    fn zap(&self, range: IpaRange) -> Result<(), MapError> {
        Self::zap(self, range)
    }

    fn leaf(&self, ipa: Ipa) -> LeafOrGap {
        let Ok(found) = self.lookup(ipa) else {
            return LeafOrGap::GapUntil(Ipa::new(u64::MAX));
        };
        match found.entry {
            Entry::Leaf { pa, attrs } => LeafOrGap::Leaf(LeafRun {
                range: found.slot,
                pa,
                attrs,
                level: found.level,
            }),
            _ => LeafOrGap::GapUntil(found.slot.end()),
        }
    }

    fn clean_invalidate_data(&self, range: PaRange) {
        self.platform().clean_invalidate_data(range);
    }

    fn invalidate_fetch(&self, range: PaRange) {
        self.platform().invalidate_fetch(range);
    }
}

/// The bytes of a range of frames; `None` if they do not fit 64 bits.
pub(crate) fn bytes(range: GfnRange) -> Option<IpaRange> {
    let size = range.npages().checked_mul(1 << stage2::addr::FRAME_SHIFT)?;
    IpaRange::new(range.start().start(), size).ok()
}

/// The longest run of equal leaves that begins at or behind `at`, clipped to `end`.
pub(crate) fn next_run<T: GuestTable>(table: &T, mut at: Ipa, end: Ipa) -> Option<LeafRun> {
    let mut run = loop {
        if at >= end {
            return None;
        }
        match table.leaf(at) {
            LeafOrGap::GapUntil(next) if next > at => at = next,
            LeafOrGap::GapUntil(_) => return None,
            LeafOrGap::Leaf(leaf) => break clip(leaf, at, end)?,
        }
    };
    while run.range.end() < end {
        let LeafOrGap::Leaf(next) = table.leaf(run.range.end()) else {
            break;
        };
        let follows = run.pa.checked_add(run.range.len()) == Some(next.pa)
            && next.range.start() == run.range.end()
            && (next.attrs, next.level) == (run.attrs, run.level);
        let Some(next) = clip(next, run.range.end(), end).filter(|_| follows) else {
            break;
        };
        let Ok(longer) = IpaRange::new(run.range.start(), run.range.len() + next.range.len())
        else {
            break;
        };
        run.range = longer;
    }
    Some(run)
}

/// The part of a leaf inside `[at, end)`.
fn clip(leaf: LeafRun, at: Ipa, end: Ipa) -> Option<LeafRun> {
    let start = at.max(leaf.range.start());
    let stop = end.min(leaf.range.end());
    let range = IpaRange::new(start, stop.get().checked_sub(start.get())?).ok()?;
    let pa = leaf
        .pa
        .checked_add(start.get() - leaf.range.start().get())?;
    Some(LeafRun { range, pa, ..leaf })
}

/// Rewrites the leaves of a range that `change` changes, each in the way and with the
/// maintenance that the old and the new one ask for. Same addresses, same sizes: takes no memory.
pub(crate) fn rewrite<T: GuestTable>(
    table: &mut T,
    range: IpaRange,
    change: impl Fn(LeafAttrs) -> LeafAttrs,
) -> Result<(), MapError> {
    let mut at = range.start();
    while let Some(run) = next_run(table, at, range.end()) {
        at = run.range.end();
        let attrs = change(run.attrs);
        if attrs != run.attrs {
            let request = MapRequest::new(run.range.start(), run.range.len(), run.pa, attrs);
            table.map(&request.with_blocks(Blocks::UpTo(run.level)))?;
        }
    }
    Ok(())
}
