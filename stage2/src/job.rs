//! What to write into a range, and building tables for it that nothing reaches yet.
//!
//! A map writes leaves, an annotation or an unmap writes one software word. Both fill whole
//! slots at the coarsest level that fits, so both share the counting of tables and the building
//! of subtrees. A subtree is built with plain stores and linked with one, so what used to stand
//! in its slot (an annotation, the rest of a block) must be carried into it first.

use crate::addr::{Pa, PaRange};
use crate::attr::Maintenance;
use crate::entry::SoftWord;
use crate::format::{TableFormat, WordKind};
use crate::level::Level;
use crate::platform::Platform;
use crate::reserve::Reserve;
use crate::space::Stage2;
use crate::table::Table;

/// The content of a range.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Job {
    /// Leaves with encoded attributes; the output address is the input address plus `delta`.
    Leaves {
        attrs: u64,
        delta: u64,
        levels: LeafLevels,
        owed: Maintenance,
    },
    /// The same invalid word everywhere.
    Word(u64),
}

/// Set of levels at which leaves may stand, as bits of [`Level::height`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeafLevels(u8);

impl LeafLevels {
    pub(crate) const PAGE: Self = Self(1);

    pub(crate) const fn with(self, level: Level) -> Self {
        Self(self.0 | 1 << level.height())
    }

    #[inline]
    pub(crate) const fn has(self, level: Level) -> bool {
        self.0 >> level.height() & 1 != 0
    }
}

/// What a slot held before a table replaces it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Background {
    /// An invalid word, to be repeated.
    Word(u64),
    /// A leaf, to be continued in smaller ones.
    Leaf { attrs: u64, pa: u64 },
}

/// Part of a table's input: `start..end` inside one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Span {
    /// The part in the first slot, and the rest.
    #[inline]
    pub(crate) fn split_first(self, slot_size: u64) -> (Self, Option<Self>) {
        let behind = (self.start | (slot_size - 1)) + 1;
        if behind >= self.end {
            return (self, None);
        }
        (
            Self {
                end: behind,
                ..self
            },
            Some(Self {
                start: behind,
                ..self
            }),
        )
    }

    #[inline]
    pub(crate) const fn len(self) -> u64 {
        self.end - self.start
    }
}

impl Job {
    /// Whether the span, part of one slot of `level`, becomes one entry.
    #[inline]
    pub(crate) fn fits(&self, span: Span, level: Level, slot_size: u64) -> bool {
        span.len() == slot_size && self.fits_at(span.start, level, slot_size)
    }

    /// Whether a full slot at `at` may become one entry.
    #[inline]
    fn fits_at(&self, at: u64, level: Level, slot_size: u64) -> bool {
        match *self {
            Self::Leaves { delta, levels, .. } => {
                levels.has(level) && at.wrapping_add(delta) & (slot_size - 1) == 0
            }
            Self::Word(_) => true,
        }
    }

