//! Table memory for all cases: one arena, a stack of free tables.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, AtomicEntry, CacheMaintenance, DetachedTable, Granule,
    IpaRange, Level, Pa, PaRange, TableMemory, TlbInvalidate,
};

mod counted;

pub use counted::{Counted, Counts};

/// Threads that take tables, each from a part of the arena of its own, as vCPUs take them from
/// caches of their own.
const THREADS: usize = 2;
/// Tables in each part: 1 GiB of pages needs 514.
const TABLES: usize = 550;
const PART: usize = TABLES * 4096;
const BYTES: usize = THREADS * PART;

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

/// What one thread has taken, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Taken(AtomicUsize);

thread_local! {
    static PART_OF_THREAD: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// From here on this thread takes its tables from that part.
pub fn take_from_part(part: usize) {
    PART_OF_THREAD.with(|mine| mine.set(part % THREADS));
}

/// Table memory that does nothing for maintenance. There are two, made fresh for each run.
#[derive(Debug)]
pub struct Machine {
    arena: NonNull<u8>,
    taken: [Taken; THREADS],
    free: std::sync::Mutex<Vec<usize>>,
}

// SAFETY: the arena is only handed out in disjoint tables, and never freed.
unsafe impl Sync for Machine {}
// SAFETY: as above.
unsafe impl Send for Machine {}

impl Machine {
    fn new() -> Self {
        let layout = Layout::from_size_align(BYTES, 1 << 21).expect("a valid layout");
        // SAFETY: the size is not zero.
        let arena = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory");
        // SAFETY: all of the arena; touched once so that no run pays page faults.
        unsafe { arena.as_ptr().write_bytes(1, BYTES) };
        Self {
            arena,
            taken: Default::default(),
            free: std::sync::Mutex::new(Vec::with_capacity(THREADS * TABLES)),
        }
    }

    /// The machine with all tables free.
    pub fn fresh() -> &'static Self {
        Self::fresh_pair()[0]
    }

    /// Both machines with all tables free.
    pub fn fresh_pair() -> [&'static Self; 2] {
        static BOTH: std::sync::OnceLock<[Machine; 2]> = std::sync::OnceLock::new();
        let machines = BOTH.get_or_init(|| [Self::new(), Self::new()]).each_ref();
        for machine in machines {
            machine
                .taken
                .iter()
                .for_each(|taken| taken.0.store(0, Ordering::Relaxed));
            machine.free.lock().expect("no case panics").clear();
        }
        machines
    }

    /// A table, as an offset into the arena.
    pub fn take(&self) -> usize {
        let part = PART_OF_THREAD.with(std::cell::Cell::get);
        let next = self.taken[part].0.fetch_add(1, Ordering::Relaxed);
        if next < TABLES {
            return part * PART + next * 4096;
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
    fn invalidate_range(&self, _context: (), range: IpaRange, _level: Option<Level>) {
        std::hint::black_box(range);
    }
    #[inline(never)]
    fn invalidate_all(&self, _context: ()) {
        std::hint::black_box(());
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
