//! The same memory, counting what is asked of the machine.

use std::cell::Cell;
use std::ptr::NonNull;

use stage2::{
    AtomicEntry, CacheMaintenance, DetachedTable, EntryRef, IpaRange, Level, Pa, PaRange,
    TableMemory, TlbInvalidate,
};

use super::Machine;

/// What an operation asked for.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// TLB invalidations.
    pub tlb: Cell<u64>,
    /// Barriers between stores and walkers.
    pub publish: Cell<u64>,
    /// Data-cache operations, each on a range.
    pub data: Cell<u64>,
    /// Instruction-cache operations, each on a range.
    pub fetch: Cell<u64>,
    /// Entries of linked tables written.
    pub stores: Cell<u64>,
    /// Entries of tables looked at.
    pub visits: Cell<u64>,
    /// Tables taken.
    pub taken: Cell<u64>,
    /// Tables given back.
    pub given: Cell<u64>,
}

impl Counts {
    /// In the order of [`Counts::NAMES`].
    pub fn values(&self) -> [u64; 8] {
        [
            &self.tlb,
            &self.publish,
            &self.data,
            &self.fetch,
            &self.visits,
            &self.stores,
            &self.taken,
            &self.given,
        ]
        .map(Cell::get)
    }

    pub const NAMES: [&'static str; 8] = [
        "TLB invalidations",
        "barriers",
        "data-cache ranges",
        "fetch ranges",
        "entries visited",
        "entries written while linked",
        "tables taken",
        "tables given back",
    ];

    /// What was asked for after `before`.
    pub fn since(&self, before: &Self) -> Self {
        let now = self.clone();
        for (count, old) in [
            (&now.tlb, &before.tlb),
            (&now.publish, &before.publish),
            (&now.data, &before.data),
            (&now.fetch, &before.fetch),
            (&now.visits, &before.visits),
            (&now.stores, &before.stores),
            (&now.taken, &before.taken),
            (&now.given, &before.given),
        ] {
            count.set(count.get() - old.get());
        }
        now
    }
}

/// Counts for one thread.
#[derive(Debug)]
pub struct Counted {
    machine: &'static Machine,
    pub counts: Counts,
}

impl Counted {
    pub fn fresh() -> Self {
        Self {
            machine: Machine::fresh(),
            counts: Counts::default(),
        }
    }
}

fn add(count: &Cell<u64>) {
    count.set(count.get() + 1);
}

// SAFETY: everything is the machine's.
unsafe impl TableMemory for Counted {
    fn alloc_table(&self) -> Option<Pa> {
        add(&self.counts.taken);
        self.machine.alloc_table()
    }
    fn free_table(&self, table: DetachedTable) {
        add(&self.counts.given);
        self.machine.free_table(table);
    }
    fn alloc_root(&self, size: u64) -> Option<Pa> {
        self.machine.alloc_root(size)
    }
    fn free_root(&self, root: DetachedTable, size: u64) {
        self.machine.free_root(root, size);
    }
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        self.machine.table_ptr(table)
    }
    fn visited(&self, entries: usize) {
        let visits = &self.counts.visits;
        visits.set(visits.get() + entries as u64);
    }
    fn store(&self, entry: EntryRef<'_>, raw: u64) {
        add(&self.counts.stores);
        self.machine.store(entry, raw);
    }
    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        add(&self.counts.stores);
        self.machine.compare_exchange(entry, old, new)
    }
}

impl TlbInvalidate for Counted {
    type Context = ();
    fn invalidate_range(&self, _context: (), _range: IpaRange, _level: Option<Level>) {
        add(&self.counts.tlb);
    }
    fn invalidate_all(&self, _context: ()) {
        add(&self.counts.tlb);
    }
}

impl CacheMaintenance for Counted {
    fn clean_invalidate_data(&self, _range: PaRange) {
        add(&self.counts.data);
    }
    fn invalidate_fetch(&self, _range: PaRange) {
        add(&self.counts.fetch);
    }
    fn publish(&self) {
        add(&self.counts.publish);
    }
}
