//! The host's map on the fake machine, by example and by property.

use proptest::prelude::*;
use stage2::testing::{Arch, FakeMachine};
use std::boxed::Box;
use std::vec::Vec;

use super::*;
use crate::features::IdRegisters;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn range(start: u64, end: u64) -> AddrRange {
    AddrRange::new(start, end).unwrap()
}

/// A core with a 40-bit physical address space and FEAT_XNX.
fn features() -> Features {
    Features::decode(&IdRegisters {
        mmfr0: 0x10_1122,
        mmfr1: 0x1021_2122,
        ..IdRegisters::default()
    })
}

/// RAM from 1 GiB to 3 GiB and from 4 GiB to 4.5 GiB; EL2 in the last 1.8 MiB of the former.
fn el2() -> AddrRange {
    range(3 * GIB - 0x1d_0000, 3 * GIB)
}

fn map(machine: &FakeMachine) -> HostMap<&FakeMachine> {
    let mut memory = RangeList::new();
    memory.insert(range(GIB, 3 * GIB), "ram").unwrap();
    memory
        .insert(range(4 * GIB, 4 * GIB + GIB / 2), "ram")
        .unwrap();
    let format = format(&features()).unwrap();
    let map = HostMap::new(format, machine, Default::default(), memory, el2()).unwrap();
    machine.attach(Pa::new(map.root()));
    map
}

fn machine(tables: usize) -> FakeMachine {
    FakeMachine::new(Arch::arm_4k(1, 40, false), tables)
}

/// Start and size of the leaf at `address`, read back by the independent walker.
fn leaf(machine: &FakeMachine, address: u64) -> Option<(u64, u64, stage2::testing::RawLeaf)> {
    let arch = Arch::arm_4k(1, 40, false);
    machine
        .leaves()
        .into_iter()
        .find_map(|(start, level, leaf)| {
            let size = 1u64 << arch.shift(level);
            (start..start + size)
                .contains(&address)
                .then_some((start, size, leaf))
        })
}

#[test]
fn ram_without_el2_in_its_gib_is_mapped_by_one_block() {
    let machine = machine(32);
    let map = map(&machine);
    assert_eq!(map.fault(GIB + 0x1234_5678), Answer::Mapped);
    let (start, size, raw) = leaf(&machine, GIB).unwrap();
    assert_eq!((start, size), (GIB, GIB));
    assert!(raw.pa == GIB && raw.read && raw.write && raw.exec_kernel && raw.exec_user);
}

#[test]
fn next_to_el2_the_largest_block_that_avoids_it_is_taken() {
    let machine = machine(32);
    let map = map(&machine);
    assert_eq!(map.fault(2 * GIB + 5), Answer::Mapped);
    assert_eq!(leaf(&machine, 2 * GIB).unwrap().1, 2 * MIB);
    assert_eq!(map.fault(el2().start() - 1), Answer::Mapped);
    let (start, size, _) = leaf(&machine, el2().start() - 1).unwrap();
    assert_eq!((start, size), (el2().start() - 4096, 4096));
}

#[test]
fn el2_is_refused_on_every_page_and_stays_unmapped() {
    let machine = machine(32);
    let map = map(&machine);
    for page in (el2().start()..el2().end()).step_by(4096) {
        assert_eq!(map.fault(page), Answer::Refused);
        assert_eq!(map.fault(page + 4095), Answer::Refused);
        assert!(leaf(&machine, page).is_none());
    }
}

#[test]
fn devices_are_never_executable_and_never_reach_into_ram() {
    let machine = machine(32);
    let map = map(&machine);
    assert_eq!(map.fault(0x900_0000), Answer::Mapped);
    let (start, size, raw) = leaf(&machine, 0x900_0000).unwrap();
    assert_eq!((start, size), (0, GIB));
    assert!(raw.read && raw.write && !raw.exec_kernel && !raw.exec_user);
    assert_eq!(map.fault(4 * GIB + GIB / 2), Answer::Mapped);
    assert_eq!(leaf(&machine, 4 * GIB + GIB / 2).unwrap().1, 2 * MIB);
}

#[test]
fn hidden_registers_are_refused_and_their_neighbours_are_not() {
    let machine = machine(32);
    let mut map = map(&machine);
    assert!(map.hide(range(0x803_0000, 0x803_1000)));
    assert_eq!(map.fault(0x803_0fff), Answer::Refused);
    assert_eq!(map.fault(0x802_f000), Answer::Mapped);
    assert_eq!(map.fault(0x803_1000), Answer::Mapped);
    assert!(leaf(&machine, 0x803_0000).is_none());
    assert_eq!(leaf(&machine, 0x802_f000).unwrap().1, 4096);
    assert_eq!(map.fault(0x803_0000), Answer::Refused);
    // No guest gets them as a device, either.
    assert!(map.hides(range(0x803_0000, 0x804_0000)) && map.hides(range(0x802_f000, 0x803_1000)));
    assert!(!map.hides(range(0x802_f000, 0x803_0000)) && !map.hides(range(0x803_1000, 0x804_0000)));
}

