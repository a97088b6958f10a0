//! Taking leaves away, exclusively: unmap and annotate.
//!
//! Both run in two passes around one invalidation. The first breaks every leaf, and every table
//! that the range covers or that becomes empty; the words it leaves behind remember what was
//! there. The second, behind the TLBs and the importers, cleans caches, hands the frames out,
//! frees the tables, and writes the final word.

use crate::addr::{IpaRange, Pa};
use crate::bbm::Flush;
use crate::entry::{Annotation, SoftWord};
use crate::error::MapError;
use crate::format::{TableFormat, WordKind};
use crate::job::{Job, Span};
use crate::level::Level;
use crate::platform::Platform;
use crate::reserve::Reserve;
use crate::space::Stage2;
use crate::sweep::{DetachedLeaf, Sink, Sweep};
use crate::table::Table;

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
                if owes || run.sweep.tells() || run.word != SoftWord::EMPTY {
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
