//! One table in memory. The only module that dereferences a pointer.
#![expect(
    unsafe_code,
    reason = "entries are reached through the platform's pointer"
)]

use core::ptr::NonNull;

use crate::addr::Pa;
use crate::platform::{EntryRef, TableMemory};
use crate::sync::{AtomicEntry, Ordering};

/// A table, or a whole concatenated root: a power of two of entries.
pub(crate) struct Table<'a, M> {
    base: NonNull<AtomicEntry>,
    /// Entries minus one.
    mask: usize,
    pa: Pa,
    memory: &'a M,
}

impl<M> Clone for Table<'_, M> {
    #[inline]
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Table<'_, M> {}

impl<'a, M: TableMemory> Table<'a, M> {
    /// The table at `pa`: an address that `memory` handed out for at least `entries` entries, a
    /// power of two, and that was not given back. The core keeps this by taking addresses only
    /// from the allocator, from its root, from table words it wrote, and from what walks and
    /// exclusive maps remember until a table is unlinked (`short.rs`), and by freeing a table only under
    /// exclusive access after unlinking it.
    #[inline]
    pub(crate) fn at(memory: &'a M, pa: Pa, entries: usize) -> Self {
        debug_assert!(entries.is_power_of_two());
        Self {
            base: memory.table_ptr(pa),
            mask: entries - 1,
            pa,
            memory,
        }
    }

    #[inline]
    pub(crate) const fn pa(&self) -> Pa {
        self.pa
    }

    #[inline]
    pub(crate) const fn entries(&self) -> usize {
        self.mask + 1
    }

    #[inline]
    fn word(&self, index: usize) -> &'a AtomicEntry {
        debug_assert!(index <= self.mask);
        // SAFETY: `base` points to all entries of the table (promise of `TableMemory` for an
        // address it handed out, kept by the callers of `at`), and masking stays below them.
        let word = unsafe { self.base.add(index & self.mask) };
        // SAFETY: as above; entries are only ever accessed atomically, so a shared reference
        // is all that exists, and the memory stays valid while the table is not given back.
        unsafe { word.as_ref() }
    }

    /// `count` entries from `first`, as far as the table goes.
    #[inline]
    fn words(&self, first: usize, count: usize) -> &'a [AtomicEntry] {
        let first = first & self.mask;
        let count = count.min(self.entries() - first);
        // SAFETY: as in `word`; `first + count` is at most the entries of the table.
        let start = unsafe { self.base.add(first) };
        // SAFETY: as in `word`, for `count` entries from `start`.
        unsafe { core::slice::from_raw_parts(start.as_ptr(), count) }
    }

    /// `count` entries from `first`, for stores that the platform makes.
    #[inline]
    pub(crate) fn entry_run(
        &self,
        first: usize,
        count: usize,
    ) -> impl Iterator<Item = EntryRef<'a>> {
        let table = self.pa;
        let words = self.words(first, count).iter().enumerate();
        words.map(move |(n, word)| EntryRef {
            table,
            index: first + n,
            word,
        })
    }

    /// `count` entries from `first` and what they say, read as by [`load`](Self::load).
    #[inline]
    pub(crate) fn load_run(
        &self,
        first: usize,
        count: usize,
    ) -> impl Iterator<Item = (EntryRef<'a>, u64)> {
        self.memory.visited(count);
        self.entry_run(first, count)
            .map(|entry| (entry, entry.word.load(Ordering::Acquire)))
    }

    /// The entry, for a store that the platform makes.
    #[inline]
    pub(crate) fn entry(&self, index: usize) -> EntryRef<'a> {
        EntryRef {
            table: self.pa,
            index,
            word: self.word(index),
        }
    }

    /// The entry, for a compare-and-swap that is the first look at it.
    #[inline]
    pub(crate) fn unread_entry(&self, index: usize) -> EntryRef<'a> {
        self.memory.visited(1);
        self.entry(index)
    }

    /// Reads an entry; what a table it points to held when it was linked is seen, too.
    #[inline]
    pub(crate) fn load(&self, index: usize) -> u64 {
        self.memory.visited(1);
        self.word(index).load(Ordering::Acquire)
    }

    /// Reads an entry of a table that nothing reaches.
    #[inline]
    pub(crate) fn peek(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    /// Writes an entry of a table that nothing reaches yet.
    #[inline]
    pub(crate) fn init(&self, index: usize, raw: u64) {
        self.word(index).store(raw, Ordering::Relaxed);
    }

    /// Writes `count` entries from `first` of a table that nothing reaches yet: `raw`,
    /// `raw + step`, and so on. As nobody looks, these need not be single stores: the compiler
    /// may write several entries at once.
    #[inline]
    pub(crate) fn init_run(&self, first: usize, count: usize, raw: u64, step: u64) {
        let (eights, rest) = self.words(first, count).as_chunks::<8>();
        let mut next: [u64; 8] =
            core::array::from_fn(|n| raw.wrapping_add(step.wrapping_mul(n as u64)));
        for eight in eights {
            for (word, raw) in eight.iter().zip(next) {
                write_unseen(word, raw);
            }
            next = next.map(|raw| raw.wrapping_add(step.wrapping_mul(8)));
        }
        for (word, raw) in rest.iter().zip(next) {
            write_unseen(word, raw);
        }
    }

    /// How many of the `limit` entries from `first` are zero up to the first that is not.
    #[inline]
    pub(crate) fn zero_run(&self, first: usize, limit: usize) -> usize {
        self.run(first, limit, 0, 0)
    }

    /// How many of the `limit` entries from `first` say `raw`, `raw + step`, and so on. Nothing
    /// is followed from there, so what they point to need not be seen.
    #[inline]
    pub(crate) fn run(&self, first: usize, limit: usize, mut raw: u64, step: u64) -> usize {
        let mut count = 0;
        let words = self.words(first, limit);
        for word in words {
            if word.load(Ordering::Relaxed) != raw {
                break;
            }
            raw = raw.wrapping_add(step);
            count += 1;
        }
        self.memory
            .visited(count + usize::from(count < words.len()));
        count
    }

    /// Whether all entries outside `first..end` are zero. Looks behind the range first: what
    /// remains of a table is mostly there.
    pub(crate) fn is_zero_outside(&self, first: usize, end: usize) -> bool {
        let behind = self.entries() - end;
        self.zero_run(end, behind) == behind && self.zero_run(0, first) == first
    }
}

