//! Exactly what is invalidated, cleaned and announced: the ranges, not only their order.

use stage2::testing::{Event, FakeMachine};
use stage2::{
    Annotation, FaultOutcome, FaultRequest, Ipa, IpaRange, LeafAttrs, Level, MapError, MapRequest,
    Pa, PaRange, Perms, RangeOps, TlbCaps,
};

use crate::kit::*;

/// Data cleaned since the last look, as (start, bytes).
fn cleaned(machine: &FakeMachine) -> Vec<(u64, u64)> {
    let frames = |event| match event {
        Event::Data(frames) => Some((frames.start().get(), frames.len())),
        _ => None,
    };
    machine
        .take_events()
        .into_iter()
        .filter_map(frames)
        .collect()
}

/// Ranges invalidated since the last look.
fn invalidated(machine: &FakeMachine) -> Vec<(IpaRange, Option<Level>)> {
    let ranges = |event| match event {
        Event::TlbRange(range, level) => Some((range, level)),
        _ => None,
    };
    machine
        .take_events()
        .into_iter()
        .filter_map(ranges)
        .collect()
}

fn offer_ranges(machine: &FakeMachine) {
    machine.set_caps(TlbCaps {
        range_ops: RangeOps::Offered,
        whole_beyond: 0,
    });
}

#[test]
fn a_zap_invalidates_and_cleans_the_whole_run() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, 0, 8 * PAGE, GIB);
    let _ = machine.take_events();
    space.zap_exclusive(range(2 * PAGE, 3 * PAGE)).unwrap();
    let events = machine.take_events();
    let run = Event::TlbRange(range(2 * PAGE, 3 * PAGE), Some(Level::PAGE));
    assert_eq!(events.iter().filter(|event| **event == run).count(), 1);
    let frames = PaRange::new(Pa::new(GIB + 2 * PAGE), 3 * PAGE).unwrap();
    let data = events
        .iter()
        .filter(|event| matches!(event, Event::Data(_)));
    assert_eq!(data.collect::<Vec<_>>(), [&Event::Data(frames)]);
    assert_clean(&machine);
}

/// The ninth run finds no room in the list; its words remember each page.
#[test]
fn a_zap_cleans_a_run_that_finds_no_room_in_the_list() {
    let machine = machine(8);
    let mut space = space(&machine);
    for n in 0..8 {
        map(&mut space, 4 * n * PAGE, PAGE, GIB + 0x10_0000 * n);
    }
    map_pages(&mut space, 64 * PAGE, 3 * PAGE, 3 * GIB);
    let _ = machine.take_events();
    space.zap_exclusive(range(0, BLOCK)).unwrap();
    let mut expected: Vec<_> = (0..8).map(|n| (GIB + 0x10_0000 * n, PAGE)).collect();
    expected.push((3 * GIB, 3 * PAGE));
    assert_eq!(cleaned(&machine), expected);
    assert_clean(&machine);
}

/// Cached steps of walks are of the whole slot, wherever in it the last page was.
#[test]
fn a_table_that_goes_takes_the_cached_steps_of_its_whole_slot() {
    let machine = machine(8);
    offer_ranges(&machine);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, GIB);
    map(&mut space, BLOCK + 5 * PAGE, PAGE, GIB + 5 * PAGE);
    let _ = machine.take_events();
    space.unmap(range(BLOCK + 5 * PAGE, PAGE)).unwrap();
    assert_eq!(invalidated(&machine), [(range(BLOCK, BLOCK), None)]);
    assert_clean(&machine);
}

#[test]
fn a_flush_joins_neighbours_and_nothing_else() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, 0, 3 * PAGE, GIB);
    map_pages(&mut space, 3 * PAGE, 2 * PAGE, 2 * GIB);
    let _ = machine.take_events();
    space.flush(range(0, BLOCK)).unwrap();
    let expected = [(GIB, 3 * PAGE), (2 * GIB, 2 * PAGE)];
    assert_eq!(cleaned(&machine), expected);
    assert_clean(&machine);
}

/// With memory that owes nothing, the frames still have to be handed out.
#[test]
fn forced_pages_are_handed_out_one_by_one() {
    let machine = machine_fwb(8);
    let mut space = space_fwb(&machine);
    let forced = MapRequest {
        attrs: LeafAttrs::forced_write_back(Perms::RW),
        ..request(0, 4 * PAGE, GIB)
    };
    space.map(&forced).unwrap();
    let mut gone = Vec::new();
    space
        .unmap_with(range(PAGE, 2 * PAGE), &mut |leaf| {
            gone.push((leaf.ipa().get(), leaf.frames().start().get()));
        })
        .unwrap();
    assert_eq!(gone, [(PAGE, GIB + PAGE), (2 * PAGE, GIB + 2 * PAGE)]);
    assert_clean(&machine);
}

/// The same note over a part of itself takes no table.
#[test]
fn a_note_over_itself_needs_no_memory() {
    let machine = machine(8);
    let mut space = space(&machine);
    let note = Annotation::try_new(3).unwrap();
    space.annotate(range(0, BLOCK), note).unwrap();
    machine.allow_allocations(Some(0));
    assert_eq!(space.annotate(range(PAGE, PAGE), note), Ok(()));
    let other = Annotation::try_new(4).unwrap();
    assert_eq!(
        space.annotate(range(PAGE, PAGE), other),
        Err(MapError::NoMemory { needed: 1 })
    );
    assert_clean(&machine);
}

#[test]
fn a_fault_inside_a_block_relaxes_and_invalidates_the_whole_block() {
    let machine = machine(8);
    let mut space = space(&machine);
    let read = MapRequest {
        attrs: LeafAttrs::normal(Perms::READ),
        ..request(BLOCK, BLOCK, GIB)
    };
    space.map(&read).unwrap();
    let _ = machine.take_events();
    let at = Ipa::new(BLOCK + 5 * PAGE);
    let fault = FaultRequest::new(at, range(BLOCK, BLOCK), Pa::new(GIB), normal());
    assert_eq!(space.fault(&fault), Ok(FaultOutcome::Relaxed));
    let events = machine.take_events();
    let frames = PaRange::new(Pa::new(GIB), BLOCK).unwrap();
    let block = Event::TlbRange(range(BLOCK, BLOCK), Some(Level::L2));
    assert!(events.contains(&block));
    assert!(events.contains(&Event::Fetch(frames)));
    assert_clean(&machine);
}
