//! What a guest's stage 2 needs of the machine: tables from the pages that the host donated to the
//! VM, TLB invalidation for its VMID, cache maintenance of its memory.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use abi::VmCounter;
use board::{MAX_MEMORY, RangeList};
use el2::features::Features;
use el2::vm_counters::VmCounters;
use stage2::arm::{ArmTlb, ArmTlbOps};
use stage2::{
    AtomicEntry, CacheMaintenance, DetachedTable, IpaRange, Level, Pa, PaRange, TableMemory,
    TlbCaps, TlbInvalidate,
};

use super::frames::FramePool;
use super::mem;
use super::tlb::{self, Tagged, TlbOps};

/// The machine underneath one guest's stage 2.
#[derive(Debug)]
pub(crate) struct GuestTables {
    pool: &'static FramePool,
    in_use: AtomicU64,
    tlb: ArmTlb<TlbOps>,
    memory: &'static RangeList<MAX_MEMORY>,
    features: &'static Features,
    counters: &'static VmCounters,
}

impl GuestTables {
    /// Tables from `pool`; cache maintenance only inside `memory`, counted in `counters`.
    pub(crate) fn new(
        pool: &'static FramePool,
        counters: &'static VmCounters,
        memory: &'static RangeList<MAX_MEMORY>,
        features: &'static Features,
        vtcr: u64,
    ) -> Self {
        Self {
            pool,
            in_use: AtomicU64::new(0),
            tlb: tlb::invalidation(features, vtcr),
            memory,
            features,
            counters,
        }
    }

    /// Makes the guest's root known to the TLB instructions.
    pub(crate) fn set_root(&self, vttbr: u64) {
        self.tlb.ops().set_root(vttbr);
    }

    /// Pages that are tables now.
    pub(crate) fn in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }

    fn take(&self, size: u64) -> Option<Pa> {
        let pa = self.pool.alloc(size)?;
        self.in_use.fetch_add(size >> 12, Ordering::Relaxed);
        Some(Pa::new(pa))
    }

    fn give(&self, table: &DetachedTable, size: u64) {
        // SAFETY: the core detaches a table only when neither a walk, a TLB nor an importer can
        // reach it, and each was handed out by `take` with this size.
        unsafe { self.pool.free(table.pa().get(), size) };
        self.in_use.fetch_sub(size >> 12, Ordering::Relaxed);
    }

    /// The range, if it is RAM: devices have no lines to maintain, and EL2 does not map them.
    fn ram(&self, range: PaRange) -> Option<board::AddrRange> {
        let (start, end) = (range.start().get(), range.end().get());
        let ram = self.memory.find(start)?;
        board::AddrRange::new(start, end.min(ram.end()))
    }
}

// SAFETY: the pool hands out each page once, page-aligned (roots: aligned to their size), mapped
// at its own address for as long as EL2 runs.
unsafe impl TableMemory for GuestTables {
    fn alloc_table(&self) -> Option<Pa> {
        self.take(board::PAGE_SIZE)
    }

    fn free_table(&self, table: DetachedTable) {
        self.give(&table, board::PAGE_SIZE);
    }

    fn alloc_root(&self, size: u64) -> Option<Pa> {
        self.take(size)
    }

    fn free_root(&self, root: DetachedTable, size: u64) {
        self.give(&root, size);
    }

    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        let pointer = core::ptr::with_exposed_provenance_mut(table.get() as usize);
        // SAFETY: a table is in donated RAM, which EL2 does not use at address 0: `Place` and the
        // pool refuse null.
        unsafe { NonNull::new_unchecked(pointer) }
    }
}

impl TlbInvalidate for GuestTables {
    type Context = Tagged;

    fn invalidate_range(&self, context: Tagged, range: IpaRange, level: Option<Level>) {
        self.counters.count(VmCounter::Zaps);
        self.tlb.invalidate_range(context, range, level);
    }

    fn invalidate_all(&self, context: Tagged) {
        self.counters.count(VmCounter::Zaps);
        self.tlb.invalidate_all(context);
    }

    fn caps(&self) -> TlbCaps {
        self.tlb.caps()
    }
}

impl CacheMaintenance for GuestTables {
    fn clean_invalidate_data(&self, range: PaRange) {
        let Some(ram) = self.ram(range) else { return };
        mem::clean_invalidate_to_poc(ram);
        let lines = ram.size().div_ceil(u64::from(self.features.dcache_line));
        self.counters.add(VmCounter::LinesFlushed, lines);
    }

    fn invalidate_fetch(&self, range: PaRange) {
        let Some(ram) = self.ram(range) else { return };
        if !self.features.idc {
            mem::clean_to_pou(ram);
        }
        if !self.features.dic {
            mem::invalidate_icache();
        }
    }

    fn publish(&self) {
        self.tlb.ops().dsb_ishst();
    }
}
