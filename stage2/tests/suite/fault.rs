//! Faults under shared access.

use stage2::testing::Event;
use stage2::{
    Age, Annotation, EncodeError, FaultOutcome, FaultRequest, Ipa, LeafAttrs, Level, MapError, Pa,
    Perms,
};

use crate::kit::*;

/// The entry is the one of the page and of no other: not of the last page of all, whose table
/// is there, too.
#[test]
fn a_fault_beside_tables_elsewhere_takes_its_own_entry() {
    let machine = machine(8);
    let mut space = space(&machine);
    let end = 1 << 39;
    map(&mut space, end - 2 * PAGE, PAGE, GIB);
    map(&mut space, PAGE, PAGE, 2 * GIB);
    let low = fault_at(5 * PAGE + 7, 5 * PAGE, PAGE);
    assert_eq!(space.fault(&low), Ok(FaultOutcome::Mapped(Level::PAGE)));
    let expected = [
        (PAGE, 3, 2 * GIB),
        (5 * PAGE, 3, 5 * PAGE),
        (end - 2 * PAGE, 3, GIB),
    ];
    assert_eq!(mapped(&machine), expected);
    assert_clean(&machine);
}

fn fault_at(ipa: u64, window: u64, size: u64) -> FaultRequest {
    FaultRequest::new(
        Ipa::new(ipa),
        range(window, size),
        Pa::new(window),
        normal(),
    )
}

#[test]
fn a_fault_takes_the_largest_block_inside_the_window() {
    let machine = machine(8);
    let space = space(&machine);
    let whole = fault_at(GIB + 5, 0, 4 * GIB);
    assert_eq!(space.fault(&whole), Ok(FaultOutcome::Mapped(Level::L1)));
    let short = fault_at(GIB - 1, 0, GIB - PAGE);
    assert!(matches!(
        space.fault(&short),
        Err(MapError::OutsideWindow(_))
    ));
    let short = fault_at(GIB - PAGE - 1, 0, GIB - PAGE);
    assert_eq!(space.fault(&short), Ok(FaultOutcome::Mapped(Level::PAGE)));
    let block = fault_at(BLOCK, 0, GIB - PAGE);
    assert_eq!(space.fault(&block), Ok(FaultOutcome::Mapped(Level::L2)));
    let expected = [
        (BLOCK, 2, BLOCK),
        (GIB - 2 * PAGE, 3, GIB - 2 * PAGE),
        (GIB, 1, GIB),
    ];
    assert_eq!(mapped(&machine), expected);
    assert_clean(&machine);
}

#[test]
fn a_second_fault_finds_the_leaf() {
    let machine = machine(8);
    let space = space(&machine);
    let request = fault_at(PAGE + 1, 0, 2 * PAGE);
    assert_eq!(space.fault(&request), Ok(FaultOutcome::Mapped(Level::PAGE)));
    assert_eq!(space.fault(&request), Ok(FaultOutcome::AlreadyMapped));
    assert_clean(&machine);
}

#[test]
fn a_fault_adds_permissions_but_takes_none() {
    let machine = machine(8);
    let space = space(&machine);
    let read = LeafAttrs::normal(Perms::READ);
    let ask = |perms| FaultRequest {
        attrs: LeafAttrs::normal(perms),
        ..fault_at(0, 0, PAGE)
    };
    assert_eq!(
        space.fault(&ask(read.perms)),
        Ok(FaultOutcome::Mapped(Level::PAGE))
    );
    assert_eq!(space.fault(&ask(Perms::RWX)), Ok(FaultOutcome::Relaxed));
    assert!(leaf_at(&machine, 0).write && leaf_at(&machine, 0).exec_kernel);
    assert_eq!(
        space.fault(&ask(Perms::READ)),
        Ok(FaultOutcome::AlreadyMapped)
    );
    assert!(leaf_at(&machine, 0).write);
    assert_clean(&machine);
}

#[test]
fn a_fault_does_not_replace_other_memory_or_another_type() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0x5000);
    assert!(matches!(
        space.fault(&fault_at(0, 0, PAGE)),
        Ok(FaultOutcome::Conflict(_))
    ));
    map(&mut space, PAGE, PAGE, PAGE);
    let device = LeafAttrs::device(Perms::RW);
    let other = FaultRequest {
        attrs: device,
        ..fault_at(PAGE, PAGE, PAGE)
    };
    assert!(matches!(space.fault(&other), Ok(FaultOutcome::Conflict(_))));
    assert_eq!(mapped(&machine), [(0, 3, 0x5000), (PAGE, 3, PAGE)]);
}

