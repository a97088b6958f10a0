//! Runs of equal entries, and the text that shows them.

#![expect(clippy::unwrap_used, reason = "a step that cannot be done fails")]

use stage2::{
    Age, Annotation, Blocks, Combine, Device, LeafAttrs, Level, MapError, MapRequest, MemType, Pa,
    Perms, Run, RunKind, SwBits,
};

use crate::kit::*;

fn runs(space: &Space<'_>, from: u64, size: u64) -> Vec<Run> {
    space.runs(range(from, size)).unwrap().collect()
}

fn run(from: u64, size: u64, level: Level, kind: RunKind) -> Run {
    Run {
        range: range(from, size),
        level,
        kind,
    }
}

fn mapped_at(pa: u64) -> RunKind {
    RunKind::Mapped {
        pa: Pa::new(pa),
        attrs: normal(),
    }
}

#[test]
fn equal_neighbours_are_one_run() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 2 * BLOCK + 3 * PAGE, GIB);
    let pages = run(2 * BLOCK, 3 * PAGE, Level::PAGE, mapped_at(GIB + 2 * BLOCK));
    let blocks = run(0, 2 * BLOCK, Level::L2, mapped_at(GIB));
    assert_eq!(runs(&space, 0, GIB), [blocks, pages]);
}

#[test]
fn other_memory_permissions_notes_and_gaps_end_a_run() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 2 * PAGE, GIB);
    map(&mut space, 2 * PAGE, PAGE, 2 * GIB);
    map(&mut space, 4 * PAGE, PAGE, GIB + 4 * PAGE);
    let read = LeafAttrs::normal(Perms::READ);
    let weaker = MapRequest {
        attrs: read,
        ..request(5 * PAGE, PAGE, GIB + 5 * PAGE)
    };
    space.map(&weaker).unwrap();
    let notes = [1, 2].map(|payload| Annotation::try_new(payload).unwrap());
    space.annotate(range(6 * PAGE, 2 * PAGE), notes[0]).unwrap();
    space.annotate(range(8 * PAGE, PAGE), notes[1]).unwrap();
    let weak = RunKind::Mapped {
        pa: Pa::new(GIB + 5 * PAGE),
        attrs: read,
    };
    let page = |from, pages, kind| run(from * PAGE, pages * PAGE, Level::PAGE, kind);
    let expected = [
        page(0, 2, mapped_at(GIB)),
        page(2, 1, mapped_at(2 * GIB)),
        page(4, 1, mapped_at(GIB + 4 * PAGE)),
        page(5, 1, weak),
        page(6, 2, RunKind::Annotated(notes[0])),
        page(8, 1, RunKind::Annotated(notes[1])),
    ];
    assert_eq!(runs(&space, 0, 1 << 39), expected);
    assert_eq!(
        runs(&space, PAGE, 2 * PAGE),
        [
            page(1, 1, mapped_at(GIB + PAGE)),
            page(2, 1, mapped_at(2 * GIB)),
        ]
    );
}

#[test]
fn who_looks_at_few_slots_gets_a_part_of_a_run_or_learns_how_far_nothing_is() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, GIB + 5 * PAGE, 4 * PAGE, GIB);
    let look = |from: u64, slots| {
        let runs = space.runs(range(from, 3 * GIB - from)).unwrap();
        let mut runs = runs.limited(slots);
        let found = runs
            .next()
            .map(|run| (run.range.start().get(), run.range.len()));
        (found, runs.position().get())
    };
    let leaf = GIB + 5 * PAGE;
    assert_eq!(look(0, 6), (None, leaf));
    assert_eq!(look(0, 7), (Some((leaf, PAGE)), leaf + PAGE));
    assert_eq!(
        look(leaf + PAGE, 2),
        (Some((leaf + PAGE, 2 * PAGE)), leaf + 3 * PAGE)
    );
    assert_eq!(look(leaf, 5), (Some((leaf, 4 * PAGE)), leaf + 4 * PAGE));
    assert_eq!(look(leaf + 4 * PAGE, 9999), (None, 3 * GIB));
}

