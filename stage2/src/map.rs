//! Mapping a range, exclusively: any entry may be replaced.

use crate::addr::{Ipa, IpaRange, Pa, PaRange};
use crate::attr::{LeafAttrs, Maintenance};
use crate::bbm::Flush;
use crate::entry::{SoftWord, UpdateKind};
use crate::erase::Sweep;
use crate::error::{EncodeError, MapError};
use crate::format::{TableFormat, WordKind};
use crate::job::{Job, LeafLevels, Span};
use crate::level::Level;
use crate::platform::Platform;
use crate::reserve::Reserve;
use crate::space::Stage2;
use crate::table::Table;

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
    /// Not at all: the caller promises [`Stage2::flush`] before the guest runs.
    Deferred,
}

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

/// What a map did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapOutcome {
    /// The range is mapped as asked; something changed.
    Mapped,
    /// It was mapped exactly so before; nothing changed.
    AlreadyMapped,
}

/// Running state of one map.
struct Progress {
    reserve: Reserve,
    flush: Flush,
    stored: bool,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Maps a range by the largest blocks that fit. Whatever stood there is replaced, notes
    /// included; the rest of a block that is hit only in part stays mapped in smaller leaves.
    /// A leaf whose permissions alone change is rewritten in place; one that is the same stays.
    ///
    /// # Errors
    /// Nothing has changed after an error. [`MapError::NoMemory`] names the tables that are
    /// needed; any other says what is wrong with the request.
    pub fn map(&mut self, request: &MapRequest) -> Result<MapOutcome, MapError> {
        if request.size == self.geometry().page_size()
            && let Some(done) = self.map_page(request)?
        {
            return Ok(done);
        }
        let (job, span) = self.prepare_map(request)?;
        let (table, level) = self.common_table(span);
        let needed = if level.is_page() {
            0
        } else {
            self.count_map(&job, &table, level, span)
        };
        let reserve = self.reserve(needed)?;
        let mut progress = Progress {
            reserve,
            flush: Flush::NOTHING,
            stored: false,
        };
        self.map_table(&job, &table, level, span, &mut progress);
        self.finish_map(progress)
    }