#[test]
fn a_fault_on_a_note_reports_it() {
    let machine = machine(8);
    let mut space = space(&machine);
    let note = Annotation::try_new(5).unwrap();
    space.annotate(range(0, BLOCK), note).unwrap();
    assert_eq!(
        space.fault(&fault_at(PAGE, 0, BLOCK)),
        Ok(FaultOutcome::Annotated(note))
    );
}

#[test]
fn a_fault_without_memory_changes_nothing() {
    for allowed in 0..2 {
        let machine = machine(8);
        let space = space(&machine);
        machine.allow_allocations(Some(allowed));
        let error = space.fault(&fault_at(0, 0, PAGE));
        assert_eq!(error, Err(MapError::NoMemory { needed: 2 }));
        assert_eq!(machine.tables_in_use(), 1);
        machine.allow_allocations(Some(2));
        assert!(space.fault(&fault_at(0, 0, PAGE)).is_ok());
    }
}

#[test]
fn a_fault_makes_an_old_leaf_young() {
    let machine = machine(8);
    let mut space = space(&machine);
    let old = normal().with_age(Age::Old);
    space
        .map(&stage2::MapRequest {
            attrs: old,
            ..request(0, PAGE, 0)
        })
        .unwrap();
    assert!(!leaf_at(&machine, 0).young);
    assert_eq!(
        space.fault(&fault_at(0, 0, PAGE)),
        Ok(FaultOutcome::Relaxed)
    );
    assert!(leaf_at(&machine, 0).young);
    assert_clean(&machine);
}

#[test]
fn relax_adds_execution_with_instruction_cache_maintenance() {
    let machine = machine(8);
    let mut space = space(&machine);
    let data = LeafAttrs::normal(Perms::RW);
    space
        .map(&stage2::MapRequest {
            attrs: data,
            ..request(0, PAGE, 0x9000)
        })
        .unwrap();
    assert!(!machine.is_fetchable(0x9000, PAGE));
    assert_eq!(
        space.relax_perms(Ipa::new(7), Perms::EXEC),
        Ok(FaultOutcome::Relaxed)
    );
    assert!(machine.is_fetchable(0x9000, PAGE));
    assert!(leaf_at(&machine, 0).exec_user);
    assert_eq!(
        space.relax_perms(Ipa::new(7), Perms::EXEC),
        Ok(FaultOutcome::AlreadyMapped)
    );
    let nowhere = Ipa::new(GIB);
    assert_eq!(
        space.relax_perms(nowhere, Perms::EXEC),
        Err(MapError::NotMapped(nowhere))
    );
    assert_clean(&machine);
}

#[test]
fn permissions_come_with_youth() {
    let machine = machine(8);
    let mut space = space(&machine);
    let old = LeafAttrs::normal(Perms::READ).with_age(Age::Old);
    let aged = stage2::MapRequest {
        attrs: old,
        ..request(0, PAGE, GIB)
    };
    space.map(&aged).unwrap();
    let relaxed = space.relax_perms(Ipa::new(0), Perms::WRITE);
    assert_eq!(relaxed, Ok(FaultOutcome::Relaxed));
    let leaf = leaf_at(&machine, 0);
    assert!(leaf.young && leaf.write);
    assert_clean(&machine);
}

#[test]
fn a_fault_beside_a_mapped_page_takes_its_part_of_the_window() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 2 * BLOCK, PAGE, GIB);
    let inside = FaultRequest::new(
        Ipa::new(2 * BLOCK + 5 * PAGE + 9),
        range(2 * BLOCK + PAGE, 8 * PAGE),
        Pa::new(0x70_0000),
        normal(),
    );
    for request in [
        inside,
        FaultRequest {
            ipa: Ipa::new(2 * BLOCK + 9 * PAGE - 1),
            ..inside
        },
    ] {
        assert_eq!(space.fault(&request), Ok(FaultOutcome::Mapped(Level::PAGE)));
    }
    let expected = [
        (2 * BLOCK, 3, GIB),
        (2 * BLOCK + 5 * PAGE, 3, 0x70_4000),
        (2 * BLOCK + 8 * PAGE, 3, 0x70_7000),
    ];
    assert_eq!(mapped(&machine), expected);
    assert_clean(&machine);
}