/// Writes an entry of a table that nothing reaches yet, by a store that need not be a single one.
#[inline(always)]
#[cfg(not(loom))]
fn write_unseen(word: &AtomicEntry, raw: u64) {
    // SAFETY: `word` is a live entry, and nobody accesses it meanwhile: its table was allocated
    // for this operation and is linked, by a release store, only when it is complete.
    unsafe { word.as_ptr().write(raw) };
}

#[cfg(loom)]
fn write_unseen(word: &AtomicEntry, raw: u64) {
    word.store(raw, Ordering::Relaxed);
}

/// The code that dereferences, small enough for Miri.
#[cfg(all(test, not(loom)))]
mod tests {
    use std::prelude::rust_2024::*;

    use super::*;
    use crate::platform::DetachedTable;

    /// One table of 32 entries, all of which say where they are.
    struct OneTable(Vec<AtomicEntry>);

    const ENTRIES: usize = 32;

    // SAFETY: the vector holds the table and stays where it is; nothing is handed out.
    unsafe impl TableMemory for OneTable {
        fn alloc_table(&self) -> Option<Pa> {
            None
        }
        fn free_table(&self, _table: DetachedTable) {}
        fn alloc_root(&self, _size: u64) -> Option<Pa> {
            None
        }
        fn free_root(&self, _root: DetachedTable, _size: u64) {}
        fn table_ptr(&self, _table: Pa) -> NonNull<AtomicEntry> {
            NonNull::from(self.0.as_slice()).cast()
        }
    }

    fn memory() -> OneTable {
        OneTable((1000..1032).map(AtomicEntry::new).collect())
    }

