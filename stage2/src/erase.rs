//! Taking leaves away, exclusively: unmap and annotate.
//!
//! Both run in two passes around one invalidation. The first breaks every leaf, and every table
//! that the range covers or that becomes empty; the words it leaves behind remember what was
//! there. The second, behind the TLBs and the importers, cleans caches, hands the frames out,
//! frees the tables, and writes the final word.

use crate::addr::{Ipa, IpaRange, Pa, PaRange};
use crate::bbm::Flush;
use crate::entry::{Annotation, SoftWord};
use crate::error::MapError;
use crate::format::{TableFormat, WordKind};
use crate::job::{Job, Span};
use crate::level::Level;
use crate::platform::Platform;
use crate::reserve::Reserve;
use crate::space::Stage2;
use crate::sync::Ordering;
use crate::table::Table;

/// Memory that left a table: no CPU and no importer can reach it through the space any more, and
/// its cache maintenance is done.
#[derive(Debug, PartialEq, Eq)]
pub struct DetachedLeaf {
    ipa: Ipa,
    frames: PaRange,
}

impl DetachedLeaf {
    /// Where it was mapped.
    #[must_use]
    pub const fn ipa(&self) -> Ipa {
        self.ipa
    }

    /// The memory.
    #[must_use]
    pub const fn frames(&self) -> PaRange {
        self.frames
    }
}

/// Who is told of the memory that leaves.
type Sink<'s> = &'s mut dyn FnMut(DetachedLeaf);

/// Running state of the second pass.
pub(crate) struct Sweep<'s> {
    sink: Option<Sink<'s>>,
    /// Memory to clean that is not yet cleaned: neighbours are cleaned together.
    dirty: Option<(u64, u64)>,
}

impl<'s> Sweep<'s> {
    /// Tells nobody.
    pub(crate) const fn quiet() -> Self {
        Self {
            sink: None,
            dirty: None,
        }
    }

    fn telling(sink: Option<Sink<'s>>) -> Self {
        Self { sink, dirty: None }
    }
}

/// A block that the range hits in part: the table that replaces it, made behind the invalidation.
#[derive(Clone, Copy, Debug)]
struct Cut {
    slot: u64,
    level: Level,
    table: Pa,
}

