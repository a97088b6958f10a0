//! Mapping a range, exclusively: any entry may be replaced.

use crate::addr::{IpaRange, Pa, PaRange};
use crate::attr::{LeafAttrs, Maintenance};
use crate::bbm::Flush;
use crate::entry::{SoftWord, UpdateKind};
use crate::error::{EncodeError, MapError};
use crate::format::{TableFormat, WordKind};
use crate::job::{Job, Leaves, Span};
use crate::level::Level;
use crate::platform::Platform;
use crate::request::{Blocks, CmoMode, MapOutcome, MapRequest};
use crate::reserve::Reserve;
use crate::short;
use crate::space::Stage2;
use crate::table::Table;

/// What it takes to turn an entry into a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing valid stands there: maintenance, and a store.
    Fill,
    /// A store over a leaf, of a kind that never needs to break it.
    Rewrite(UpdateKind),
    /// Break before make.
    Replace,
}

/// Running state of one map.
pub(crate) struct Progress {
    pub(crate) reserve: Reserve,
    pub(crate) flush: Flush,
    pub(crate) stored: bool,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Maps a range by the largest blocks that fit. Whatever stood there is replaced, notes
    /// included; the rest of a block that is hit only in part stays mapped in smaller leaves.
    /// A leaf whose permissions alone change is rewritten in place; one that is the same stays.
    ///
    /// # Errors
    /// Nothing has changed after an error. [`MapError::NoMemory`] names the tables that are
    /// needed; any other says what is wrong with the request.
    #[inline]
    pub fn map(&mut self, request: &MapRequest) -> Result<MapOutcome, MapError> {
        let simple = if request.size == short::PAGE_SIZE {
            self.map_page(request)
        } else {
            self.map_block(request)
        };
        if simple {
            return Ok(MapOutcome::Mapped);
        }
        self.map_anywhere(request)
    }

    #[cold]
    fn map_anywhere(&mut self, request: &MapRequest) -> Result<MapOutcome, MapError> {
        let range = IpaRange::new(request.ipa, request.size)?;
        self.check_aligned(request.ipa.get() | request.size | request.pa.get())?;
        self.check_input(&range)?;
        self.map_range(request, range)
    }

    fn map_range(&mut self, request: &MapRequest, range: IpaRange) -> Result<MapOutcome, MapError> {
        let out = PaRange::new(request.pa, request.size)?;
        let leaves = self.leaves(&request.attrs, (range, out), request.blocks, request.cmo)?;
        let span = Span::of(&range);
        let (table, level) = self.common_table(span);
        let reserve = self.reserve(self.count_map(&leaves, &table, level, span))?;
        let mut progress = Progress {
            reserve,
            flush: Flush::NOTHING,
            stored: false,
        };
        self.map_table(&leaves, &table, level, span, &mut progress);
        self.finish_map(progress)
    }

    #[inline]
    fn finish_map(&self, progress: Progress) -> Result<MapOutcome, MapError> {
        if progress.flush.range().is_some() {
            self.invalidate(&progress.flush);
        } else if progress.stored {
            self.platform.publish();
        }
        self.give_back(progress.reserve);
        Ok(if progress.stored {
            MapOutcome::Mapped
        } else {
            MapOutcome::AlreadyMapped
        })
    }

    /// Encodes the attributes once for all leaves of a range.
    #[inline]
    pub(crate) fn leaves(
        &self,
        attrs: &LeafAttrs,
        (range, out): (IpaRange, PaRange),
        blocks: Blocks,
        cmo: CmoMode,
    ) -> Result<Leaves, EncodeError> {
        let (word, owed) = self.encode_leaves(attrs, self.last_page(&out), cmo)?;
        let delta = out.start().get().wrapping_sub(range.start().get());
        Ok(Leaves {
            attrs: word,
            delta,
            levels: self.leaf_levels.limited(blocks),
            owed,
        })
    }

    /// Encodes attributes for leaves whose output ends with this page, notes what they will owe when they go,
    /// and says what they owe before they are made.
    #[inline(always)]
    pub(crate) fn encode_leaves(
        &self,
        attrs: &LeafAttrs,
        last: Pa,
        cmo: CmoMode,
    ) -> Result<(u64, Maintenance), EncodeError> {
        let (word, owed) = self.format.encode_owing(attrs)?;
        self.check_leaves(word, last)?;
        self.note_owed(owed.data);
        match cmo {
            CmoMode::Now => Ok((word, owed)),
            CmoMode::Deferred => Ok((word, Maintenance::NONE)),
        }
    }

    /// The deepest existing table that spans the whole range: where the work is.
    #[inline]
    fn common_table(&self, span: Span) -> (Table<'_, P>, Level) {
        let mut table = self.root_table();
        let mut level = self.geometry().start_level();
        while !level.is_page() {
            let shift = self.geometry().shift(level);
            if span.start >> shift != (span.end - 1) >> shift {
                break;
            }
            let raw = table.load(self.index(&table, span.start, level));
            if self.format.kind(raw, level) != WordKind::Table || (span.len() >> shift) != 0 {
                break;
            }
            table = self.child(raw, level);
            level = level.finer();
        }
        (table, level)
    }

