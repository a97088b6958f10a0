//! Behaviour on a bridge made with vm-fdt, shaped like QEMU's.

use proptest::prelude::*;
use std::vec::Vec;
use vm_fdt::FdtWriter;

use crate::{AddrRange, Tree};

fn range(start: u64, end: u64) -> AddrRange {
    AddrRange::new(start, end).unwrap()
}

/// The bridge of QEMU's virt; its interrupt controller has addresses of two cells.
fn with_bridge(bus_range: [u32; 2], ecam_size: u64) -> Vec<u8> {
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    let node = fdt.begin_node("intc@8000000").unwrap();
    fdt.property_u32("phandle", 0x8003).unwrap();
    fdt.property_u32("#interrupt-cells", 3).unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("pcie@10000000").unwrap();
    fdt.property_string("compatible", "pci-host-ecam-generic")
        .unwrap();
    fdt.property_array_u64("reg", &[0x40_1000_0000, ecam_size])
        .unwrap();
    fdt.property_array_u32("bus-range", &bus_range).unwrap();
    let ranges = [
        [0x100_0000, 0, 0, 0, 0x3eff_0000, 0, 0x1_0000],
        [0x200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2eff_0000],
        [0x300_0000, 0x80, 0, 0x80, 0, 0x80, 0],
    ];
    fdt.property_array_u32("ranges", ranges.as_flattened())
        .unwrap();
    fdt.property_array_u32("interrupt-map-mask", &[0x1800, 0, 0, 7])
        .unwrap();
    let row = |device: u32, pin: u32| {
        let spi = 3 + (device + pin - 1) % 4;
        [device << 11, 0, 0, pin, 0x8003, 0, 0, 0, spi, 4]
    };
    let map: Vec<u32> = (0..16).flat_map(|n| row(n / 4, n % 4 + 1)).collect();
    fdt.property_array_u32("interrupt-map", &map).unwrap();
    fdt.end_node(node).unwrap();
    fdt.end_node(root).unwrap();
    fdt.finish().unwrap()
}

#[test]
fn pci_bridge_is_read_with_its_windows() {
    let blob = with_bridge([0, 0xff], 0x1000_0000);
    let bridge = Tree::new(&blob).unwrap().pci_bridge().unwrap();
    assert_eq!(bridge.ecam, range(0x40_1000_0000, 0x40_2000_0000));
    assert_eq!((bridge.first_bus, bridge.last_bus), (0, 0xff));
    let low = bridge.memory32.unwrap();
    assert_eq!(low.cpu, range(0x1000_0000, 0x3eff_0000));
    assert_eq!(low.bus, 0x1000_0000);
    let high = bridge.memory64.unwrap();
    assert_eq!(
        high.bus_range(),
        Some(range(0x80_0000_0000, 0x100_0000_0000))
    );
}

#[test]
fn pci_pins_are_swizzled_as_the_map_says() {
    let blob = with_bridge([0, 0xff], 0x1000_0000);
    let bridge = Tree::new(&blob).unwrap().pci_bridge().unwrap();
    let found = [(0, 1), (1, 1), (2, 4), (5, 2), (31, 1)].map(|(d, p)| bridge.interrupt(d, p));
    assert_eq!(found, [35, 36, 36, 37, 38].map(Some));
    assert_eq!(bridge.interrupt(0, 0), None);
}

#[test]
fn pci_buses_end_where_the_configuration_space_does() {
    let blob = with_bridge([1, 0xff], 0x30_0000);
    let bridge = Tree::new(&blob).unwrap().pci_bridge().unwrap();
    assert_eq!((bridge.first_bus, bridge.last_bus), (1, 3));
    for (buses, size) in [
        ([0, 0xff], 0xf_ffff),
        ([2, 1], 0x1000_0000),
        ([0x100, 0x100], 0x1000_0000),
    ] {
        let blob = with_bridge(buses, size);
        assert_eq!(Tree::new(&blob).unwrap().pci_bridge(), None);
    }
}

proptest! {
    #[test]
    fn a_corrupt_bridge_never_panics(
        flips in prop::collection::vec((0usize..1500, any::<u8>()), 0..6),
    ) {
        let mut blob = with_bridge([0, 0xff], 0x1000_0000);
        for (at, value) in flips {
            if let Some(byte) = blob.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(tree) = Tree::new(&blob)
            && let Some(bridge) = tree.pci_bridge()
        {
            let _ = bridge.interrupt(31, 4);
        }
    }
}
