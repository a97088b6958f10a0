//! The short way: one leaf into an empty entry of a table that exists.
//!
//! Nearly every fault, and every map call for a single page or block, is that, so it has as few
//! steps as it can: one test that tells such a request, a walk whose shifts the compiler knows,
//! the encoding, the maintenance, the store. Whatever else it meets, a request that makes no sense
//! included, it leaves to the long way with nothing changed; what is wrong is said there.

use crate::addr::{Pa, PaRange};
use crate::attr::{LeafAttrs, Maintenance};
use crate::entry::SoftWord;
use crate::format::TableFormat;
use crate::level::Level;

use crate::platform::{EntryRef, Platform};
use crate::request::{CmoMode, FaultRequest, MapRequest, Met};
use crate::space::{Position, Stage2};
use crate::sync::{AtomicEntry, Ordering};
use crate::table::Table;
use crate::walk_cache::WalkCache;

/// What the short way knows of a space.
#[derive(Debug)]
pub(crate) struct Short {
    /// Not zero in tables of another than the common shape, which always go the long way.
    refuse: u64,
    /// Bits that the input address of a page must not have.
    no_ipa: u64,
    /// Bits that its output address must not have.
    no_pa: u64,
    /// The table of pages that was mapped into last: the number of its slot, or [`NO_SLOT`].
    /// Only exclusive operations look at it or change it; an atomic, because those that take
    /// tables away share code with others.
    last_slot: AtomicEntry,
    last_table: AtomicEntry,
    /// Where walks start.
    walk_cache: WalkCache,
}

/// Pages of the common shape.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// The number of no slot.
const NO_SLOT: u64 = u64::MAX;

impl Short {
    pub(crate) fn of<F: TableFormat>(format: &F) -> Self {
        let geometry = format.geometry();
        let inside = (geometry.input_end() - 1) & !(PAGE_SIZE - 1);
        Self {
            refuse: u64::from(!geometry.is_common()),
            no_ipa: !inside,
            no_pa: !format.plain_outputs(),
            last_slot: AtomicEntry::new(NO_SLOT),
            last_table: AtomicEntry::new(0),
            walk_cache: WalkCache::new(),
        }
    }

    /// A table leaves: what is remembered may be it, or below it.
    #[inline]
    pub(crate) fn forget(&self) {
        self.last_slot.store(NO_SLOT, Ordering::Relaxed);
        self.walk_cache.forget();
    }
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Maps a page, of [`PAGE_SIZE`]. Says whether it was that simple; nothing has changed if
    /// not.
    pub(crate) fn map_page(&mut self, request: &MapRequest) -> bool {
        let (ipa, pa) = (request.ipa.get(), request.pa.get());
        let Short {
            refuse,
            no_ipa,
            no_pa,
            ..
        } = self.short;
        if refuse | ipa & no_ipa | pa & no_pa != 0 {
            return false;
        }
        let Some(table) = self.last_or_page_table(ipa) else {
            return false;
        };
        let here = self.page_of(table, ipa);
        if !here.is_empty() {
            return false;
        }
        let Some((leaf, owed)) = self.page_word(&request.attrs, request.pa) else {
            return false;
        };
        self.clean_if_now(request.cmo, (pa, PAGE_SIZE), owed);
        self.make(here.table.entry(here.index), leaf);
        self.platform.publish();
        true
    }

    /// Maps a block, of the size of one and aligned to it. Says whether it was that simple;
    /// nothing has changed if not.
    pub(crate) fn map_block(&mut self, request: &MapRequest) -> bool {
        let size_at = |level| 1 << self.geometry().common_shift(level);
        if request.size == size_at(Level::L1) {
            self.map_block_of(request, Level::L1)
        } else if request.size == size_at(Level::L2) {
            self.map_block_of(request, Level::L2)
        } else {
            false
        }
    }

    #[inline(always)]
    fn map_block_of(&mut self, request: &MapRequest, level: Level) -> bool {
        let (ipa, pa) = (request.ipa.get(), request.pa.get());
        let shift = self.geometry().common_shift(level);
        let size = 1 << shift;
        let within = size - 1;
        let Short {
            refuse,
            no_ipa,
            no_pa,
            ..
        } = self.short;
        let odd = ipa & (no_ipa | within) | pa & (no_pa | within);
        let levels = self.leaf_levels.limited(request.blocks);
        let reserved = self.exports.reserved_bits() != 0;
        if refuse != 0 || odd != 0 || reserved || !levels.has(level) {
            return false;
        }
        let Some(table) = self.table_of_blocks(ipa, level) else {
            return false;
        };
        let here = Position::at(table, ipa, level, shift);
        if !here.is_empty() {
            return false;
        }
        let Ok((word, owed)) = self.format.encode_owing(&request.attrs) else {
            return false;
        };
        self.note_owed(owed.data);
        self.clean_if_now(request.cmo, (pa, size), owed);
        let leaf = self.format.leaf_word(word, request.pa, level);
        self.make(table.entry(here.index), leaf);
        self.platform.publish();
        true
    }

