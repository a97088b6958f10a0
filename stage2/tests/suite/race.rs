//! Faults that lose the entry they want to another CPU, at the last moment.

#![expect(unsafe_code, reason = "passes table memory on")]
#![expect(clippy::unwrap_used, reason = "a step that cannot be done fails")]

use std::cell::Cell;
use std::ptr::NonNull;

use stage2::testing::FakeMachine;
use stage2::{
    Annotation, AtomicEntry, Blocks, CacheMaintenance, DetachedTable, Entry, EntryRef,
    FaultOutcome, FaultRequest, ForceWriteBack, Ipa, IpaRange, LeafAttrs, Level, Pa, PaRange,
    Perms, Stage2, TableFormat, TableMemory, TlbInvalidate,
};

use crate::kit::*;

/// A machine on which somebody else writes a word into the entry of the next swap, just before.
struct Contended<'m> {
    machine: &'m FakeMachine,
    rival: Cell<Option<u64>>,
}

// SAFETY: everything is the machine's.
unsafe impl TableMemory for Contended<'_> {
    fn alloc_table(&self) -> Option<Pa> {
        TableMemory::alloc_table(self.machine)
    }
    fn free_table(&self, table: DetachedTable) {
        TableMemory::free_table(self.machine, table);
    }
    fn alloc_root(&self, size: u64) -> Option<Pa> {
        TableMemory::alloc_root(self.machine, size)
    }
    fn free_root(&self, root: DetachedTable, size: u64) {
        TableMemory::free_root(self.machine, root, size);
    }
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        TableMemory::table_ptr(self.machine, table)
    }
    fn store(&self, entry: EntryRef<'_>, raw: u64) {
        TableMemory::store(self.machine, entry, raw);
    }
    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        if let Some(word) = self.rival.take() {
            TableMemory::store(self.machine, entry, word);
        }
        TableMemory::compare_exchange(self.machine, entry, old, new)
    }
}

impl TlbInvalidate for Contended<'_> {
    type Context = <FakeMachine as TlbInvalidate>::Context;
    fn invalidate_range(&self, context: Self::Context, range: IpaRange, level: Option<Level>) {
        self.machine.invalidate_range(context, range, level);
    }
    fn invalidate_all(&self, context: Self::Context) {
        self.machine.invalidate_all(context);
    }
}

impl CacheMaintenance for Contended<'_> {
    fn clean_invalidate_data(&self, range: PaRange) {
        self.machine.clean_invalidate_data(range);
    }
    fn invalidate_fetch(&self, range: PaRange) {
        self.machine.invalidate_fetch(range);
    }
    fn publish(&self) {
        CacheMaintenance::publish(self.machine);
    }
}

fn page(ipa: u64) -> FaultRequest {
    FaultRequest::new(Ipa::new(ipa), range(0, GIB), Pa::new(GIB), normal())
        .with_blocks(Blocks::Never)
}

/// Some pages are mapped; then the entry of a fault gets a note before the fault's own word.
fn lose(machine: &FakeMachine, before: &[u64], ipa: u64) {
    let note = Annotation::try_new(6).unwrap();
    let format = arm(ForceWriteBack::Off);
    let word = format.encode(&Entry::Annotated(note), Level::PAGE).unwrap();
    let contended = Contended {
        machine,
        rival: Cell::new(None),
    };
    let space = Stage2::new(format, contended, 5).unwrap();
    machine.attach(space.root());
    for ipa in before {
        space.fault(&page(*ipa)).unwrap();
    }
    let tables = machine.tables_in_use();
    space.platform().rival.set(Some(word));
    let outcome = space.fault(&page(ipa));
    assert_eq!(outcome, Ok(FaultOutcome::Annotated(note)));
    assert_eq!(
        machine.tables_in_use(),
        tables,
        "a chain was not given back"
    );
    assert_clean(machine);
}

#[test]
fn a_fault_that_loses_gives_its_tables_back_and_looks_again() {
    lose(&machine(8), &[], 0);
    lose(&machine(8), &[0], BLOCK);
}

#[test]
fn a_fault_that_loses_on_the_short_way_looks_again() {
    lose(&machine(8), &[0], PAGE);
}

/// A leaf is broken by a zap between the look at it and the swap of its permissions.
#[test]
fn permissions_of_a_leaf_that_is_being_zapped_are_tried_again() {
    const BROKEN_BY_THE_FIRST_CLAIM: u64 = 1 << 60 | 1 << 4;
    let machine = machine(8);
    let contended = Contended {
        machine: &machine,
        rival: Cell::new(None),
    };
    let space = Stage2::new(arm(ForceWriteBack::Off), contended, 5).unwrap();
    machine.attach(space.root());
    let read = FaultRequest {
        attrs: LeafAttrs::normal(Perms::READ),
        ..page(0)
    };
    space.fault(&read).unwrap();
    space
        .platform()
        .rival
        .set(Some(BROKEN_BY_THE_FIRST_CLAIM | GIB));
    let relaxed = space.relax_perms(Ipa::new(0), Perms::WRITE);
    assert_eq!(relaxed, Ok(FaultOutcome::Retry));
    assert_eq!(mapped(&machine), []);
}