    /// Tables that `map_table` will take: none in a table of pages, each of which is a leaf.
    fn count_map(&self, leaves: &Leaves, table: &Table<'_, P>, level: Level, span: Span) -> usize {
        if level.is_page() {
            return 0;
        }
        let size = self.geometry().slot_size(level);
        let mut count = 0;
        for part in span.slots(size) {
            if leaves.fit(part, level, size) {
                continue;
            }
            let raw = table.load(self.index(table, part.start, level));
            count += match self.format.kind(raw, level) {
                WordKind::Table => {
                    self.count_map(leaves, &self.child(raw, level), level.finer(), part)
                }
                WordKind::Leaf if self.agrees(leaves, raw, level, part) => 0,
                _ => self.count_fresh(&Job::Leaves(*leaves), level.finer(), part),
            };
        }
        count
    }

    /// Whether a block already maps its part of the request.
    pub(crate) fn agrees(&self, leaves: &Leaves, raw: u64, level: Level, part: Span) -> bool {
        let within = part.start & (self.geometry().slot_size(level) - 1);
        leaves.levels.has(level)
            && (self.format.attrs_word(raw, level) ^ leaves.attrs) & !self.format.hardware_bits()
                == 0
            && self.format.output(raw, level).get() + within == leaves.output(part.start)
    }

    /// Maps the part of a request that one linked table spans.
    pub(crate) fn map_table(
        &self,
        leaves: &Leaves,
        table: &Table<'_, P>,
        level: Level,
        span: Span,
        run: &mut Progress,
    ) {
        let shift = self.geometry().shift(level);
        let mut rest = Some(span);
        while let Some(span) = rest {
            let full = leaves.full_slots(span, level, shift);
            if full == 0 {
                let (part, behind) = span.split_first(1 << shift);
                self.map_below(leaves, table, level, part, run);
                rest = behind;
                continue;
            }
            let index = self.index(table, span.start, level);
            let raw = table.load(index);
            let done = if raw == SoftWord::EMPTY {
                let empty = 1 + table.zero_run(index + 1, full - 1);
                self.fill_empty(leaves, table, level, span.start, empty, run);
                empty
            } else {
                self.map_over(leaves, table, (raw, level), span.start, full, run)
            };
            rest = span.behind(done, shift);
        }
    }

    /// Makes leaves in slots that are empty.
    #[inline]
    pub(crate) fn fill_empty(
        &self,
        leaves: &Leaves,
        table: &Table<'_, P>,
        level: Level,
        at: u64,
        count: usize,
        run: &mut Progress,
    ) {
        let size = (count as u64) << self.geometry().shift(level);
        self.clean_for(
            leaves,
            Span {
                start: at,
                end: at + size,
            },
        );
        let first = self.index(table, at, level);
        let pa = leaves.output(at);
        self.leaf_runs(
            leaves.attrs,
            pa,
            level,
            count,
            |offset, count, raw, step| {
                let mut raw = raw;
                for index in first + offset..first + offset + count {
                    self.make(table.entry(index), raw);
                    raw = raw.wrapping_add(step);
                }
            },
        );
        run.stored = true;
    }

    /// Makes a leaf over whatever stands in the first of `full` slots, and in those behind it
    /// that can share its invalidation. Says in how many.
    fn map_over(
        &self,
        leaves: &Leaves,
        table: &Table<'_, P>,
        (old, level): (u64, Level),
        at: u64,
        full: usize,
        run: &mut Progress,
    ) -> usize {
        let index = self.index(table, at, level);
        let new = self.wanted(leaves, at, level);
        let size = self.geometry().slot_size(level);
        match self.change(old, new, level) {
            Change::Fill => self.fill_empty(leaves, table, level, at, 1, run),
            Change::Replace => {
                return self.replace_run(leaves, table, (old, level), at, full, run);
            }
            Change::Rewrite(UpdateKind::Same) => {}
            Change::Rewrite(kind) => {
                let span = Span {
                    start: at,
                    end: at + size,
                };
                if kind == UpdateKind::InPlaceThenInvalidate {
                    self.clean_fetch_if_added(old, new, span);
                    run.flush.leaf(at, size, level);
                }
                self.make(table.entry(index), new);
                run.stored = true;
            }
        }
        1
    }

    /// The leaf that the request wants in the slot at `at`.
    pub(crate) fn wanted(&self, leaves: &Leaves, at: u64, level: Level) -> u64 {
        let pa = Pa::new(leaves.output(at));
        self.format.leaf_word(leaves.attrs, pa, level)
    }

    /// What turns an entry into a leaf.
    pub(crate) fn change(&self, old: u64, new: u64, level: Level) -> Change {
        match self.format.kind(old, level) {
            WordKind::Invalid => Change::Fill,
            WordKind::Table => Change::Replace,
            WordKind::Leaf => match self.update_kind(old, new, level) {
                UpdateKind::BreakBeforeMake => Change::Replace,
                kind => Change::Rewrite(kind),
            },
        }
    }

    fn update_kind(&self, old: u64, new: u64, level: Level) -> UpdateKind {
        let attrs = |raw| self.format.decode_attrs(raw);
        let pa = |raw| self.format.output(raw, level);
        UpdateKind::between((pa(old), &attrs(old)), (pa(new), &attrs(new)))
    }

    /// Code written while a page was not executable must not be shadowed by old fetches.
    #[track_caller]
    pub(crate) fn clean_fetch_if_added(&self, old: u64, new: u64, part: Span) {
        let fetch = |raw| self.format.maintenance(raw).fetch;
        if fetch(new) && !fetch(old) {
            let pa = self.format.output(new, Level::PAGE).get();
            let owed = Maintenance {
                data: false,
                fetch: true,
            };
            self.clean_before_make(PaRange::from_bounds(pa, pa + part.len()), owed);
        }
    }
}
