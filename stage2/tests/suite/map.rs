//! Exclusive maps.

use stage2::testing::{Event, FakeMachine};
use stage2::{
    Annotation, Blocks, EncodeError, Entry, Ipa, LeafAttrs, Level, MapError, MapOutcome,
    MapRequest, Pa, Perms,
};

use crate::kit::*;

#[test]
fn one_page_takes_a_table_for_each_level() {
    let machine = machine(8);
    let mut space = space(&machine);
    assert_eq!(
        map(&mut space, 0x8000_1000, PAGE, 0x4000_3000),
        MapOutcome::Mapped
    );
    assert_eq!(mapped(&machine), [(0x8000_1000, 3, 0x4000_3000)]);
    assert_eq!(machine.tables_in_use(), 3);
    assert_clean(&machine);
}

#[test]
fn the_largest_blocks_that_fit_are_used() {
    let machine = machine(8);
    let mut space = space(&machine);
    let start = GIB - BLOCK - PAGE;
    map(&mut space, start, PAGE + BLOCK + GIB + PAGE, start);
    let expected = [
        (start, 3, start),
        (GIB - BLOCK, 2, GIB - BLOCK),
        (GIB, 1, GIB),
        (2 * GIB, 3, 2 * GIB),
    ];
    assert_eq!(mapped(&machine), expected);
    assert_clean(&machine);
}

#[test]
fn output_alignment_limits_blocks() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, BLOCK, PAGE);
    assert_eq!(mapped(&machine).len(), 512);
    assert_eq!(mapped(&machine)[511], (511 * PAGE, 3, 512 * PAGE));
    assert_clean(&machine);
}

/// Input and output are aligned to each other, but neither to a block.
#[test]
fn a_block_of_bytes_that_is_not_aligned_takes_pages() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 4 * BLOCK, PAGE, GIB);
    map(&mut space, PAGE, BLOCK, PAGE);
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 512 + 1);
    assert_eq!(leaves[0], (PAGE, 3, PAGE));
    assert_eq!(leaves[511], (BLOCK, 3, BLOCK));
    assert_clean(&machine);
}

#[test]
fn block_limits_are_kept() {
    let machine = machine(1200);
    let mut space = space(&machine);
    let two_blocks = request(0, 2 * BLOCK, 0).with_blocks(Blocks::Never);
    space.map(&two_blocks).unwrap();
    assert_eq!(mapped(&machine).len(), 1024);
    space
        .map(&request(GIB, GIB, GIB).with_blocks(Blocks::UpTo(Level::L2)))
        .unwrap();
    assert_eq!(mapped(&machine).len(), 1024 + 512);
    assert_clean(&machine);
}

#[test]
fn the_same_map_again_changes_nothing() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, BLOCK + PAGE, 0);
    let before = machine.snapshot();
    let _ = machine.take_events();
    assert_eq!(
        map(&mut space, 0, BLOCK + PAGE, 0),
        MapOutcome::AlreadyMapped
    );
    assert_eq!(map(&mut space, PAGE, PAGE, PAGE), MapOutcome::AlreadyMapped);
    assert_eq!(machine.snapshot(), before);
    assert_eq!(machine.take_events(), []);
}

#[test]
fn other_memory_replaces_a_page_through_an_invalid_entry() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0x10_0000);
    map(&mut space, 0, PAGE, 0x20_0000);
    assert_eq!(mapped(&machine), [(0, 3, 0x20_0000)]);
    assert_clean(&machine);
}

#[test]
fn a_page_inside_a_block_keeps_the_rest_of_the_block() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, BLOCK, 0x4000_0000);
    map(&mut space, 5 * PAGE, PAGE, 0x100_0000);
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 512);
    assert_eq!(leaves[4], (4 * PAGE, 3, 0x4000_4000));
    assert_eq!(leaves[5], (5 * PAGE, 3, 0x100_0000));
    assert_eq!(leaves[6], (6 * PAGE, 3, 0x4000_6000));
    assert_clean(&machine);
}

#[test]
fn a_page_inside_a_gigabyte_keeps_blocks_around_it() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, GIB, 0x4000_0000);
    map(&mut space, 3 * BLOCK + PAGE, PAGE, 0x100_0000);
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 511 + 512);
    assert_eq!(leaves[2], (2 * BLOCK, 2, 0x4000_0000 + 2 * BLOCK));
    assert_eq!(leaves[4], (3 * BLOCK + PAGE, 3, 0x100_0000));
    assert_eq!(
        leaves[5],
        (3 * BLOCK + 2 * PAGE, 3, 0x4000_0000 + 3 * BLOCK + 2 * PAGE)
    );
    assert_clean(&machine);
}

