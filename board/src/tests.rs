//! Behaviour on trees made with vm-fdt, shaped like QEMU's and the Raspberry Pi's.

mod patch;

use dtoolkit::fdt::Fdt;
use dtoolkit::{Node, Property};
use proptest::prelude::*;
use std::string::{String, ToString};
use std::vec::Vec;
use std::{format, vec};
use vm_fdt::{FdtReserveEntry, FdtWriter};

use crate::*;

/// A tree like QEMU `virt`'s: root with two cells each, PSCI, GICv3, PL011.
fn virt(cpus: u64) -> Vec<u8> {
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    fdt.property_string("model", "linux,dummy-virt").unwrap();
    let node = fdt.begin_node("psci").unwrap();
    fdt.property_string("method", "smc").unwrap();
    fdt.property_string("compatible", "arm,psci-1.0").unwrap();
    fdt.end_node(node).unwrap();
    memory(&mut fdt, &[0x4000_0000, 0x2000_0000]);
    let parent = fdt.begin_node("cpus").unwrap();
    fdt.property_u32("#address-cells", 1).unwrap();
    fdt.property_u32("#size-cells", 0).unwrap();
    for cpu in 0..cpus {
        let node = fdt.begin_node(&format!("cpu@{cpu}")).unwrap();
        fdt.property_string("device_type", "cpu").unwrap();
        fdt.property_u32("reg", u32::try_from(cpu).unwrap())
            .unwrap();
        fdt.property_string("enable-method", "psci").unwrap();
        fdt.end_node(node).unwrap();
    }
    fdt.end_node(parent).unwrap();
    let node = fdt.begin_node("intc@8000000").unwrap();
    fdt.property_string("compatible", "arm,gic-v3").unwrap();
    fdt.property_array_u64(
        "reg",
        &[
            0x800_0000,
            0x1_0000,
            0x80a_0000,
            0xf6_0000,
            0x40_0000_0000,
            0x400_0000,
        ],
    )
    .unwrap();
    fdt.property_u32("#redistributor-regions", 2).unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("pl011@9000000").unwrap();
    fdt.property_string_list(
        "compatible",
        vec!["arm,pl011".into(), "arm,primecell".into()],
    )
    .unwrap();
    fdt.property_array_u64("reg", &[0x900_0000, 0x1000])
        .unwrap();
    fdt.end_node(node).unwrap();
    for number in [0u64, 1] {
        let base = 0xa00_0000 + 0x200 * number;
        let node = fdt.begin_node(&format!("virtio_mmio@{base:x}")).unwrap();
        fdt.property_string("compatible", "virtio,mmio").unwrap();
        fdt.property_array_u64("reg", &[base, 0x200]).unwrap();
        fdt.end_node(node).unwrap();
    }
    pci(&mut fdt);
    let node = fdt.begin_node("chosen").unwrap();
    fdt.property_array_u64("rng-seed", &[1, 2]).unwrap();
    fdt.property_string("stdout-path", "/pl011@9000000")
        .unwrap();
    fdt.property_string("bootargs", "shim.run=all").unwrap();
    fdt.property_string("ravelin,log-level", "debug").unwrap();
    fdt.property_string("ravelin,self-test", "null").unwrap();
    fdt.property_u32("linux,initrd-start", 0x4800_0000).unwrap();
    fdt.property_u64("linux,initrd-end", 0x4800_1234).unwrap();
    fdt.end_node(node).unwrap();
    fdt.end_node(root).unwrap();
    fdt.finish().unwrap()
}

/// An SMMU, the PCI host bridge behind it, and an ITS.
fn pci(fdt: &mut FdtWriter) {
    let node = fdt.begin_node("its@8080000").unwrap();
    fdt.property_string("compatible", "arm,gic-v3-its").unwrap();
    fdt.property_array_u64("reg", &[0x808_0000, 0x2_0000])
        .unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("v2m@8020000").unwrap();
    fdt.property_string("compatible", "arm,gic-v2m-frame")
        .unwrap();
    fdt.property_array_u64("reg", &[0x802_0000, 0x1000])
        .unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("smmuv3@9050000").unwrap();
    fdt.property_string("compatible", "arm,smmu-v3").unwrap();
    fdt.property_null("dma-coherent").unwrap();
    fdt.property_u32("phandle", 0x8004).unwrap();
    fdt.property_array_u64("reg", &[0x905_0000, 0x2_0000])
        .unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("pcie@10000000").unwrap();
    fdt.property_string("compatible", "pci-host-ecam-generic")
        .unwrap();
    let map = [0, 0x8004, 0, 0x100, 0x100, 0x8004, 0x4000, 0x80];
    fdt.property_array_u32("iommu-map", &map).unwrap();
    fdt.end_node(node).unwrap();
}

