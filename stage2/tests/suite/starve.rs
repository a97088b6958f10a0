//! Too little memory at every step of every operation that takes tables.

#![expect(clippy::unwrap_used, reason = "a step that cannot be done fails")]

use stage2::testing::{Arch, FakeMachine};
use stage2::{Annotation, FaultRequest, ForceWriteBack, Level, MapError, Pa, Stage2};

use crate::kit::*;

type Step = fn(&mut Space<'_>) -> Result<(), MapError>;

/// What is there before, what is asked, and how many tables it takes.
struct Case {
    name: &'static str,
    before: Step,
    ask: Step,
    needed: usize,
}

fn note() -> Annotation {
    Annotation::try_new(7).unwrap()
}

fn map_at(space: &mut Space<'_>, ipa: u64, size: u64, pa: u64) -> Result<(), MapError> {
    space.map(&request(ipa, size, pa)).map(drop)
}

fn nothing(_: &mut Space<'_>) -> Result<(), MapError> {
    Ok(())
}

fn gigabyte(space: &mut Space<'_>) -> Result<(), MapError> {
    map_at(space, 0, GIB, 0)
}

fn two_blocks(space: &mut Space<'_>) -> Result<(), MapError> {
    map_at(space, 0, 2 * BLOCK, 0)
}

const CASES: &[Case] = &[
    Case {
        name: "map pages of two blocks",
        before: nothing,
        ask: |space| map_at(space, BLOCK - PAGE, 2 * PAGE, GIB),
        needed: 3,
    },
    Case {
        name: "map pages of two gigabytes",
        before: nothing,
        ask: |space| map_at(space, GIB - PAGE, 2 * PAGE, GIB),
        needed: 4,
    },
    Case {
        name: "map a page into a gigabyte",
        before: gigabyte,
        ask: |space| map_at(space, 5 * PAGE, PAGE, GIB),
        needed: 2,
    },
    Case {
        name: "map a page into a note",
        before: |space| space.annotate(range(0, GIB), note()),
        ask: |space| map_at(space, 5 * PAGE, PAGE, GIB),
        needed: 2,
    },
    Case {
        name: "unmap a page of a gigabyte",
        before: gigabyte,
        ask: |space| space.unmap(range(5 * PAGE, PAGE)),
        needed: 2,
    },
    Case {
        name: "unmap the border of two blocks",
        before: two_blocks,
        ask: |space| space.unmap(range(BLOCK - PAGE, 2 * PAGE)),
        needed: 2,
    },
    Case {
        name: "annotate a page of nothing",
        before: nothing,
        ask: |space| space.annotate(range(5 * PAGE, PAGE), note()),
        needed: 2,
    },
    Case {
        name: "annotate a page of a block",
        before: two_blocks,
        ask: |space| space.annotate(range(5 * PAGE, PAGE), note()),
        needed: 1,
    },
    Case {
        name: "annotate inside another note",
        before: |space| space.annotate(range(0, 2 * BLOCK), note()),
        ask: |space| {
            let other = Annotation::try_new(8).unwrap();
            space.annotate(range(BLOCK - PAGE, 2 * PAGE), other)
        },
        needed: 2,
    },
    Case {
        name: "fault on a page",
        before: nothing,
        ask: |space| {
            let page = range(5 * PAGE, PAGE);
            let request = FaultRequest::new(page.start(), page, Pa::new(GIB), normal());
            space.fault(&request).map(drop)
        },
        needed: 2,
    },
    Case {
        name: "split a gigabyte",
        before: gigabyte,
        ask: |space| space.split(range(0, PAGE), Level::L2).map(drop),
        needed: 1,
    },
    Case {
        name: "split two blocks",
        before: two_blocks,
        ask: |space| space.split(range(0, 2 * BLOCK), Level::PAGE).map(drop),
        needed: 2,
    },
];

#[test]
fn every_failed_allocation_leaves_everything_as_it_was() {
    for case in CASES {
        let machine = machine(16);
        let mut space = space(&machine);
        (case.before)(&mut space).unwrap();
        let (before, in_use) = (machine.snapshot(), machine.tables_in_use());
        for allowed in 0..case.needed {
            machine.allow_allocations(Some(allowed));
            let needed = case.needed;
            let refused = (case.ask)(&mut space);
            assert_eq!(refused, Err(MapError::NoMemory { needed }), "{}", case.name);
            assert_eq!(machine.tables_in_use(), in_use, "{}", case.name);
            let after = machine.snapshot();
            assert_eq!(after, before, "{} with {allowed}", case.name);
            assert_clean(&machine);
        }
        machine.allow_allocations(Some(case.needed));
        assert_eq!((case.ask)(&mut space), Ok(()), "{}", case.name);
        assert_clean(&machine);
    }
}

#[test]
fn what_needs_no_table_asks_for_none() {
    let machine = machine(16);
    let mut space = space(&machine);
    map(&mut space, 0, BLOCK, GIB);
    map(&mut space, BLOCK, PAGE, GIB + BLOCK);
    machine.allow_allocations(Some(0));
    assert_eq!(map_at(&mut space, BLOCK + PAGE, 7 * PAGE, GIB), Ok(()));
    assert_eq!(map_at(&mut space, 2 * BLOCK, BLOCK, 2 * GIB), Ok(()));
    assert_eq!(map_at(&mut space, 5 * PAGE, PAGE, GIB + 5 * PAGE), Ok(()));
    assert_eq!(space.annotate(range(3 * BLOCK, BLOCK), note()), Ok(()));
    assert_eq!(space.split(range(BLOCK, BLOCK), Level::PAGE), Ok(0));
    assert_eq!(space.unmap(range(0, GIB)), Ok(()));
    assert_clean(&machine);
}

#[test]
fn a_space_without_memory_for_its_root_says_how_much() {
    let machine = FakeMachine::new(Arch::arm_4k(1, 39, false), 0);
    let refused = Stage2::new(arm(ForceWriteBack::Off), &machine, 5);
    assert_eq!(refused.err(), Some(MapError::NoMemory { needed: 1 }));
    assert_eq!(machine.tables_in_use(), 0);
}
