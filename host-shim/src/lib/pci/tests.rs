//! Behaviour on functions that are made up, with registers as the specification describes them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::vec::Vec;

use board::{AddrRange, PciBridge, PciWindow, Tree};
use vm_fdt::FdtWriter;

use super::*;

/// A register: its value, and which bits a write changes.
#[derive(Clone, Copy)]
struct Register {
    value: u32,
    writable: u32,
}

/// Functions as maps of their registers.
#[derive(Default)]
struct Bus {
    functions: BTreeMap<Function, RefCell<BTreeMap<u16, Register>>>,
}

impl Bus {
    fn add(&mut self, place: (u8, u8), registers: &[(u16, u32, u32)]) -> Function {
        let function = Function::new(0, place.0, place.1).unwrap();
        let list = registers.iter().map(|&(offset, value, writable)| {
            let register = Register { value, writable };
            (offset, register)
        });
        self.functions
            .insert(function, RefCell::new(list.collect()));
        function
    }
}

impl ConfigSpace for Bus {
    fn read(&self, function: Function, offset: u16) -> u32 {
        assert!(offset.is_multiple_of(4) && offset < 4096);
        let Some(registers) = self.functions.get(&function) else {
            return u32::MAX;
        };
        registers.borrow().get(&offset).map_or(0, |r| r.value)
    }

    fn write(&self, function: Function, offset: u16, value: u32) {
        assert!(offset.is_multiple_of(4) && offset < 4096);
        if let Some(registers) = self.functions.get(&function)
            && let Some(register) = registers.borrow_mut().get_mut(&offset)
        {
            register.value = register.value & !register.writable | value & register.writable;
        }
    }
}

const ID: (u16, u32, u32) = (0, 0x11e8_1234, 0);
/// Bits of the command that can be set, and a status of which nothing must be cleared.
const COMMAND: (u16, u32, u32) = (4, 0x0010_0000, 0x547);

/// Windows as on QEMU's virt, but `size` bytes small and 0x1000_0000 lower on the bus.
fn bridge(size: u64) -> PciBridge {
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    let node = fdt.begin_node("pcie@10000000").unwrap();
    fdt.property_string("compatible", "pci-host-ecam-generic")
        .unwrap();
    fdt.property_array_u64("reg", &[0x40_1000_0000, 0x1000_0000])
        .unwrap();
    fdt.end_node(node).unwrap();
    fdt.end_node(root).unwrap();
    let blob = fdt.finish().unwrap();
    let mut bridge = Tree::new(&blob).unwrap().pci_bridge().unwrap();
    let window = |cpu, bus| {
        let cpu = AddrRange::with_size(cpu, size).unwrap();
        Some(PciWindow { cpu, bus })
    };
    bridge.memory32 = window(0x1000_0000, 0);
    bridge.memory64 = window(0x80_0000_0000, 0x80_0000_0000);
    bridge
}

#[test]
fn requester_ids_are_bus_device_and_function() {
    let function = Function::new(0x12, 31, 5).unwrap();
    assert_eq!(function.requester(), 0x12fd);
    assert_eq!(Function::from_requester(0x12fd), function);
    assert_eq!(
        (function.bus(), function.device(), function.number()),
        (0x12, 31, 5)
    );
    assert_eq!(std::format!("{function}"), "12:1f.5");
    assert_eq!(Function::new(0, 32, 0), None);
    assert_eq!(Function::new(0, 0, 8), None);
}

#[test]
fn functions_are_found_where_they_are() {
    let mut bus = Bus::default();
    let class = (8, 0x00ff_0010, 0);
    bus.add((1, 0), &[ID, class]);
    // A device that answers for any function has one.
    bus.add((1, 3), &[ID, class]);
    let multiple = (0xc, 0x0080_0000, 0);
    bus.add((2, 0), &[ID, multiple]);
    bus.add((2, 7), &[ID, (0xc, 0x0001_0000, 0)]);
    // Without function 0 there is no device.
    bus.add((3, 1), &[ID]);
    let found: Vec<_> = functions(&bus, 0).collect();
    let places: Vec<_> = found.iter().map(|f| f.function.requester()).collect();
    assert_eq!(places, [1 << 3, 2 << 3, 2 << 3 | 7]);
    assert_eq!((found[0].vendor, found[0].device), (0x1234, 0x11e8));
    assert_eq!(found[0].class, 0x00_ff00);
    assert_eq!([found[1].header, found[2].header], [0, 1]);
    assert_eq!(functions(&bus, 1).count(), 0);
}