fn memory(fdt: &mut FdtWriter, reg: &[u64]) {
    let node = fdt.begin_node("memory@0").unwrap();
    fdt.property_string("device_type", "memory").unwrap();
    fdt.property_array_u64("reg", reg).unwrap();
    fdt.end_node(node).unwrap();
}

/// A tree like the Raspberry Pi 4's: one size cell at the root, a soc bus with `ranges`, spin
/// tables, mini UART as console, existing `/reserved-memory`.
fn pi() -> Vec<u8> {
    let reserved = FdtReserveEntry::new(0, 0x1000).unwrap();
    let mut fdt = FdtWriter::new_with_mem_reserv(&[reserved]).unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 1).unwrap();
    let node = fdt.begin_node("aliases").unwrap();
    fdt.property_string("serial1", "/soc/serial@7e215040")
        .unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("chosen").unwrap();
    fdt.property_string("stdout-path", "serial1:115200n8")
        .unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("memory@0").unwrap();
    fdt.property_string("device_type", "memory").unwrap();
    fdt.property_array_u32("reg", &[0, 0, 0x3b40_0000, 0, 0x4000_0000, 0xbc00_0000])
        .unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("reserved-memory").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 1).unwrap();
    fdt.property_null("ranges").unwrap();
    let child = fdt.begin_node("secret@3000000").unwrap();
    fdt.property_array_u32("reg", &[0, 0x300_0000, 0x1800])
        .unwrap();
    fdt.property_null("no-map").unwrap();
    fdt.end_node(child).unwrap();
    fdt.end_node(node).unwrap();
    let parent = fdt.begin_node("cpus").unwrap();
    fdt.property_u32("#address-cells", 1).unwrap();
    fdt.property_u32("#size-cells", 0).unwrap();
    for cpu in 0..4u32 {
        let node = fdt.begin_node(&format!("cpu@{cpu}")).unwrap();
        fdt.property_string("device_type", "cpu").unwrap();
        fdt.property_u32("reg", cpu).unwrap();
        fdt.property_string("enable-method", "spin-table").unwrap();
        fdt.property_u64("cpu-release-addr", 0xd8 + 8 * u64::from(cpu))
            .unwrap();
        fdt.end_node(node).unwrap();
    }
    let node = fdt.begin_node("l2-cache0").unwrap();
    fdt.end_node(node).unwrap();
    fdt.end_node(parent).unwrap();
    let soc = fdt.begin_node("soc").unwrap();
    fdt.property_u32("#address-cells", 1).unwrap();
    fdt.property_u32("#size-cells", 1).unwrap();
    fdt.property_array_u32(
        "ranges",
        &[
            0x7e00_0000,
            0,
            0xfe00_0000,
            0x180_0000,
            0x4000_0000,
            0,
            0xff80_0000,
            0x80_0000,
        ],
    )
    .unwrap();
    for (name, compatible, reg) in [
        ("serial@7e201000", "arm,pl011", vec![0x7e20_1000, 0x200]),
        (
            "serial@7e215040",
            "brcm,bcm2835-aux-uart",
            vec![0x7e21_5040, 0x40],
        ),
        (
            "watchdog@7e100000",
            "brcm,bcm2711-pm",
            vec![0x7e10_0000, 0x114],
        ),
        (
            "rng@7e104000",
            "brcm,bcm2711-rng200",
            vec![0x7e10_4000, 0x28],
        ),
        (
            "interrupt-controller@40041000",
            "arm,gic-400",
            vec![
                0x4004_1000,
                0x1000,
                0x4004_2000,
                0x2000,
                0x4004_4000,
                0x2000,
                0x4004_6000,
                0x2000,
            ],
        ),
    ] {
        let node = fdt.begin_node(name).unwrap();
        fdt.property_string("compatible", compatible).unwrap();
        fdt.property_array_u32("reg", &reg).unwrap();
        fdt.end_node(node).unwrap();
    }
    fdt.end_node(soc).unwrap();
    fdt.end_node(root).unwrap();
    fdt.finish().unwrap()
}

fn range(start: u64, end: u64) -> AddrRange {
    AddrRange::new(start, end).unwrap()
}

fn read(blob: &[u8]) -> Board<'_> {
    Board::read(&Tree::new(blob).unwrap()).unwrap()
}

fn host(el2: AddrRange, cpus: &[u64]) -> HostTree<'_> {
    HostTree {
        el2,
        cpus,
        iommu: Some(0x8004),
        generator: true,
    }
}