#[test]
fn a_block_over_a_table_frees_the_table() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, 0, BLOCK, 0x4000_0000);
    assert_eq!(machine.tables_in_use(), 3);
    map(&mut space, 0, BLOCK, 0x4000_0000);
    assert_eq!(mapped(&machine), [(0, 2, 0x4000_0000)]);
    assert_eq!(machine.tables_in_use(), 2);
    assert_clean(&machine);
}

#[test]
fn permissions_change_in_place() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0x1000);
    let read_only = MapRequest {
        attrs: LeafAttrs::normal(Perms::READ),
        ..request(0, PAGE, 0x1000)
    };
    let _ = machine.take_events();
    assert_eq!(space.map(&read_only), Ok(MapOutcome::Mapped));
    let stores = machine
        .take_events()
        .into_iter()
        .filter(|e| matches!(e, stage2::testing::Event::Store { .. }));
    assert_eq!(stores.count(), 1);
    assert!(!leaf_at(&machine, 0).write);
    assert_clean(&machine);
}

#[test]
fn memory_type_changes_through_an_invalid_entry() {
    let machine = machine_fwb(8);
    let mut space = space_fwb(&machine);
    map(&mut space, 0, PAGE, 0x1000);
    assert_eq!(leaf_at(&machine, 0).mem, 7);
    let forced = LeafAttrs::forced_write_back(Perms::RWX);
    map_as(&mut space, forced, 0, PAGE, 0x1000);
    assert_eq!(leaf_at(&machine, 0).mem, 6);
    assert_clean(&machine);
    map(&mut space, 0, PAGE, 0x1000);
    assert_eq!(leaf_at(&machine, 0).mem, 7);
    assert_clean(&machine);
}

#[test]
fn a_map_over_a_note_keeps_the_note_around_it() {
    let machine = machine(8);
    let mut space = space(&machine);
    let note = Annotation::try_new(77).unwrap();
    space.annotate(range(0, BLOCK), note).unwrap();
    map(&mut space, PAGE, PAGE, 0x5000);
    assert_eq!(mapped(&machine), [(PAGE, 3, 0x5000)]);
    let around = space.lookup(Ipa::new(0)).unwrap();
    assert_eq!(
        (around.entry, around.slot),
        (Entry::Annotated(note), range(0, PAGE))
    );
    assert_clean(&machine);
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let machine = machine(8);
    let mut space = space(&machine);
    let mut refused = |request: MapRequest| space.map(&request).unwrap_err();
    assert_eq!(refused(request(1, PAGE, 0)), MapError::Unaligned(0x1001));
    assert_eq!(
        refused(request(0, PAGE + 1, 0)),
        MapError::Unaligned(0x1001)
    );
    assert_eq!(refused(request(0, PAGE, 8)), MapError::Unaligned(0x1008));
    assert!(matches!(refused(request(0, 0, 0)), MapError::Range(_)));
    assert!(matches!(
        refused(request(!0xfff, 2 * PAGE, 0)),
        MapError::Range(_)
    ));
    assert!(matches!(
        refused(request(0, 2 * PAGE, !0xfff)),
        MapError::Range(_)
    ));
    let past = request((1 << 39) - PAGE, 2 * PAGE, 0);
    assert_eq!(
        refused(past),
        MapError::OutOfInput(range((1 << 39) - PAGE, 2 * PAGE))
    );
    let high = request(0, 2 * PAGE, (1 << 40) - PAGE);
    let out = EncodeError::OutOfRange {
        pa: Pa::new(1 << 40),
        bits: 40,
    };
    assert_eq!(refused(high), MapError::Encode(out));
    let forced = LeafAttrs::forced_write_back(Perms::RW);
    assert!(matches!(
        refused(MapRequest {
            attrs: forced,
            ..request(0, PAGE, 0)
        }),
        MapError::Encode(EncodeError::CannotCombine(..))
    ));
    assert_eq!(machine.tables_in_use(), 1);
    assert_eq!(mapped(&machine), []);
}

