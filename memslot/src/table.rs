//! What this crate asks of a page table.
//!
//! The rule of the core holds here, too: `&self` may run beside faults, `&mut self` excludes
//! them. [`stage2::Stage2`] is the table of every machine; tests put others in its place to
//! fail at a chosen step and to look inside.

use stage2::{
    Aging, Annotation, Blocks, FaultOutcome, FaultRequest, Ipa, IpaRange, LeafAttrs, Level,
    MapError, MapRequest, Pa, PaRange, Perms, Platform, RunKind, Stage2, TableFormat,
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

    /// The part that lies in `within`.
    #[must_use]
    pub fn clipped(self, within: IpaRange) -> Option<Self> {
        let start = within.start().max(self.range.start());
        let end = within.end().min(self.range.end());
        let range = IpaRange::new(start, end.get().checked_sub(start.get())?).ok()?;
        let pa = self
            .pa
            .checked_add(start.get() - self.range.start().get())?;
        Some(Self { range, pa, ..self })
    }
}

/// A second-stage page table with its machine.
pub trait GuestTable {
    /// Pages of 4 KiB in the smallest leaf, as a power of two: 0, 2 or 4. Slots begin and end at
    /// its multiples.
    fn page_order(&self) -> u32 {
        0
    }

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

    /// Removes leaves, notes and tables of a range, completely before it returns.
    ///
    /// # Errors
    /// The table's; nothing has changed then.
    fn unmap(&mut self, range: IpaRange) -> Result<(), MapError>;

    /// Puts a note in the place of a range's leaves, which no fault replaces.
    ///
    /// # Errors
    /// The table's; nothing has changed then.
    fn annotate(&mut self, range: IpaRange, note: Annotation) -> Result<(), MapError>;

    /// The first address of a range that has a note, and the note.
    fn first_note(&self, range: IpaRange) -> Option<(Ipa, Annotation)>;

    /// Removes leaves of a range, completely before it returns; tables and notes stay.
    ///
    /// # Errors
    /// The table's; nothing has changed then.
    fn zap(&self, range: IpaRange) -> Result<(), MapError>;

    /// Bytes of a range in leaves that were used since they were last made old; with
    /// [`Aging::Clear`] these are old, and no use goes unnoticed, when it returns.
    ///
    /// # Errors
    /// The table's; a format without an access flag can't make leaves old.
    fn age(&self, range: IpaRange, aging: Aging) -> Result<u64, MapError>;

    /// Adds permissions to the leaf at `ipa`, and makes it young.
    ///
    /// # Errors
    /// The table's, [`MapError::NotMapped`] without a leaf; nothing has changed then.
    fn relax(&self, ipa: Ipa, add: Perms) -> Result<FaultOutcome, MapError>;

    /// The first run of equal leaves in the range, clipped to it.
    fn next_run(&self, range: IpaRange) -> Option<LeafRun>;

    /// Where the first leaf of the range is; its end if there is none.
    fn empty_to(&self, range: IpaRange) -> Ipa {
        self.next_run(range)
            .map_or(range.end(), |run| run.range.start())
    }

    /// Whether some leaf may owe data-cache maintenance when it goes.
    fn owes_data(&self) -> bool {
        true
    }

    /// Forgets every translation; the tables are not taken down when this is dropped, nor is what
    /// they map cleaned.
    fn abandon(&mut self) {}

    /// Cleans and invalidates memory to the point of coherency.
    fn clean_invalidate_data(&self, range: PaRange);

    /// Makes memory fit to be fetched from.
    fn invalidate_fetch(&self, range: PaRange);
}

impl<F: TableFormat, P: Platform> GuestTable for Stage2<F, P> {
    fn page_order(&self) -> u32 {
        self.geometry().page_shift() - stage2::addr::FRAME_SHIFT
    }

    fn fault(&self, request: &FaultRequest) -> Result<FaultOutcome, MapError> {
        Self::fault(self, request)
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), MapError> {
        Self::map(self, request).map(|_| ())
    }

    fn unmap(&mut self, range: IpaRange) -> Result<(), MapError> {
        Self::unmap(self, range)
    }