#[test]
fn memory_of_firmware_is_refused_and_its_neighbours_are_not() {
    let machine = machine(32);
    let mut map = map(&machine);
    let firmware = range(GIB, GIB + 0x8_0000);
    assert!(map.hide(firmware));
    assert_eq!(map.fault(GIB + 0x8_0000), Answer::Mapped);
    assert_eq!(map.fault(GIB + 2 * MIB), Answer::Mapped);
    for page in (firmware.start()..firmware.end()).step_by(4096) {
        assert_eq!(map.fault(page), Answer::Refused);
        assert!(leaf(&machine, page).is_none());
    }
    let (start, _, raw) = leaf(&machine, GIB + 0x8_0000).unwrap();
    assert!(raw.pa == start && raw.exec_kernel);
}

#[test]
fn addresses_beyond_the_tables_are_refused() {
    let machine = machine(32);
    let map = map(&machine);
    assert_eq!(map.fault((1 << 40) - 1), Answer::Mapped);
    assert_eq!(map.fault(1 << 40), Answer::Refused);
    assert_eq!(map.fault(u64::MAX), Answer::Refused);
}

/// A 48-bit space: every 512 GiB needs a table of its own. One is spare.
fn scarce() -> FakeMachine {
    FakeMachine::new(Arch::arm_4k(0, 48, false), 5)
}

fn map_48(machine: &FakeMachine) -> HostMap<&FakeMachine> {
    let features = Features::decode(&IdRegisters {
        mmfr0: 0x10_1125,
        mmfr1: 0x1021_2122,
        ..IdRegisters::default()
    });
    let mut memory = RangeList::new();
    memory.insert(range(GIB, 3 * GIB), "ram").unwrap();
    let format = format(&features).unwrap();
    let map = HostMap::new(format, machine, Default::default(), memory, el2()).unwrap();
    machine.attach(Pa::new(map.root()));
    map
}

#[test]
fn without_table_pages_device_mappings_are_recycled() {
    let machine = scarce();
    let map = map_48(&machine);
    assert_eq!(map.fault(GIB), Answer::Mapped);
    assert_eq!(map.fault(1 << 39), Answer::Mapped);
    assert_eq!(map.fault(2 << 39), Answer::MappedAfterRecycling);
    assert_eq!(map.fault(1 << 39), Answer::MappedAfterRecycling);
    assert_eq!(machine.finish(), Vec::<std::string::String>::new());
}

#[test]
fn recycling_keeps_ram_mapped_and_el2_refused() {
    let machine = scarce();
    let map = map_48(&machine);
    assert_eq!(map.fault(GIB), Answer::Mapped);
    for window in 1..511u64 {
        assert_ne!(map.fault(window << 39), Answer::Refused);
    }
    for page in (el2().start()..el2().end()).step_by(4096) {
        assert_eq!(map.fault(page), Answer::Refused);
    }
    let arch = Arch::arm_4k(0, 48, false);
    let ram = machine
        .leaves()
        .into_iter()
        .find(|(start, ..)| *start == GIB);
    assert_eq!(
        ram.map(|(_, level, _)| 1u64 << arch.shift(level)),
        Some(GIB)
    );
}

#[test]
fn without_any_table_page_a_fault_is_refused_and_changes_nothing() {
    let machine = FakeMachine::new(Arch::arm_4k(0, 48, false), 4);
    let map = map_48(&machine);
    let before = machine.snapshot();
    assert_eq!(map.fault(1 << 39), Answer::Refused);
    assert_eq!(machine.snapshot(), before);
}

#[test]
fn vtcr_for_40_bits_starts_at_level_1() {
    // RES1 31, PS 2, SH0 3, ORGN0 1, IRGN0 1, SL0 1, T0SZ 24 (Arm ARM D24.2, VTCR_EL2).
    let format = format(&features()).unwrap();
    assert_eq!(vtcr(&format, false), 0x8002_3558);
    assert_eq!(vtcr(&format, true), 0x800a_3558);
}

