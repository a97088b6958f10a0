//! The same on `stage2`'s own tables, whose entries change by compare-and-swap under the shared
//! lock: two entries a table and two levels, small enough to explore.
#![expect(unsafe_code, reason = "a test machine lends memory to page tables")]

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use loom::thread;
use memslot::edge::Dma;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::mtrr::Msr;
use memslot::noncoherent::Edge;
use memslot::policy::{CdQuirk, EptPolicy, MemTypePolicy, VcpuTypes};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::testing::FakeFrames;
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use stage2::format::{TableFormat, WordKind};
use stage2::{
    Age, ArmConfig, ArmFeatures, ArmStage2, AtomicEntry, CacheMaintenance, Combine, DetachedTable,
    EncodeError, Entry, Ept, EptConfig, ForceWriteBack, Geometry, Gfn, Granule, Ipa, IpaRange,
    LeafAttrs, Level, MemType, Offered, Pa, PaRange, Stage2, TableMemory, TlbInvalidate,
};

use crate::{FWB, check};

/// A format with its own shape: four pages, behind a root and two tables.
#[derive(Debug)]
struct Small<F>(F, Geometry);

impl<F> Small<F> {
    fn new(format: Result<F, impl core::fmt::Debug>) -> Self {
        let shape = Geometry::new(12, 1, 14, Level::L2);
        Self(format.unwrap(), shape.unwrap())
    }
}

// SAFETY: everything but the shape is the inner format's, which made the promise.
unsafe impl<F: TableFormat> TableFormat for Small<F> {
    fn geometry(&self) -> &Geometry {
        &self.1
    }
    fn output_bits(&self) -> u32 {
        self.0.output_bits()
    }
    fn supports_leaf(&self, level: Level) -> bool {
        level.is_page()
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

const TABLES: usize = 5;

/// Tables of two words.
struct Memory {
    words: Vec<AtomicEntry>,
    free: Mutex<Vec<u64>>,
}

impl Memory {
    fn new() -> Self {
        Self {
            words: (0..TABLES * 2).map(|_| AtomicEntry::new(0)).collect(),
            free: Mutex::new((0..TABLES as u64).map(|n| n << 12).collect()),
        }
    }

    fn in_use(&self) -> usize {
        TABLES - self.free.lock().unwrap().len()
    }
}

// SAFETY: each table is two words of its own, on the heap for as long as the machine lives.
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
        NonNull::from(&self.words[(table.get() >> 12) as usize * 2..]).cast()
    }
}

impl TlbInvalidate for Memory {
    type Context = ();
    fn invalidate_range(&self, (): (), _range: IpaRange, _level: Option<Level>) {}
    fn invalidate_all(&self, (): ()) {}
}

impl CacheMaintenance for Memory {
    fn clean_invalidate_data(&self, _range: PaRange) {}
    fn invalidate_fetch(&self, _range: PaRange) {}
    fn publish(&self) {}
}

const A: SlotId = SlotId(0);
const FRAME: u64 = 0x8001;

struct Vm<F: TableFormat, P> {
    mem: GuestMemory<Stage2<Small<F>, &'static Memory>, P, FakeFrames>,
    memory: &'static Memory,
}

fn slot(frame: u64) -> Memslot {
    let base = Gfn::try_new(0).unwrap();
    Memslot::new(A, base, 2, frame, SlotFlags::empty(), SlotKind::Ram).unwrap()
}

/// A VM of two pages.
fn vm<F: TableFormat, P: MemTypePolicy>(format: Small<F>, policy: P) -> Arc<Vm<F, P>> {
    let memory: &'static Memory = Box::leak(Box::new(Memory::new()));
    let table = Stage2::new(format, memory, ()).unwrap();
    let config = VmConfig {
        max_slots: 1,
        gfn_limit: 4,
        kind: VmKind::Unprotected,
    };
    let mem = GuestMemory::new(config, policy, FakeFrames::new(2, 0), table);
    mem.create_slot(slot(FRAME)).unwrap();
    Arc::new(Vm { mem, memory })
}

fn arm() -> Small<ArmStage2> {
    Small::new(ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: 32,
        output_bits: 40,
        features: ArmFeatures {
            fwb: ForceWriteBack::On,
            ..ArmFeatures::V8_0
        },
        start: None,
    }))
}

