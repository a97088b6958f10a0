//! What to write into a range, and building tables for it that nothing reaches yet.
//!
//! A map writes leaves, an annotation or an unmap writes one software word. Both fill whole
//! slots at the coarsest level that fits, so both share the counting of tables and the building
//! of subtrees. A subtree is built with plain stores and linked with one, so what used to stand
//! in its slot (an annotation, the rest of a block) must be carried into it first.

use crate::addr::{IpaRange, Pa, PaRange};
use crate::attr::Maintenance;
use crate::entry::SoftWord;
use crate::format::{TableFormat, WordKind};
use crate::level::Level;
use crate::platform::Platform;
use crate::request::Blocks;
use crate::reserve::Reserve;
use crate::space::Stage2;
use crate::table::Table;

/// The content of a range.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Job {
    Leaves(Leaves),
    /// The same invalid word everywhere.
    Word(u64),
}

/// Leaves that say the same and whose memory is contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaves {
    /// Encoded.
    pub(crate) attrs: u64,
    /// Output address minus input address.
    pub(crate) delta: u64,
    pub(crate) levels: LeafLevels,
    /// Owed before they are made.
    pub(crate) owed: Maintenance,
}

impl Leaves {
    #[inline]
    pub(crate) const fn output(&self, at: u64) -> u64 {
        at.wrapping_add(self.delta)
    }

    /// Whether a full slot at `at` may become one leaf.
    #[inline]
    const fn fit_at(&self, at: u64, level: Level, slot_size: u64) -> bool {
        self.levels.has(level) && self.output(at) & (slot_size - 1) == 0
    }

    /// Whether the span, part of one slot of `level`, becomes one leaf.
    #[inline]
    pub(crate) const fn fit(&self, span: Span, level: Level, slot_size: u64) -> bool {
        span.len() == slot_size && self.fit_at(span.start, level, slot_size)
    }

    /// Full slots from the start of the span that all become one leaf each.
    #[inline]
    pub(crate) const fn full_slots(&self, span: Span, level: Level, shift: u32) -> usize {
        if self.fit_at(span.start, level, 1 << shift) {
            span.full_slots(shift)
        } else {
            0
        }
    }
}

/// Set of levels at which leaves may stand, as bits of [`Level::height`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeafLevels(u8);

impl LeafLevels {
    pub(crate) const PAGE: Self = Self(1);

    /// Every level at which the format has leaves.
    pub(crate) fn of<F: TableFormat>(format: &F) -> Self {
        let blocks = [Level::L2, Level::L1, Level::L0]
            .into_iter()
            .filter(|level| format.supports_leaf(*level));
        Self(Self::PAGE.0 + blocks.map(|level| 1 << level.height()).sum::<u8>())
    }

    /// Those that a request allows.
    #[inline]
    pub(crate) const fn limited(self, blocks: Blocks) -> Self {
        match blocks {
            Blocks::Never => Self::PAGE,
            Blocks::UpTo(level) => Self(self.0 & ((2 << level.height()) - 1)),
            Blocks::Largest => self,
        }
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
    #[inline]
    pub(crate) const fn of(range: &IpaRange) -> Self {
        Self {
            start: range.start().get(),
            end: range.end().get(),
        }
    }

    /// The part in `size` bytes from `start`.
    #[inline]
    pub(crate) fn within(self, start: u64, size: u64) -> Self {
        Self {
            start: self.start.max(start),
            end: self.end.min(start + size),
        }
    }

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

    /// Its parts in one slot each.
    #[inline]
    pub(crate) fn slots(self, slot_size: u64) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        core::iter::from_fn(move || {
            let (part, behind) = rest?.split_first(slot_size);
            rest = behind;
            Some(part)
        })
    }

    #[inline]
    pub(crate) const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Full slots from the start, if it is the start of one.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most the entries of a table"
    )]
    const fn full_slots(self, shift: u32) -> usize {
        if self.start & ((1 << shift) - 1) == 0 {
            (self.len() >> shift) as usize
        } else {
            0
        }
    }

    /// What is left behind the first `count` slots, where the span starts with them.
    #[inline]
    pub(crate) fn behind(self, count: usize, shift: u32) -> Option<Self> {
        let start = self.start + ((count as u64) << shift);
        (start < self.end).then_some(Self {
            start,
            end: self.end,
        })
    }
}

impl Job {
    /// Full slots from the start of the span that all become one entry each.
    #[inline]
    fn full_slots(&self, span: Span, level: Level, shift: u32) -> usize {
        match self {
            Self::Leaves(leaves) => leaves.full_slots(span, level, shift),
            Self::Word(_) => span.full_slots(shift),
        }
    }
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Tables that filling `span` in a fresh table of `level` takes, that table included.
    pub(crate) fn count_fresh(&self, job: &Job, level: Level, span: Span) -> usize {
        if level.is_page() {
            return 1;
        }
        let shift = self.geometry().shift(level);
        let mut count = 1;
        let mut rest = Some(span);
        while let Some(span) = rest {
            let full = job.full_slots(span, level, shift);
            if full > 0 {
                rest = span.behind(full, shift);
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
        if last + 1 - first < table.entries() {
            self.init_background(&table, level, background, 0, first);
            self.init_background(&table, level, background, last + 1, table.entries());
        }
        let mut rest = Some(span);
        while let Some(span) = rest {
            let index = self.index(&table, span.start, level);
            let full = job.full_slots(span, level, shift);
            if full > 0 {
                self.init_full(&table, level, job, span.start, index, full);
                rest = span.behind(full, shift);
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
        table: &Table<'_, P>,
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
        table: &Table<'_, P>,
        level: Level,
        job: &Job,
        at: u64,
        index: usize,
        count: usize,
    ) {
        match *job {
            Job::Word(raw) => table.init_run(index, count, raw, 0),
            Job::Leaves(leaves) => {
                let pa = leaves.output(at);
                self.leaf_runs(
                    leaves.attrs,
                    pa,
                    level,
                    count,
                    |offset, count, raw, step| {
                        table.init_run(index + offset, count, raw, step);
                    },
                );
            }
        }
    }

    /// Leaves from `pa` on whose words differ by a constant step, at least one.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "saturates")]
    fn in_chunk(&self, pa: u64, level: Level) -> usize {
        let left = (pa | (self.format.address_chunk() - 1)) - pa;
        ((left >> self.geometry().shift(level)) as usize).saturating_add(1)
    }

    /// How many of the `limit` entries from `first`, the leaf `raw` among them, are leaves that
    /// continue it.
    #[inline]
    pub(crate) fn leaf_run(
        &self,
        table: &Table<'_, P>,
        (first, limit): (usize, usize),
        raw: u64,
        level: Level,
    ) -> usize {
        let pa = self.format.output(raw, level).get();
        let limit = limit.min(self.in_chunk(pa, level));
        let step = self.geometry().slot_size(level);
        1 + table.run(first + 1, limit - 1, raw.wrapping_add(step), step)
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
        let mut done = 0;
        while done < count {
            let at = pa + (done as u64) * step;
            let here = self.in_chunk(at, level).min(count - done);
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
    pub(crate) fn clean_for(&self, leaves: &Leaves, span: Span) {
        let pa = leaves.output(span.start);
        self.clean_before_make(PaRange::from_bounds(pa, pa + span.len()), leaves.owed);
    }
}

/// An empty slot's background.
impl Background {
    pub(crate) const EMPTY: Self = Self::Word(SoftWord::EMPTY);
}