/// The short way of single pages checks as much as the long one.
#[test]
fn pages_beside_others_are_checked_too() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0);
    let before = machine.snapshot();
    let mut refused = |request: MapRequest| space.map(&request).unwrap_err();
    let (odd_in, odd_out) = (request(PAGE + 8, PAGE, PAGE), request(PAGE, PAGE, PAGE + 8));
    assert!(matches!(refused(odd_in), MapError::Unaligned(_)));
    assert!(matches!(refused(odd_out), MapError::Unaligned(_)));
    let out = EncodeError::OutOfRange {
        pa: Pa::new(1 << 40),
        bits: 40,
    };
    assert_eq!(refused(request(PAGE, PAGE, 1 << 40)), MapError::Encode(out));
    let wrapped = refused(request(PAGE, PAGE, !0xfff));
    assert!(matches!(wrapped, MapError::Range(_)));
    let past = request((1 << 39) + PAGE, PAGE, PAGE);
    assert!(matches!(refused(past), MapError::OutOfInput(_)));
    let forced = MapRequest {
        attrs: LeafAttrs::forced_write_back(Perms::RW),
        ..request(PAGE, PAGE, PAGE)
    };
    assert!(matches!(refused(forced), MapError::Encode(_)));
    assert_eq!(machine.snapshot(), before);
    assert_clean(&machine);
}

#[test]
fn the_last_page_of_input_and_output_can_be_mapped() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, (1 << 39) - PAGE, PAGE, (1 << 40) - PAGE);
    assert_eq!(mapped(&machine), [((1 << 39) - PAGE, 3, (1 << 40) - PAGE)]);
}

#[test]
fn too_little_memory_changes_nothing_and_says_how_much_is_needed() {
    for allowed in 0..4 {
        let machine = machine(16);
        let mut space = space(&machine);
        map(&mut space, 0, BLOCK, 0);
        let before = machine.snapshot();
        machine.allow_allocations(Some(allowed));
        // Ends in two blocks' slots, one of them mapped: a table each, and one more level 2.
        let straddle = request(BLOCK - PAGE, GIB, 0x8000_0000);
        let needed = MapError::NoMemory { needed: 514 };
        assert_eq!(space.map(&straddle), Err(needed));
        assert_eq!(machine.snapshot(), before);
    }
}

#[test]
fn exactly_the_memory_that_was_named_is_enough() {
    let machine = machine(600);
    let mut space = space(&machine);
    machine.allow_allocations(Some(0));
    let unaligned = request(PAGE, 4 * BLOCK, 0x8000_0000);
    let Err(MapError::NoMemory { needed }) = space.map(&unaligned) else {
        panic!()
    };
    machine.allow_allocations(Some(needed - 1));
    assert_eq!(space.map(&unaligned), Err(MapError::NoMemory { needed }));
    assert_eq!(machine.tables_in_use(), 1);
    machine.allow_allocations(Some(needed));
    assert_eq!(space.map(&unaligned), Ok(MapOutcome::Mapped));
    assert_eq!(machine.tables_in_use(), 1 + needed);
    assert_eq!(mapped(&machine).len(), 4 * 512);
}

#[test]
fn destroy_gives_every_table_back() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, BLOCK + PAGE, 0);
    machine.detach();
    assert!(space.destroy().is_ok());
    assert_eq!(machine.tables_in_use(), 0);
}

#[test]
fn dropping_a_space_gives_every_table_back_once() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0);
    machine.detach();
    drop(space);
    assert_eq!(machine.tables_in_use(), 0);
    assert_clean(&machine);
}

#[test]
fn a_concatenated_root_maps_across_its_tables() {
    use stage2::testing::{Arch, FakeMachine};
    use stage2::{ArmConfig, ArmFeatures, ArmStage2, Granule, Stage2};
    let machine = FakeMachine::new(
        Arch {
            xnx: false,
            ..Arch::arm_4k(1, 40, false)
        },
        16,
    );
    let format = ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: 40,
        output_bits: 40,
        features: ArmFeatures::V8_0,
        start: None,
    })
    .unwrap();
    let mut space = Stage2::new(format, &machine, 1).unwrap();
    machine.attach(space.root());
    assert_eq!(space.geometry().start_level(), Level::L1);
    assert_eq!(space.geometry().root_size(), 0x2000);
    assert!(space.root().is_aligned_to(0x2000));
    let middle = 512 * GIB - PAGE;
    space.map(&request(middle, 2 * PAGE, 0x6000)).unwrap();
    assert_eq!(
        mapped(&machine),
        [(middle, 3, 0x6000), (512 * GIB, 3, 0x7000)]
    );
    assert_clean(&machine);
}

/// Two pages side by side: the second finds the table that the first has shown.
fn neighbours(space: &mut Space<'_>) {
    map(space, 0, PAGE, 0x10_0000);
    map(space, PAGE, PAGE, 0x20_0000);
    map(space, 2 * PAGE, PAGE, 0x30_0000);
}

