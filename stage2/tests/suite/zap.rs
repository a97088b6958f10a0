//! Zapping.

use stage2::testing::Event;
use stage2::{Annotation, Entry, Ipa};

use crate::kit::*;

#[test]
fn a_zap_takes_leaves_and_keeps_tables_and_notes() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 2 * PAGE, 0);
    let note = Annotation::try_new(4).unwrap();
    space.annotate(range(2 * PAGE, PAGE), note).unwrap();
    space.zap(range(0, BLOCK)).unwrap();
    assert_eq!(mapped(&machine), []);
    assert_eq!(machine.tables_in_use(), 3);
    assert_eq!(
        space.lookup(Ipa::new(2 * PAGE)).unwrap().entry,
        Entry::Annotated(note)
    );
    assert_eq!(space.lookup(Ipa::new(0)).unwrap().entry, Entry::Invalid);
    assert_clean(&machine);
}

#[test]
fn a_zap_takes_a_whole_block_for_a_part_of_it() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 2 * BLOCK, 0);
    space.zap(range(PAGE, PAGE)).unwrap();
    assert_eq!(mapped(&machine), [(BLOCK, 2, BLOCK)]);
    assert_clean(&machine);
}

#[test]
fn a_zap_of_everything_needs_one_invalidation() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, BLOCK + 5 * PAGE, 0);
    map(&mut space, 5 * GIB, PAGE, 0x100_0000);
    let _ = machine.take_events();
    space.zap_all();
    let is_tlb = |e: &&Event| matches!(e, Event::TlbRange(..) | Event::TlbAll);
    assert_eq!(machine.take_events().iter().filter(is_tlb).count(), 1);
    assert_eq!(mapped(&machine), []);
    assert_clean(&machine);
}

#[test]
fn an_exclusive_zap_keeps_to_its_range() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 3 * PAGE, 0);
    space.zap_exclusive(range(PAGE, PAGE)).unwrap();
    assert_eq!(mapped(&machine), [(0, 3, 0), (2 * PAGE, 3, 2 * PAGE)]);
    assert_clean(&machine);
}

#[test]
fn a_zap_of_nothing_does_nothing() {
    let machine = machine(8);
    let space = space(&machine);
    let _ = machine.take_events();
    space.zap(range(0, 1 << 39)).unwrap();
    assert_eq!(machine.take_events(), []);
}
