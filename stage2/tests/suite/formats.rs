//! Every format through every operation, read back by the independent walker.

#![expect(clippy::unwrap_used, reason = "a step that cannot be done fails")]

use stage2::testing::{Arch, FakeMachine, HighBits};
use stage2::{
    Age, Aging, Annotation, ArmConfig, ArmFeatures, ArmStage2, Blocks, EncodeError, Entry, Ept,
    EptConfig, Execute, FaultOutcome, FaultRequest, ForceWriteBack, Granule, Ipa, LeafAttrs, Level,
    MapError, MapRequest, Offered, Pa, Perms, Stage2, TableFormat, WideAddresses,
};

use crate::kit::*;

/// A format, and the same retyped for the walker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape<F> {
    pub(crate) format: F,
    pub(crate) arch: Arch,
}

fn arm(
    granule: Granule,
    bits: u8,
    wide: WideAddresses,
    high: HighBits,
    start: i8,
) -> Shape<ArmStage2> {
    let features = ArmFeatures {
        fwb: ForceWriteBack::Off,
        execute: Execute::Split,
        wide,
    };
    let format = ArmStage2::new(&ArmConfig {
        granule,
        input_bits: bits,
        output_bits: bits,
        features,
        start: Level::try_new(start),
    })
    .expect("a known shape");
    let page_shift = u32::from(granule.page_shift());
    let arch = Arch {
        ept: false,
        fwb: false,
        xnx: true,
        high,
        page_shift,
        index_bits: page_shift - 3,
        start,
        input_bits: u32::from(bits),
    };
    Shape { format, arch }
}

pub(crate) fn arm_4k() -> Shape<ArmStage2> {
    let narrow = (WideAddresses::Off, HighBits::None);
    arm(Granule::K4, 40, narrow.0, narrow.1, 1)
}

/// Five levels.
pub(crate) fn arm_4k_wide() -> Shape<ArmStage2> {
    arm(Granule::K4, 52, WideAddresses::On, HighBits::Lpa2, -1)
}

pub(crate) fn arm_16k() -> Shape<ArmStage2> {
    arm(Granule::K16, 47, WideAddresses::Off, HighBits::None, 1)
}

pub(crate) fn arm_64k() -> Shape<ArmStage2> {
    arm(Granule::K64, 52, WideAddresses::Off, HighBits::Lpa, 1)
}

pub(crate) fn ept() -> Shape<Ept> {
    ept_with(Offered::No, Offered::Yes)
}

fn ept_with(access_dirty: Offered, gigabyte: Offered) -> Shape<Ept> {
    let format = Ept::new(&EptConfig {
        output_bits: 52,
        execute_only: Offered::Yes,
        gigabyte,
        access_dirty,
    })
    .expect("a known shape");
    let arch = Arch::ept_4k();
    Shape { format, arch }
}

/// A run of leaves as the walker sees them: input, bytes, output, writable.
type Seen = (u64, u64, u64, bool);

/// A space under test and its sizes.
struct Bench<'m, F: TableFormat> {
    space: Stage2<F, &'m FakeMachine>,
    machine: &'m FakeMachine,
    page: u64,
    block: u64,
    /// Where the block is, in and out: near the ends, where the high address bits are.
    at: u64,
    pa: u64,
}

impl<F: TableFormat> Bench<'_, F> {
    fn map(&mut self, from: u64, size: u64, blocks: Blocks) {
        let pa = Pa::new(self.pa.wrapping_sub(self.at).wrapping_add(from));
        let request = MapRequest::new(Ipa::new(from), size, pa, normal());
        let done = self.space.map(&request.with_blocks(blocks));
        assert!(done.is_ok(), "{done:?}");
        assert_clean(self.machine);
    }

    /// The leaves, joined; and that nothing was done against the rules.
    fn seen(&self) -> Vec<Seen> {
        assert_clean(self.machine);
        let mut runs: Vec<Seen> = Vec::new();
        for (at, level, leaf) in self.machine.leaves() {
            let size = if level == 3 {
                self.page
            } else {
                assert_eq!(level, 2);
                self.block
            };
            match runs.last_mut() {
                Some((from, bytes, pa, write))
                    if *from + *bytes == at && *pa + *bytes == leaf.pa && *write == leaf.write =>
                {
                    *bytes += size;
                }
                _ => runs.push((at, size, leaf.pa, leaf.write)),
            }
        }
        runs
    }

    /// The one run that maps this.
    fn run(&self, from: u64, size: u64, write: bool) -> Seen {
        (
            from,
            size,
            self.pa.wrapping_sub(self.at).wrapping_add(from),
            write,
        )
    }

    fn levels(&self) -> Vec<i8> {
        let mut levels: Vec<i8> = self.machine.leaves().iter().map(|leaf| leaf.1).collect();
        levels.dedup();
        levels
    }
}