#[test]
fn a_page_takes_a_new_table_after_its_own_was_given_back() {
    let machine = machine(8);
    let mut space = space(&machine);
    neighbours(&mut space);
    space.unmap(range(0, BLOCK)).unwrap();
    assert_eq!(machine.tables_in_use(), 1);
    map(&mut space, PAGE, PAGE, 0x40_0000);
    assert_eq!(mapped(&machine), [(PAGE, 3, 0x40_0000)]);
    assert_eq!(machine.tables_in_use(), 3);
    assert_clean(&machine);
}

/// The memory of the page's old table serves another address now.
#[test]
fn a_page_does_not_go_into_a_table_that_is_somebody_elses_now() {
    let machine = machine(3);
    let mut space = space(&machine);
    neighbours(&mut space);
    space.unmap(range(0, BLOCK)).unwrap();
    map(&mut space, 3 * BLOCK, PAGE, 0x40_0000);
    let again = space.map(&request(PAGE, PAGE, 0x50_0000));
    assert_eq!(again, Err(MapError::NoMemory { needed: 1 }));
    assert_eq!(mapped(&machine), [(3 * BLOCK, 3, 0x40_0000)]);
    assert_clean(&machine);
}

#[test]
fn a_page_goes_into_the_block_that_replaced_its_table() {
    let machine = machine(8);
    let mut space = space(&machine);
    neighbours(&mut space);
    map(&mut space, 0, BLOCK, GIB);
    map(&mut space, 5 * PAGE, PAGE, 0x40_0000);
    let leaves = mapped(&machine);
    assert_eq!(leaves.len(), 512);
    assert_eq!(leaves[4], (4 * PAGE, 3, GIB + 4 * PAGE));
    assert_eq!(leaves[5], (5 * PAGE, 3, 0x40_0000));
    assert_clean(&machine);
}

#[test]
fn a_page_replaces_its_part_of_a_note_that_replaced_its_table() {
    let machine = machine(8);
    let mut space = space(&machine);
    neighbours(&mut space);
    let note = Annotation::try_new(7).unwrap();
    space.annotate(range(0, BLOCK), note).unwrap();
    map(&mut space, 5 * PAGE, PAGE, 0x40_0000);
    assert_eq!(mapped(&machine), [(5 * PAGE, 3, 0x40_0000)]);
    let found = space.lookup(Ipa::new(6 * PAGE)).unwrap();
    assert_eq!(found.entry, Entry::Annotated(note));
    assert_clean(&machine);
}

#[test]
fn a_page_splits_the_block_that_its_table_was_joined_into() {
    let machine = machine(8);
    let mut space = space(&machine);
    for page in 0..512 {
        map(&mut space, page * PAGE, PAGE, GIB + page * PAGE);
    }
    space.collapse(Ipa::new(0), Level::L2).unwrap();
    assert_eq!(mapped(&machine), [(0, 2, GIB)]);
    map(&mut space, 5 * PAGE, PAGE, 0x40_0000);
    assert_eq!(mapped(&machine)[5], (5 * PAGE, 3, 0x40_0000));
    assert_eq!(mapped(&machine)[6], (6 * PAGE, 3, GIB + 6 * PAGE));
    assert_clean(&machine);
}

#[test]
fn pages_in_turn_between_two_tables_go_each_into_its_own() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0x10_0000);
    map(&mut space, BLOCK, PAGE, 0x20_0000);
    map(&mut space, PAGE, PAGE, 0x30_0000);
    map(&mut space, 2 * PAGE, PAGE, 0x40_0000);
    map(&mut space, BLOCK + PAGE, PAGE, 0x50_0000);
    let expected = [
        (0, 3, 0x10_0000),
        (PAGE, 3, 0x30_0000),
        (2 * PAGE, 3, 0x40_0000),
        (BLOCK, 3, 0x20_0000),
        (BLOCK + PAGE, 3, 0x50_0000),
    ];
    assert_eq!(mapped(&machine), expected);
    assert_clean(&machine);
}

