//! Device trees: the board's, from firmware, and the FIT, from whoever wrote the card. Either the bytes as
//! they are, or a well-formed tree out of names that mean something with values that need not.

use arbitrary::{Result, Unstructured};
use board::{AddrRange, Board, HostTree, Placement, RangeList, Tree};
use vm_fdt::FdtWriter;
use vmm::fit::{self, GuestConfig};

const NODES: [&str; 22] = [
    "memory@40000000",
    "cpus",
    "cpu@0",
    "cpu@1",
    "psci",
    "chosen",
    "reserved-memory",
    "firmware@0",
    "intc@8000000",
    "soc",
    "serial@7e215040",
    "pl011@9000000",
    "virtio_mmio@a000000",
    "aliases",
    "timer",
    "watchdog@7e100000",
    "images",
    "configurations",
    "kernel",
    "ramdisk",
    "linux-1",
    "a-name-that-means-nothing",
];

const PROPERTIES: [&str; 33] = [
    "#address-cells",
    "#size-cells",
    "reg",
    "ranges",
    "device_type",
    "compatible",
    "method",
    "enable-method",
    "cpu-release-addr",
    "status",
    "no-map",
    "interrupts",
    "reg-shift",
    "reg-io-width",
    "stdout-path",
    "serial0",
    "bootargs",
    "linux,initrd-start",
    "linux,initrd-end",
    "rng-seed",
    "ravelin,log-level",
    "ravelin,self-test",
    "model",
    "data",
    "kernel",
    "ramdisk",
    "ravelin,role",
    "ravelin,memory",
    "ravelin,vcpus",
    "ravelin,disk",
    "ravelin,protected",
    "ravelin,no-lock",
    "dma-ranges",
];

const STRINGS: [&str; 31] = [
    "memory",
    "cpu",
    "arm,psci-1.0",
    "smc",
    "hvc",
    "psci",
    "spin-table",
    "arm,cortex-a15-gic",
    "arm,gic-400",
    "arm,gic-v3",
    "arm,pl011",
    "brcm,bcm2835-aux-uart",
    "brcm,bcm2711-pm",
    "brcm,bcm2711-rng200",
    "simple-bus",
    "virtio,mmio",
    "okay",
    "disabled",
    "/pl011@9000000",
    "serial0",
    "serial0:115200n8",
    "/soc/serial@7e215040",
    "ravelin.log=debug",
    "debug",
    "null",
    "guest",
    "host",
    "kernel",
    "ramdisk",
    "",
    "\u{e4}\u{f6}\u{fc}",
];

/// The board's tree, as EL2's boot reads it.
pub(crate) fn board(data: &[u8]) {
    let blob = blob(data);
    if let Some(header) = blob.first_chunk() {
        let _: Result<usize, _> = board::check_header(0, *header);
    }
    let Ok(tree) = Tree::new(&blob) else { return };
    let Ok(board) = Board::read(&tree) else {
        return;
    };
    let _ = (tree.virtio_mmio(), tree.reserved_by_ravelin());
    check_ranges(&board.memory);
    check_ranges(&board.reserved);
    check_placement(&board);
    patch(&tree, &board, &blob);
}

/// Sorted, not empty, apart.
fn check_ranges<const N: usize>(list: &RangeList<N>) {
    assert!(
        list.as_slice()
            .iter()
            .all(|range| range.start() < range.end())
    );
    for pair in list.as_slice().windows(2) {
        assert!(pair[0].end() <= pair[1].start(), "{pair:?}");
    }
}

/// What EL2 takes for itself is memory that nobody has reserved.
fn check_placement(board: &Board<'_>) {
    for size in [0x1000, 0x18_0000, 1 << 30] {
        let want = Placement {
            size,
            align: 0x20_0000,
            limit: 1 << 40,
        };
        let places = [
            board::highest_free(&board.memory, &board.reserved, want),
            board::lowest_free(&board.memory, &board.reserved, want),
        ];
        assert_eq!(places[0].is_some(), places[1].is_some());
        for place in places.into_iter().flatten() {
            let inside = |ram: &AddrRange| ram.start() <= place.start() && place.end() <= ram.end();
            assert!(board.memory.as_slice().iter().any(inside), "{place:?}");
            assert!(board.reserved.overlapping(place).is_none(), "{place:?}");
            assert!(place.start().is_multiple_of(want.align) && place.end() <= want.limit);
        }
    }
}