fn patched(blob: &[u8], cpus: &[u64]) -> Vec<u8> {
    let el2 = range(0x5fe0_0000, 0x6000_0000);
    let mut buffer = vec![0xa5; blob.len() + 8192];
    let tree = Tree::new(blob).unwrap();
    let length = patch_for_host(tree.fdt(), &mut buffer, &host(el2, cpus)).unwrap();
    buffer.truncate(length);
    buffer
}

fn prop<'a>(blob: &'a [u8], path: &str, name: &str) -> Option<&'a [u8]> {
    let node = Fdt::new(blob).unwrap().find_node(path)?;
    let value = node.property(name)?.value().as_ptr();
    let length = node.property(name)?.value().len();
    let at = value.addr() - blob.as_ptr().addr();
    Some(&blob[at..at + length])
}

#[test]
fn virt_board_is_read() {
    let blob = virt(2);
    let board = read(&blob);
    assert_eq!(board.model, "linux,dummy-virt");
    assert_eq!(board.memory.as_slice(), [range(0x4000_0000, 0x6000_0000)]);
    assert_eq!(board.psci, Some(PsciConduit::Smc));
    let console = Console {
        kind: UartKind::Pl011,
        base: 0x900_0000,
    };
    assert_eq!(board.console, Some(console));
    assert_eq!(
        board.cpus[1],
        Cpu {
            mpidr: 1,
            start: StartMethod::Psci
        }
    );
    let gicd = range(0x800_0000, 0x801_0000);
    let gicr = range(0x80a_0000, 0x900_0000);
    assert_eq!(board.gic, Some(Gic::V3 { gicd, gicr }));
    assert_eq!(board.chosen.bootargs, "shim.run=all");
    assert_eq!(board.chosen.log_level, Some("debug"));
    assert_eq!(board.chosen.self_test, Some(SelfTest::Null));
}

#[test]
fn initrd_is_reserved_by_whole_pages() {
    let blob = virt(1);
    let board = read(&blob);
    assert_eq!(board.chosen.initrd, Some(range(0x4800_0000, 0x4800_1234)));
    assert_eq!(board.reserved.as_slice(), [range(0x4800_0000, 0x4800_2000)]);
}

#[test]
fn bus_addresses_are_translated_through_ranges() {
    let blob = pi();
    let board = read(&blob);
    let console = Console {
        kind: UartKind::Mini,
        base: 0xfe21_5040,
    };
    assert_eq!(board.console, Some(console));
    assert_eq!(board.power, Some(Power::BcmPm(0xfe10_0000)));
    let Some(Gic::V2 { gicd, gich, .. }) = board.gic else {
        panic!("no GICv2");
    };
    assert_eq!(gicd.start(), 0xff84_1000);
    assert_eq!(gich, Some(range(0xff84_4000, 0xff84_6000)));
}

#[test]
fn pi_memory_and_reservations_are_read() {
    let blob = pi();
    let board = read(&blob);
    assert_eq!(
        board.memory.as_slice(),
        [range(0, 0x3b40_0000), range(0x4000_0000, 0xfc00_0000)]
    );
    assert_eq!(
        board.reserved.as_slice(),
        [range(0, 0x1000), range(0x300_0000, 0x300_2000)]
    );
    assert_eq!(board.no_map.as_slice(), [range(0x300_0000, 0x300_2000)]);
    assert_eq!(board.firmware.as_slice(), board.no_map.as_slice());
    assert_eq!(board.cpus[3].start, StartMethod::SpinTable(0xf0));
    assert_eq!(board.psci, None);
}

/// The least that a board has: a CPU, number 0.
fn one_cpu(fdt: &mut FdtWriter) {
    let cpus = fdt.begin_node("cpus").unwrap();
    fdt.property_u32("#address-cells", 1).unwrap();
    fdt.property_u32("#size-cells", 0).unwrap();
    let cpu = fdt.begin_node("cpu@0").unwrap();
    fdt.property_string("device_type", "cpu").unwrap();
    fdt.property_u32("reg", 0).unwrap();
    fdt.end_node(cpu).unwrap();
    fdt.end_node(cpus).unwrap();
}

