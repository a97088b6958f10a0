//! What a VM sees of a function that is made up after QEMU's virtio disk, register class by class.

use std::cell::RefCell;
use std::vec::Vec;

use proptest::prelude::*;

use super::super::{Bar, BarKind, ConfigSpace, Function};
use super::*;

/// A function with registers that take every write, and a note of those.
struct Real {
    registers: RefCell<[u32; 1024]>,
    written: RefCell<Vec<(u16, u32)>>,
}

impl ConfigSpace for Real {
    fn read(&self, function: Function, offset: u16) -> u32 {
        assert_eq!(function, PLACE);
        assert!(offset.is_multiple_of(4));
        self.registers.borrow()[usize::from(offset / 4)]
    }

    fn write(&self, function: Function, offset: u16, value: u32) {
        assert_eq!(function, PLACE);
        assert!(offset.is_multiple_of(4));
        self.written.borrow_mut().push((offset, value));
    }
}

const PLACE: Function = Function::from_requester(2 << 3);

/// Registers of 00:02.0: MSI-X at 0x98, power management at 0xc8, vendor's at 0x84, 0x70 and 0x40, PCI
/// Express at 0xd0, and something in the extended space.
fn real() -> Real {
    let mut registers = [0; 1024];
    let mut set = |offset: usize, value: u32| registers[offset / 4] = value;
    set(0x00, 0x1042_1af4);
    set(0x04, 0x0018_0507); // interrupt asserted, a list; every command bit
    set(0x08, 0x0100_0001);
    set(0x0c, 0x0080_4010); // multi-function, latency and cache line
    set(0x14, 0x1000_0000);
    set(0x20, 0x0000_000c);
    set(0x24, 0x0000_0080);
    set(0x28, 0x1234_5678);
    set(0x2c, 0x1100_1af4);
    set(0x30, 0xfff0_0001);
    set(0x34, 0x98);
    set(0x3c, 0x0102_04ff); // pin D
    set(0x98, 0x8003_8411); // MSI-X, then 0x84
    set(0x9c, 0x0000_0001);
    set(0x84, 0x0514_7009); // vendor, 20 bytes, then 0x70
    set(0x88, 0x0000_0004);
    set(0x94, 0xdada_dada);
    set(0x70, 0x0214_c809); // vendor, 20 bytes, then 0xc8
    set(0xc8, 0x0003_4001); // power management, then 0x40
    set(0xcc, 0x0000_0008);
    set(0x40, 0x0110_d009); // vendor, 16 bytes, then 0xd0
    set(0x4c, 0x0000_1000);
    set(0x50, 0x5050_5050); // behind it
    set(0xd0, 0x0092_0010); // PCI Express, the last
    set(0x100, 0x1402_0001); // extended: AER
    Real {
        registers: RefCell::new(registers),
        written: RefCell::new(Vec::new()),
    }
}

/// BAR 0: I/O; BAR 1: 2 KiB; BAR 2: not placed; BAR 4: 16 KiB, 64 bits, prefetchable.
fn bars() -> [Option<Bar>; MAX_BARS] {
    let bar = |index, kind, prefetchable, size, address| {
        Some(Bar {
            index,
            kind,
            prefetchable,
            size,
            address,
        })
    };
    [
        bar(0, BarKind::Io, false, 32, 0x1000),
        bar(1, BarKind::Memory32, false, 0x800, 0x1000_0000),
        bar(2, BarKind::Memory32, false, 0x1000, 0),
        None,
        bar(4, BarKind::Memory64, true, 0x4000, 0x80_0000_0000),
        None,
    ]
}

fn assigned(real: &Real) -> Assigned {
    let assigned = Assigned::new(real, PLACE, &bars());
    // It answers, is silent, and nothing else was touched.
    assert_eq!(real.written.take(), [(4, 0x402)]);
    assigned
}

#[test]
fn what_a_function_is_goes_through() {
    let real = real();
    let seen = assigned(&real);
    assert_eq!(seen.read(&real, 0x00, 4), 0x1042_1af4);
    assert_eq!(seen.read(&real, 0x00, 2), 0x1af4);
    assert_eq!(seen.read(&real, 0x02, 2), 0x1042);
    assert_eq!(seen.read(&real, 0x0b, 1), 0x01);
    assert_eq!(seen.read(&real, 0x2c, 4), 0x1100_1af4);
}

#[test]
fn what_concerns_the_machine_reads_as_nothing() {
    let real = real();
    let seen = assigned(&real);
    // Header type 0 of a single function, no cardbus, no expansion ROM, no extended space.
    for offset in [0x0c, 0x28, 0x30, 0x38, 0x100, 0xffc] {
        assert_eq!(seen.read(&real, offset, 4), 0, "{offset:#x}");
    }
}