#[test]
fn bars_say_kind_and_size_and_keep_their_values() {
    let mut bus = Bus::default();
    let function = bus.add(
        (1, 0),
        &[
            ID,
            COMMAND,
            (0x10, 0x1230_0000, 0xfff0_0000),
            (0x14, 0x4000_000c, 0xffff_c000),
            (0x18, 0x80, 0xffff_ffff),
            (0x1c, 0xc001, 0xffe0),
            (0x24, 0x0, 0xffff_fff0),
        ],
    );
    set_command(&bus, function, MEMORY_SPACE | BUS_MASTER);
    let found = bars(&bus, function).unwrap();
    let bar = |index, kind, size, address| {
        Some(Bar {
            index,
            kind,
            prefetchable: index == 1,
            size,
            address,
        })
    };
    assert_eq!(
        found,
        [
            bar(0, BarKind::Memory32, 1 << 20, 0x1230_0000),
            bar(1, BarKind::Memory64, 0x4000, 0x80_4000_0000),
            None,
            bar(3, BarKind::Io, 0x20, 0xc000),
            None,
            bar(5, BarKind::Memory32, 0x10, 0),
        ]
    );
    assert_eq!(bus.read(function, 0x18), 0x80);
    assert_eq!(bus.read(function, 0x1c), 0xc001);
    // The status was not cleared, and the function answers again.
    assert_eq!(bus.read(function, 4), 0x0010_0006);
}

#[test]
fn a_bar_beyond_four_gib_is_sized_by_both_halves() {
    let mut bus = Bus::default();
    let function = bus.add(
        (1, 0),
        &[ID, COMMAND, (0x10, 0x4, 0), (0x14, 0, 0xffff_fff0)],
    );
    let found = bars(&bus, function).unwrap();
    assert_eq!(found[0].map(|bar| bar.size), Some(1 << 36));
}

