//! A machine that costs as little as possible: table memory from a bump allocator, TLB and cache
//! operations that only count.
#![expect(unsafe_code, reason = "a test machine lends memory to page tables")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use memslot::account::LockedMemory;
use memslot::addr::GfnRange;
use memslot::fault::Access;
use memslot::frames::{FrameMissing, FrameRun, FrameSource, PinIntent};
use memslot::slot::Memslot;
use stage2::{
    AtomicEntry, CacheMaintenance, DetachedTable, Gfn, IpaRange, Level, Pa, PaRange, Pfn, RangeOps,
    TableMemory, TlbCaps, TlbInvalidate,
};

const ENTRIES: usize = 512;
const BASE: u64 = 0x10_0000_0000;

/// The machine.
#[derive(Debug)]
pub(crate) struct Lean {
    words: Box<[AtomicEntry]>,
    next: AtomicUsize,
    free: Mutex<Vec<u64>>,
    /// Tables handed out.
    pub(crate) tables: AtomicU64,
    /// TLB operations.
    pub(crate) tlb: AtomicU64,
    /// Data lines cleaned.
    pub(crate) lines: AtomicU64,
}

impl Lean {
    pub(crate) fn new(tables: usize) -> Self {
        Self {
            words: (0..tables * ENTRIES).map(|_| AtomicEntry::new(0)).collect(),
            next: AtomicUsize::new(0),
            free: Mutex::new(Vec::with_capacity(tables)),
            tables: AtomicU64::new(0),
            tlb: AtomicU64::new(0),
            lines: AtomicU64::new(0),
        }
    }

    fn take(&self, count: usize) -> Option<Pa> {
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        (first + count <= self.words.len() / ENTRIES).then(|| Pa::new(BASE + first as u64 * 4096))
    }

    /// Raw word of a table, for an independent walk.
    #[allow(dead_code, reason = "not every benchmark walks")]
    pub(crate) fn word(&self, table: u64, index: usize) -> u64 {
        self.words[(table - BASE) as usize / 8 + index].load(Ordering::Relaxed)
    }
}

// SAFETY: tables are disjoint pages of `words`, never handed out twice without a `free_table`
// between, and `words` lives as long as the machine.
unsafe impl TableMemory for Lean {
    fn alloc_table(&self) -> Option<Pa> {
        self.tables.fetch_add(1, Ordering::Relaxed);
        let free = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        free.map(Pa::new).or_else(|| self.take(1))
    }
    fn free_table(&self, table: DetachedTable) {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(table.pa().get());
    }
    fn alloc_root(&self, size: u64) -> Option<Pa> {
        self.take(size as usize / 4096)
    }
    fn free_root(&self, _root: DetachedTable, _size: u64) {}
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        NonNull::from(&self.words[(table.get() - BASE) as usize / 8..]).cast()
    }
}

impl TlbInvalidate for Lean {
    type Context = u16;
    fn invalidate_range(&self, _context: u16, _range: IpaRange, _level: Option<Level>) {
        self.tlb.fetch_add(1, Ordering::Relaxed);
    }
    fn invalidate_all(&self, _context: u16) {
        self.tlb.fetch_add(1, Ordering::Relaxed);
    }
    fn caps(&self) -> TlbCaps {
        TlbCaps {
            range_ops: RangeOps::Offered,
            whole_beyond: 512,
        }
    }
}

impl CacheMaintenance for Lean {
    fn clean_invalidate_data(&self, range: PaRange) {
        self.lines.fetch_add(range.len() / 64, Ordering::Relaxed);
    }
    fn invalidate_fetch(&self, _range: PaRange) {}
    fn publish(&self) {}
}

/// Contiguous frames behind every slot.
#[allow(dead_code, reason = "not every benchmark locks")]
#[derive(Debug)]
pub(crate) struct Contiguous(pub(crate) LockedMemory);

impl FrameSource for Contiguous {
    fn resolve(&self, slot: &Memslot, gfn: Gfn, _: Access) -> Result<FrameRun, FrameMissing> {
        let pfn = Pfn::try_new(slot.backing).ok_or(FrameMissing(gfn))?;
        Ok(FrameRun {
            range: slot.range,
            pfn,
        })
    }
    fn pin(&self, slot: &Memslot, want: GfnRange, _: PinIntent) -> Result<FrameRun, FrameMissing> {
        self.resolve(slot, want.start(), Access::Read)
    }
    fn unpin(&self, _: &Memslot, _: FrameRun, _: PinIntent) {}
    fn sequence(&self) -> u64 {
        0
    }
    fn account(&self) -> &LockedMemory {
        &self.0
    }
}