#[test]
fn registers_that_are_only_to_be_read_take_no_write() {
    let real = real();
    let mut seen = assigned(&real);
    let writable = [4, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x3c];
    for offset in (0..4096).step_by(4).filter(|o| !writable.contains(o)) {
        let before = seen.read(&real, offset, 4);
        seen.write(&real, offset, 4, u32::MAX);
        assert_eq!(seen.read(&real, offset, 4), before, "{offset:#x}");
    }
    assert_eq!(real.written.take(), []);
}

#[test]
fn of_the_command_bus_mastering_and_the_pin_go_through() {
    let real = real();
    let mut seen = assigned(&real);
    assert_eq!(seen.read(&real, 4, 2), 0);
    seen.write(&real, 4, 2, 0xffff);
    assert_eq!(seen.read(&real, 4, 2), 0x406, "memory, master, no pin");
    seen.write(&real, 4, 2, 4);
    seen.write(&real, 4, 2, 0);
    // The function goes on to decode where the host has placed it.
    assert_eq!(real.written.take(), [(4, 0x406), (4, 6), (4, 2)]);
    // One byte leaves the other one as it is.
    seen.write(&real, 5, 1, 4);
    seen.write(&real, 4, 1, 4);
    assert_eq!(seen.read(&real, 4, 2), 0x404);
    assert_eq!(real.written.take(), [(4, 0x402), (4, 0x406)]);
}

#[test]
fn the_status_is_cleared_by_ones_that_were_written() {
    let real = real();
    let mut seen = assigned(&real);
    seen.write(&real, 4, 2, 6);
    assert_eq!(seen.read(&real, 6, 2), 0x18, "it asserts, it has a list");
    seen.write(&real, 6, 2, 0xffff);
    seen.write(&real, 7, 1, 0x80);
    assert_eq!(
        real.written.take(),
        [(4, 6), (4, 0xf900_0006), (4, 0x8000_0006)]
    );
    assert_eq!(seen.read(&real, 4, 2), 6, "the command is as it was");
}

#[test]
fn addresses_are_the_vms_and_sizes_are_whole_pages() {
    let real = real();
    let mut seen = assigned(&real);
    let size = |seen: &mut Assigned, offset| {
        seen.write(&real, offset, 4, u32::MAX);
        seen.read(&real, offset, 4)
    };
    let sizes: Vec<_> = (0x10..0x28)
        .step_by(4)
        .map(|o| size(&mut seen, o))
        .collect();
    assert_eq!(sizes, [0, 0xffff_f000, 0, 0, 0xffff_c00c, 0xffff_ffff]);
    assert_eq!(real.written.take(), [], "the real ones stay");
    seen.write(&real, 0x14, 4, 0x1234_5678);
    assert_eq!(seen.read(&real, 0x14, 4), 0x1234_5000);
    seen.write(&real, 0x17, 1, 0x20);
    assert_eq!(seen.read(&real, 0x14, 4), 0x2034_5000);
}

#[test]
fn registers_are_placed_while_the_vm_lets_them_decode() {
    let real = real();
    let mut seen = assigned(&real);
    seen.write(&real, 0x14, 4, 0x1000_0000);
    seen.write(&real, 0x20, 4, 0x1001_0000);
    seen.write(&real, 0x24, 4, 0);
    let placed = |seen: &Assigned, index| seen.placed(index).map(|r| (r.start(), r.size()));
    assert_eq!((placed(&seen, 1), placed(&seen, 4)), (None, None));
    seen.write(&real, 4, 2, 2);
    assert_eq!(placed(&seen, 1), Some((0x1000_0000, 0x1000)));
    assert_eq!(placed(&seen, 4), Some((0x1001_0000, 0x4000)));
    assert_eq!(placed(&seen, 0), None, "I/O ports");
    assert_eq!(placed(&seen, 5), None, "an upper half");
    assert_eq!(placed(&seen, usize::MAX), None);
    seen.reset(&real);
    assert_eq!((placed(&seen, 1), seen.read(&real, 0x14, 4)), (None, 0));
}

#[test]
fn nothing_is_placed_outside_the_window() {
    let real = real();
    let mut seen = assigned(&real);
    seen.write(&real, 4, 2, 2);
    for (low, high) in [
        (0, 0),
        (0x0fff_c000, 0),
        (0x3efe_c000, 0),
        (0x3eff_0000, 0),
        (0x4000_0000, 0),
        (0x1001_0000, 1),
        (0xffff_c000, 0xffff_ffff),
    ] {
        seen.write(&real, 0x20, 4, low);
        seen.write(&real, 0x24, 4, high);
        let inside = (low, high) == (0x3efe_c000, 0);
        assert_eq!(seen.placed(4).is_some(), inside, "{high:#x}{low:08x}");
    }
}