#[test]
fn what_is_empty_ends_at_the_first_leaf() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, GIB + BLOCK + 7 * PAGE, 2 * PAGE, GIB);
    map(&mut space, GIB + 3 * BLOCK, BLOCK, GIB);
    let note = Annotation::try_new(1).unwrap();
    space
        .annotate(range(GIB + BLOCK + 3 * PAGE, PAGE), note)
        .unwrap();
    let empty_to = |from: u64, end: u64| space.empty_to(range(from, end - from)).unwrap().get();
    let leaf = GIB + BLOCK + 7 * PAGE;
    assert_eq!(empty_to(0, GIB), GIB);
    assert_eq!(empty_to(0, 2 * GIB), leaf);
    assert_eq!(empty_to(0, leaf), leaf);
    assert_eq!(empty_to(leaf + PAGE, leaf + 2 * PAGE), leaf + PAGE);
    assert_eq!(empty_to(leaf + 2 * PAGE, leaf + 5 * PAGE), leaf + 5 * PAGE);
    assert_eq!(empty_to(leaf + 2 * PAGE, 2 * GIB), GIB + 3 * BLOCK);
    let within = GIB + 3 * BLOCK + PAGE;
    assert_eq!(empty_to(within, within + PAGE), within);
    assert_eq!(empty_to(GIB + 4 * BLOCK, 3 * GIB), 3 * GIB);
    space.zap(range(leaf, 2 * PAGE)).unwrap();
    assert_eq!(empty_to(0, 2 * GIB), GIB + 3 * BLOCK);
    let past = space.empty_to(range(1 << 39, PAGE));
    assert_eq!(past.err(), Some(MapError::OutOfInput(range(1 << 39, PAGE))));
}

#[test]
fn a_run_reaches_out_of_the_range_by_whole_slots() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, 2 * BLOCK, GIB);
    let whole = run(0, BLOCK, Level::L2, mapped_at(GIB));
    assert_eq!(runs(&space, PAGE, PAGE), [whole]);
    let past = space.runs(range(1 << 39, PAGE));
    let refused = MapError::OutOfInput(range(1 << 39, PAGE));
    assert_eq!(past.err(), Some(refused));
}

#[test]
fn the_dump_is_a_line_for_each_run() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0x8000_0000, 3 * PAGE, 0x4000_0000);
    let blocks = request(0xc000_0000, GIB, 0xc000_0000).with_blocks(Blocks::Largest);
    space.map(&blocks).unwrap();
    let note = Annotation::try_new(0x2a).unwrap();
    space.annotate(range(0x8020_0000, BLOCK), note).unwrap();
    let text = "\
000080000000-000080002fff -> 000040000000     12 KiB rwxu WB L3
000080200000-0000803fffff note 0x2a      2 MiB L2
0000c0000000-0000ffffffff -> 0000c0000000      1 GiB rwxu WB L1
";
    assert_eq!(space.dump(range(0, 1 << 39)).to_string(), text);
    let outside = space.dump(range(1 << 39, PAGE)).to_string();
    assert_eq!(
        outside,
        "Ipa[0x8000000000..0x8000001000) is outside the table\n"
    );
}

#[test]
fn attributes_print_in_few_letters() {
    let with = |perms, mem, combine| LeafAttrs::new(perms, mem, combine).to_string();
    let (honour, force) = (Combine::HonourGuest, Combine::ForceStage2);
    let none = Perms::empty();
    assert_eq!(with(Perms::RW, MemType::WriteBack, force), "rw-- WB!");
    assert_eq!(with(none, MemType::WriteThrough, honour), "---- WT");
    assert_eq!(with(none, MemType::WriteProtected, honour), "---- WP");
    assert_eq!(
        with(Perms::EXEC_USER, MemType::NonCacheable, honour),
        "---u NC"
    );
    assert_eq!(
        with(Perms::EXEC_KERNEL, MemType::Uncached, force),
        "--x- UC!"
    );
    for (device, name) in [
        (Device::NGnRnE, "-w-- Dev-nGnRnE"),
        (Device::NGnRE, "-w-- Dev-nGnRE"),
        (Device::NGRE, "-w-- Dev-nGRE"),
        (Device::GRE, "-w-- Dev-GRE"),
    ] {
        assert_eq!(with(Perms::WRITE, MemType::Device(device), honour), name);
    }
    let old = normal()
        .with_age(Age::Old)
        .with_sw(SwBits::try_new(0xb).unwrap());
    assert_eq!(old.to_string(), "rwxu WB old sw=b");
}

#[test]
fn sizes_print_in_the_largest_unit_that_leaves_no_rest() {
    let machine = machine(8);
    let mut space = space(&machine);
    for (at, size, text) in [
        (0, PAGE, "4 KiB"),
        (BLOCK, BLOCK + PAGE, "2 MiB"),
        (4 * GIB, 4 * GIB, "4 GiB"),
    ] {
        map(&mut space, at, size, at);
        let line = space.dump(range(at, PAGE)).to_string();
        let line = space.dump(range(at, size)).to_string() + &line;
        assert!(line.contains(text), "{line}");
    }
    let tebibyte = run(0, 1 << 40, Level::L1, mapped_at(0)).to_string();
    assert!(tebibyte.contains("      1 TiB rwxu"), "{tebibyte}");
}
