//! Splitting blocks and joining leaves.

use stage2::MapOutcome;
use stage2::testing::Event;
use stage2::{Annotation, Blocks, EncodeError, Ipa, LeafAttrs, Level, MapError, MapRequest, Perms};

use crate::kit::*;

fn invalidations(machine: &stage2::testing::FakeMachine) -> usize {
    let is_tlb = |e: &&Event| matches!(e, Event::TlbRange(..) | Event::TlbAll);
    machine.take_events().iter().filter(is_tlb).count()
}

#[test]
fn a_gigabyte_splits_into_blocks_and_joins_again() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, GIB, GIB, 2 * GIB);
    let before = mapped(&machine);
    let _ = machine.take_events();
    assert_eq!(space.split(range(GIB + PAGE, PAGE), Level::L2), Ok(1));
    assert_eq!(invalidations(&machine), 1);
    let blocks = mapped(&machine);
    assert_eq!(blocks.len(), 512);
    assert_eq!(blocks[511], (2 * GIB - BLOCK, 2, 3 * GIB - BLOCK));
    assert_eq!(space.split(range(GIB, GIB), Level::L2), Ok(0));
    assert_eq!(invalidations(&machine), 0);
    space.collapse(Ipa::new(2 * GIB - 1), Level::L1).unwrap();
    assert_eq!(invalidations(&machine), 1);
    assert_eq!(mapped(&machine), before);
    assert_eq!(machine.tables_in_use(), 1);
    assert_clean(&machine);
}

#[test]
fn a_split_takes_every_block_that_the_range_touches_and_no_other() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 4 * BLOCK, GIB);
    let _ = machine.take_events();
    let middle = range(BLOCK + PAGE, BLOCK);
    assert_eq!(space.split(middle, Level::PAGE), Ok(2));
    assert_eq!(invalidations(&machine), 1);
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 2 + 2 * 512);
    assert_eq!(
        (leaves[0], leaves[1025]),
        ((0, 2, GIB), (3 * BLOCK, 2, GIB + 3 * BLOCK))
    );
    assert_clean(&machine);
}

#[test]
fn a_gigabyte_splits_to_pages_through_two_levels() {
    let machine = machine(600);
    let mut space = space(&machine);
    map(&mut space, 0, GIB, 0);
    assert_eq!(space.split(range(0, PAGE), Level::PAGE), Ok(1));
    assert_eq!(machine.tables_in_use(), 1 + 1 + 512);
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 512 * 512);
    assert_eq!(leaves[513], (513 * PAGE, 3, 513 * PAGE));
    space.collapse(Ipa::new(0), Level::L1).unwrap();
    assert_eq!(mapped(&machine), [(0, 1, 0)]);
    assert_eq!(machine.tables_in_use(), 1);
    assert_clean(&machine);
}

#[test]
fn leaves_that_differ_do_not_join() {
    let not_uniform = |change: fn(&mut Space<'_>)| {
        let machine = machine(8);
        let mut space = space(&machine);
        map_pages(&mut space, 0, BLOCK, GIB);
        change(&mut space);
        let before = machine.snapshot();
        let at = Ipa::new(7 * PAGE);
        let refused = space.collapse(at, Level::L2);
        assert_eq!(refused, Err(MapError::NotUniform(at)));
        assert_eq!(machine.snapshot(), before);
        assert_clean(&machine);
    };
    not_uniform(|space| space.unmap(range(3 * PAGE, PAGE)).unwrap());
    not_uniform(|space| space.unmap(range(0, PAGE)).unwrap());
    not_uniform(|space| space.unmap(range(0, BLOCK)).unwrap());
    not_uniform(|space| assert_eq!(space.write_protect(range(511 * PAGE, PAGE)), Ok(1)));
    not_uniform(|space| assert_eq!(map(space, 3 * PAGE, PAGE, 2 * GIB), MapOutcome::Mapped));
    not_uniform(|space| {
        let outcome = map_pages(space, 0, BLOCK, 2 * GIB + PAGE);
        assert_eq!(outcome, MapOutcome::Mapped);
    });
    not_uniform(|space| {
        let note = Annotation::try_new(1).unwrap();
        space.annotate(range(5 * PAGE, PAGE), note).unwrap();
    });
}

#[test]
fn a_block_that_is_there_is_joined_already() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, GIB, 0);
    let _ = machine.take_events();
    assert_eq!(space.collapse(Ipa::new(0), Level::L2), Ok(()));
    assert_eq!(space.collapse(Ipa::new(0), Level::L1), Ok(()));
    assert_eq!(machine.take_events(), []);
}

#[test]
fn levels_without_leaves_and_addresses_outside_are_refused() {
    let machine = machine(8);
    let mut space = space(&machine);
    let no_leaf = Err(MapError::Encode(EncodeError::NoLeafAt(Level::L0)));
    assert_eq!(space.split(range(0, PAGE), Level::L0).map(drop), no_leaf);
    assert_eq!(space.collapse(Ipa::new(0), Level::L0), no_leaf);
    let end = 1 << 39;
    let outside = Err(MapError::OutOfInput(range(end, PAGE)));
    assert_eq!(space.collapse(Ipa::new(end + 5), Level::L2), outside);
    assert_eq!(
        space.split(range(end, PAGE), Level::PAGE).map(drop),
        outside
    );
    let odd = range(8, PAGE);
    assert_eq!(space.split(odd, Level::PAGE), Err(MapError::Unaligned(8)));
}

#[test]
fn a_split_keeps_what_leaves_say() {
    let machine = machine(8);
    let mut space = space(&machine);
    let device = LeafAttrs::device(Perms::READ);
    let block = MapRequest {
        attrs: device,
        ..request(0, BLOCK, GIB)
    };
    space.map(&block.with_blocks(Blocks::Largest)).unwrap();
    space.split(range(0, BLOCK), Level::PAGE).unwrap();
    let found = space.lookup(Ipa::new(BLOCK - 1)).unwrap().entry;
    let pa = stage2::Pa::new(GIB + BLOCK - PAGE);
    assert_eq!(found, stage2::Entry::Leaf { pa, attrs: device });
}
