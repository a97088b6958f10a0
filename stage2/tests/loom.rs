//! Interleavings of shared operations, explored by loom:
//! `RUSTFLAGS="--cfg loom" cargo test --release -p ravelin-stage2 --test loom`.
#![cfg(loom)]
#![expect(unsafe_code, reason = "implements the unsafe traits")]
#![expect(clippy::unwrap_used, reason = "a model that cannot be set up fails")]

use std::panic::Location;
use std::ptr::NonNull;
use std::sync::Mutex as Plain;
use std::sync::atomic::AtomicUsize as PlainUsize;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use stage2::format::TableFormat;
use stage2::*;

/// Two entries a table, two or three levels: small enough to explore. Three levels are the
/// shape in which a page takes the short way.
#[derive(Debug)]
struct Tiny(ArmStage2, Geometry);

impl Tiny {
    fn new(start: Level) -> Self {
        let bits = if start == Level::L1 { 15 } else { 14 };
        let config = ArmConfig {
            granule: Granule::K4,
            input_bits: 32,
            output_bits: 40,
            features: ArmFeatures::V8_0,
            start: None,
        };
        Self(
            ArmStage2::new(&config).unwrap(),
            Geometry::new(12, 1, bits, start).unwrap(),
        )
    }
}

// SAFETY: everything but the shape is the Arm format's.
unsafe impl TableFormat for Tiny {
    fn geometry(&self) -> &Geometry {
        &self.1
    }
    fn output_bits(&self) -> u32 {
        self.0.output_bits()
    }
    fn supports_leaf(&self, level: Level) -> bool {
        self.0.supports_leaf(level)
    }
    fn encode_attrs(&self, attrs: &LeafAttrs) -> Result<u64, EncodeError> {
        self.0.encode_attrs(attrs)
    }
    fn leaf_word(&self, attrs: u64, pa: Pa, level: Level) -> u64 {
        self.0.leaf_word(attrs, pa, level)
    }
    fn attrs_word(&self, raw: u64, level: Level) -> u64 {
        self.0.attrs_word(raw, level)
    }
    fn table_word(&self, table: Pa) -> u64 {
        self.0.table_word(table)
    }
    fn kind(&self, raw: u64, level: Level) -> WordKind {
        self.0.kind(raw, level)
    }
    fn plain_table(&self, raw: u64) -> Option<Pa> {
        self.0.plain_table(raw)
    }
    fn plain_outputs(&self) -> u64 {
        self.0.plain_outputs()
    }
    fn plain_page(&self, attrs: u64, pa: Pa) -> u64 {
        self.0.plain_page(attrs, pa)
    }
    fn output(&self, raw: u64, level: Level) -> Pa {
        self.0.output(raw, level)
    }
    fn decode_attrs(&self, raw: u64) -> LeafAttrs {
        self.0.decode_attrs(raw)
    }
    fn address_chunk(&self) -> u64 {
        self.0.address_chunk()
    }
    fn without_write(&self, raw: u64) -> u64 {
        self.0.without_write(raw)
    }
    fn with_age(&self, raw: u64, age: Age) -> Result<u64, EncodeError> {
        self.0.with_age(raw, age)
    }
    fn hardware_bits(&self) -> u64 {
        self.0.hardware_bits()
    }
}

/// As many as two threads take that both build a chain.
const TABLES: usize = 5;

struct Memory {
    words: Vec<AtomicEntry>,
    free: Plain<Vec<u64>>,
    invalidations: AtomicUsize,
    /// Compare-and-swaps on the short way, which are no step of the model.
    short: PlainUsize,
}

impl Memory {
    fn new() -> Self {
        Self {
            words: (0..2 * TABLES).map(|_| AtomicEntry::new(0xbad1)).collect(),
            free: Plain::new((0..TABLES as u64).map(|n| n * 4096).collect()),
            invalidations: AtomicUsize::new(0),
            short: PlainUsize::new(0),
        }
    }
    fn in_use(&self) -> usize {
        TABLES - self.free.lock().unwrap().len()
    }
}

// SAFETY: each table is two words of its own.
unsafe impl TableMemory for Memory {
    fn alloc_table(&self) -> Option<Pa> {
        self.free.lock().unwrap().pop().map(Pa::new)
    }
    fn free_table(&self, table: DetachedTable) {
        self.free.lock().unwrap().push(table.pa().get());
    }
    fn alloc_root(&self, _size: u64) -> Option<Pa> {
        self.alloc_table()
    }
    fn free_root(&self, root: DetachedTable, _size: u64) {
        self.free_table(root);
    }
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        NonNull::from(&self.words[table.get() as usize / 4096 * 2..]).cast()
    }
    #[track_caller]
    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        if Location::caller().file().ends_with("short.rs") {
            self.short.fetch_add(1, Ordering::Relaxed);
        }
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        let swapped = entry.word.compare_exchange(old, new, success, failure);
        swapped.is_ok()
    }
}

