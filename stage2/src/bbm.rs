//! Break-before-make and the order of maintenance: the only place that changes a linked entry.
//!
//! The order (Arm ARM D8.16.1 and D8.17, memory-type contract in `docs/maintenance-order.md`):
//!
//! 1. *break*: store an invalid word;
//! 2. *publish*: the walker sees it;
//! 3. *invalidate*: no CPU caches it, stage 1 results included;
//! 4. *importers*: no device uses it;
//! 5. *data cache*: what was cached reaches memory, before anyone looks there uncached;
//! 6. *instruction cache*: nothing stale is fetched;
//! 7. *make*: store the new word;
//! 8. *publish*.
//!
//! Frames and tables are given back only behind 4.

use crate::addr::{IpaRange, Pa, PaRange};
use crate::attr::Maintenance;
use crate::entry::{Claim, SoftWord};
use crate::format::TableFormat;
use crate::level::{Geometry, Level};
use crate::platform::{DetachedTable, EntryRef, Platform, RangeOps, TlbCaps};
use crate::space::Stage2;

/// What one invalidation must cover, gathered while entries are taken away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flush {
    start: u64,
    end: u64,
    levels: Levels,
}

/// Which levels the entries had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Levels {
    None,
    One(Level),
    /// Leaves of several levels, the finest of which is not known.
    Mixed,
    /// Tables among them: cached steps of walks must go, too.
    Tables,
}

/// How to invalidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Range(Option<Level>),
    Whole,
}

impl Flush {
    pub(crate) const NOTHING: Self = Self {
        start: u64::MAX,
        end: 0,
        levels: Levels::None,
    };

    pub(crate) fn leaf(&mut self, start: u64, size: u64, level: Level) {
        self.cover(start, size);
        self.levels = match self.levels {
            Levels::None => Levels::One(level),
            Levels::One(known) if known == level => Levels::One(level),
            Levels::One(_) => Levels::Mixed,
            levels => levels,
        };
    }

    pub(crate) fn table(&mut self, start: u64, size: u64) {
        self.cover(start, size);
        self.levels = Levels::Tables;
    }

    fn cover(&mut self, start: u64, size: u64) {
        self.start = self.start.min(start);
        self.end = self.end.max(start + size);
    }

    pub(crate) fn range(&self) -> Option<IpaRange> {
        (self.levels != Levels::None).then(|| IpaRange::from_bounds(self.start, self.end))
    }

    /// A level lets hardware drop one entry size; a table without range operations takes the
    /// whole context, as no single address names all cached steps below it.
    pub(crate) fn scope(&self, caps: &TlbCaps, geometry: &Geometry) -> Scope {
        let len = self.end - self.start;
        let stride = match self.levels {
            Levels::None => return Scope::Whole,
            Levels::Tables if caps.range_ops == RangeOps::Missing => return Scope::Whole,
            Levels::One(level) => geometry.shift(level),
            Levels::Mixed | Levels::Tables => geometry.page_shift(),
        };
        if caps.range_ops == RangeOps::Missing && len >> stride > caps.whole_beyond {
            return Scope::Whole;
        }
        Scope::Range(match self.levels {
            Levels::One(level) => Some(level),
            _ => None,
        })
    }
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Steps 2 to 4 for everything gathered; nothing gathered costs nothing.
    #[inline]
    #[track_caller]
    pub(crate) fn invalidate(&self, flush: &Flush) {
        let Some(range) = flush.range() else { return };
        self.platform.publish();
        match flush.scope(&self.platform.caps(), self.geometry()) {
            Scope::Range(level) => self.platform.invalidate_range(self.context, range, level),
            Scope::Whole => self.platform.invalidate_all(self.context),
        }
        self.exports.notify(range);
    }

    /// Step 1 for a leaf nobody else can change: the word left behind remembers what step 5
    /// needs. A leaf that owes nothing may become empty at once.
    #[inline]
    #[track_caller]
    pub(crate) fn break_leaf(&self, entry: EntryRef<'_>, raw: u64, level: Level) -> SoftWord {
        let pa = self.format.output(raw, level);
        let owes_data = self.format.maintenance(raw).data;
        let word = SoftWord::BrokenLeaf {
            pa,
            owes_data,
            claim: Claim::EXCLUSIVE,
        };
        self.platform.store(entry, word.encode());
        word
    }