/// The host's tree is one that can be read again, with EL2's memory reserved.
fn patch(tree: &Tree<'_>, board: &Board<'_>, blob: &[u8]) {
    let Some(el2) = AddrRange::with_size(0x7fe0_0000, 0x20_0000) else {
        return;
    };
    let cpus: Vec<u64> = board.cpus.iter().map(|cpu| cpu.mpidr).take(2).collect();
    let mut buffer = vec![0; blob.len() + 8192];
    let host = HostTree {
        el2,
        cpus: &cpus,
        iommu: board.iommu.as_ref().map(|iommu| iommu.phandle),
        generator: board.generator.is_some(),
    };
    let Ok(length) = board::patch_for_host(tree.fdt(), &mut buffer, &host) else {
        return;
    };
    let patched = Tree::new(&buffer[..length]).expect("the host's tree can't be read");
    let patched = Board::read(&patched).expect("the host's tree is no board");
    let reserved = patched.reserved.as_slice();
    let holds = |range: &AddrRange| range.start() <= el2.start() && el2.end() <= range.end();
    assert!(reserved.iter().any(holds), "EL2's memory is not reserved");
    assert_eq!(patched.generator, None, "the host has EL2's generator");
}

/// The FIT, as the shim reads it.
pub(crate) fn fit(data: &[u8]) {
    let blob = blob(data);
    let Ok(guests) = fit::guests(&blob) else {
        return;
    };
    for guest in guests.iter().flatten() {
        check_guest(guest);
    }
}

fn check_guest(guest: &GuestConfig<'_>) {
    assert!((1..=8).contains(&guest.vcpus));
    assert!(guest.assigned.len() <= 4);
    assert!(guest.memory != 0 && guest.memory.is_multiple_of(2 << 20));
    let ramdisk = guest.ramdisk.map_or(0, <[u8]>::len) as u64;
    if let Ok(layout) = vmm::image::layout(guest.kernel, ramdisk, guest.memory) {
        let _ = format!("{layout:?}");
    }
}

/// Bytes as they are if the first one is even, else a tree made of the others.
fn blob(data: &[u8]) -> Vec<u8> {
    match data.split_first() {
        Some((first, rest)) if first % 2 == 0 => rest.to_vec(),
        Some((_, rest)) => write_tree(rest).unwrap_or_default(),
        None => Vec::new(),
    }
}

/// A tree with nodes nested as the bytes say.
fn write_tree(data: &[u8]) -> std::result::Result<Vec<u8>, vm_fdt::Error> {
    let mut input = Unstructured::new(data);
    let mut fdt = FdtWriter::new()?;
    let mut open = vec![fdt.begin_node("")?];
    // Properties come before children.
    let mut may_have_properties = true;
    while !input.is_empty() {
        match input.int_in_range(0..=7u8).unwrap_or(0) {
            0..=3 if may_have_properties => property(&mut input, &mut fdt)?,
            0..=5 if open.len() < 6 => {
                let name = *input.choose(&NODES).unwrap_or(&"");
                open.push(fdt.begin_node(name)?);
                may_have_properties = true;
            }
            _ if open.len() > 1 => {
                if let Some(node) = open.pop() {
                    fdt.end_node(node)?;
                }
                may_have_properties = false;
            }
            _ => {}
        }
    }
    while let Some(node) = open.pop() {
        fdt.end_node(node)?;
    }
    fdt.finish()
}

fn property(
    input: &mut Unstructured<'_>,
    fdt: &mut FdtWriter,
) -> std::result::Result<(), vm_fdt::Error> {
    let name = *input.choose(&PROPERTIES).unwrap_or(&"reg");
    let value = value(input).unwrap_or_default();
    fdt.property(name, &value)
}

fn value(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Ok(match input.int_in_range(0..=4u8)? {
        0 => input
            .bytes(
                input
                    .len()
                    .min(usize::from(input.peek_bytes(1).map_or(0, |b| b[0] % 40))),
            )?
            .to_vec(),
        1 => (input.arbitrary::<u8>()? & 3)
            .to_be_bytes()
            .map(|b| [0, 0, 0, b])
            .concat(),
        2 => {
            let [start, size] = [cell(input)?, cell(input)?];
            [start.to_be_bytes(), size.to_be_bytes()].concat()
        }
        3 => cell(input)?.to_be_bytes().to_vec(),
        _ => {
            let mut text = input.choose(&STRINGS)?.as_bytes().to_vec();
            text.push(0);
            text
        }
    })
}

/// An address or a size: mostly round, sometimes at the end of the address space.
fn cell(input: &mut Unstructured<'_>) -> Result<u64> {
    let number = u64::from(input.arbitrary::<u8>()?);
    Ok(match input.int_in_range(0..=4u8)? {
        0 => input.arbitrary()?,
        1 => u64::MAX - number,
        2 => number << 12,
        _ => number << 24,
    })
}