    fn annotate(&mut self, range: IpaRange, note: Annotation) -> Result<(), MapError> {
        Self::annotate(self, range, note)
    }

    fn first_note(&self, range: IpaRange) -> Option<(Ipa, Annotation)> {
        self.runs(range).ok()?.find_map(|run| match run.kind {
            RunKind::Annotated(note) => Some((run.range.start().max(range.start()), note)),
            RunKind::Mapped { .. } => None,
        })
    }

    fn zap(&self, range: IpaRange) -> Result<(), MapError> {
        Self::zap(self, range)
    }

    fn age(&self, range: IpaRange, aging: Aging) -> Result<u64, MapError> {
        self.test_and_clear_young(range, aging)
    }

    fn relax(&self, ipa: Ipa, add: Perms) -> Result<FaultOutcome, MapError> {
        self.relax_perms(ipa, add)
    }

    fn next_run(&self, range: IpaRange) -> Option<LeafRun> {
        let mapped = |run: stage2::Run| match run.kind {
            RunKind::Mapped { pa, attrs } => {
                let whole = LeafRun {
                    range: run.range,
                    pa,
                    attrs,
                    level: run.level,
                };
                whole.clipped(range)
            }
            RunKind::Annotated(_) => None,
        };
        self.runs(range).ok()?.find_map(mapped)
    }

    fn empty_to(&self, range: IpaRange) -> Ipa {
        Self::empty_to(self, range).unwrap_or(range.start())
    }

    fn owes_data(&self) -> bool {
        Self::owes_data(self)
    }

    fn abandon(&mut self) {
        Self::abandon(self);
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

/// Rewrites the leaves of a range that `change` changes, each in the way and with the
/// maintenance that the old and the new one ask for. Same addresses; same sizes but for a part of a block,
/// which is cut: that alone takes memory.
pub(crate) fn rewrite<T: GuestTable>(
    table: &mut T,
    range: IpaRange,
    change: impl Fn(LeafAttrs) -> LeafAttrs,
) -> Result<(), MapError> {
    let mut rest = Some(range);
    while let Some(run) = rest.and_then(|r| table.next_run(r)) {
        rest = behind(range, run.range.end());
        let attrs = change(run.attrs);
        if attrs != run.attrs {
            let request = MapRequest::new(run.range.start(), run.range.len(), run.pa, attrs);
            table.map(&request.with_blocks(Blocks::UpTo(run.level)))?;
        }
    }
    Ok(())
}

/// The part of a range from `at` on.
pub(crate) fn behind(range: IpaRange, at: Ipa) -> Option<IpaRange> {
    IpaRange::new(at, range.end().get().checked_sub(at.get())?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use stage2::{Combine, MemType, Perms};

    /// Four pages at 0x1000, memory at 0x8000.
    fn run() -> LeafRun {
        LeafRun {
            range: IpaRange::new(Ipa::new(0x1000), 0x4000).unwrap(),
            pa: Pa::new(0x8000),
            attrs: LeafAttrs::new(Perms::READ, MemType::WriteBack, Combine::HonourGuest),
            level: Level::PAGE,
        }
    }

    fn clipped(start: u64, size: u64) -> Option<(u64, u64, u64)> {
        let within = IpaRange::new(Ipa::new(start), size).unwrap();
        let part = run().clipped(within)?;
        Some((part.range.start().get(), part.range.len(), part.pa.get()))
    }

    #[test]
    fn a_clipped_run_keeps_the_memory_of_what_is_left() {
        assert_eq!(clipped(0x2000, 0x1000), Some((0x2000, 0x1000, 0x9000)));
        assert_eq!(clipped(0x3000, 0x9000), Some((0x3000, 0x2000, 0xa000)));
        assert_eq!(clipped(0, 0x9000), Some((0x1000, 0x4000, 0x8000)));
    }

    #[test]
    fn nothing_is_left_of_a_run_elsewhere() {
        assert_eq!(clipped(0x5000, 0x1000), None);
        assert_eq!(clipped(0, 0x1000), None);
    }

    #[test]
    fn the_memory_of_a_run_has_its_size() {
        let memory = run().memory().unwrap();
        assert_eq!((memory.start().get(), memory.len()), (0x8000, 0x4000));
    }
}