    /// Step 1 for a table, with everything below it. The only way in which a table that was
    /// linked leaves.
    #[inline]
    #[track_caller]
    pub(crate) fn break_table(&self, entry: EntryRef<'_>, raw: u64, level: Level) {
        self.short.forget();
        let word = SoftWord::BrokenTable(self.format.output(raw, level));
        self.platform.store(entry, word.encode());
    }

    /// Step 5 on the way out.
    #[inline]
    #[track_caller]
    pub(crate) fn clean_data(&self, range: PaRange) {
        self.platform.clean_invalidate_data(range);
    }

    /// Steps 5 and 6 on the way in.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn clean_before_make(&self, range: PaRange, owed: Maintenance) {
        if owed.data {
            self.platform.clean_invalidate_data(range);
        }
        if owed.fetch {
            self.platform.invalidate_fetch(range);
        }
    }

    /// Step 7: over an entry that is invalid, or for a change that hardware allows in place.
    #[inline]
    #[track_caller]
    pub(crate) fn make(&self, entry: EntryRef<'_>, raw: u64) {
        self.platform.store(entry, raw);
    }

    /// Gives back a table that was broken, invalidated and announced.
    pub(crate) fn free_table(&self, table: Pa) {
        self.platform.free_table(DetachedTable::new(table));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(flush: &Flush, range_ops: RangeOps) -> Scope {
        let caps = TlbCaps {
            range_ops,
            whole_beyond: 4,
        };
        let geometry = Geometry::new(12, 9, 39, Level::L1).unwrap();
        flush.scope(&caps, &geometry)
    }

    fn leaves(count: u64, level: Level, size: u64) -> Flush {
        let mut flush = Flush::NOTHING;
        for n in 0..count {
            flush.leaf(0x4000_0000 + n * size, size, level);
        }
        flush
    }

    #[test]
    fn leaves_of_one_level_are_a_range_with_a_hint_up_to_the_limit() {
        for (level, size) in [(Level::PAGE, 0x1000), (Level::L2, 0x20_0000)] {
            let four = leaves(4, level, size);
            assert_eq!(scope(&four, RangeOps::Missing), Scope::Range(Some(level)));
            let five = leaves(5, level, size);
            assert_eq!(scope(&five, RangeOps::Missing), Scope::Whole);
            assert_eq!(scope(&five, RangeOps::Offered), Scope::Range(Some(level)));
        }
    }

    #[test]
    fn leaves_of_several_levels_count_as_pages_and_give_no_hint() {
        let mut mixed = leaves(1, Level::L2, 0x20_0000);
        mixed.leaf(0x4020_0000, 0x1000, Level::PAGE);
        assert_eq!(scope(&mixed, RangeOps::Missing), Scope::Whole);
        assert_eq!(scope(&mixed, RangeOps::Offered), Scope::Range(None));
        let mut near = leaves(3, Level::PAGE, 0x1000);
        near.leaf(0x4000_3000, 0x1000, Level::L2);
        assert_eq!(scope(&near, RangeOps::Missing), Scope::Range(None));
        near.leaf(0x4000_2000, 0x1000, Level::PAGE);
        assert_eq!(scope(&near, RangeOps::Missing), Scope::Range(None));
    }

    #[test]
    fn a_table_takes_everything_unless_ranges_are_offered() {
        let mut flush = leaves(1, Level::PAGE, 0x1000);
        flush.table(0x4000_0000, 0x20_0000);
        flush.leaf(0x4020_0000, 0x1000, Level::PAGE);
        assert_eq!(scope(&flush, RangeOps::Missing), Scope::Whole);
        assert_eq!(scope(&flush, RangeOps::Offered), Scope::Range(None));
        let hull = IpaRange::from_bounds(0x4000_0000, 0x4020_1000);
        assert_eq!(flush.range(), Some(hull));
        assert_eq!(Flush::NOTHING.range(), None);
    }
}
