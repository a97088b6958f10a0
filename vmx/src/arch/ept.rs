//! The machine under a VM's page table: frames for tables, INVEPT on every CPU.

use alloc::sync::Arc;
use core::arch::asm;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use stage2::platform::{TlbCaps, TlbInvalidate};
use stage2::vmx::{Snoop, VmxFacts, VmxMaintenance, VmxOps};
use stage2::{
    AtomicEntry, CacheMaintenance, DetachedTable, IpaRange, Level, Offered, Pa, PaRange,
    TableMemory,
};
use vmx::capability::Capabilities;
use vmx::shootdown::Shootdown;

use super::memory::FRAMES;
use super::{cpu, smp};

/// CPUs driven out of guests by invalidations, for the console.
static DRIVEN_OUT: AtomicU64 = AtomicU64::new(0);

/// The single operations that [`VmxMaintenance`] puts in order.
#[derive(Debug)]
struct Ops(Arc<Shootdown>);

impl VmxOps for Ops {
    /// INVEPT itself is executed by each CPU before it next enters.
    fn invept_everywhere(&self, _pointer: u64) {
        let driven = self.0.invalidate(smp::kick, core::hint::spin_loop);
        DRIVEN_OUT.fetch_add(driven.into(), Ordering::Relaxed);
    }

    fn flush_line(&self, line: Pa) {
        // SAFETY: writes back and invalidates one line of mapped memory; no data changes.
        unsafe { asm!("clflush [{}]", in(reg) line.get(), options(nostack, preserves_flags)) };
    }

    fn fence(&self) {
        // SAFETY: orders accesses, nothing else.
        unsafe { asm!("mfence", options(nostack, preserves_flags)) };
    }
}

/// CPUs that have been driven out of guests so far.
pub(crate) fn driven_out() -> u64 {
    DRIVEN_OUT.load(Ordering::Relaxed)
}

/// Platform of one VM's table. The EPT pointer tags translations and contains the root, so the
/// root exists before the table does.
#[derive(Debug)]
pub(crate) struct EptMachine {
    maintenance: VmxMaintenance<Ops>,
    root: Pa,
}

impl EptMachine {
    /// A platform with a root of its own; `None` without memory.
    pub(crate) fn new(capabilities: &Capabilities, shootdown: Arc<Shootdown>) -> Option<Self> {
        let root = FRAMES.alloc(super::FRAME)?;
        let [_, ebx, ..] = cpu::cpuid(1, 0);
        let facts = VmxFacts {
            line: u64::from(ebx >> 8 & 0xff) * 8,
            snoop: match capabilities.self_snoop {
                Offered::Yes => Snoop::Itself,
                Offered::No => Snoop::No,
            },
        };
        Some(Self {
            maintenance: VmxMaintenance::new(Ops(shootdown), facts),
            root,
        })
    }

    /// The root that the table will have.
    pub(crate) const fn root(&self) -> Pa {
        self.root
    }
}

// SAFETY: frames of the pool are handed out once, whole and aligned, mapped one to one for good;
// the default bodies of `store` and `compare_exchange` are kept.
unsafe impl TableMemory for EptMachine {
    fn alloc_table(&self) -> Option<Pa> {
        FRAMES.alloc(super::FRAME)
    }

    fn free_table(&self, table: DetachedTable) {
        // SAFETY: `alloc_table` has given it out, and the core says that nothing reaches it.
        unsafe { FRAMES.free(table.pa(), super::FRAME) };
    }

    /// Asked once, by the table that this is the platform of.
    fn alloc_root(&self, _size: u64) -> Option<Pa> {
        Some(self.root)
    }

    fn free_root(&self, root: DetachedTable, size: u64) {
        // SAFETY: `new` has taken it, and the core says that nothing reaches it.
        unsafe { FRAMES.free(root.pa(), size) };
    }

    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        let pointer = core::ptr::with_exposed_provenance_mut(table.get() as usize);
        NonNull::new(pointer).unwrap_or(NonNull::dangling())
    }
}

impl TlbInvalidate for EptMachine {
    type Context = u64;

    fn invalidate_range(&self, context: u64, range: IpaRange, level: Option<Level>) {
        self.maintenance.invalidate_range(context, range, level);
    }

    fn invalidate_all(&self, context: u64) {
        self.maintenance.invalidate_all(context);
    }

    fn caps(&self) -> TlbCaps {
        self.maintenance.caps()
    }
}

impl CacheMaintenance for EptMachine {
    fn clean_invalidate_data(&self, range: PaRange) {
        self.maintenance.clean_invalidate_data(range);
    }

    fn invalidate_fetch(&self, range: PaRange) {
        self.maintenance.invalidate_fetch(range);
    }

    fn publish(&self) {
        self.maintenance.publish();
    }
}