/// Whether the table of the page exists or not, a request is refused for the same reason.
#[test]
fn a_fault_that_makes_no_sense_is_refused_where_its_table_exists_too() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0x10_0000);
    let before = machine.snapshot();
    let good = FaultRequest::new(Ipa::new(PAGE), range(PAGE, PAGE), Pa::new(0), normal());
    let with = |window, pa| FaultRequest {
        window,
        pa: Pa::new(pa),
        ..good
    };
    for window in [range(2 * PAGE, PAGE), range(0, PAGE)] {
        let outside = space.fault(&with(window, 0));
        assert_eq!(outside, Err(MapError::OutsideWindow(Ipa::new(PAGE))));
    }
    for odd in [
        with(range(PAGE - 8, 2 * PAGE), 0),
        with(range(PAGE, PAGE + 8), 0),
        with(range(PAGE, PAGE), 8),
    ] {
        assert!(matches!(space.fault(&odd), Err(MapError::Unaligned(_))));
    }
    // Alike at both ends, or in input and output.
    for (window, pa) in [
        (range(PAGE + 8, 2 * PAGE), 0),
        (range(PAGE, 2 * PAGE), 8),
        (range(PAGE + 8, 2 * PAGE), 8),
    ] {
        let odd = FaultRequest {
            ipa: Ipa::new(2 * PAGE + 1),
            ..with(window, pa)
        };
        assert!(matches!(space.fault(&odd), Err(MapError::Unaligned(_))));
    }
    let wide = space.fault(&with(range(PAGE, 1 << 39), 0));
    assert!(matches!(wide, Err(MapError::OutOfInput(_))));
    let far = |pa, bits| {
        Err(MapError::Encode(EncodeError::OutOfRange {
            pa: Pa::new(pa),
            bits,
        }))
    };
    let beyond = space.fault(&with(range(PAGE, PAGE), 1 << 40));
    assert_eq!(beyond, far(1 << 40, 40));
    let across = space.fault(&with(range(PAGE, 2 * PAGE), (1 << 40) - PAGE));
    assert_eq!(across, far(1 << 40, 40));
    assert_eq!(machine.snapshot(), before);
}

#[test]
fn a_deferred_fault_beside_a_mapped_page_leaves_the_caches_alone() {
    let machine = machine(8);
    let mut space = space(&machine);
    machine.expect_deferred(true);
    map(&mut space, 0, PAGE, 0x10_0000);
    let _ = machine.take_events();
    let page = range(PAGE, PAGE);
    let request = FaultRequest::new(Ipa::new(PAGE), page, Pa::new(0x20_0000), normal());
    let made = space.fault(&request.deferred());
    assert_eq!(made, Ok(FaultOutcome::Mapped(Level::PAGE)));
    let cleans = |event: &Event| matches!(event, Event::Data(_) | Event::Fetch(_));
    assert!(!machine.take_events().iter().any(cleans));
    space.flush(page).unwrap();
    assert_eq!(
        machine.take_events().iter().filter(|e| cleans(e)).count(),
        2
    );
}

#[test]
fn an_odd_address_relaxes_the_page_that_it_is_in() {
    let machine = machine(8);
    let mut space = space(&machine);
    let read = LeafAttrs::normal(Perms::READ);
    for page in [6, 7] {
        let one = stage2::MapRequest {
            attrs: read,
            ..request(page * PAGE, PAGE, GIB + page * PAGE)
        };
        space.map(&one).unwrap();
    }
    let relaxed = space.relax_perms(Ipa::new(7 * PAGE + 0x123), Perms::WRITE);
    assert_eq!(relaxed, Ok(FaultOutcome::Relaxed));
    assert!(leaf_at(&machine, 7 * PAGE).write);
    assert!(!leaf_at(&machine, 6 * PAGE).write);
    assert_clean(&machine);
}

/// What is odd on two sides in the same way is as odd as on one.
#[test]
fn a_window_that_is_no_whole_pages_is_refused_where_no_table_is() {
    let machine = machine(8);
    let space = space(&machine);
    for pa in [GIB, GIB + 8] {
        let request = FaultRequest::new(Ipa::new(16), range(8, PAGE), Pa::new(pa), normal());
        let refused = space.fault(&request);
        assert!(matches!(refused, Err(MapError::Unaligned(_))));
    }
    let odd_end = FaultRequest::new(Ipa::new(0), range(0, PAGE + 8), Pa::new(8), normal());
    let refused = space.fault(&odd_end);
    assert!(matches!(refused, Err(MapError::Unaligned(_))));
    assert_clean(&machine);
}
