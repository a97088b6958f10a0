//! Entries that the core looks at: each on the way to what changes, and each that changes, once.

use stage2::testing::FakeMachine;
use stage2::{FaultRequest, Ipa, LeafAttrs, MapRequest, Pa, Perms};

use crate::kit::*;

/// Two tables full of pages.
fn full(machine: &FakeMachine) -> Space<'_> {
    let mut space = space(machine);
    map_pages(&mut space, 0, 2 * BLOCK, GIB);
    let _ = machine.take_visits();
    space
}

/// The root's entry, two of the table below, and the pages.
const EVERY: usize = 1 + 2 + 1024;

#[test]
fn a_map_into_empty_tables_looks_at_the_entry_that_is_empty() {
    let machine = machine(8);
    let mut space = space(&machine);
    let _ = machine.take_visits();
    map(&mut space, GIB, GIB, GIB);
    assert_eq!(machine.take_visits(), 1);
}

#[test]
fn a_page_beside_another_looks_at_its_own_entry() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, GIB);
    map(&mut space, PAGE, PAGE, GIB + PAGE);
    let _ = machine.take_visits();
    map(&mut space, 2 * PAGE, PAGE, GIB + 2 * PAGE);
    assert_eq!(machine.take_visits(), 1);
}

fn page_fault(at: u64) -> FaultRequest {
    FaultRequest::new(Ipa::new(at), range(at, PAGE), Pa::new(GIB), normal())
}

#[test]
fn a_fault_and_a_look_up_walk_once() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, GIB);
    let _ = machine.take_visits();
    space.fault(&page_fault(PAGE)).unwrap();
    assert_eq!(machine.take_visits(), 3);
}

#[test]
fn a_second_walk_to_a_gigabyte_starts_at_its_table() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, GIB);
    space.lookup(Ipa::new(PAGE)).unwrap();
    let _ = machine.take_visits();
    space.fault(&page_fault(PAGE)).unwrap();
    assert_eq!(machine.take_visits(), 2);
    space.fault(&page_fault(2 * PAGE).on_missing()).unwrap();
    assert_eq!(machine.take_visits(), 2);
    space.lookup(Ipa::new(PAGE)).unwrap();
    assert_eq!(machine.take_visits(), 2);
}

#[test]
fn protecting_and_zapping_look_at_each_entry_once() {
    let machine = machine(8);
    let mut space = full(&machine);
    space.write_protect(range(0, 2 * BLOCK)).unwrap();
    assert_eq!(machine.take_visits(), EVERY);
    space.zap_exclusive(range(0, 2 * BLOCK)).unwrap();
    assert_eq!(machine.take_visits(), EVERY);
}

/// The table that goes is looked through, its empty entries included. One more: the count looks
/// at the root's entry, to see whether tables are needed.
#[test]
fn an_unmap_of_whole_tables_looks_at_each_entry_once() {
    let machine = machine(8);
    let mut space = full(&machine);
    space.unmap(range(0, GIB)).unwrap();
    assert_eq!(machine.take_visits(), EVERY + 510 + 1);
}

/// Besides, the way to the tables is looked at, and their entries counted, before.
#[test]
fn a_map_over_leaves_looks_at_each_once_and_twice_where_they_are_broken() {
    let machine = machine(8);
    let mut space = full(&machine);
    let read = MapRequest {
        attrs: LeafAttrs::normal(Perms::READ),
        ..request(0, BLOCK, GIB)
    };
    space.map(&read.with_blocks(stage2::Blocks::Never)).unwrap();
    let way = machine.take_visits() - 512;
    assert_eq!(way, 4);
    map_pages(&mut space, BLOCK, BLOCK, 2 * GIB);
    assert_eq!(machine.take_visits(), way + 2 * 512);
}

/// Nothing is looked at behind the range, empty or not.
#[test]
fn a_zap_of_part_of_a_table_looks_at_that_part() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, GIB);
    let _ = machine.take_visits();
    space.zap_exclusive(range(4 * PAGE, 4 * PAGE)).unwrap();
    assert_eq!(machine.take_visits(), 2 + 4);
    space.zap(range(4 * PAGE, 4 * PAGE)).unwrap();
    assert_eq!(machine.take_visits(), 2 + 4);
}