fn x86() -> Arc<Vm<Ept, EptPolicy>> {
    let format = Ept::new(&EptConfig {
        output_bits: 46,
        execute_only: Offered::Yes,
        gigabyte: Offered::Yes,
        access_dirty: Offered::No,
    });
    let policy = EptPolicy::guest_mtrr(CdQuirk::WriteBack);
    let vm = vm(Small::new(format), policy);
    vm.mem.register_device(Dma::NonSnooping).unwrap();
    vm
}

impl<F: TableFormat, P: MemTypePolicy> Vm<F, P> {
    fn fault(&self, page: u64, vcpu: &P::Vcpu) -> FaultOutcome {
        let fault = Stage2Fault {
            ipa: Ipa::new(page << 12),
            access: Access::Write,
            kind: FaultKind::Translation,
        };
        self.mem.handle_fault(&fault, vcpu).unwrap()
    }

    /// Faults until the page is there, as a guest does.
    fn touch(&self, page: u64, vcpu: &P::Vcpu) {
        while self.fault(page, vcpu) == FaultOutcome::Retry {
            thread::yield_now();
        }
    }

    fn leaf(&self, page: u64) -> Option<(Pa, LeafAttrs)> {
        let found = self.mem.with_table(|t| t.lookup(Ipa::new(page << 12)));
        match found.unwrap().entry {
            Entry::Leaf { pa, attrs } => Some((pa, attrs)),
            _ => None,
        }
    }
}

/// A fault that saw the old count never leaves its leaf behind, and no table is lost.
#[test]
fn real_fault_against_count_edge() {
    check(3, || {
        let vm = vm(arm(), FWB);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(0, &()));
        let _ = vm.fault(1, &());
        let edge = vm.mem.register_device(Dma::NonSnooping);
        assert_eq!(edge, Ok(Edge::Started));
        let _ = vcpu.join().unwrap();
        for (_, attrs) in [0, 1].into_iter().filter_map(|page| vm.leaf(page)) {
            let honoured = (MemType::WriteBack, Combine::HonourGuest);
            assert_eq!((attrs.mem, attrs.combine), honoured);
        }
        vm.mem.delete_slot(A).unwrap();
        assert_eq!(vm.memory.in_use(), 1, "only the root is left");
    });
}

/// A fault that saw the old slot never maps its frame after the slot was replaced.
#[test]
fn real_slot_replacement_against_fault() {
    check(3, || {
        let vm = vm(arm(), FWB);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(0, &()));
        vm.mem.delete_slot(A).unwrap();
        vm.mem.create_slot(slot(0x9001)).unwrap();
        let _ = vcpu.join().unwrap();
        if let Some((pa, _)) = vm.leaf(0) {
            assert_eq!(pa, Pa::new(0x9001 << 12));
        }
        vm.mem.delete_slot(A).unwrap();
        assert_eq!(vm.memory.in_use(), 1, "only the root is left");
    });
}

/// One vCPU's register write removes leaves under the shared lock while another, whose registers
/// agree already, faults the same pages in. Whoever comes back from its write finds no leaf of
/// the old type.
#[test]
fn real_register_write_against_faults() {
    check(3, || {
        let vm = x86();
        let mut mine = VcpuTypes::new(40, true);
        let mut others = mine.clone();
        others.mtrrs.write(Msr::DefaultType, 0x804).unwrap();
        vm.touch(0, &mine);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(0, &others));
        vm.mem
            .write_memory_type_msr(&mut mine, Msr::DefaultType, 0x804, || ())
            .unwrap();
        if let Some((_, attrs)) = vm.leaf(0) {
            assert_eq!(attrs.mem, MemType::WriteThrough);
        }
        vm.touch(0, &mine);
        let _ = vcpu.join().unwrap();
        // The other may have come across the old leaf and removed what stands there now.
        if let Some((_, attrs)) = vm.leaf(0) {
            assert_eq!(attrs.mem, MemType::WriteThrough);
        }
    });
}

/// Two vCPUs write their registers at the same time, each with a page of its own.
#[test]
fn real_register_writes_against_each_other() {
    check(3, || {
        let vm = x86();
        let program = |vm: Arc<Vm<Ept, EptPolicy>>, page| {
            move || {
                let mut vcpu = VcpuTypes::new(40, true);
                vm.touch(page, &vcpu);
                vm.mem
                    .write_memory_type_msr(&mut vcpu, Msr::DefaultType, 0x804, || ())
                    .unwrap();
                assert_eq!(vm.leaf(page), None, "a stale leaf of page {page}");
            }
        };
        let other = thread::spawn(program(Arc::clone(&vm), 1));
        program(Arc::clone(&vm), 0)();
        other.join().unwrap();
    });
}