fn with<F: TableFormat>(shape: Shape<F>, run: impl FnOnce(&mut Bench<'_, F>)) {
    let machine = FakeMachine::new(shape.arch, 24);
    let space = Stage2::new(shape.format, &machine, 5).expect("a valid set-up");
    machine.attach(space.root());
    let root = machine.tables_in_use();
    let geometry = *space.geometry();
    let block = geometry.slot_size(Level::L2);
    let output_end = 1u64 << space.format().output_bits();
    let mut bench = Bench {
        space,
        machine: &machine,
        page: geometry.page_size(),
        block,
        at: geometry.input_end() - 3 * block,
        pa: output_end - 2 * block,
    };
    run(&mut bench);
    let whole = range(0, geometry.input_end());
    bench.space.unmap(whole).expect("whole slots need no table");
    assert_eq!(bench.seen(), []);
    assert_eq!(machine.tables_in_use(), root);
}

fn map_look_unmap<F: TableFormat>(b: &mut Bench<'_, F>) {
    let (at, page, block) = (b.at, b.page, b.block);
    b.map(at - 2 * page, block + 3 * page, Blocks::Largest);
    assert_eq!(b.levels(), [3, 2, 3]);
    assert_eq!(b.seen(), [b.run(at - 2 * page, block + 3 * page, true)]);
    for (ipa, level) in [(at - 1, Level::PAGE), (at + page, Level::L2)] {
        let found = b.space.lookup(Ipa::new(ipa)).unwrap();
        assert_eq!(found.level, level);
        let pa = Pa::new(b.pa - at + found.slot.start().get());
        let attrs = normal();
        assert_eq!(found.entry, Entry::Leaf { pa, attrs });
    }
    b.space.unmap(range(at + page, page)).unwrap();
    let low = b.run(at - 2 * page, 3 * page, true);
    let high = b.run(at + 2 * page, block - page, true);
    assert_eq!(b.seen(), [low, high]);
    b.map(at + page, page, Blocks::Largest);
    assert_eq!(b.seen(), [b.run(at - 2 * page, block + 3 * page, true)]);
}

fn protect_split_collapse<F: TableFormat>(b: &mut Bench<'_, F>) {
    let (at, page, block) = (b.at, b.page, b.block);
    b.map(at, 2 * block, Blocks::Largest);
    assert_eq!(b.space.write_protect(range(at + page, page)), Ok(1));
    let halves = [b.run(at, block, false), b.run(at + block, block, true)];
    assert_eq!(b.seen(), halves);
    let relaxed = b.space.relax_perms(Ipa::new(at), Perms::WRITE);
    assert_eq!(relaxed, Ok(FaultOutcome::Relaxed));
    assert_eq!(b.seen(), [b.run(at, 2 * block, true)]);
    assert_eq!(b.space.split(range(at, page), Level::PAGE), Ok(1));
    assert_eq!(b.levels(), [3, 2]);
    assert_eq!(b.seen(), [b.run(at, 2 * block, true)]);
    let pages = usize::try_from(block / page).unwrap();
    assert_eq!(b.space.write_protect(range(at, block)), Ok(pages));
    assert_eq!(b.seen(), halves);
    b.space.collapse(Ipa::new(at + page), Level::L2).unwrap();
    assert_eq!(b.levels(), [2]);
    assert_eq!(b.seen(), halves);
}

fn fault_note_zap<F: TableFormat>(b: &mut Bench<'_, F>) {
    let (at, page, block) = (b.at, b.page, b.block);
    let window = range(at, 2 * block);
    let fault = |ipa: u64| FaultRequest::new(Ipa::new(ipa), window, Pa::new(b.pa), normal());
    let (first, second) = (fault(at + 3 * page), fault(at + block + 1));
    let small = first.with_blocks(Blocks::Never);
    let (page_made, block_made) = (Level::PAGE, Level::L2);
    for (request, outcome) in [
        (small, FaultOutcome::Mapped(page_made)),
        (first, FaultOutcome::AlreadyMapped),
        (second, FaultOutcome::Mapped(block_made)),
    ] {
        assert_eq!(b.space.fault(&request), Ok(outcome));
        assert_clean(b.machine);
    }
    let made = [
        b.run(at + 3 * page, page, true),
        b.run(at + block, block, true),
    ];
    assert_eq!(b.seen(), made);
    let note = Annotation::try_new(0xbeef).unwrap();
    b.space.annotate(range(at + 4 * page, page), note).unwrap();
    b.space.zap(range(at, 2 * block)).unwrap();
    assert_eq!(b.seen(), []);
    let noted = b.space.fault(&fault(at + 4 * page));
    assert_eq!(noted, Ok(FaultOutcome::Annotated(note)));
    b.map(at, 4 * page, Blocks::Never);
    b.map(at + block, block, Blocks::Largest);
    b.space.zap_exclusive(range(at + page, block)).unwrap();
    assert_eq!(b.seen(), [b.run(at, page, true)]);
}

/// Neighbours, a call for each, with and without high output bits.
fn one_by_one<F: TableFormat>(b: &mut Bench<'_, F>) {
    let (at, page, block) = (b.at, b.page, b.block);
    for pa in [b.pa, block] {
        b.pa = pa;
        b.map(at, page, Blocks::Largest);
        b.map(at + page, page, Blocks::Largest);
        let window = range(at, block);
        for n in [2, 3] {
            let ipa = Ipa::new(at + n * page + 8);
            let request = FaultRequest::new(ipa, window, Pa::new(b.pa), normal());
            let made = b.space.fault(&request);
            assert_eq!(made, Ok(FaultOutcome::Mapped(Level::PAGE)));
        }
        assert_eq!(b.seen(), [b.run(at, 4 * page, true)]);
        b.space.zap_exclusive(window).unwrap();
    }
}

/// Output that goes on across the address from which a format keeps high bits elsewhere, in one
/// call: linked tables and new ones.
fn across<F: TableFormat>(b: &mut Bench<'_, F>, boundary: u64) {
    let page = b.page;
    b.at = b.block;
    b.pa = boundary - 4 * page;
    let at = b.at;
    b.map(at, 8 * page, Blocks::Never);
    assert_eq!(b.seen(), [b.run(at, 8 * page, true)]);
    let whole = range(at, b.block);
    b.space.zap_exclusive(whole).unwrap();
    b.map(at, 8 * page, Blocks::Never);
    assert_eq!(b.seen(), [b.run(at, 8 * page, true)]);
    assert_eq!(b.space.write_protect(whole), Ok(8));
    b.space.unmap(range(at + page, 6 * page)).unwrap();
    let ends = [b.run(at, page, false), b.run(at + 7 * page, page, false)];
    assert_eq!(b.seen(), ends);
}

#[test]
fn leaves_go_on_where_address_bits_move() {
    with(arm_64k(), |b| across(b, 1 << 48));
    with(arm_4k_wide(), |b| across(b, 1 << 50));
}

/// Pages of 4 KiB are the only ones that some tables know.
fn smaller_than_a_page<F: TableFormat>(b: &mut Bench<'_, F>) {
    b.map(0, b.page, Blocks::Never);
    b.space.zap_exclusive(range(0, b.page)).unwrap();
    for at in [1, 0] {
        let small = MapRequest::new(Ipa::new(at), PAGE, Pa::new(0), normal());
        let unaligned = MapError::Unaligned(PAGE | at);
        assert_eq!(b.space.map(&small), Err(unaligned));
    }
    let window = range(0, PAGE);
    let fault = FaultRequest::new(Ipa::new(0), window, Pa::new(0), normal());
    assert_eq!(b.space.fault(&fault), Err(MapError::Unaligned(PAGE)));
    assert_eq!(b.seen(), []);
}

#[test]
fn less_than_a_page_is_refused_where_the_table_exists_too() {
    for shape in [arm_16k(), arm_64k()] {
        with(shape, |b| {
            b.pa = b.at;
            smaller_than_a_page(b);
        });
    }
}

fn everything<F: TableFormat + Copy>(shape: Shape<F>) {
    with(shape, one_by_one);
    with(shape, map_look_unmap);
    with(shape, protect_split_collapse);
    with(shape, fault_note_zap);
}

#[test]
fn arm_with_4k_pages_does_everything() {
    everything(arm_4k());
    let narrow = (WideAddresses::Off, HighBits::None);
    everything(arm(Granule::K4, 48, narrow.0, narrow.1, 0));
    everything(arm(Granule::K4, 34, narrow.0, narrow.1, 2));
}

#[test]
fn arm_with_4k_pages_and_52_bits_does_everything() {
    everything(arm_4k_wide());
    let wide = (WideAddresses::On, HighBits::Lpa2);
    everything(arm(Granule::K4, 52, wide.0, wide.1, 0));
}

#[test]
fn arm_with_16k_pages_does_everything() {
    everything(arm_16k());
    let wide = (WideAddresses::On, HighBits::Lpa2);
    everything(arm(Granule::K16, 52, wide.0, wide.1, 0));
}

#[test]
fn arm_with_64k_pages_does_everything() {
    everything(arm_64k());
    let narrow = (WideAddresses::Off, HighBits::None);
    everything(arm(Granule::K64, 44, narrow.0, narrow.1, 2));
}

#[test]
fn ept_does_everything() {
    everything(ept());
    everything(ept_with(Offered::Yes, Offered::No));
}

#[test]
fn ages_are_tested_and_cleared_where_there_is_a_flag() {
    fn aged<F: TableFormat>(b: &mut Bench<'_, F>) {
        b.map(b.at, b.page, Blocks::Never);
        let page = range(b.at, b.page);
        assert_eq!(b.space.test_and_clear_young(page, Aging::Clear), Ok(b.page));
        assert_eq!(b.space.test_and_clear_young(page, Aging::Test), Ok(0));
        let found = b.space.lookup(Ipa::new(b.at)).unwrap().entry;
        assert!(matches!(found, Entry::Leaf { attrs, .. } if attrs.age == Age::Old));
        let young = b.space.make_young(Ipa::new(b.at));
        assert_eq!(young, Ok(FaultOutcome::Relaxed));
        assert_eq!(b.space.test_and_clear_young(page, Aging::Test), Ok(b.page));
    }
    with(arm_64k(), aged);
    with(ept_with(Offered::Yes, Offered::Yes), aged);
    with(ept(), |b| {
        b.map(b.at, b.page, Blocks::Never);
        let cleared = b
            .space
            .test_and_clear_young(range(b.at, b.page), Aging::Clear);
        let none = MapError::Encode(EncodeError::NoAccessFlag);
        assert_eq!(cleared, Err(none));
    });
}

#[test]
fn a_leaf_gets_its_access_flag_back() {
    let old = normal().with_age(Age::Old);
    let arm = arm_4k().format;
    let ept = ept_with(Offered::Yes, Offered::Yes).format;
    fn young<F: TableFormat>(format: &F, old: &LeafAttrs) -> LeafAttrs {
        let word = format.encode_attrs(old).unwrap();
        let leaf = format.leaf_word(word, Pa::new(GIB), Level::PAGE);
        assert_eq!(format.decode_attrs(leaf).age, Age::Old);
        let young = format.with_age(leaf, Age::Young).unwrap();
        assert_eq!(format.output(young, Level::PAGE), Pa::new(GIB));
        format.decode_attrs(young)
    }
    assert_eq!(young(&arm, &old), normal());
    assert_eq!(young(&ept, &old), normal());
}

#[test]
fn ept_leaves_may_be_execute_only() {
    with(ept(), |b| {
        let attrs = LeafAttrs::normal(Perms::EXEC);
        let request = MapRequest::new(Ipa::new(b.at), b.page, Pa::new(b.pa), attrs);
        b.space.map(&request).unwrap();
        assert_clean(b.machine);
        let (_, _, leaf) = b.machine.leaves()[0];
        assert!(!leaf.read && !leaf.write && leaf.exec_kernel);
    });
}

#[test]
fn the_largest_blocks_are_those_of_the_format() {
    fn largest<F: TableFormat>(shape: Shape<F>, level: Level) {
        let machine = FakeMachine::new(shape.arch, 24);
        let mut space = Stage2::new(shape.format, &machine, 5).expect("a valid set-up");
        machine.attach(space.root());
        let size = space.geometry().slot_size(level);
        space.map(&request(size, size, size)).unwrap();
        assert_eq!(mapped(&machine), [(size, level.number(), size)]);
        assert_clean(&machine);
    }
    largest(arm_4k_wide(), Level::L0);
    largest(arm_4k(), Level::L1);
    largest(arm_16k(), Level::L2);
    largest(arm_64k(), Level::L1);
    largest(ept(), Level::L1);
}