/// A boot loader lists the initrd among the reservations, exactly or by whole pages. What else is in its
/// pages is not the board's.
#[test]
fn reservation_of_the_initrd_is_none_of_the_boards() {
    for size in [0x1234, 0x2000] {
        let reserved = [(0, 0x1000), (0x4800_0000, size)]
            .map(|(start, size)| FdtReserveEntry::new(start, size).unwrap());
        let mut fdt = FdtWriter::new_with_mem_reserv(&reserved).unwrap();
        let root = fdt.begin_node("").unwrap();
        fdt.property_u32("#address-cells", 2).unwrap();
        fdt.property_u32("#size-cells", 2).unwrap();
        memory(&mut fdt, &[0, 0x8000_0000]);
        let chosen = fdt.begin_node("chosen").unwrap();
        fdt.property_u64("linux,initrd-start", 0x4800_0000).unwrap();
        fdt.property_u64("linux,initrd-end", 0x4800_1234).unwrap();
        fdt.end_node(chosen).unwrap();
        one_cpu(&mut fdt);
        fdt.end_node(root).unwrap();
        let blob = fdt.finish().unwrap();
        let board = read(&blob);
        assert_eq!(board.set_aside.as_slice(), [range(0, 0x1000)]);
        let pages = range(0x4800_0000, 0x4800_2000);
        assert!(board.reserved.as_slice().contains(&pages));
    }
}

#[test]
fn firmware_that_keeps_cores_is_known_by_the_machine() {
    assert!(read(&virt(2)).psci_gives_back && read(&pi()).psci_gives_back);
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    let names = ["raspberrypi,5-model-b".into(), "brcm,bcm2712".into()];
    fdt.property_string_list("compatible", names.into())
        .unwrap();
    memory(&mut fdt, &[0, 0x4000_0000]);
    one_cpu(&mut fdt);
    fdt.end_node(root).unwrap();
    let blob = fdt.finish().unwrap();
    assert!(!read(&blob).psci_gives_back);
}

/// Drivers and devices find their memory by `compatible` or a phandle; what has neither is the
/// firmware's own.
#[test]
fn memory_that_a_driver_may_claim_is_not_firmwares() {
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    memory(&mut fdt, &[0, 0x4000_0000]);
    one_cpu(&mut fdt);
    let parent = fdt.begin_node("reserved-memory").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    fdt.property_null("ranges").unwrap();
    for (name, base) in [("atf@0", 0), ("nvram@1", 0x10_0000), ("dsp@2", 0x20_0000)] {
        let node = fdt.begin_node(name).unwrap();
        fdt.property_array_u64("reg", &[base, 0x8_0000]).unwrap();
        fdt.property_null("no-map").unwrap();
        match name {
            "nvram@1" => fdt.property_string("compatible", "nvmem-rmem").unwrap(),
            "dsp@2" => fdt.property_u32("phandle", 7).unwrap(),
            _ => {}
        }
        fdt.end_node(node).unwrap();
    }
    fdt.end_node(parent).unwrap();
    fdt.end_node(root).unwrap();
    let blob = fdt.finish().unwrap();
    let board = read(&blob);
    assert_eq!(board.no_map.as_slice().len(), 3);
    assert_eq!(board.firmware.as_slice(), [range(0, 0x8_0000)]);
}

#[test]
fn atag_list_zero_and_bad_sizes_are_told_apart() {
    let atag = check_header(0x100, [5, 0, 0, 0, 1, 0, 0x41, 0x54]);
    let found = 0x0500_0000;
    assert_eq!(
        atag,
        Err(BoardError::NotADeviceTree {
            address: 0x100,
            found
        })
    );
    let huge = check_header(0, [0xd0, 0x0d, 0xfe, 0xed, 0x7f, 0, 0, 0]);
    assert_eq!(huge, Err(BoardError::BadSize(0x7f00_0000)));
    let tiny = check_header(0, [0xd0, 0x0d, 0xfe, 0xed, 0, 0, 0, 39]);
    assert_eq!(tiny, Err(BoardError::BadSize(39)));
    let good = check_header(0, [0xd0, 0x0d, 0xfe, 0xed, 0, 0x10, 0, 0]);
    assert_eq!(good, Ok(0x10_0000));
}

#[test]
fn a_tree_without_memory_or_cpus_is_refused() {
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.end_node(root).unwrap();
    let blob = fdt.finish().unwrap();
    let board = Board::read(&Tree::new(&blob).unwrap());
    assert_eq!(board.unwrap_err(), BoardError::NoMemory);
    let blob = virt(0);
    let board = Board::read(&Tree::new(&blob).unwrap());
    assert_eq!(board.unwrap_err(), BoardError::NoCpus);
}

proptest! {
    /// Truncated or flipped trees give an error or a board, never a panic.
    #[test]
    fn corrupt_trees_never_panic(flips in prop::collection::vec((0usize..1500, any::<u8>()), 0..6),
                                 cut in 0usize..1500) {
        let mut blob = pi();
        for (at, value) in flips {
            if let Some(byte) = blob.get_mut(at) {
                *byte = value;
            }
        }
        blob.truncate(blob.len().saturating_sub(cut / 3));
        if let Ok(tree) = Tree::new(&blob) {
            let board: Result<String, _> = Board::read(&tree).map(|b| b.model.to_string());
            drop(board);
        }
    }
}

