//! Tables that walks remember: never one that has left, and the same answers as a whole walk.

use stage2::testing::{Arch, FakeMachine};
use stage2::{
    Annotation, ArmConfig, ArmFeatures, ArmStage2, Blocks, Entry, FaultOutcome, FaultRequest,
    Granule, Ipa, Level, MapError, Pa, Stage2,
};

use crate::kit::*;

/// A page on its own, after whose table the walk has been.
fn page_and_neighbour(space: &mut Space<'_>, at: u64) {
    map(space, at, PAGE, 0x10_0000);
    map(space, at + PAGE, PAGE, 0x20_0000);
}

fn page_fault(at: u64, pa: u64) -> FaultRequest {
    FaultRequest::new(Ipa::new(at), range(at, PAGE), Pa::new(pa), normal())
}

#[test]
fn a_look_up_does_not_see_the_table_that_another_gigabyte_has_now() {
    let machine = machine(3);
    let mut space = space(&machine);
    page_and_neighbour(&mut space, 0);
    space.unmap(range(0, GIB)).unwrap();
    page_and_neighbour(&mut space, 2 * GIB);
    let found = space.lookup(Ipa::new(PAGE)).unwrap();
    assert_eq!((found.entry, found.level), (Entry::Invalid, Level::L1));
    assert_clean(&machine);
}

#[test]
fn a_fault_does_not_go_into_the_table_that_another_gigabyte_has_now() {
    let machine = machine(3);
    let mut space = space(&machine);
    page_and_neighbour(&mut space, 0);
    space.unmap(range(0, GIB)).unwrap();
    page_and_neighbour(&mut space, 2 * GIB);
    let fault = page_fault(5 * PAGE, 0x30_0000).on_missing();
    assert_eq!(space.fault(&fault), Err(MapError::NoMemory { needed: 2 }));
    assert_eq!(mapped(&machine).len(), 2);
    assert_clean(&machine);
}

#[test]
fn a_block_does_not_go_into_the_table_that_another_gigabyte_has_now() {
    let machine = machine(3);
    let mut space = space(&machine);
    page_and_neighbour(&mut space, 0);
    space.unmap(range(0, GIB)).unwrap();
    page_and_neighbour(&mut space, 2 * GIB);
    let block = space.map(&request(4 * BLOCK, BLOCK, GIB));
    assert_eq!(block, Err(MapError::NoMemory { needed: 1 }));
    assert_eq!(mapped(&machine).len(), 2);
    assert_clean(&machine);
}

#[test]
fn a_look_up_sees_the_gigabyte_that_replaced_its_table() {
    let machine = machine(8);
    let mut space = space(&machine);
    page_and_neighbour(&mut space, GIB);
    map(&mut space, GIB, GIB, 4 * GIB);
    let found = space.lookup(Ipa::new(GIB + PAGE)).unwrap();
    assert_eq!(found.level, Level::L1);
    assert!(matches!(found.entry, Entry::Leaf { pa, .. } if pa == Pa::new(4 * GIB)));
    assert_clean(&machine);
}

#[test]
fn a_look_up_sees_the_block_that_its_pages_collapsed_into() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, GIB, BLOCK, 4 * GIB);
    assert_eq!(space.lookup(Ipa::new(GIB)).unwrap().level, Level::PAGE);
    space.collapse(Ipa::new(GIB), Level::L2).unwrap();
    assert_eq!(space.lookup(Ipa::new(GIB)).unwrap().level, Level::L2);
    let fault = page_fault(GIB + PAGE, 4 * GIB + PAGE).on_missing();
    assert_eq!(space.fault(&fault), Ok(FaultOutcome::AlreadyMapped));
    assert_clean(&machine);
}

/// More gigabytes than there are places: each is walked to or remembered, and all are told apart.
#[test]
fn twenty_gigabytes_keep_their_pages_apart() {
    let machine = machine(64);
    let mut space = space(&machine);
    for n in 0..20 {
        map(&mut space, n * GIB, PAGE, n << 30 | 0x1000);
    }
    for page in 1..4 {
        for n in 0..20 {
            let at = n * GIB + page * PAGE;
            let fault = page_fault(at, (n << 30) + 0x1000 + page * PAGE).on_missing();
            assert_eq!(space.fault(&fault), Ok(FaultOutcome::Mapped(Level::PAGE)));
        }
    }
    let expected = (0..20).flat_map(|n| {
        (0..4).map(move |page| (n * GIB + page * PAGE, 3, (n << 30) + 0x1000 + page * PAGE))
    });
    assert_eq!(mapped(&machine), expected.collect::<Vec<_>>());
    assert_clean(&machine);
}