    /// Full slots from the start of the span that all become one entry each.
    #[inline]
    pub(crate) fn full_slots(&self, span: Span, level: Level, shift: u32) -> usize {
        let size = 1 << shift;
        if span.start & (size - 1) != 0 || !self.fits_at(span.start, level, size) {
            return 0;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most the entries of a table"
        )]
        let count = (span.len() >> shift) as usize;
        count
    }

    /// Where the input address goes, for leaves.
    #[inline]
    pub(crate) fn output(&self, at: u64) -> Option<u64> {
        match *self {
            Self::Leaves { delta, .. } => Some(at.wrapping_add(delta)),
            Self::Word(_) => None,
        }
    }
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Tables that filling `span` in a fresh table of `level` takes, that table included.
    pub(crate) fn count_fresh(&self, job: &Job, level: Level, span: Span) -> usize {
        let shift = self.geometry().shift(level);
        let mut count = 1;
        let mut rest = Some(span);
        while let Some(span) = rest {
            let full = job.full_slots(span, level, shift);
            if full > 0 {
                let start = span.start + ((full as u64) << shift);
                rest = (start < span.end).then_some(Span {
                    start,
                    end: span.end,
                });
                continue;
            }
            let (first, behind) = span.split_first(1 << shift);
            count += self.count_fresh(job, level.finer(), first);
            rest = behind;
        }
        count
    }

    /// Builds a table of `level` for the slot around `span`: `job` inside the span,
    /// `background` around it.
    pub(crate) fn build(
        &self,
        job: &Job,
        level: Level,
        span: Span,
        background: Background,
        reserve: &mut Reserve,
    ) -> Option<Pa> {
        let pa = self.take(reserve)?;
        let table = self.table(pa);
        let shift = self.geometry().shift(level);
        let first = self.index(&table, span.start, level);
        let last = self.index(&table, span.end - 1, level);
        self.init_background(&table, level, background, 0, first);
        self.init_background(&table, level, background, last + 1, table.entries());
        let mut rest = Some(span);
        while let Some(span) = rest {
            let index = self.index(&table, span.start, level);
            let full = job.full_slots(span, level, shift);
            if full > 0 {
                self.init_full(&table, level, job, span.start, index, full);
                let start = span.start + ((full as u64) << shift);
                rest = (start < span.end).then_some(Span {
                    start,
                    end: span.end,
                });
                continue;
            }
            let (part, behind) = span.split_first(1 << shift);
            let below = self.background_of(background, level, index);
            let child = self.build(job, level.finer(), part, below, reserve)?;
            table.init(index, self.format.table_word(child));
            rest = behind;
        }
        Some(pa)
    }

    /// What the slot's own table would continue.
    fn background_of(&self, background: Background, level: Level, index: usize) -> Background {
        match background {
            Background::Leaf { attrs, pa } => {
                let pa = pa + ((index as u64) << self.geometry().shift(level));
                Background::Leaf { attrs, pa }
            }
            word @ Background::Word(_) => word,
        }
    }

    /// What a table that replaces the entry must continue; nothing for a table.
    pub(crate) fn background(&self, raw: u64, level: Level) -> Option<Background> {
        match self.format.kind(raw, level) {
            WordKind::Table => None,
            WordKind::Invalid => Some(Background::Word(raw)),
            WordKind::Leaf => Some(Background::Leaf {
                attrs: self.format.attrs_word(raw, level),
                pa: self.format.output(raw, level).get(),
            }),
        }
    }

    pub(crate) fn init_background(
        &self,
        table: &Table<'_>,
        level: Level,
        background: Background,
        first: usize,
        end: usize,
    ) {
        match background {
            Background::Word(raw) => table.init_run(first, end - first, raw, 0),
            Background::Leaf { attrs, pa } => {
                let pa = pa + ((first as u64) << self.geometry().shift(level));
                self.leaf_runs(attrs, pa, level, end - first, |offset, count, raw, step| {
                    table.init_run(first + offset, count, raw, step);
                });
            }
        }
    }

    #[inline]
    fn init_full(
        &self,
        table: &Table<'_>,
        level: Level,
        job: &Job,
        at: u64,
        index: usize,
        count: usize,
    ) {
        match *job {
            Job::Word(raw) => table.init_run(index, count, raw, 0),
            Job::Leaves { attrs, delta, .. } => {
                let pa = at.wrapping_add(delta);
                self.leaf_runs(attrs, pa, level, count, |offset, count, raw, step| {
                    table.init_run(index + offset, count, raw, step);
                });
            }
        }
    }

    /// Calls back with runs of leaves whose words differ by a constant step: one run, except
    /// across the address boundary where a format keeps high bits elsewhere.
    #[inline]
    pub(crate) fn leaf_runs(
        &self,
        attrs: u64,
        pa: u64,
        level: Level,
        count: usize,
        mut run: impl FnMut(usize, usize, u64, u64),
    ) {
        let step = self.geometry().slot_size(level);
        let chunk = self.format.address_chunk();
        let mut done = 0;
        while done < count {
            let at = pa + (done as u64) * step;
            #[expect(clippy::cast_possible_truncation, reason = "capped by the count")]
            let in_chunk = ((((at | (chunk - 1)) - at) / step) as usize).saturating_add(1);
            let here = in_chunk.min(count - done);
            run(
                done,
                here,
                self.format.leaf_word(attrs, Pa::new(at), level),
                step,
            );
            done += here;
        }
    }

    /// Steps 5 and 6 of the maintenance order for new leaves in `span`.
    #[inline]
    #[track_caller]
    pub(crate) fn clean_for(&self, job: &Job, span: Span) {
        if let Job::Leaves { delta, owed, .. } = *job {
            let pa = span.start.wrapping_add(delta);
            self.clean_before_make(PaRange::from_bounds(pa, pa + span.len()), owed);
        }
    }
}

/// An empty slot's background.
impl Background {
    pub(crate) const EMPTY: Self = Self::Word(SoftWord::EMPTY);
}
