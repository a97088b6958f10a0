//! What a stage 2 needs of the machine: tables from a pool, TLB invalidation for its VMID, and for
//! a guest's cache maintenance of its memory. One type for both, so that the page-table code is in
//! the image once.
//!
//! The host's has no cache maintenance, because its mappings are the identity and its memory types
//! are its own: a leaf that comes or goes changes neither the data's address nor how the host
//! caches it. Pages that change their owner are maintained by whoever moves them.

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

/// The machine underneath a stage 2.
#[derive(Debug)]
pub(crate) struct Tables {
    pool: &'static FramePool,
    in_use: AtomicU64,
    tlb: ArmTlb<TlbOps>,
    guest: Option<Upkeep>,
}

/// What only a guest's has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Upkeep {
    /// Cache maintenance only inside it.
    pub(crate) ram: &'static RangeList<MAX_MEMORY>,
    /// Whether the cores need it.
    pub(crate) features: &'static Features,
    /// Where it is counted.
    pub(crate) counters: &'static VmCounters,
}

impl Upkeep {
    /// The range, if it is RAM: devices have no lines to maintain, and EL2 does not map them.
    fn in_ram(&self, range: PaRange) -> Option<board::AddrRange> {
        let (start, end) = (range.start().get(), range.end().get());
        let ram = self.ram.find(start)?;
        board::AddrRange::new(start, end.min(ram.end()))
    }
}

impl Tables {
    /// Tables from `pool`, for cores with `features`; of the host, or of a guest.
    pub(crate) fn new(
        pool: &'static FramePool,
        guest: Option<Upkeep>,
        features: &Features,
        vtcr: u64,
    ) -> Self {
        Self {
            pool,
            in_use: AtomicU64::new(0),
            tlb: tlb::invalidation(features, vtcr),
            guest,
        }
    }

    fn count_zap(&self) {
        if let Some(guest) = &self.guest {
            guest.counters.count(VmCounter::Zaps);
        }
    }

    /// Makes the root known to the TLB instructions.
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
}

// SAFETY: the pool hands out each page once, page-aligned (roots: aligned to their size), mapped
// at its own address for as long as EL2 runs.
unsafe impl TableMemory for Tables {
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
        // SAFETY: a table is in EL2's memory or in donated RAM, which EL2 does not use at address
        // 0: the pool refuses null.
        unsafe { NonNull::new_unchecked(pointer) }
    }
}

impl TlbInvalidate for Tables {
    type Context = Tagged;

    fn invalidate_range(&self, context: Tagged, range: IpaRange, level: Option<Level>) {
        self.count_zap();
        self.tlb.invalidate_range(context, range, level);
    }

    fn invalidate_all(&self, context: Tagged) {
        self.count_zap();
        self.tlb.invalidate_all(context);
    }

    fn caps(&self) -> TlbCaps {
        self.tlb.caps()
    }
}

impl CacheMaintenance for Tables {
    fn clean_invalidate_data(&self, range: PaRange) {
        let Some(guest) = &self.guest else { return };
        let Some(ram) = guest.in_ram(range) else {
            return;
        };
        mem::clean_invalidate_to_poc(ram);
        let lines = ram.size().div_ceil(u64::from(guest.features.dcache_line));
        guest.counters.add(VmCounter::LinesFlushed, lines);
    }

    fn invalidate_fetch(&self, range: PaRange) {
        let Some(guest) = &self.guest else { return };
        let Some(ram) = guest.in_ram(range) else {
            return;
        };
        if !guest.features.idc {
            mem::clean_to_pou(ram);
        }
        if !guest.features.dic {
            mem::invalidate_icache();
        }
    }

    fn publish(&self) {
        self.tlb.ops().dsb_ishst();
    }
}