    fn words(memory: &OneTable) -> Vec<u64> {
        let load = |word: &AtomicEntry| word.load(Ordering::Relaxed);
        memory.0.iter().map(load).collect()
    }

    #[test]
    fn a_run_is_written_where_it_belongs_and_nowhere_else() {
        for (first, count) in [
            (0, 32),
            (0, 0),
            (0, 1),
            (3, 8),
            (5, 7),
            (7, 25),
            (31, 1),
            (2, 17),
        ] {
            let memory = memory();
            let table = Table::at(&memory, Pa::new(0x1000), ENTRIES);
            table.init_run(first, count, 50, 3);
            let mut expected: Vec<u64> = (1000..1032).collect();
            for (n, word) in expected[first..first + count].iter_mut().enumerate() {
                *word = 50 + 3 * n as u64;
            }
            assert_eq!(words(&memory), expected);
            assert_eq!(table.run(first, count, 50, 3), count);
        }
    }

    #[test]
    fn a_run_ends_with_the_table() {
        let memory = memory();
        let table = Table::at(&memory, Pa::new(0x1000), ENTRIES);
        table.init_run(20, 100, u64::MAX, 1);
        let wrapped: Vec<u64> = core::iter::once(u64::MAX).chain(0..11).collect();
        assert_eq!(words(&memory)[20..], wrapped);
        assert_eq!(words(&memory)[..20], (1000..1020).collect::<Vec<u64>>());
        assert_eq!(table.run(20, 100, u64::MAX, 1), 12);
    }

    #[test]
    fn runs_are_counted_up_to_the_first_that_differs() {
        let memory = memory();
        let table = Table::at(&memory, Pa::new(0x1000), ENTRIES);
        assert_eq!(table.run(4, 28, 1004, 1), 28);
        assert_eq!(table.run(4, 9, 1004, 1), 9);
        assert_eq!(table.run(4, 28, 1005, 1), 0);
        table.init_run(8, 8, 0, 0);
        assert_eq!(table.zero_run(8, 24), 8);
        assert_eq!(table.zero_run(10, 24), 6);
        assert_eq!(table.zero_run(7, 24), 0);
        assert_eq!(table.run(4, 28, 1004, 1), 4);
    }

    #[test]
    fn entries_outside_a_range_are_looked_at_on_both_sides() {
        let memory = memory();
        let table = Table::at(&memory, Pa::new(0x1000), ENTRIES);
        table.init_run(0, ENTRIES, 0, 0);
        table.init(9, 5);
        assert!(table.is_zero_outside(9, 10));
        assert!(table.is_zero_outside(4, 12));
        assert!(!table.is_zero_outside(10, 12));
        assert!(!table.is_zero_outside(4, 9));
        assert!(!table.is_zero_outside(0, 0));
        assert!(table.is_zero_outside(0, ENTRIES));
    }

    #[test]
    fn platforms_that_say_nothing_else_store_and_swap() {
        let memory = memory();
        let table = Table::at(&memory, Pa::new(0x1000), ENTRIES);
        memory.store(table.entry(3), 7);
        assert_eq!(table.load(3), 7);
        assert!(!memory.compare_exchange(table.entry(3), 8, 9));
        assert_eq!(table.load(3), 7);
        assert!(TableMemory::compare_exchange(
            &&memory,
            table.entry(3),
            7,
            9
        ));
        assert_eq!(table.load(3), 9);
    }

    #[test]
    fn entries_handed_to_the_platform_say_where_they_are() {
        let memory = memory();
        let table = Table::at(&memory, Pa::new(0x1000), ENTRIES);
        for (n, entry) in table.entry_run(30, 9).enumerate() {
            assert_eq!((entry.table, entry.index), (Pa::new(0x1000), 30 + n));
            entry.word.store(n as u64, Ordering::Release);
        }
        assert_eq!(words(&memory)[29..], [1029, 0, 1]);
        assert_eq!(table.entry(31).index, 31);
        assert_eq!(table.load(31), 1);
        assert_eq!((table.entries(), table.pa()), (32, Pa::new(0x1000)));
    }
}