#[test]
fn virtio_devices_and_seed_are_found() {
    let blob = virt(1);
    let tree = Tree::new(&blob).unwrap();
    let found = tree.virtio_mmio();
    let starts: Vec<u64> = found.iter().map(|range| range.start()).collect();
    assert_eq!(starts, [0xa00_0000, 0xa00_0200]);
    assert_eq!(found[0].size(), 0x200);
    let seed = Board::read(&tree).unwrap().chosen.rng_seed;
    assert_eq!(seed, [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2]);
}

#[test]
fn the_iommu_of_the_pci_bridge_is_found_with_its_streams() {
    let blob = virt(1);
    let board = read(&blob);
    let iommu = board.iommu.unwrap();
    assert_eq!(iommu.registers, range(0x905_0000, 0x907_0000));
    assert!(iommu.coherent);
    assert_eq!((iommu.phandle, iommu.others), (0x8004, 0));
    let streams = [0, 0x10, 0xff, 0x100, 0x17f].map(|function| iommu.stream_of(function));
    let expected = [0, 0x10, 0xff, 0x4000, 0x407f].map(Some);
    assert_eq!(streams, expected);
    assert_eq!(iommu.stream_of(0x180), None);
    assert_eq!(iommu.function_of(0x407f), Some(0x17f));
    assert_eq!(iommu.function_of(0x4080), None);
    assert_eq!(board.doorbells.as_slice(), [range(0x802_0000, 0x802_1000)]);
    assert_eq!(read(&pi()).iommu, None);
}

#[test]
fn the_host_is_not_told_of_the_iommu() {
    let tree = patched(&virt(1), &[0]);
    assert_eq!(prop(&tree, "/pcie@10000000", "iommu-map"), None);
    assert!(prop(&tree, "/pcie@10000000", "compatible").is_some());
    let status = prop(&tree, "/smmuv3@9050000", "status");
    assert_eq!(status, Some(&b"disabled\0"[..]));
    assert_eq!(read(&tree).iommu, None);
}

#[test]
fn the_generator_is_found_unless_it_is_disabled() {
    let blob = pi();
    let registers = range(0xfe10_4000, 0xfe10_4028);
    assert_eq!(read(&blob).generator, Some(registers));
    assert_eq!(read(&virt(1)).generator, None);
    // What EL2 makes of the tree is one where it is disabled.
    let tree = patched(&blob, &[0]);
    assert_eq!(read(&tree).generator, None);
    let disabled = |blob| Tree::new(blob).unwrap().disabled_generator();
    assert_eq!(disabled(&blob), None);
    assert_eq!(disabled(&tree), Some(registers));
}

#[test]
fn a_generator_without_room_for_its_registers_is_none() {
    let node = |reg: [u32; 2]| {
        let mut blob = pi();
        let big_endian = |reg: [u32; 2]| reg.map(u32::to_be_bytes).concat();
        let old = big_endian([0x7e10_4000, 0x28]);
        let at = blob.windows(8).position(|bytes| bytes == old).unwrap();
        blob[at..at + 8].copy_from_slice(&big_endian(reg));
        read(&blob).generator
    };
    for reg in [[0x7e10_4000, 0x24], [0x7e10_4000, 0x27], [0x7e10_4000, 0]] {
        assert_eq!(node(reg), None);
    }
    for start in [0x7e10_4001, 0x7e10_4002] {
        assert_eq!(node([start, 0x28]), None);
    }
    let registers = range(0xfe10_4004, 0xfe10_4104);
    assert_eq!(node([0x7e10_4004, 0x100]), Some(registers));
}

#[test]
fn the_host_keeps_a_generator_that_el2_does_not_drive() {
    let (blob, el2) = (pi(), range(0x5fe0_0000, 0x6000_0000));
    let node = "/soc/rng@7e104000";
    let disabled = Some(&b"disabled\0"[..]);
    assert_eq!(prop(&patched(&blob, &[0]), node, "status"), disabled);
    let mut buffer = vec![0; blob.len() + 8192];
    let kept = HostTree {
        generator: false,
        ..host(el2, &[0])
    };
    let length = patch_for_host(Tree::new(&blob).unwrap().fdt(), &mut buffer, &kept).unwrap();
    assert_eq!(prop(&buffer[..length], node, "status"), None);
    assert_eq!(read(&buffer[..length]).generator, read(&blob).generator);
}