/// An IOMMU that walks the host's tables.
struct Walker(&'static FakeMachine);

impl stage2::InvalidateListener for Walker {
    fn invalidate(&self, range: IpaRange) {
        self.0.told(range);
    }
}

const DOORBELL: u64 = 0x809_0000;

/// A map that is lent to an IOMMU; the machine caches for it what it walks.
fn exported(tables: usize) -> (&'static FakeMachine, HostMap<&'static FakeMachine>) {
    let machine: &'static FakeMachine = Box::leak(Box::new(machine(tables)));
    let mut map = map(machine);
    let mut doorbells = RangeList::new();
    let page = range(DOORBELL, DOORBELL + 4096);
    doorbells.insert(page, "doorbells").unwrap();
    let importer = Importer {
        listener: Box::leak(Box::new(Walker(machine))),
        must_be_zero: 0,
        output_bits: 40,
        coarsest_leaf: stage2::Level::L1,
    };
    map.export(importer, &doorbells).unwrap();
    machine.import();
    (machine, map)
}

#[test]
fn an_exported_map_holds_all_ram_of_the_host_and_the_doorbells() {
    let (machine, _map) = exported(64);
    let mapped: u64 = machine
        .leaves()
        .into_iter()
        .map(|(_, level, _)| 1u64 << Arch::arm_4k(1, 40, false).shift(level))
        .sum();
    let ram = 2 * GIB + GIB / 2 - el2().size();
    assert_eq!(mapped, ram + 4096);
    assert!(leaf(machine, el2().start()).is_none());
    let (start, size, raw) = leaf(machine, DOORBELL).unwrap();
    assert_eq!((start, size), (DOORBELL, 4096));
    assert!(raw.write && !raw.exec_kernel);
}

#[test]
fn what_an_exported_map_loses_the_iommu_forgets_and_gets_back_at_once() {
    let (machine, map) = exported(64);
    let page = range(GIB + 5 * MIB, GIB + 5 * MIB + 4096);
    map.take_away(page, Owner::Guest(0)).unwrap();
    assert!(leaf(machine, page.start()).is_none());
    assert!(machine.take_events().iter().any(|event| matches!(
        event,
        stage2::testing::Event::Notify(range) if range.contains(Ipa::new(page.start()))
    )));
    map.give_back(page).unwrap();
    let (start, _, raw) = leaf(machine, page.start()).unwrap();
    assert!(start <= page.start() && raw.write && raw.exec_kernel);
    assert_eq!(machine.finish(), Vec::<std::string::String>::new());
}

#[test]
fn recycling_leaves_the_doorbells_of_an_exported_map_alone() {
    let (machine, map) = exported(64);
    for window in 5..500u64 {
        let answer = map.fault(window * GIB + 0x1000 * window);
        assert_ne!(answer, Answer::Refused);
    }
    map.drop_devices(&mut map.space.write());
    assert!(leaf(machine, 100 * GIB).is_none());
    assert_eq!(leaf(machine, DOORBELL).unwrap().1, 4096);
    assert_eq!(leaf(machine, GIB).unwrap().0, GIB);
    assert_eq!(machine.finish(), Vec::<std::string::String>::new());
}

#[test]
fn an_iommu_that_cannot_walk_the_map_is_refused_and_nobody_walks_it() {
    let machine: &'static FakeMachine = Box::leak(Box::new(machine(64)));
    let mut map = map(machine);
    let importer = |output_bits| Importer {
        listener: Box::leak(Box::new(Walker(machine))),
        must_be_zero: 0,
        output_bits,
        coarsest_leaf: stage2::Level::L1,
    };
    let refused = map.export(importer(36), &RangeList::new());
    let wide = HostMapError::Export(ExportError::TooWide(40));
    assert_eq!(refused, Err(wide));
    assert_eq!(map.export(importer(40), &RangeList::new()), Ok(()));
}

proptest! {
    /// After any faults, every leaf is the identity, none touches EL2, only RAM executes.
    #[test]
    fn any_faults_keep_the_invariant(addresses in prop::collection::vec(0u64..6 * GIB, 1..40)) {
        let machine = machine(40);
        let map = map(&machine);
        for address in addresses {
            let refused = map.fault(address) == Answer::Refused;
            prop_assert_eq!(refused, el2().contains(address));
        }
        let arch = Arch::arm_4k(1, 40, false);
        for (start, level, raw) in machine.leaves() {
            let size = 1u64 << arch.shift(level);
            let leaf = range(start, start + size);
            prop_assert!(raw.pa == start && !leaf.overlaps(el2()));
            let ram = [range(GIB, 3 * GIB), range(4 * GIB, 4 * GIB + GIB / 2)];
            let inside = ram.iter().any(|r| r.contains_range(leaf));
            let outside = ram.iter().all(|r| !r.overlaps(leaf));
            prop_assert!(inside || outside);
            prop_assert_eq!(raw.exec_kernel, inside);
        }
        prop_assert_eq!(machine.finish(), Vec::<std::string::String>::new());
    }
}