    /// The short way for one page into an empty entry of a table that exists. Nothing when there
    /// is more to do.
    #[inline]
    fn map_page(&self, request: &MapRequest) -> Result<Option<MapOutcome>, MapError> {
        let (ipa, pa) = (request.ipa.get(), request.pa.get());
        self.check_aligned(ipa | request.size | pa)?;
        if ipa >> self.geometry().input_bits() != 0 {
            return Ok(None); // the long way says what is wrong
        }
        let here = self.descend(ipa);
        if !here.level.is_page() || here.raw != SoftWord::EMPTY {
            return Ok(None);
        }
        let attrs = self.format.encode_attrs(&request.attrs)?;
        let out = PaRange::new(request.pa, request.size)?;
        self.check_leaves(attrs, &out)?;
        let owed = request.attrs.maintenance();
        self.note_owed(owed.data);
        if request.cmo == CmoMode::Now {
            self.clean_before_make(out, owed);
        }
        let leaf = self.format.leaf_word(attrs, request.pa, Level::PAGE);
        self.make(here.table.entry(here.index), leaf);
        self.platform.publish();
        Ok(Some(MapOutcome::Mapped))
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

    /// Everything that can be wrong with a request.
    #[inline]
    fn prepare_map(&self, request: &MapRequest) -> Result<(Job, Span), MapError> {
        let range = IpaRange::new(request.ipa, request.size)?;
        let out = PaRange::new(request.pa, request.size)?;
        self.check_aligned(request.ipa.get() | request.size | request.pa.get())?;
        self.check_input(&range)?;
        let job = self.leaf_job(&request.attrs, (range, out), request.blocks, request.cmo)?;
        Ok((
            job,
            Span {
                start: range.start().get(),
                end: range.end().get(),
            },
        ))
    }

    /// Encodes the attributes once for all leaves of a range.
    #[inline]
    pub(crate) fn leaf_job(
        &self,
        attrs: &LeafAttrs,
        (range, out): (IpaRange, PaRange),
        blocks: Blocks,
        cmo: CmoMode,
    ) -> Result<Job, EncodeError> {
        let word = self.format.encode_attrs(attrs)?;
        self.check_leaves(word, &out)?;
        let owed = match cmo {
            CmoMode::Now => attrs.maintenance(),
            CmoMode::Deferred => Maintenance {
                data: false,
                fetch: false,
            },
        };
        self.note_owed(attrs.maintenance().data);
        let delta = out.start().get().wrapping_sub(range.start().get());
        Ok(Job::Leaves {
            attrs: word,
            delta,
            levels: self.leaf_levels(blocks),
            owed,
        })
    }

    #[inline]
    fn leaf_levels(&self, blocks: Blocks) -> LeafLevels {
        let coarsest = match blocks {
            Blocks::Never => return LeafLevels::PAGE,
            Blocks::UpTo(level) => level.number(),
            Blocks::Largest => -1,
        };
        let mut levels = LeafLevels::PAGE;
        for level in [Level::L2, Level::L1, Level::L0] {
            if level.number() >= coarsest && self.format.supports_leaf(level) {
                levels = levels.with(level);
            }
        }
        levels
    }

    /// The deepest existing table that spans the whole range: where the work is.
    #[inline]
    fn common_table(&self, span: Span) -> (Table<'_>, Level) {
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

    /// Tables that `map_table` will take.
    fn count_map(&self, job: &Job, table: &Table<'_>, level: Level, span: Span) -> usize {
        let size = self.geometry().slot_size(level);
        let mut count = 0;
        let mut rest = Some(span);
        while let Some(span) = rest {
            let (part, behind) = span.split_first(size);
            rest = behind;
            if job.fits(part, level, size) {
                continue;
            }
            let raw = table.load(self.index(table, part.start, level));
            count += match self.format.kind(raw, level) {
                WordKind::Table => {
                    self.count_map(job, &self.child(raw, level), level.finer(), part)
                }
                WordKind::Leaf if self.agrees(job, raw, level, part) => 0,
                _ => self.count_fresh(job, level.finer(), part),
            };
        }
        count
    }

    /// Whether a block already maps its part of the request.
    fn agrees(&self, job: &Job, raw: u64, level: Level, part: Span) -> bool {
        let Job::Leaves {
            attrs,
            delta,
            levels,
            ..
        } = *job
        else {
            return false;
        };
        let within = part.start & (self.geometry().slot_size(level) - 1);
        levels.has(level)
            && (self.format.attrs_word(raw, level) ^ attrs) & !self.format.hardware_bits() == 0
            && self.format.output(raw, level).get() + within == part.start.wrapping_add(delta)
    }

    /// Maps the part of a request that one linked table spans.
    fn map_table(
        &self,
        job: &Job,
        table: &Table<'_>,
        level: Level,
        span: Span,
        run: &mut Progress,
    ) {
        let shift = self.geometry().shift(level);
        let mut rest = Some(span);
        while let Some(span) = rest {
            let index = self.index(table, span.start, level);
            let full = job.full_slots(span, level, shift);
            let empty = table.zero_run(index, full);
            if empty > 0 {
                self.fill_empty(job, table, level, span.start, empty, run);
                let start = span.start + ((empty as u64) << shift);
                rest = (start < span.end).then_some(Span {
                    start,
                    end: span.end,
                });
                continue;
            }
            let (part, behind) = span.split_first(1 << shift);
            if full > 0 {
                self.map_leaf(job, table, level, part, run);
            } else {
                self.map_below(job, table, level, part, run);
            }
            rest = behind;
        }
    }

    /// Makes leaves in slots that are empty.
    #[inline]
    fn fill_empty(
        &self,
        job: &Job,
        table: &Table<'_>,
        level: Level,
        at: u64,
        count: usize,
        run: &mut Progress,
    ) {
        let Job::Leaves { attrs, delta, .. } = *job else {
            return;
        };
        let size = (count as u64) << self.geometry().shift(level);
        self.clean_for(
            job,
            Span {
                start: at,
                end: at + size,
            },
        );
        let first = self.index(table, at, level);
        let pa = at.wrapping_add(delta);
        self.leaf_runs(attrs, pa, level, count, |offset, count, raw, step| {
            let mut raw = raw;
            for index in first + offset..first + offset + count {
                self.make(table.entry(index), raw);
                raw = raw.wrapping_add(step);
            }
        });
        run.stored = true;
    }

    /// Makes one leaf over whatever stands in its slot.
    fn map_leaf(&self, job: &Job, table: &Table<'_>, level: Level, part: Span, run: &mut Progress) {
        let Job::Leaves { attrs, delta, .. } = *job else {
            return;
        };
        let index = self.index(table, part.start, level);
        let entry = table.entry(index);
        let old = table.load(index);
        let new = self
            .format
            .leaf_word(attrs, Pa::new(part.start.wrapping_add(delta)), level);
        match self.format.kind(old, level) {
            WordKind::Invalid => {
                self.clean_for(job, part);
                self.make(entry, new);
            }
            WordKind::Table => self.block_over_table(job, table, level, part, new),
            WordKind::Leaf => match self.update_kind(old, new, level) {
                UpdateKind::Same => return,
                UpdateKind::InPlace => self.make(entry, new),
                UpdateKind::InPlaceThenInvalidate => {
                    self.clean_fetch_if_added(old, new, part);
                    self.make(entry, new);
                    run.flush.leaf(part.start, part.len(), level);
                }
                UpdateKind::BreakBeforeMake => self.leaf_over_leaf(job, table, level, part, new),
            },
        }
        run.stored = true;
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

    fn leaf_over_leaf(&self, job: &Job, table: &Table<'_>, level: Level, part: Span, new: u64) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let mut flush = Flush::NOTHING;
        self.break_leaf(table.entry(index), old, level);
        flush.leaf(part.start, part.len(), level);
        self.invalidate(&flush);
        self.clean_removed(
            old,
            level,
            Span {
                start: 0,
                end: part.len(),
            },
        );
        self.clean_for(job, part);
        self.make(table.entry(index), new);
    }

    fn block_over_table(&self, job: &Job, table: &Table<'_>, level: Level, part: Span, new: u64) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let mut flush = Flush::NOTHING;
        self.break_table(table.entry(index), old, level);
        flush.table(part.start, part.len());
        self.invalidate(&flush);
        let mut sweep = Sweep::quiet();
        self.release_table(
            self.format.output(old, level),
            level.finer(),
            part.start,
            &mut sweep,
        );
        self.finish_sweep(&mut sweep);
        self.clean_for(job, part);
        self.make(table.entry(index), new);
    }

    /// Maps part of a slot through a table, existing or new.
    fn map_below(
        &self,
        job: &Job,
        table: &Table<'_>,
        level: Level,
        part: Span,
        run: &mut Progress,
    ) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let Some(background) = self.background(old, level) else {
            let child = self.child(old, level);
            return self.map_table(job, &child, level.finer(), part, run);
        };
        if self.format.kind(old, level) == WordKind::Leaf {
            if self.agrees(job, old, level, part) {
                return;
            }
            return self.map_into_block(job, table, level, part, run);
        }
        let built = self.build(job, level.finer(), part, background, &mut run.reserve);
        let Some(child) = built else { return };
        self.clean_for(job, part);
        self.make(table.entry(index), self.format.table_word(child));
        run.stored = true;
    }

    /// Replaces a block by a table that keeps the rest of it.
    fn map_into_block(
        &self,
        job: &Job,
        table: &Table<'_>,
        level: Level,
        part: Span,
        run: &mut Progress,
    ) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let Some(background) = self.background(old, level) else {
            return;
        };
        let built = self.build(job, level.finer(), part, background, &mut run.reserve);
        let Some(child) = built else { return };
        let size = self.geometry().slot_size(level);
        let within = part.start & (size - 1);
        let mut flush = Flush::NOTHING;
        self.break_leaf(table.entry(index), old, level);
        flush.leaf(part.start - within, size, level);
        self.invalidate(&flush);
        self.clean_removed(
            old,
            level,
            Span {
                start: within,
                end: within + part.len(),
            },
        );
        self.clean_for(job, part);
        self.make(table.entry(index), self.format.table_word(child));
        run.stored = true;
    }

    /// Step 5 for the bytes `part` of a leaf that was taken away.
    #[track_caller]
    pub(crate) fn clean_removed(&self, raw: u64, level: Level, part: Span) {
        if self.format.maintenance(raw).data {
            let pa = self.format.output(raw, level).get();
            self.clean_data(PaRange::from_bounds(pa + part.start, pa + part.end));
        }
    }
}
