//! Unmapping and annotating.

use stage2::testing::Event;
use stage2::{Annotation, Entry, Ipa, Level, MapError};

use crate::kit::*;

#[test]
fn unmap_gives_empty_tables_back() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0x8000_0000, 3 * PAGE, 0);
    space.unmap(range(0x8000_0000, PAGE)).unwrap();
    assert_eq!(machine.tables_in_use(), 3);
    space.unmap(range(0x8000_1000, 2 * PAGE)).unwrap();
    assert_eq!(machine.tables_in_use(), 1);
    assert_eq!(mapped(&machine), []);
    assert_clean(&machine);
}

#[test]
fn unmap_of_one_page_keeps_its_neighbours() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 3 * PAGE, 0);
    space.unmap(range(PAGE, PAGE)).unwrap();
    assert_eq!(mapped(&machine), [(0, 3, 0), (2 * PAGE, 3, 2 * PAGE)]);
    assert_clean(&machine);
}

#[test]
fn unmap_cuts_blocks_at_both_ends() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 3 * BLOCK, 0);
    space.unmap(range(BLOCK - PAGE, BLOCK + 2 * PAGE)).unwrap();
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 511 + 511);
    assert_eq!(leaves[510], (510 * PAGE, 3, 510 * PAGE));
    assert_eq!(leaves[511], (2 * BLOCK + PAGE, 3, 2 * BLOCK + PAGE));
    assert_clean(&machine);
}

#[test]
fn unmap_inside_one_gigabyte_block_keeps_the_rest() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, GIB, 0);
    space.unmap(range(7 * BLOCK + PAGE, PAGE)).unwrap();
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 511 + 511);
    assert!(!leaves.iter().any(|(at, _, _)| *at == 7 * BLOCK + PAGE));
    assert_clean(&machine);
}

#[test]
fn unmap_needs_one_invalidation_for_everything() {
    let machine = machine(600);
    let mut space = space(&machine);
    map_pages(&mut space, 0, 4 * BLOCK, 0);
    let _ = machine.take_events();
    space.unmap(range(PAGE, 4 * BLOCK - 2 * PAGE)).unwrap();
    let is_tlb = |e: &&Event| matches!(e, Event::TlbRange(..) | Event::TlbAll);
    assert_eq!(machine.take_events().iter().filter(is_tlb).count(), 1);
    assert_eq!(mapped(&machine).len(), 2);
    assert_clean(&machine);
}

#[test]
fn unmap_of_nothing_does_nothing() {
    let machine = machine(8);
    let mut space = space(&machine);
    let _ = machine.take_events();
    space.unmap(range(0, 1 << 39)).unwrap();
    assert_eq!(machine.take_events(), []);
}

#[test]
fn unmapped_memory_is_handed_out_once_and_clean() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, BLOCK - PAGE, PAGE + BLOCK, 0x4020_0000 - PAGE);
    let mut gone = Vec::new();
    space
        .unmap_with(range(BLOCK - PAGE, 3 * PAGE), &mut |leaf| {
            let frames = leaf.frames();
            assert!(machine.is_clean(frames.start().get(), frames.len()));
            gone.push((leaf.ipa().get(), frames.start().get(), frames.len()));
        })
        .unwrap();
    let expected = [
        (BLOCK - PAGE, 0x401f_f000, PAGE),
        (BLOCK, 0x4020_0000, 2 * PAGE),
    ];
    assert_eq!(gone, expected);
    assert_clean(&machine);
}

#[test]
fn cutting_a_block_without_memory_changes_nothing() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, GIB, 0);
    let before = machine.snapshot();
    machine.allow_allocations(Some(1));
    let error = space.unmap(range(PAGE, PAGE));
    assert_eq!(error, Err(MapError::NoMemory { needed: 2 }));
    assert_eq!(machine.snapshot(), before);
    machine.allow_allocations(Some(2));
    space.unmap(range(PAGE, PAGE)).unwrap();
    assert_clean(&machine);
}