#[test]
fn of_the_capabilities_the_vendors_are_left() {
    let real = real();
    let seen = assigned(&real);
    assert_eq!(seen.read(&real, 0x34, 4), 0x84);
    assert_eq!(seen.read(&real, 0x84, 4), 0x0514_7009);
    assert_eq!(seen.read(&real, 0x70, 4), 0x0214_4009, "0xc8 is left out");
    assert_eq!(seen.read(&real, 0x40, 4), 0x0110_0009, "the last");
    assert_eq!(seen.read(&real, 0x88, 4), 4);
    assert_eq!(seen.read(&real, 0x94, 4), 0xdada_dada);
    assert_eq!(seen.read(&real, 0x4c, 2), 0x1000);
    for hidden in [0x50, 0x98, 0x9c, 0xc8, 0xcc, 0xd0] {
        assert_eq!(seen.read(&real, hidden, 4), 0, "{hidden:#x}");
    }
}

#[test]
fn without_capabilities_there_is_no_list() {
    let real = real();
    real.registers.borrow_mut()[1] = 0;
    let seen = assigned(&real);
    assert_eq!(seen.read(&real, 0x34, 4), 0);
    assert_eq!(seen.read(&real, 6, 2), 0);
    assert_eq!(seen.read(&real, 0x84, 4), 0);
}

#[test]
fn a_list_that_runs_in_circles_ends() {
    let real = real();
    real.registers.borrow_mut()[0x40 / 4] = 0x01ff_8409;
    let seen = assigned(&real);
    assert_eq!(seen.read(&real, 0x40, 4), 0x01ff_0009);
    assert_eq!(seen.read(&real, 0xfc, 4), 0);
}

#[test]
fn the_pin_is_the_first_and_the_line_is_the_vms() {
    let real = real();
    let mut seen = assigned(&real);
    assert_eq!(seen.read(&real, 0x3c, 4), 0x100);
    seen.write(&real, 0x3c, 4, 0xffff_ff2a);
    seen.write(&real, 0x3d, 1, 4);
    assert_eq!(seen.read(&real, 0x3c, 4), 0x12a);
    real.registers.borrow_mut()[0x3c / 4] = 0xff;
    assert_eq!(seen.read(&real, 0x3d, 1), 0);
    assert_eq!(real.written.take(), []);
}

#[test]
fn an_interrupt_is_asserted_unless_the_vm_has_disabled_the_pin() {
    let real = real();
    let mut seen = assigned(&real);
    assert!(seen.asserts(&real));
    seen.write(&real, 4, 2, 0x400);
    assert!(!seen.asserts(&real));
    seen.write(&real, 4, 2, 6);
    real.registers.borrow_mut()[1] = 0x0010_0507;
    assert!(!seen.asserts(&real));
}

#[test]
fn widths_and_alignments_that_the_bus_lacks_read_as_ones() {
    let real = real();
    let mut seen = assigned(&real);
    for (offset, size) in [(0, 0), (0, 3), (0, 8), (1, 2), (2, 4), (3, 4), (4096, 4)] {
        assert_eq!(seen.read(&real, offset, size), u32::MAX);
        seen.write(&real, offset + 4, size, u32::MAX);
    }
    assert_eq!(real.written.take(), []);
}

#[test]
fn ipas_are_functions_and_registers() {
    let at = |device: u64, function: u64, register: u64| {
        register_at(0x3f00_0000 + (device << 15 | function << 12 | register))
    };
    assert_eq!(at(1, 0, 0), Some((Some(0), 0)));
    assert_eq!(at(4, 0, 0xffc), Some((Some(3), 0xffc)));
    assert_eq!(at(2, 0, 0x105), Some((Some(1), 0x105)));
    for (device, function) in [(0, 0), (1, 1), (4, 7), (5, 0), (31, 7)] {
        assert_eq!(at(device, function, 4), Some((None, 4)));
    }
    assert_eq!(register_at(0x3eff_ffff), None);
    assert_eq!(register_at(0x3f10_0000), None);
    assert_eq!(register_at(u64::MAX), None);
}

proptest! {
    /// Whatever a VM does: no panic, and nothing of the real function changes but bus mastering, the
    /// pin's disable bit and the status; what it reads back of its command is what it may set.
    #[test]
    fn any_access_is_harmless(
        accesses in prop::collection::vec((0u16..4200, 0u8..9, any::<u32>(), any::<bool>()), 0..100),
        list in prop::collection::vec((0u16..64, any::<u32>()), 0..8),
    ) {
        let real = real();
        for (register, value) in list {
            real.registers.borrow_mut()[usize::from(register)] = value;
        }
        let mut seen = Assigned::new(&real, PLACE, &bars());
        real.written.take();
        for (offset, size, value, write) in accesses {
            if write {
                seen.write(&real, offset, size, value);
            } else {
                seen.read(&real, offset, size);
            }
            for index in 0..MAX_BARS {
                if let Some(range) = seen.placed(index) {
                    prop_assert!(range.start() >= 0x1000_0000 && range.end() <= 0x3eff_0000);
                }
            }
        }
        for (offset, value) in real.written.take() {
            prop_assert_eq!(offset, 4);
            prop_assert_eq!(value & 0xfbfb & !2, 0, "{:#x}", value);
            prop_assert_eq!(value & 2, 2);
        }
        prop_assert_eq!(seen.read(&real, 4, 2) & !0x406, 0);
    }
}