    /// Resolves a fault by a page, beside others. Says whether it was that simple; nothing has
    /// changed if not.
    pub(crate) fn fault_page(&self, request: &FaultRequest) -> bool {
        let Short {
            refuse,
            no_ipa,
            no_pa,
            ..
        } = self.short;
        let (start, end) = (request.window.start().get(), request.window.end().get());
        let at = request.ipa.get() & !(PAGE_SIZE - 1);
        let last = end.wrapping_sub(PAGE_SIZE);
        let (within, span) = (at.wrapping_sub(start), last.wrapping_sub(start));
        let first = request.pa.get();
        let last_out = first.wrapping_add(span);
        let strange = refuse | (start | last) & no_ipa | (first | last_out) & no_pa;
        if strange != 0 || within > span {
            return false;
        }
        let Some(table) = self.page_table(at) else {
            return false;
        };
        let Some(entry) = self.entry_to_take(table, at, request.met) else {
            return false;
        };
        let pa = first + within;
        let Some((leaf, owed)) = self.page_word(&request.attrs, Pa::new(pa)) else {
            return false;
        };
        self.clean_if_now(request.cmo, (pa, PAGE_SIZE), owed);
        let won = self.platform.compare_exchange(entry, SoftWord::EMPTY, leaf);
        if won {
            self.platform.publish();
        }
        won
    }

    /// The entry of a page, unless it is known not to be empty.
    #[inline(always)]
    fn entry_to_take<'a>(&self, table: Table<'a, P>, at: u64, met: Met) -> Option<EntryRef<'a>> {
        match met {
            Met::Nothing => Some(table.unread_entry(self.page_index(&table, at))),
            Met::Anything => {
                let here = self.page_of(table, at);
                here.is_empty().then_some(table.entry(here.index))
            }
        }
    }

    /// Steps 5 and 6 of the maintenance order, unless they are left to a flush.
    #[inline(always)]
    #[track_caller]
    fn clean_if_now(&self, cmo: CmoMode, (pa, size): (u64, u64), owed: Maintenance) {
        if cmo == CmoMode::Now {
            self.clean_before_make(PaRange::from_bounds(pa, pa + size), owed);
        }
    }

    /// The descriptor of a page and what it owes, unless something speaks against it.
    #[inline(always)]
    fn page_word(&self, attrs: &LeafAttrs, pa: Pa) -> Option<(u64, Maintenance)> {
        let (word, owed) = self.format.encode_owing(attrs).ok()?;
        let leaf = self.format.plain_page(word, pa);
        let block = self.format.leaf_word(word, Pa::new(0), Level::L2);
        if (leaf | block) & self.exports.reserved_bits() != 0 {
            return None;
        }
        self.note_owed(owed.data);
        Some((leaf, owed))
    }

    /// [`descend`](Self::descend) that finds pages only, and only in tables of the common shape.
    #[inline(always)]
    pub(crate) fn page_entry(&self, at: u64) -> Option<Position<'_, P>> {
        Some(self.page_of(self.page_table(at)?, at))
    }

    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "masked to the table's entries"
    )]
    fn page_index(&self, table: &Table<'_, P>, at: u64) -> usize {
        (at >> self.geometry().common_shift(Level::PAGE)) as usize & (table.entries() - 1)
    }

    #[inline(always)]
    fn page_of<'a>(&self, table: Table<'a, P>, at: u64) -> Position<'a, P> {
        let shift = self.geometry().common_shift(Level::PAGE);
        Position::at(table, at, Level::PAGE, shift)
    }

    /// [`page_table`](Self::page_table) under exclusive access, where the last one is remembered.
    #[inline(always)]
    fn last_or_page_table(&self, at: u64) -> Option<Table<'_, P>> {
        let slot = at >> self.geometry().common_shift(Level::L2);
        if self.short.last_slot.load(Ordering::Relaxed) == slot {
            // Linked when it was noted, and nothing was taken away since.
            let table = Pa::new(self.short.last_table.load(Ordering::Relaxed));
            return Some(self.small_table(table));
        }
        let table = self.page_table(at)?;
        self.short.last_slot.store(slot, Ordering::Relaxed);
        self.short
            .last_table
            .store(table.pa().get(), Ordering::Relaxed);
        Some(table)
    }

    /// The table of pages around `at` in tables of the common shape.
    #[inline(always)]
    fn page_table(&self, at: u64) -> Option<Table<'_, P>> {
        let table = self.table_of_blocks(at, Level::L2)?;
        self.step(table, at, Level::L2)
    }

    /// The table of blocks around `at`, which is remembered for the walks to come; nothing in
    /// tables of another shape, of which therefore none is ever remembered.
    #[inline]
    fn block_table(&self, at: u64, gigabyte: u64) -> Option<Table<'_, P>> {
        if !self.geometry().is_common() {
            return None;
        }
        let table = self.gigabyte_table(at)?;
        let table = self.step(table, at, Level::L1)?;
        self.short.walk_cache.keep(gigabyte, table.pa());
        Some(table)
    }

    /// The table of gigabytes around `at`.
    #[inline(always)]
    fn gigabyte_table(&self, at: u64) -> Option<Table<'_, P>> {
        let root = self.root_table();
        if self.geometry().start_level() == Level::L0 {
            self.step(root, at, Level::L0)
        } else {
            Some(root)
        }
    }

    /// The table of `level`, 1 or 2, around `at`.
    #[inline(always)]
    fn table_of_blocks(&self, at: u64, level: Level) -> Option<Table<'_, P>> {
        if level == Level::L1 {
            return self.gigabyte_table(at);
        }
        let gigabyte = at >> self.geometry().common_shift(Level::L1);
        match self.short.walk_cache.find(gigabyte) {
            Some(known) => Some(self.small_table(known)),
            None => self.block_table(at, gigabyte),
        }
    }

    /// The table below an entry, if there is one and that is quickly said.
    #[inline(always)]
    fn step(&self, table: Table<'_, P>, at: u64, level: Level) -> Option<Table<'_, P>> {
        let here = Position::at(table, at, level, self.geometry().common_shift(level));
        Some(self.small_table(self.format.plain_table(here.raw)?))
    }

    #[inline(always)]
    fn small_table(&self, pa: Pa) -> Table<'_, P> {
        Table::at(&self.platform, pa, self.geometry().common_entries())
    }
}