/// Running state of one erase. A range has two ends, so it cuts at most two blocks.
struct Erase<'s> {
    word: u64,
    cuts: [Option<Cut>; 2],
    flush: Flush,
    second_pass: bool,
    /// Whether a table was linked, which the walker must see; words that stay invalid need not
    /// be seen.
    linked: bool,
    reserve: Reserve,
    sweep: Sweep<'s>,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Removes every leaf and every note of the range and gives empty tables back, with one
    /// invalidation for everything. A block that is hit in part keeps its rest in smaller
    /// leaves.
    ///
    /// # Errors
    /// Nothing has changed after an error. Cutting a block takes tables: [`MapError::NoMemory`].
    pub fn unmap(&mut self, range: IpaRange) -> Result<(), MapError> {
        self.erase(range, SoftWord::EMPTY, None)
    }

    /// [`Stage2::unmap`] that tells `sink` of all memory that left, when it may be reused.
    ///
    /// # Errors
    /// As [`Stage2::unmap`].
    pub fn unmap_with(
        &mut self,
        range: IpaRange,
        sink: &mut dyn FnMut(DetachedLeaf),
    ) -> Result<(), MapError> {
        self.erase(range, SoftWord::EMPTY, Some(sink))
    }

    /// Writes `note` over the range, at the coarsest levels that fit; leaves there are unmapped.
    ///
    /// # Errors
    /// As [`Stage2::unmap`].
    pub fn annotate(&mut self, range: IpaRange, note: Annotation) -> Result<(), MapError> {
        self.erase(range, SoftWord::Annotation(note).encode(), None)
    }

    fn erase(
        &mut self,
        range: IpaRange,
        word: u64,
        sink: Option<Sink<'_>>,
    ) -> Result<(), MapError> {
        self.check_range(&range)?;
        let span = Span::of(&range);
        let (root, level) = (self.root_table(), self.geometry().start_level());
        let reserve = self.reserve(self.count_erase(word, &root, level, span))?;
        let mut run = Erase {
            word,
            cuts: [None; 2],
            flush: Flush::NOTHING,
            second_pass: false,
            linked: false,
            reserve,
            sweep: Sweep::telling(sink),
        };
        self.break_span(&root, level, span, &mut run);
        self.invalidate(&run.flush);
        if run.second_pass {
            self.sweep_span(&root, level, span, &mut run);
            self.finish_sweep(&mut run.sweep);
        }
        if run.linked {
            self.platform.publish();
        }
        self.give_back(run.reserve);
        Ok(())
    }

    /// Tables that the first pass will take: only the two ends can need any, and the middle of
    /// an empty slot that gets a note in part.
    fn count_erase(&self, word: u64, table: &Table<'_, P>, level: Level, span: Span) -> usize {
        let size = self.geometry().slot_size(level);
        let mut count = 0;
        for part in ends(span, size) {
            if part.len() == size {
                continue;
            }
            let raw = table.load(self.index(table, part.start, level));
            count += match self.format.kind(raw, level) {
                WordKind::Table => {
                    self.count_erase(word, &self.child(raw, level), level.finer(), part)
                }
                WordKind::Invalid if raw == word => 0,
                _ => self.count_fresh(&Job::Word(word), level.finer(), part),
            };
        }
        count
    }

    /// First pass over one linked table. Says whether all of the span is empty afterwards.
    fn break_span(
        &self,
        table: &Table<'_, P>,
        level: Level,
        span: Span,
        run: &mut Erase<'_>,
    ) -> bool {
        let size = self.geometry().slot_size(level);
        let mut emptied = true;
        let mut rest = Some(span);
        while let Some(span) = rest {
            let (part, behind) = span.split_first(size);
            rest = behind;
            let index = self.index(table, part.start, level);
            let raw = table.load(index);
            if raw == SoftWord::EMPTY && run.word == SoftWord::EMPTY {
                continue;
            }
            emptied &= if part.len() == size {
                self.break_slot(table, level, part, raw, run)
            } else {
                self.break_part(table, level, part, raw, run)
            };
        }
        emptied && run.word == SoftWord::EMPTY
    }

    /// First pass over a slot that the range covers.
    fn break_slot(
        &self,
        table: &Table<'_, P>,
        level: Level,
        part: Span,
        raw: u64,
        run: &mut Erase<'_>,
    ) -> bool {
        let entry = table.entry(self.index(table, part.start, level));
        match self.format.kind(raw, level) {
            WordKind::Invalid if raw == run.word => {}
            WordKind::Invalid => self.make(entry, run.word),
            WordKind::Table => {
                self.break_table(entry, raw, level);
                run.flush.table(part.start, part.len());
                run.second_pass = true;
            }
            WordKind::Leaf => {
                let owes = self.format.maintenance(raw).data;
                if owes || run.sweep.sink.is_some() || run.word != SoftWord::EMPTY {
                    self.break_leaf(entry, raw, level);
                    run.second_pass = true;
                } else {
                    self.make(entry, SoftWord::EMPTY);
                }
                run.flush.leaf(part.start, part.len(), level);
            }
        }
        true
    }

    /// First pass over a slot that the range hits in part.
    fn break_part(
        &self,
        table: &Table<'_, P>,
        level: Level,
        part: Span,
        raw: u64,
        run: &mut Erase<'_>,
    ) -> bool {
        let index = self.index(table, part.start, level);
        let entry = table.entry(index);
        let Some(background) = self.background(raw, level) else {
            return self.break_below(table, level, part, raw, run);
        };
        if raw == run.word {
            return true;
        }
        let job = Job::Word(run.word);
        let Some(child) = self.build(&job, level.finer(), part, background, &mut run.reserve)
        else {
            return false;
        };
        if self.format.kind(raw, level) == WordKind::Invalid {
            self.make(entry, self.format.table_word(child));
            run.linked = true;
            return false;
        }
        let size = self.geometry().slot_size(level);
        let cut = Cut {
            slot: part.start & !(size - 1),
            level,
            table: child,
        };
        let free = usize::from(run.cuts[0].is_some());
        run.cuts[free] = Some(cut);
        run.linked = true;
        self.break_leaf(entry, raw, level);
        run.flush.leaf(cut.slot, size, level);
        run.second_pass = true;
        false
    }

    /// First pass below a table that the range hits in part; breaks it if nothing is left.
    fn break_below(
        &self,
        table: &Table<'_, P>,
        level: Level,
        part: Span,
        raw: u64,
        run: &mut Erase<'_>,
    ) -> bool {
        let (child, below) = (self.child(raw, level), level.finer());
        if !self.break_span(&child, below, part, run) {
            return false;
        }
        let first = self.index(&child, part.start, below);
        let behind = self.index(&child, part.end - 1, below) + 1;
        if !child.is_zero_outside(first, behind) {
            return false;
        }
        let size = self.geometry().slot_size(level);
        self.break_table(
            table.entry(self.index(table, part.start, level)),
            raw,
            level,
        );
        run.flush.table(part.start & !(size - 1), size);
        run.second_pass = true;
        true
    }

    /// Second pass over one linked table.
    fn sweep_span(&self, table: &Table<'_, P>, level: Level, span: Span, run: &mut Erase<'_>) {
        let size = self.geometry().slot_size(level);
        let mut rest = Some(span);
        while let Some(span) = rest {
            let (part, behind) = span.split_first(size);
            rest = behind;
            let index = self.index(table, part.start, level);
            let raw = table.load(index);
            if self.format.kind(raw, level) == WordKind::Table {
                self.sweep_span(&self.child(raw, level), level.finer(), part, run);
                continue;
            }
            let slot = part.start & !(size - 1);
            let last = match SoftWord::decode(raw) {
                SoftWord::BrokenLeaf { pa, owes_data, .. } => {
                    let gone = pa.get() + (part.start - slot);
                    self.detach(part.start, (gone, part.len()), owes_data, &mut run.sweep);
                    self.cut_word(slot, level, run)
                }
                SoftWord::BrokenTable(pa) => {
                    self.release_table(pa, level.finer(), slot, &mut run.sweep);
                    run.word
                }
                SoftWord::Empty | SoftWord::Annotation(_) | SoftWord::ReadyTable(_) => continue,
            };
            if last != raw {
                self.make(table.entry(index), last);
            }
        }
    }

    /// The final word of a broken leaf: the table that keeps its rest, or the erase's word.
    fn cut_word(&self, slot: u64, level: Level, run: &Erase<'_>) -> u64 {
        let here = |cut: &&Cut| cut.slot == slot && cut.level == level;
        match run.cuts.iter().flatten().find(here) {
            Some(cut) => self.format.table_word(cut.table),
            None => run.word,
        }
    }

    /// Frees a table that was broken and invalidated, and everything below it.
    pub(crate) fn release_table(&self, pa: Pa, level: Level, base: u64, sweep: &mut Sweep<'_>) {
        let table = self.table(pa);
        let leaves_matter = sweep.sink.is_some() || self.owes_data.load(Ordering::Relaxed);
        if leaves_matter || !level.is_page() {
            let (mut index, shift) = (0, self.geometry().shift(level));
            while index < table.entries() {
                let at = base + ((index as u64) << shift);
                index += self.release_run(&table, index, level, at, sweep);
            }
        }
        self.free_table(pa);
    }

    /// Releases the entry and those behind it that say nothing else. Says how many.
    fn release_run(
        &self,
        table: &Table<'_, P>,
        index: usize,
        level: Level,
        at: u64,
        sweep: &mut Sweep<'_>,
    ) -> usize {
        let (raw, left) = (table.load(index), table.entries() - index);
        if raw == SoftWord::EMPTY {
            return 1 + table.zero_run(index + 1, left - 1);
        }
        if sweep.sink.is_some() || self.format.kind(raw, level) != WordKind::Leaf {
            self.release_entry(raw, level, at, sweep);
            return 1;
        }
        let count = self.leaf_run(table, (index, left), raw, level);
        let bytes = (count as u64) << self.geometry().shift(level);
        let owes = self.format.maintenance(raw).data;
        let pa = self.format.output(raw, level).get();
        self.detach(at, (pa, bytes), owes, sweep);
        count
    }

    /// Releases what an entry leads to, valid or broken.
    pub(crate) fn release_entry(&self, raw: u64, level: Level, at: u64, sweep: &mut Sweep<'_>) {
        let size = self.geometry().slot_size(level);
        match self.format.kind(raw, level) {
            WordKind::Table => {
                self.release_table(self.format.output(raw, level), level.finer(), at, sweep);
            }
            WordKind::Leaf => {
                let owes = self.format.maintenance(raw).data;
                self.detach(
                    at,
                    (self.format.output(raw, level).get(), size),
                    owes,
                    sweep,
                );
            }
            WordKind::Invalid => match SoftWord::decode(raw) {
                SoftWord::BrokenLeaf { pa, owes_data, .. } => {
                    self.detach(at, (pa.get(), size), owes_data, sweep);
                }
                SoftWord::BrokenTable(pa) | SoftWord::ReadyTable(pa) => {
                    self.release_table(pa, level.finer(), at, sweep);
                }
                SoftWord::Empty | SoftWord::Annotation(_) => {}
            },
        }
    }

    /// Step 5 for memory that left; with a sink it is cleaned before the sink hears of it.
    fn detach(&self, ipa: u64, (pa, size): (u64, u64), owes_data: bool, sweep: &mut Sweep<'_>) {
        if owes_data {
            match sweep.dirty {
                Some((start, end)) if end == pa => sweep.dirty = Some((start, pa + size)),
                _ => {
                    self.finish_sweep(sweep);
                    sweep.dirty = Some((pa, pa + size));
                }
            }
        }
        if sweep.sink.is_some() {
            self.finish_sweep(sweep);
        }
        if let Some(sink) = &mut sweep.sink {
            let frames = PaRange::from_bounds(pa, pa + size);
            sink(DetachedLeaf {
                ipa: Ipa::new(ipa),
                frames,
            });
        }
    }

    /// Cleans what is gathered.
    pub(crate) fn finish_sweep(&self, sweep: &mut Sweep<'_>) {
        if let Some((start, end)) = sweep.dirty.take() {
            self.clean_data(PaRange::from_bounds(start, end));
        }
    }

    /// Frees everything below the root, which nothing uses any more.
    pub(crate) fn release_root(&self) {
        let (root, level) = (self.root_table(), self.geometry().start_level());
        let mut sweep = Sweep::quiet();
        for index in 0..root.entries() {
            let raw = root.load(index);
            if raw != SoftWord::EMPTY {
                let at = (index as u64) << self.geometry().shift(level);
                self.release_entry(raw, level, at, &mut sweep);
            }
        }
        self.finish_sweep(&mut sweep);
    }
}

/// The first and the last slot of a span, once if they are the same.
fn ends(span: Span, size: u64) -> impl Iterator<Item = Span> {
    let (first, _) = span.split_first(size);
    let last_start = (span.end - 1) & !(size - 1);
    let last = (last_start > span.start).then_some(Span {
        start: last_start,
        end: span.end,
    });
    core::iter::once(first).chain(last)
}