impl TlbInvalidate for Memory {
    type Context = ();
    fn invalidate_range(&self, (): (), _range: IpaRange, _level: Option<Level>) {
        self.invalidations.fetch_add(1, Ordering::SeqCst);
    }
    fn invalidate_all(&self, (): ()) {
        self.invalidations.fetch_add(1, Ordering::SeqCst);
    }
}

impl CacheMaintenance for Memory {
    fn clean_invalidate_data(&self, _range: PaRange) {}
    fn invalidate_fetch(&self, _range: PaRange) {}
    fn publish(&self) {}
}

type Space = Stage2<Tiny, &'static Memory>;

fn space() -> (Space, &'static Memory) {
    from_level(Level::L2)
}

fn from_level(start: Level) -> (Space, &'static Memory) {
    let memory: &'static Memory = Box::leak(Box::new(Memory::new()));
    let space = Stage2::new(Tiny::new(start), memory, ()).unwrap();
    (space, memory)
}

/// A space in which a table of pages exists, so that the next fault takes the short way: page 1
/// is mapped.
fn short_space() -> (Space, &'static Memory) {
    let (space, memory) = from_level(Level::L1);
    fault(&space, 1);
    (space, memory)
}

/// Whether this many compare-and-swaps took the short way.
fn took_short_way(memory: &Memory, times: usize) -> bool {
    memory.short.load(Ordering::Relaxed) == times
}

fn window() -> IpaRange {
    IpaRange::new(Ipa::new(0), 0x4000).unwrap()
}

fn fault(space: &Space, page: u64) -> FaultOutcome {
    let attrs = LeafAttrs::normal(Perms::RW);
    let request = FaultRequest::new(Ipa::new(page * 4096), window(), Pa::new(0x10_0000), attrs);
    space.fault(&request.with_blocks(Blocks::Never)).unwrap()
}

fn leaf(space: &Space, page: u64) -> Option<Pa> {
    match space.lookup(Ipa::new(page * 4096)).unwrap().entry {
        Entry::Leaf { pa, .. } => Some(pa),
        _ => None,
    }
}

fn join<T>(handle: thread::JoinHandle<T>) -> T {
    handle.join().unwrap()
}

#[test]
fn two_installs_of_one_page_agree_and_lose_no_table() {
    loom::model(|| {
        let (space, memory) = space();
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let second = thread::spawn(move || fault(&other, 0));
        let outcomes = [fault(&space, 0), join(second)];
        let mapped = |o: &&FaultOutcome| **o == FaultOutcome::Mapped(Level::PAGE);
        assert_eq!(outcomes.iter().filter(mapped).count(), 1);
        assert!(outcomes.contains(&FaultOutcome::AlreadyMapped));
        assert_eq!(memory.in_use(), 2);
    });
}

#[test]
fn installs_of_neighbours_share_one_table() {
    loom::model(|| {
        let (space, memory) = space();
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let second = thread::spawn(move || fault(&other, 1));
        fault(&space, 0);
        join(second);
        assert_eq!(leaf(&space, 0), Some(Pa::new(0x10_0000)));
        assert_eq!(leaf(&space, 1), Some(Pa::new(0x10_1000)));
        assert_eq!(memory.in_use(), 2);
    });
}

