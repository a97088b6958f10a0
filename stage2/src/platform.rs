//! What the core asks of the machine: table memory, TLB invalidation, cache maintenance.
//!
//! The traits take `&self` and the TLB trait a context, so that a test can stand in for the
//! machine and see which operation was asked, in which order, for whom. Their methods are
//! `#[track_caller]`: a test can tell the call sites in the core apart, take one away or delay
//! it, and must then fail. On a real machine the methods inline and the location vanishes.

use core::ptr::NonNull;

use crate::addr::{IpaRange, Pa, PaRange};
use crate::level::Level;
use crate::sync::{AtomicEntry, Ordering};

/// A table that nothing reaches any more: not the hardware (invalidated), not an importer
/// (told), not a walk of ours (exclusive access, or never linked). Only the core makes one.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "dropping it leaks the table"]
pub struct DetachedTable {
    pa: Pa,
}

impl DetachedTable {
    pub(crate) const fn new(pa: Pa) -> Self {
        Self { pa }
    }

    /// Where the table is.
    #[must_use]
    pub const fn pa(&self) -> Pa {
        self.pa
    }
}

/// One entry about to be written.
#[derive(Clone, Copy, Debug)]
pub struct EntryRef<'a> {
    /// The table's address.
    pub table: Pa,
    /// The entry's index in it.
    pub index: usize,
    /// The entry.
    pub word: &'a AtomicEntry,
}

/// Where tables live.
///
/// # Safety
/// * `alloc_table` and `alloc_root` hand out memory that nobody else uses, of the size asked
///   for and aligned to it, that stays valid until it is given back through `free_table` or
///   `free_root`. Its contents do not matter: the core initialises it.
/// * `table_ptr` gives, for every address inside memory handed out, a pointer that is valid for
///   atomic reads and writes of the whole table, the same memory at every call.
/// * `store` and `compare_exchange` have the effect of their default bodies.
#[expect(
    unsafe_code,
    reason = "the core dereferences what an implementor hands out"
)]
pub unsafe trait TableMemory {
    /// A table of one page (4, 16 or 64 KiB, the format's granule).
    fn alloc_table(&self) -> Option<Pa>;

    /// Takes a table back.
    fn free_table(&self, table: DetachedTable);

    /// A root of `size` bytes, a power of two of at least a page and at most 16.
    fn alloc_root(&self, size: u64) -> Option<Pa>;

    /// Takes a root of `size` bytes back.
    fn free_root(&self, root: DetachedTable, size: u64);

    /// The table at `table`, an address that `alloc_table` or `alloc_root` returned.
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry>;

    /// So many entries are looked at. For who counts them; does nothing.
    #[inline]
    fn visited(&self, entries: usize) {
        let _ = entries;
    }

    /// Writes an entry that the hardware may be reading.
    #[inline]
    #[track_caller]
    fn store(&self, entry: EntryRef<'_>, raw: u64) {
        entry.word.store(raw, Ordering::Release);
    }

    /// Replaces `old` by `new` if it is still there; says whether it was.
    #[inline]
    #[track_caller]
    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        entry
            .word
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

/// What the machine's TLB can do, measured or read from its identification registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbCaps {
    /// Whether a range costs about as much as a page (FEAT_TLBIRANGE).
    pub range_ops: RangeOps,
    /// Entries beyond which invalidating everything of the context is cheaper.
    pub whole_beyond: u64,
}

/// Whether the TLB takes ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeOps {
    /// Ranges in one or few operations.
    Offered,
    /// One operation for each entry.
    Missing,
}

/// Invalidation of cached translations.
pub trait TlbInvalidate {
    /// Whose translations: a VMID with its table on Arm, an EPT pointer on x86.
    type Context: Copy;

    /// Removes every translation of `range` and every cached step of a walk to it, stage 1
    /// results included, on every CPU, and completes before it returns. The core has published
    /// its stores. May remove more, never less. With a level, only leaves of that level changed.
    #[track_caller]
    fn invalidate_range(&self, context: Self::Context, range: IpaRange, level: Option<Level>);

    /// The same for everything of the context.
    #[track_caller]
    fn invalidate_all(&self, context: Self::Context);

    /// What it can do.
    #[inline]
    fn caps(&self) -> TlbCaps {
        TlbCaps {
            range_ops: RangeOps::Missing,
            whole_beyond: 512,
        }
    }
}

/// Cache maintenance, and the barrier between table stores and the walker.
pub trait CacheMaintenance {
    /// Cleans and invalidates every data-cache line of the range to the point of coherency, and
    /// completes before it returns. Clean *and* invalidate: the lines may be dirty. To the point
    /// of *coherency*: that is where a guest with its caches off, and a device, read.
    #[track_caller]
    fn clean_invalidate_data(&self, range: PaRange);

    /// Makes the range fit to be executed after data was written to it, and completes before it
    /// returns: instruction caches invalidated, data cleaned to the point of unification where
    /// the machine asks for it.
    #[track_caller]
    fn invalidate_fetch(&self, range: PaRange);

    /// Makes earlier table stores visible to the hardware walker (Arm: `dsb ishst`, Arm ARM
    /// D8.2.6; x86: nothing, stores are ordered).
    #[track_caller]
    fn publish(&self);
}

/// Everything the core asks of a machine.
pub trait Platform: TableMemory + TlbInvalidate + CacheMaintenance {}

impl<T: TableMemory + TlbInvalidate + CacheMaintenance> Platform for T {}

// SAFETY: every method is passed on to an implementor that made the promise.
#[expect(unsafe_code, reason = "see above")]
unsafe impl<T: TableMemory> TableMemory for &T {
    #[inline]
    fn alloc_table(&self) -> Option<Pa> {
        T::alloc_table(self)
    }
    #[inline]
    fn free_table(&self, table: DetachedTable) {
        T::free_table(self, table);
    }
    #[inline]
    fn alloc_root(&self, size: u64) -> Option<Pa> {
        T::alloc_root(self, size)
    }
    #[inline]
    fn free_root(&self, root: DetachedTable, size: u64) {
        T::free_root(self, root, size);
    }
    #[inline]
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        T::table_ptr(self, table)
    }
    #[inline]
    fn visited(&self, entries: usize) {
        T::visited(self, entries);
    }
    #[inline]
    #[track_caller]
    fn store(&self, entry: EntryRef<'_>, raw: u64) {
        T::store(self, entry, raw);
    }
    #[inline]
    #[track_caller]
    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        T::compare_exchange(self, entry, old, new)
    }
}

impl<T: TlbInvalidate> TlbInvalidate for &T {
    type Context = T::Context;
    #[inline]
    #[track_caller]
    fn invalidate_range(&self, context: Self::Context, range: IpaRange, level: Option<Level>) {
        T::invalidate_range(self, context, range, level);
    }
    #[inline]
    #[track_caller]
    fn invalidate_all(&self, context: Self::Context) {
        T::invalidate_all(self, context);
    }
    #[inline]
    fn caps(&self) -> TlbCaps {
        T::caps(self)
    }
}

impl<T: CacheMaintenance> CacheMaintenance for &T {
    #[inline]
    #[track_caller]
    fn clean_invalidate_data(&self, range: PaRange) {
        T::clean_invalidate_data(self, range);
    }
    #[inline]
    #[track_caller]
    fn invalidate_fetch(&self, range: PaRange) {
        T::invalidate_fetch(self, range);
    }
    #[inline]
    #[track_caller]
    fn publish(&self) {
        T::publish(self);
    }
}