#[test]
fn bars_of_no_known_kind_are_refused() {
    for (offset, value) in [(0x10, 2), (0x24, 4), (0x10, 6)] {
        let mut bus = Bus::default();
        let function = bus.add((1, 0), &[ID, COMMAND, (offset, value, 0xffff_f000)]);
        let refused = bars(&bus, function);
        assert!(
            matches!(refused, Err(PciError::BadBar { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn registers_are_placed_apart_aligned_and_inside() {
    let mut bus = Bus::default();
    let mut windows = Windows::new(&bridge(0x40_0000));
    let small = (0x10, 0, 0xffff_fff0);
    let large = (0x18, 0, 0xfff0_0000);
    let wide = (0x20, 0xc, 0xffff_0000);
    let upper = (0x24, 0, 0xffff_ffff);
    let first = bus.add((1, 0), &[ID, COMMAND, small, large, wide, upper]);
    let second = bus.add((2, 0), &[ID, COMMAND, small]);
    set_command(&bus, first, MEMORY_SPACE);
    let found = place(&bus, first, &mut windows).unwrap();
    let addresses: Vec<_> = found.iter().flatten().map(|bar| bar.address).collect();
    assert_eq!(addresses, [0x1000, 0x10_0000, 0x80_0000_0000]);
    assert_eq!(command(&bus, first), 0);
    assert_eq!(bus.read(first, 0x18), 0x10_0000);
    assert_eq!([bus.read(first, 0x20), bus.read(first, 0x24)], [0xc, 0x80]);
    let other = place(&bus, second, &mut windows).unwrap()[0].unwrap();
    assert_eq!(other.address, 0x20_0000);
    // By pages, where the CPU sees it.
    let cpu = windows.cpu(&other).unwrap();
    assert_eq!((cpu.start(), cpu.size()), (0x1020_0000, 0x1000));
    let cpu = windows.cpu(&found[4].unwrap()).unwrap();
    assert_eq!((cpu.start(), cpu.size()), (0x80_0000_0000, 0x1_0000));
}

#[test]
fn a_full_window_is_an_error_and_a_wide_register_takes_the_other() {
    let mut bus = Bus::default();
    let mut windows = Windows::new(&bridge(0x2000));
    let wide = |at| [(at, 4, 0xffff_f000), (at + 4, 0, 0xffff_ffff)];
    let pairs = [wide(0x10), wide(0x18), wide(0x20)];
    let registers = [&[ID, COMMAND], pairs.as_flattened()].concat();
    let function = bus.add((1, 0), &registers);
    let found = place(&bus, function, &mut windows).unwrap();
    let addresses: Vec<_> = found.iter().flatten().map(|bar| bar.address).collect();
    assert_eq!(addresses, [0x80_0000_0000, 0x80_0000_1000, 0x1000]);
    let size = 0x1000;
    let refused = place(&bus, function, &mut windows);
    assert_eq!(refused, Err(PciError::NoRoom { function, size }));
}

#[test]
fn what_was_not_placed_is_nowhere() {
    let windows = Windows::new(&bridge(0x2000));
    let bar = Bar {
        index: 0,
        kind: BarKind::Memory32,
        prefetchable: false,
        size: 0x1000,
        address: 0x8000,
    };
    assert_eq!(windows.cpu(&bar), None);
    let io = Bar {
        kind: BarKind::Io,
        address: 0x1000,
        ..bar
    };
    assert_eq!(windows.cpu(&io), None);
}

#[test]
fn capabilities_are_followed_to_their_end() {
    let mut bus = Bus::default();
    let express = (0x40, 0x0002_0010, 0);
    let msi_x = (0x80, 0x0003_4011, 0);
    let function = bus.add((1, 0), &[ID, COMMAND, (0x34, 0x83, 0), msi_x, express]);
    let ids: Vec<_> = capabilities(&bus, function)
        .map(|c| (c.id, c.offset))
        .collect();
    assert_eq!(ids, [(0x11, 0x80), (0x10, 0x40)]);
    assert_eq!(find_capability(&bus, function, 5), None);
}

#[test]
fn a_list_that_runs_in_circles_ends() {
    let mut bus = Bus::default();
    let function = bus.add((1, 0), &[ID, COMMAND, (0x34, 0x40, 0), (0x40, 0x4009, 0)]);
    assert!(capabilities(&bus, function).count() <= 48);
    let without = bus.add((2, 0), &[ID, (0x34, 0x40, 0), (0x40, 0x4009, 0)]);
    assert_eq!(capabilities(&bus, without).count(), 0);
}

#[test]
fn pins_are_one_to_four() {
    let mut bus = Bus::default();
    let with = bus.add((1, 0), &[ID, (0x3c, 0x01ff, 0)]);
    let without = bus.add((2, 0), &[ID, (0x3c, 0x00ff, 0)]);
    let absurd = bus.add((3, 0), &[ID, (0x3c, 0x05ff, 0)]);
    let pins = [with, without, absurd].map(|f| interrupt_pin(&bus, f));
    assert_eq!(pins, [Some(1), None, None]);
}

#[test]
fn a_function_that_can_is_reset_and_gets_its_registers_back() {
    let mut bus = Bus::default();
    let mut windows = Windows::new(&bridge(0x2000));
    let list = [(0x34, 0x40, 0), (0x40, 0x0002_0010, 0), (0x44, 1 << 28, 0)];
    // Status bits, which are cleared by ones, and a control register with something in it.
    let control = (0x48, 0x000f_0010, 0xffff_ffff);
    let bar = (0x10, 0, 0xffff_f000);
    let registers = [&[ID, COMMAND, control, bar][..], &list].concat();
    let function = bus.add((1, 0), &registers);
    let found = place(&bus, function, &mut windows).unwrap();
    let mut waited = 0;
    assert!(reset_function(&bus, function, || waited += 1));
    assert_eq!((waited, bus.read(function, 0x48)), (1, 0x8010));
    bus.write(function, 0x10, 0);
    restore(&bus, function, &found);
    assert_eq!(bus.read(function, 0x10), 0x1000);
}

#[test]
fn a_function_that_can_not_is_not_reset() {
    let mut bus = Bus::default();
    let control = (0x48, 0, 0xffff_ffff);
    let express = [(0x34, 0x40, 0), (0x40, 0x0002_0010, 0)];
    let registers = [&[ID, COMMAND, control][..], &express].concat();
    let without = bus.add((1, 0), &registers);
    let plain = bus.add((2, 0), &[ID, COMMAND]);
    assert!(!reset_function(&bus, without, || panic!(
        "it waits for nothing"
    )));
    assert!(!reset_function(&bus, plain, || panic!(
        "it waits for nothing"
    )));
    assert_eq!(bus.read(without, 0x48), 0);
}

#[test]
fn the_status_of_a_virtio_device_is_in_its_common_configuration() {
    let mut bus = Bus::default();
    let id = (0, 0x1042_1af4, 0);
    let status = (4, 0x0010_0000, 0);
    let list = [
        (0x34, 0x40, 0),
        (0x40, 0x0510_5009, 0),
        (0x50, 0x0110_0009, 0),
    ];
    let place = [(0x54, 4, 0), (0x58, 0x1000, 0), (0x5c, 0x38, 0)];
    let with = |id, place: [_; 3]| [&[id, status][..], &list, &place].concat();
    let good = bus.add((1, 0), &with(id, place));
    assert_eq!(virtio_status(&bus, good), Some((4, 0x1014)));
    let other = bus.add((2, 0), &with((0, 0x1042_1af5, 0), place));
    let [bar, offset, _] = place;
    let short = bus.add((3, 0), &with(id, [bar, offset, (0x5c, 0x14, 0)]));
    let far = bus.add(
        (4, 0),
        &with(id, [bar, (0x58, u32::MAX, 0), (0x5c, 0x38, 0)]),
    );
    for wrong in [other, short, far] {
        assert_eq!(virtio_status(&bus, wrong), None);
    }
}