#[test]
fn an_install_beside_a_zap_is_there_or_gone_never_broken() {
    loom::model(|| {
        let (space, memory) = space();
        fault(&space, 0);
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let zapper = thread::spawn(move || other.zap(window()).unwrap());
        let outcome = fault(&space, 0);
        join(zapper);
        let entry = space.lookup(Ipa::new(0)).unwrap().entry;
        match outcome {
            FaultOutcome::Mapped(_) => assert!(entry.is_leaf()),
            FaultOutcome::AlreadyMapped | FaultOutcome::Retry => assert_eq!(entry, Entry::Invalid),
            other => panic!("{other:?}"),
        }
        assert_eq!(memory.invalidations.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn two_zaps_leave_nothing_and_each_has_invalidated() {
    loom::model(|| {
        let (space, memory) = space();
        fault(&space, 0);
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let second = thread::spawn(move || other.zap(window()).unwrap());
        space.zap(window()).unwrap();
        assert!(memory.invalidations.load(Ordering::SeqCst) >= 1);
        assert_eq!(leaf(&space, 0), None);
        join(second);
        assert_eq!(space.lookup(Ipa::new(0)).unwrap().entry, Entry::Invalid);
    });
}

struct Device(AtomicUsize);

impl InvalidateListener for Device {
    fn invalidate(&self, _range: IpaRange) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// An importer that registers beside a zap has either been told, or walks and finds no leaf; and
/// once it has left, it is not called, so that the space may go.
#[test]
fn a_zap_beside_an_importer_that_comes_and_goes() {
    loom::model(|| {
        let (mut space, memory) = space();
        fault(&space, 0);
        let root = space.export(0).unwrap();
        let device: &'static Device = Box::leak(Box::new(Device(AtomicUsize::new(0))));
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let zapper = thread::spawn(move || other.zap(window()).unwrap());
        let importer = Importer {
            listener: device,
            must_be_zero: 0,
            output_bits: 48,
            coarsest_leaf: Level::L1,
        };
        space.register(&root, importer).unwrap();
        let cached = leaf(&space, 0).is_some();
        join(zapper);
        assert!(!cached || device.0.load(Ordering::SeqCst) == 1);
        space.unregister(device).unwrap();
        let told = device.0.load(Ordering::SeqCst);
        let mut space = Arc::try_unwrap(space).unwrap();
        assert!(space.unexport(root).is_ok());
        assert!(space.destroy().is_ok());
        assert_eq!(device.0.load(Ordering::SeqCst), told);
        assert_eq!(memory.in_use(), 0);
    });
}

#[test]
fn two_installs_on_the_short_way_agree() {
    loom::model(|| {
        let (space, memory) = short_space();
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let second = thread::spawn(move || fault(&other, 0));
        let mut outcomes = [fault(&space, 0), join(second)];
        outcomes.sort_by_key(|outcome| *outcome == FaultOutcome::AlreadyMapped);
        let expected = [
            FaultOutcome::Mapped(Level::PAGE),
            FaultOutcome::AlreadyMapped,
        ];
        assert_eq!(outcomes, expected);
        assert_eq!(leaf(&space, 0), Some(Pa::new(0x10_0000)));
        assert!(took_short_way(memory, 1) || took_short_way(memory, 2));
    });
}

/// The zap's word is not empty, so the short way leaves it to the long one, which answers.
#[test]
fn an_install_on_the_short_way_beside_a_zap_is_there_or_gone_never_broken() {
    loom::model(|| {
        let (space, memory) = short_space();
        fault(&space, 0);
        assert!(took_short_way(memory, 1));
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let zapper = thread::spawn(move || other.zap(window()).unwrap());
        let outcome = fault(&space, 0);
        join(zapper);
        let entry = space.lookup(Ipa::new(0)).unwrap().entry;
        match outcome {
            FaultOutcome::Mapped(_) => assert!(entry.is_leaf() && took_short_way(memory, 2)),
            FaultOutcome::AlreadyMapped | FaultOutcome::Retry => assert_eq!(entry, Entry::Invalid),
            other => panic!("{other:?}"),
        }
        assert_eq!(memory.invalidations.load(Ordering::SeqCst), 1);
    });
}

/// A leaf that a zap has not seen is of after the zap; one that it has seen is gone.
#[test]
fn an_install_into_an_empty_entry_beside_a_zap_is_there_or_was_zapped() {
    loom::model(|| {
        let (space, memory) = short_space();
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let zapper = thread::spawn(move || other.zap(window()).unwrap());
        let outcome = fault(&space, 0);
        join(zapper);
        assert_eq!(outcome, FaultOutcome::Mapped(Level::PAGE));
        assert!(took_short_way(memory, 1));
        let entry = space.lookup(Ipa::new(0)).unwrap().entry;
        assert!(entry.is_leaf() || entry == Entry::Invalid);
        assert_eq!(leaf(&space, 1), None);
    });
}

#[test]
fn an_install_on_the_short_way_beside_one_that_makes_the_table() {
    loom::model(|| {
        let (space, memory) = from_level(Level::L1);
        let space = Arc::new(space);
        let other = Arc::clone(&space);
        let second = thread::spawn(move || fault(&other, 1));
        let first = fault(&space, 0);
        assert_eq!(
            [first, join(second)],
            [FaultOutcome::Mapped(Level::PAGE); 2]
        );
        assert_eq!(leaf(&space, 0), Some(Pa::new(0x10_0000)));
        assert_eq!(leaf(&space, 1), Some(Pa::new(0x10_1000)));
        assert_eq!(memory.in_use(), 3);
    });
}
