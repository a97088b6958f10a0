//! What the host's stage 2 needs of the machine: tables from EL2's pool, TLB invalidation, and
//! deliberately no cache maintenance.
//!
//! None, because the host's mappings are the identity and its memory types are its own: a leaf
//! that comes or goes changes neither the data's address nor how the host caches it. Pages that
//! change their owner are maintained by whoever moves them.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use el2::features::Features;
use stage2::arm::{ArmTlb, ArmTlbOps};
use stage2::{
    AtomicEntry, CacheMaintenance, DetachedTable, IpaRange, Level, Pa, PaRange, TableMemory,
    TlbCaps, TlbInvalidate,
};

use super::frames::FramePool;
use super::tlb::{self, Tagged, TlbOps};

/// The machine underneath the host's stage 2.
#[derive(Debug)]
pub(crate) struct HostTables {
    pool: &'static FramePool,
    in_use: AtomicU64,
    tlb: ArmTlb<TlbOps>,
}

impl HostTables {
    /// Tables from `pool`, for cores with `features`.
    pub(crate) fn new(pool: &'static FramePool, features: &Features, vtcr: u64) -> Self {
        Self {
            pool,
            in_use: AtomicU64::new(0),
            tlb: tlb::invalidation(features, vtcr),
        }
    }

    /// Makes the host's root known to the TLB instructions.
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
unsafe impl TableMemory for HostTables {
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
        // SAFETY: a table is in EL2's memory, which does not start at address 0.
        unsafe { NonNull::new_unchecked(pointer) }
    }
}

impl TlbInvalidate for HostTables {
    type Context = Tagged;

    fn invalidate_range(&self, context: Tagged, range: IpaRange, level: Option<Level>) {
        self.tlb.invalidate_range(context, range, level);
    }

    fn invalidate_all(&self, context: Tagged) {
        self.tlb.invalidate_all(context);
    }

    fn caps(&self) -> TlbCaps {
        self.tlb.caps()
    }
}

impl CacheMaintenance for HostTables {
    fn clean_invalidate_data(&self, _: PaRange) {}

    fn invalidate_fetch(&self, _: PaRange) {}

    fn publish(&self) {
        self.tlb.ops().dsb_ishst();
    }
}