/// Gigabytes whose numbers agree in all bits that a place has room for.
#[test]
fn gigabytes_far_apart_are_told_apart() {
    const FAR: u64 = 0x1000 * GIB;
    let machine = FakeMachine::new(
        Arch {
            xnx: false,
            ..Arch::arm_4k(0, 48, false)
        },
        64,
    );
    let format = ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: 48,
        output_bits: 48,
        features: ArmFeatures::V8_0,
        start: Some(Level::L0),
    })
    .unwrap();
    let mut space = Stage2::new(format, &machine, 1).unwrap();
    machine.attach(space.root());
    let places = [0, FAR, 2 * FAR, FAR + 8 * GIB, 8 * GIB];
    for page in 0..3 {
        for at in places {
            let page = at + page * PAGE;
            space.map(&request(page, PAGE, page)).unwrap();
            assert_eq!(space.lookup(Ipa::new(page)).unwrap().level, Level::PAGE);
        }
    }
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 15);
    assert!(leaves.iter().all(|(at, level, pa)| at == pa && *level == 3));
    assert_clean(&machine);
}

/// Whatever stands there, what the hardware met is a hint: the answer does not hang on it.
#[test]
fn a_fault_on_what_is_there_after_all_is_answered_as_without_the_hint() {
    let machine = machine(8);
    let mut space = space(&machine);
    page_and_neighbour(&mut space, 0);
    let note = Annotation::try_new(9).unwrap();
    space.annotate(range(2 * PAGE, PAGE), note).unwrap();
    let before = machine.leaves();
    let answer = |at, pa| space.fault(&page_fault(at, pa).on_missing());
    assert_eq!(answer(PAGE, 0x20_0000), Ok(FaultOutcome::AlreadyMapped));
    assert_eq!(
        answer(2 * PAGE, 0x30_0000),
        Ok(FaultOutcome::Annotated(note))
    );
    let conflict = answer(0, 0x40_0000);
    assert!(matches!(conflict, Ok(FaultOutcome::Conflict(_))));
    assert_eq!(machine.leaves(), before);
    assert_clean(&machine);
}

#[test]
fn a_block_keeps_to_its_limit_and_its_alignment() {
    let machine = machine(16);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0x10_0000);
    let pages = request(BLOCK, BLOCK, GIB).with_blocks(Blocks::Never);
    space.map(&pages).unwrap();
    assert_eq!(space.lookup(Ipa::new(BLOCK)).unwrap().level, Level::PAGE);
    map(&mut space, 4 * BLOCK, BLOCK, 3 * GIB + PAGE);
    assert_eq!(
        space.lookup(Ipa::new(4 * BLOCK)).unwrap().level,
        Level::PAGE
    );
    map(&mut space, 6 * BLOCK, BLOCK, 2 * GIB);
    assert_eq!(space.lookup(Ipa::new(6 * BLOCK)).unwrap().level, Level::L2);
    let limited = request(GIB, GIB, 4 * GIB).with_blocks(Blocks::UpTo(Level::L2));
    space.map(&limited).unwrap();
    assert_eq!(space.lookup(Ipa::new(GIB)).unwrap().level, Level::L2);
    map(&mut space, 2 * GIB + BLOCK, BLOCK, 8 * BLOCK);
    let found = space.lookup(Ipa::new(2 * GIB + BLOCK)).unwrap();
    assert_eq!(found.level, Level::L2);
    assert_clean(&machine);
}

/// By less than a page, on one side or on both in the same way.
#[test]
fn a_block_that_is_odd_is_refused_where_its_table_exists() {
    let machine = machine(8);
    let mut space = space(&machine);
    page_and_neighbour(&mut space, 0);
    let before = machine.leaves();
    for (ipa, pa) in [(8, 0), (0, 8), (8, 8)] {
        let block = request(BLOCK + ipa, BLOCK, GIB + pa);
        assert!(matches!(space.map(&block), Err(MapError::Unaligned(_))));
        let gigabyte = request(GIB + ipa, GIB, GIB + pa);
        assert!(matches!(space.map(&gigabyte), Err(MapError::Unaligned(_))));
    }
    assert_eq!(machine.leaves(), before);
    assert_clean(&machine);
}
