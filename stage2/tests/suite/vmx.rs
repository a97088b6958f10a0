//! EPT with its maintenance over single instructions: the order of INVEPT and cache flushes is
//! checked by the same machine that checks Arm's.

#![expect(unsafe_code, reason = "passes table memory on")]
#![expect(clippy::unwrap_used, reason = "a step that cannot be done fails")]

use std::cell::RefCell;
use std::ptr::NonNull;

use stage2::testing::{Event, FakeMachine};
use stage2::vmx::{Snoop, VmxFacts, VmxMaintenance, VmxOps};
use stage2::{
    AtomicEntry, CacheMaintenance, DetachedTable, EntryRef, IpaRange, Level, Pa, PaRange, RangeOps,
    Stage2, TableMemory, TlbCaps, TlbInvalidate,
};

use crate::formats::ept;
use crate::kit::*;

const POINTER: u64 = 0x7_0000_001e;
const LINE: u64 = 64;

/// Single instructions, done to the machine: INVEPT drops what it caches, a flushed line is
/// cleaned, and nothing is published, as x86 stores need none of that.
struct Cpu<'m> {
    machine: &'m FakeMachine,
    trace: RefCell<Vec<&'static str>>,
}

impl VmxOps for Cpu<'_> {
    fn invept_everywhere(&self, pointer: u64) {
        assert_eq!(pointer, POINTER);
        self.trace.borrow_mut().push("invept");
        CacheMaintenance::publish(self.machine);
        self.machine.invalidate_all(0);
    }
    fn flush_line(&self, line: Pa) {
        assert!(line.is_aligned_to(LINE));
        let line = PaRange::new(line, LINE).unwrap();
        self.machine.clean_invalidate_data(line);
    }
    fn fence(&self) {
        self.trace.borrow_mut().push("mfence");
    }
}

/// The machine's memory with VMX maintenance.
struct Vmx<'m> {
    machine: &'m FakeMachine,
    maintenance: VmxMaintenance<Cpu<'m>>,
}

impl<'m> Vmx<'m> {
    fn new(machine: &'m FakeMachine, snoop: Snoop) -> Self {
        let cpu = Cpu {
            machine,
            trace: RefCell::default(),
        };
        let facts = VmxFacts { line: LINE, snoop };
        Self {
            machine,
            maintenance: VmxMaintenance::new(cpu, facts),
        }
    }

    fn trace(&self) -> Vec<&'static str> {
        self.maintenance.ops().trace.take()
    }
}

// SAFETY: everything is the machine's.
unsafe impl TableMemory for Vmx<'_> {
    fn alloc_table(&self) -> Option<Pa> {
        self.machine.alloc_table()
    }
    fn free_table(&self, table: DetachedTable) {
        self.machine.free_table(table);
    }
    fn alloc_root(&self, size: u64) -> Option<Pa> {
        self.machine.alloc_root(size)
    }
    fn free_root(&self, root: DetachedTable, size: u64) {
        self.machine.free_root(root, size);
    }
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        self.machine.table_ptr(table)
    }
    fn store(&self, entry: EntryRef<'_>, raw: u64) {
        self.machine.store(entry, raw);
        CacheMaintenance::publish(self.machine); // in order, at once
    }
    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        let done = self.machine.compare_exchange(entry, old, new);
        CacheMaintenance::publish(self.machine);
        done
    }
}

impl TlbInvalidate for Vmx<'_> {
    type Context = u64;
    fn invalidate_range(&self, pointer: u64, range: IpaRange, level: Option<Level>) {
        self.maintenance.invalidate_range(pointer, range, level);
    }
    fn invalidate_all(&self, pointer: u64) {
        self.maintenance.invalidate_all(pointer);
    }
    fn caps(&self) -> TlbCaps {
        self.maintenance.caps()
    }
}

impl CacheMaintenance for Vmx<'_> {
    fn clean_invalidate_data(&self, range: PaRange) {
        self.maintenance.clean_invalidate_data(range);
    }
    fn invalidate_fetch(&self, range: PaRange) {
        self.maintenance.invalidate_fetch(range);
        // Fetches see stores: nothing is issued, and nothing stale is left.
        self.machine.invalidate_fetch(range);
    }
    fn publish(&self) {
        self.maintenance.publish();
    }
}

fn run(snoop: Snoop) -> (Vec<Vec<&'static str>>, usize) {
    let shape = ept();
    let machine = FakeMachine::new(shape.arch, 16);
    CacheMaintenance::publish(&machine);
    let vmx = Vmx::new(&machine, snoop);
    let mut space = Stage2::new(shape.format, vmx, POINTER).unwrap();
    CacheMaintenance::publish(&machine);
    machine.attach(space.root());
    let mut traces = Vec::new();
    let flushes = |machine: &FakeMachine| {
        let data = |e: &&Event| matches!(e, Event::Data(_));
        machine.take_events().iter().filter(data).count()
    };
    space.map(&request(0, 2 * PAGE, GIB)).unwrap();
    traces.push(space.platform().trace());
    let flushed = flushes(&machine);
    space.map(&request(0, PAGE, 2 * GIB)).unwrap();
    traces.push(space.platform().trace());
    space.zap(range(0, PAGE)).unwrap();
    traces.push(space.platform().trace());
    space.write_protect(range(PAGE, PAGE)).unwrap();
    traces.push(space.platform().trace());
    space.unmap(range(0, GIB)).unwrap();
    traces.push(space.platform().trace());
    if snoop == Snoop::No {
        assert_clean(&machine);
    }
    (traces, flushed)
}

#[test]
fn a_change_is_one_invept_then_flushes_then_the_new_entry() {
    let (traces, flushed) = run(Snoop::No);
    assert_eq!(flushed, 2 * 4096 / 64);
    let expected: [&[&str]; 5] = [
        &["mfence"],
        &["invept", "mfence", "mfence"],
        &["invept", "mfence"],
        &["invept"],
        &["invept", "mfence"],
    ];
    assert_eq!(traces, expected);
}

#[test]
fn a_cpu_that_snoops_itself_flushes_no_line() {
    let (traces, flushed) = run(Snoop::Itself);
    assert_eq!(flushed, 0);
    assert_eq!(traces[0], ["mfence"]);
    assert_eq!(traces[3], ["invept"]);
}

#[test]
fn a_range_that_is_no_multiple_of_lines_is_flushed_whole() {
    let machine = FakeMachine::new(ept().arch, 4);
    let vmx = Vmx::new(&machine, Snoop::No);
    let odd = PaRange::new(Pa::new(0x1030), 0x50).unwrap();
    vmx.clean_invalidate_data(odd);
    let lines = machine.take_events();
    let line = |at| Event::Data(PaRange::new(Pa::new(at), LINE).unwrap());
    assert_eq!(lines, [line(0x1000), line(0x1040)]);
    assert_eq!(vmx.trace(), ["mfence"]);
    assert_eq!(vmx.caps().range_ops, RangeOps::Offered);
}

#[test]
fn everything_is_invalidated_by_one_invept() {
    let machine = FakeMachine::new(ept().arch, 4);
    let vmx = Vmx::new(&machine, Snoop::Itself);
    vmx.invalidate_all(POINTER);
    assert_eq!(vmx.trace(), ["invept"]);
    assert_eq!(machine.take_events(), [Event::Publish, Event::TlbAll]);
}