#[test]
fn notes_stand_at_the_coarsest_levels() {
    let machine = machine(8);
    let mut space = space(&machine);
    let note = Annotation::try_new(3).unwrap();
    space
        .annotate(range(BLOCK - PAGE, BLOCK + PAGE), note)
        .unwrap();
    let page = space.lookup(Ipa::new(BLOCK - 1)).unwrap();
    assert_eq!(
        (page.entry, page.level),
        (Entry::Annotated(note), Level::PAGE)
    );
    let block = space.lookup(Ipa::new(BLOCK)).unwrap();
    assert_eq!(
        (block.entry, block.level),
        (Entry::Annotated(note), Level::L2)
    );
    assert_eq!(block.slot, range(BLOCK, BLOCK));
    assert_clean(&machine);
}

#[test]
fn a_note_replaces_leaves_and_frees_their_tables() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, 0, BLOCK, 0);
    map(&mut space, BLOCK, BLOCK, BLOCK);
    let note = Annotation::try_new(9).unwrap();
    space.annotate(range(0, BLOCK + PAGE), note).unwrap();
    assert_eq!(mapped(&machine).len(), 511);
    assert_eq!(space.lookup(Ipa::new(0)).unwrap().slot, range(0, BLOCK));
    assert_eq!(
        space.lookup(Ipa::new(BLOCK)).unwrap().slot,
        range(BLOCK, PAGE)
    );
    assert_clean(&machine);
}

#[test]
fn a_second_note_replaces_part_of_the_first() {
    let machine = machine(8);
    let mut space = space(&machine);
    let (first, second) = (
        Annotation::try_new(1).unwrap(),
        Annotation::try_new(2).unwrap(),
    );
    space.annotate(range(0, BLOCK), first).unwrap();
    space.annotate(range(PAGE, PAGE), second).unwrap();
    let note = |at| space.lookup(Ipa::new(at)).unwrap().entry;
    assert_eq!(note(0), Entry::Annotated(first));
    assert_eq!(note(PAGE), Entry::Annotated(second));
    assert_eq!(note(2 * PAGE), Entry::Annotated(first));
    assert_clean(&machine);
}

#[test]
fn unmap_removes_notes_and_their_tables() {
    let machine = machine(8);
    let mut space = space(&machine);
    space
        .annotate(range(PAGE, PAGE), Annotation::try_new(1).unwrap())
        .unwrap();
    assert_eq!(machine.tables_in_use(), 3);
    space.unmap(range(0, GIB)).unwrap();
    assert_eq!(machine.tables_in_use(), 1);
    assert_clean(&machine);
}

#[test]
fn unmap_inside_a_note_keeps_the_rest_of_it() {
    let machine = machine(8);
    let mut space = space(&machine);
    let note = Annotation::try_new(1).unwrap();
    space.annotate(range(0, BLOCK), note).unwrap();
    space.unmap(range(0, PAGE)).unwrap();
    assert_eq!(space.lookup(Ipa::new(0)).unwrap().entry, Entry::Invalid);
    assert_eq!(
        space.lookup(Ipa::new(PAGE)).unwrap().entry,
        Entry::Annotated(note)
    );
    assert_clean(&machine);
}

#[test]
fn lookup_shows_the_largest_empty_slot() {
    let machine = machine(8);
    let mut space = space(&machine);
    assert_eq!(
        space.lookup(Ipa::new(0x1234_5678)).unwrap().slot,
        range(0, GIB)
    );
    map(&mut space, 0, PAGE, 0);
    let near = space.lookup(Ipa::new(PAGE + 8)).unwrap();
    assert_eq!(
        (near.entry, near.level, near.slot),
        (Entry::Invalid, Level::PAGE, range(PAGE, PAGE))
    );
    assert_eq!(
        space.lookup(Ipa::new(BLOCK)).unwrap().slot,
        range(BLOCK, BLOCK)
    );
    let end = Ipa::new(1 << 39);
    assert!(matches!(space.lookup(end), Err(MapError::OutOfInput(_))));
    assert!(matches!(
        space.lookup(Ipa::new(u64::MAX)),
        Err(MapError::OutOfInput(_))
    ));
}
