//! Table memory for all cases: one arena, a stack of free tables.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, AtomicEntry, CacheMaintenance, DetachedTable, Granule,
    IpaRange, Level, Pa, PaRange, TableMemory, TlbInvalidate,
};

/// Tables in the arena: 1 GiB of pages needs 514.
const TABLES: usize = 1100;
const BYTES: usize = TABLES * 4096;

/// The 4 KiB format that all cases use: 39 input bits, three levels.
pub fn arm() -> ArmStage2 {
    ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: 39,
        output_bits: 44,
        features: ArmFeatures::V8_0,
        start: Some(Level::L1),
    })
    .expect("a known shape")
}

/// Table memory that counts maintenance. There is one, made fresh for each run.
#[derive(Debug)]
pub struct Machine {
    arena: NonNull<u8>,
    next: AtomicUsize,
    free: std::sync::Mutex<Vec<usize>>,
    pub tlb: AtomicU64,
}

// SAFETY: the arena is only handed out in disjoint tables, and never freed.
unsafe impl Sync for Machine {}
// SAFETY: as above.
unsafe impl Send for Machine {}

impl Machine {
    /// The machine with all tables free.
    pub fn fresh() -> &'static Self {
        static ONE: std::sync::OnceLock<Machine> = std::sync::OnceLock::new();
        let machine = ONE.get_or_init(|| {
            let layout = Layout::from_size_align(BYTES, 1 << 21).expect("a valid layout");
            // SAFETY: the size is not zero.
            let arena = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory");
            let free = std::sync::Mutex::new(Vec::with_capacity(TABLES));
            // SAFETY: all of the arena; touched once so that no run pays page faults.
            unsafe { arena.as_ptr().write_bytes(1, BYTES) };
            Self {
                arena,
                next: AtomicUsize::new(0),
                free,
                tlb: AtomicU64::new(0),
            }
        });
        machine.next.store(0, Ordering::Relaxed);
        machine.free.lock().expect("no case panics").clear();
        machine
    }

    /// A table, as an offset into the arena.
    pub fn take(&self) -> usize {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        if next < TABLES {
            return next * 4096;
        }
        self.free
            .lock()
            .expect("no case panics")
            .pop()
            .expect("the arena is large enough")
    }

    pub fn give(&self, offset: usize) {
        self.free.lock().expect("no case panics").push(offset);
    }

    pub fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < BYTES);
        // SAFETY: inside the arena.
        unsafe { self.arena.add(offset) }
    }

    pub fn offset_of(&self, pointer: *const u8) -> usize {
        pointer.addr() - self.arena.as_ptr().addr()
    }

    /// A zeroed table, which is what the peers ask for.
    pub fn take_zeroed(&self) -> usize {
        let offset = self.take();
        // SAFETY: a whole table of the arena that nobody else has.
        unsafe { self.at(offset).as_ptr().write_bytes(0, 4096) };
        offset
    }

    /// `count` zeroed words in a row.
    pub fn zeroed(&self, count: usize) -> &[AtomicU64] {
        let first = self.take_zeroed();
        for _ in 1..count.div_ceil(512) {
            self.take_zeroed();
        }
        // SAFETY: these tables are contiguous and nobody else has them.
        unsafe { std::slice::from_raw_parts(self.at(first).as_ptr().cast(), count) }
    }
}

// SAFETY: tables are disjoint parts of an arena that is never freed.
unsafe impl TableMemory for Machine {
    #[inline]
    fn alloc_table(&self) -> Option<Pa> {
        Some(Pa::new(self.take() as u64))
    }
    #[inline]
    fn free_table(&self, table: DetachedTable) {
        self.give(table.pa().get() as usize);
    }
    fn alloc_root(&self, size: u64) -> Option<Pa> {
        assert_eq!(size, 4096);
        self.alloc_table()
    }
    fn free_root(&self, root: DetachedTable, _size: u64) {
        self.free_table(root);
    }
    #[inline]
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        // SAFETY: an offset that `alloc_table` handed out.
        unsafe { self.arena.add(table.get() as usize).cast() }
    }
}

impl TlbInvalidate for Machine {
    type Context = ();
    #[inline(never)]
    fn invalidate_range(&self, _context: (), _range: IpaRange, _level: Option<Level>) {
        self.tlb.fetch_add(1, Ordering::Relaxed);
    }
    #[inline(never)]
    fn invalidate_all(&self, _context: ()) {
        self.tlb.fetch_add(1, Ordering::Relaxed);
    }
}

impl CacheMaintenance for Machine {
    #[inline(never)]
    fn clean_invalidate_data(&self, range: PaRange) {
        std::hint::black_box(range);
    }
    #[inline(never)]
    fn invalidate_fetch(&self, range: PaRange) {
        std::hint::black_box(range);
    }
    #[inline(never)]
    fn publish(&self) {
        std::hint::black_box(());
    }
}