/// Whether the table of the page exists or not, a request is refused for the same reason.
#[test]
fn a_page_that_makes_no_sense_is_refused_where_its_table_exists_too() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0x10_0000);
    let before = machine.snapshot();
    let refused = |space: &mut Space<'_>, ipa, size, pa| space.map(&request(ipa, size, pa));
    let unaligned = |value| Err(MapError::Unaligned(value));
    for at in [8, PAGE + 8, 2 * PAGE + 8] {
        assert_eq!(refused(&mut space, at, PAGE, 0), unaligned(at | PAGE));
    }
    assert_eq!(
        refused(&mut space, PAGE, PAGE, PAGE / 2),
        unaligned(PAGE + PAGE / 2)
    );
    for size in [PAGE, 2 * PAGE] {
        assert_eq!(
            refused(&mut space, PAGE + 8, size, 8),
            unaligned(size | PAGE | 8)
        );
    }
    assert_eq!(refused(&mut space, PAGE, PAGE + 8, 8), unaligned(PAGE | 8));
    let far = EncodeError::OutOfRange {
        pa: Pa::new(1 << 40),
        bits: 40,
    };
    assert_eq!(
        refused(&mut space, PAGE, PAGE, 1 << 40),
        Err(MapError::Encode(far))
    );
    assert!(matches!(
        refused(&mut space, 1 << 39, PAGE, 0),
        Err(MapError::OutOfInput(_))
    ));
    let device = MapRequest {
        attrs: LeafAttrs::device(Perms::RWX),
        ..request(PAGE, PAGE, 0)
    };
    assert!(matches!(space.map(&device), Err(MapError::Encode(_))));
    assert_eq!(machine.snapshot(), before);
}

/// The TLB invalidations since the last look: ranges, and whether all was invalidated.
fn invalidations(machine: &FakeMachine) -> Vec<(u64, u64, Option<Level>)> {
    let ranges = machine.take_events().into_iter().filter_map(|e| match e {
        Event::TlbRange(range, level) => Some((range.start().get(), range.len(), level)),
        Event::TlbAll => Some((0, 0, None)),
        _ => None,
    });
    ranges.collect()
}

#[test]
fn other_memory_over_many_pages_takes_one_invalidation() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, BLOCK, 8 * PAGE, GIB);
    let _ = machine.take_events();
    map_pages(&mut space, BLOCK + PAGE, 6 * PAGE, 2 * GIB);
    let page = Some(Level::PAGE);
    assert_eq!(invalidations(&machine), [(BLOCK + PAGE, 6 * PAGE, page)]);
    let leaves = mapped(&machine);
    assert_eq!(leaves[0], (BLOCK, 3, GIB));
    assert_eq!(leaves[1], (BLOCK + PAGE, 3, 2 * GIB));
    assert_eq!(leaves[6], (BLOCK + 6 * PAGE, 3, 2 * GIB + 5 * PAGE));
    assert_eq!(leaves[7], (BLOCK + 7 * PAGE, 3, GIB + 7 * PAGE));
    assert_clean(&machine);
}

#[test]
fn pages_that_stay_are_not_broken_among_those_that_are_replaced() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, 0, 4 * PAGE, GIB);
    map(&mut space, PAGE, PAGE, 2 * GIB + PAGE);
    let _ = machine.take_events();
    map_pages(&mut space, 0, 4 * PAGE, 2 * GIB);
    let page = Some(Level::PAGE);
    let expected = [(0, PAGE, page), (2 * PAGE, 2 * PAGE, page)];
    assert_eq!(invalidations(&machine), expected);
    assert_eq!(mapped(&machine)[1], (PAGE, 3, 2 * GIB + PAGE));
    assert_eq!(mapped(&machine)[3], (3 * PAGE, 3, 2 * GIB + 3 * PAGE));
    assert_clean(&machine);
}

#[test]
fn blocks_over_tables_take_one_invalidation() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, 0, PAGE, GIB);
    map_pages(&mut space, BLOCK, PAGE, GIB + PAGE);
    map(&mut space, 2 * BLOCK, BLOCK, 3 * GIB);
    let _ = machine.take_events();
    map(&mut space, 0, 3 * BLOCK, 2 * GIB);
    assert_eq!(invalidations(&machine).len(), 1);
    let expected = [
        (0, 2, 2 * GIB),
        (BLOCK, 2, 2 * GIB + BLOCK),
        (2 * BLOCK, 2, 2 * GIB + 2 * BLOCK),
    ];
    assert_eq!(mapped(&machine), expected);
    assert_eq!(machine.tables_in_use(), 2);
    assert_clean(&machine);
}

#[test]
fn other_permissions_over_many_pages_take_one_invalidation() {
    let machine = machine(8);
    let mut space = space(&machine);
    map_pages(&mut space, 0, 4 * PAGE, GIB);
    let _ = machine.take_events();
    let read = MapRequest {
        attrs: LeafAttrs::normal(Perms::READ),
        ..request(PAGE, 2 * PAGE, GIB + PAGE)
    };
    space.map(&read).unwrap();
    assert_eq!(
        invalidations(&machine),
        [(PAGE, 2 * PAGE, Some(Level::PAGE))]
    );
    assert!(leaf_at(&machine, 0).write && !leaf_at(&machine, PAGE).write);
    assert_clean(&machine);
}
