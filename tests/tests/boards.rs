//! What EL2 reads in the real device trees of the Raspberry Pi 4 and 5, which Debian's kernel package ships.
//!
//! The firmware fills in what the files leave open (the size of RAM); `as_firmware_leaves_it` does the same. The
//! expected values are those of the SoCs' documentation, not of the code under test.

#![expect(clippy::unwrap_used, reason = "in a test, a panic is the failure")]

use board::dtoolkit::fdt::Fdt;
use board::{
    AddrRange, Board, BoardError, Console, Gic, HostTree, Placement, PsciConduit, StartMethod,
    Tree, UartKind, highest_free, patch_for_host,
};
use dtoolkit::model::DeviceTreeProperty;
use dtoolkit::{Node, Property};
use ravelin_tests::{device_tree, files, machine};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn debian(name: &str) -> Vec<u8> {
    files::read(&machine::debian_dtb(name), "run `make setup`").unwrap()
}

/// The tree with these cells as RAM, as the firmware leaves it.
fn as_firmware_leaves_it(name: &str, memory: &str, reg: &[u32]) -> Vec<u8> {
    let mut tree = device_tree::parse(&debian(name)).unwrap();
    let node = tree.find_node_mut(memory).unwrap();
    node.remove_property("reg");
    node.add_property(DeviceTreeProperty::new("reg", reg).unwrap());
    tree.to_dtb()
}

/// Pi 4 with 4 GiB: 948 MiB below the VideoCore, the rest up to the peripherals, and from 4 GiB on.
fn pi4() -> Vec<u8> {
    let reg = [
        0,
        0,
        0x3b40_0000,
        0,
        0x4000_0000,
        0xbc00_0000,
        1,
        0,
        0x0400_0000,
    ];
    as_firmware_leaves_it("bcm2711-rpi-4-b.dtb", "/memory@0", &reg)
}

/// Pi 5 with 8 GiB.
fn pi5() -> Vec<u8> {
    let tree = device_tree::parse(&debian("bcm2712-rpi-5-b.dtb")).unwrap();
    let name = tree
        .root
        .children()
        .map(|n| n.name().to_owned())
        .find(|n| n.starts_with("memory@"));
    let reg = [0, 0, 0, 0x3fc0_0000, 0, 0x4000_0000, 1, 0xc000_0000];
    as_firmware_leaves_it("bcm2712-rpi-5-b.dtb", &format!("/{}", name.unwrap()), &reg)
}

fn range(start: u64, end: u64) -> AddrRange {
    AddrRange::new(start, end).unwrap()
}

fn is_reserved(board: &Board<'_>, wanted: AddrRange) -> bool {
    board
        .reserved
        .as_slice()
        .iter()
        .any(|r| r.contains_range(wanted))
}

/// EL2's place as it would choose it: 8 MiB, below 4 GiB or as high as there is.
fn place_el2(board: &Board<'_>) -> AddrRange {
    let want = Placement {
        size: 8 * MIB,
        align: 2 * MIB,
        limit: u64::MAX,
    };
    highest_free(&board.memory, &board.reserved, want).unwrap()
}

fn read(blob: &[u8]) -> Board<'_> {
    Board::read(&Tree::new(blob).unwrap()).unwrap()
}

/// Distributor, CPU interface, and their two parts for a hypervisor.
fn gic(board: &Board<'_>) -> [AddrRange; 4] {
    let Some(Gic::V2 {
        gicd,
        gicc,
        gich,
        gicv,
    }) = board.gic
    else {
        panic!("not a GICv2: {:?}", board.gic);
    };
    [gicd, gicc, gich.unwrap(), gicv.unwrap()]
}

/// Affinity of each CPU, and how it is started.
fn cpus(board: &Board<'_>) -> Vec<(u64, StartMethod)> {
    let cpus = board.cpus.iter();
    cpus.map(|cpu| (cpu.mpidr, cpu.start)).collect()
}

#[test]
fn pi4_file_as_shipped_has_no_memory_and_that_is_said() {
    let blob = debian("bcm2711-rpi-4-b.dtb");
    let tree = Tree::new(&blob).unwrap();
    assert!(matches!(Board::read(&tree), Err(BoardError::NoMemory)));
}

#[test]
fn pi4_console_is_translated_through_the_soc_bus() {
    let blob = pi4();
    let board = read(&blob);
    // stdout-path = "serial1": the mini UART, bus address 0x7e215040.
    assert_eq!(
        board.console,
        Some(Console {
            kind: UartKind::Mini,
            base: 0xfe21_5040
        })
    );
}

#[test]
fn pi4_with_disabled_bluetooth_talks_on_the_first_pl011() {
    let mut tree = device_tree::parse(&pi4()).unwrap();
    device_tree::set_chosen(&mut tree, "stdout-path", "serial0:115200n8").unwrap();
    let blob = tree.to_dtb();
    let board = read(&blob);
    assert_eq!(
        board.console,
        Some(Console {
            kind: UartKind::Pl011,
            base: 0xfe20_1000
        })
    );
}

#[test]
fn pi4_gic_has_all_four_parts_at_the_true_addresses() {
    let blob = pi4();
    let board = read(&blob);
    let parts = gic(&board);
    let starts = parts.map(AddrRange::start);
    assert_eq!(starts, [0xff84_1000, 0xff84_2000, 0xff84_4000, 0xff84_6000]);
    // The CPU interface is 8 KiB: DIR is in its second page.
    assert_eq!(parts[1].size(), 0x2000);
}

#[test]
fn pi4_cpus_wait_in_a_spin_table_and_there_is_no_psci() {
    let blob = pi4();
    let board = read(&blob);
    assert_eq!(board.psci, None);
    let cpus = cpus(&board);
    let spin = |word| StartMethod::SpinTable(word);
    assert_eq!(
        cpus,
        [
            (0, spin(0xd8)),
            (1, spin(0xe0)),
            (2, spin(0xe8)),
            (3, spin(0xf0))
        ]
    );
}

#[test]
fn pi4_reserves_the_page_of_the_spin_table() {
    let blob = pi4();
    let board = read(&blob);
    assert!(
        is_reserved(&board, range(0, 0x1000)),
        "{:?}",
        board.reserved.as_slice()
    );
}

#[test]
fn pi4_memory_is_in_its_banks_and_el2_finds_a_place() {
    let blob = pi4();
    let board = read(&blob);
    let total: u64 = board.memory.as_slice().iter().map(|r| r.size()).sum();
    assert_eq!(total, 0x3b40_0000 + 0xbc00_0000 + 0x0400_0000);
    let el2 = place_el2(&board);
    assert!(
        board
            .memory
            .as_slice()
            .iter()
            .any(|r| r.contains_range(el2))
    );
    assert!(board.reserved.overlapping(el2).is_none());
}

#[test]
fn pi5_console_is_the_debug_uart_behind_two_buses() {
    let blob = pi5();
    let board = read(&blob);
    assert_eq!(
        board.console,
        Some(Console {
            kind: UartKind::Pl011,
            base: 0x10_7d00_1000
        })
    );
}

#[test]
fn pi5_gic_is_above_4_gib() {
    let blob = pi5();
    let board = read(&blob);
    let parts = gic(&board);
    let starts = parts.map(AddrRange::start);
    assert_eq!(
        starts,
        [
            0x10_7fff_9000,
            0x10_7fff_a000,
            0x10_7fff_c000,
            0x10_7fff_e000
        ]
    );
}

#[test]
fn pi5_cpus_are_numbered_in_aff1_and_started_by_psci() {
    let blob = pi5();
    let board = read(&blob);
    assert_eq!(board.psci, Some(PsciConduit::Smc));
    let cpus = cpus(&board);
    let psci = StartMethod::Psci;
    assert_eq!(
        cpus,
        [(0, psci), (0x100, psci), (0x200, psci), (0x300, psci)]
    );
}

#[test]
fn pi5_firmware_keeps_the_first_512_kib() {
    let blob = pi5();
    let board = read(&blob);
    let firmware = range(0, 0x8_0000);
    assert!(
        is_reserved(&board, firmware),
        "{:?}",
        board.reserved.as_slice()
    );
    assert!(
        board
            .no_map
            .as_slice()
            .iter()
            .any(|r| r.contains_range(firmware))
    );
    assert!(place_el2(&board).start() >= GIB);
}

/// What the host gets, read again from scratch.
fn check_host_tree(blob: &[u8], cpus: &[u64]) {
    let board = read(blob);
    let el2 = place_el2(&board);
    let mut buffer = vec![0; blob.len() + 8192];
    let length = patch_for_host(
        Fdt::new(blob).unwrap(),
        &mut buffer,
        &HostTree {
            el2,
            cpus,
            iommu: None,
            generator: board.generator.is_some(),
        },
    )
    .unwrap();
    let patched = &buffer[..length];
    let host = read(patched);
    assert_eq!(host.psci, Some(PsciConduit::Hvc));
    assert!(host.cpus.iter().all(|cpu| cpu.start == StartMethod::Psci));
    assert_eq!(
        host.cpus.iter().map(|cpu| cpu.mpidr).collect::<Vec<_>>(),
        cpus
    );
    assert!(host.no_map.as_slice().iter().any(|r| r.contains_range(el2)));
    assert_eq!(host.memory.as_slice(), board.memory.as_slice());
    assert_eq!((host.console, host.gic), (board.console, board.gic));
    // The node is there, counted below, but disabled.
    assert_eq!(host.generator, None);
    let node = format!("/reserved-memory/ravelin@{:x}", el2.start());
    assert!(
        Fdt::new(patched)
            .unwrap()
            .find_node(&node)
            .unwrap()
            .property("no-map")
            .is_some()
    );
    assert_eq!(nodes(blob) + 1, nodes(patched) - psci_added(blob));
}

fn nodes(blob: &[u8]) -> usize {
    fn count(node: &impl Node) -> usize {
        1 + node.children().map(|child| count(&child)).sum::<usize>()
    }
    count(&Fdt::new(blob).unwrap().root())
}

/// Pi 4's tree gets a `/psci`, and Pi 5's has one.
fn psci_added(blob: &[u8]) -> usize {
    usize::from(Fdt::new(blob).unwrap().find_node("/psci").is_none())
}

#[test]
fn pi4_host_gets_the_machine_less_el2() {
    check_host_tree(&pi4(), &[0, 1, 2, 3]);
}

#[test]
fn pi5_host_gets_the_machine_less_el2() {
    check_host_tree(&pi5(), &[0, 0x100, 0x200, 0x300]);
}

#[test]
fn pi4_has_a_generator_alone_in_its_page() {
    let blob = pi4();
    let generator = Board::read(&Tree::new(&blob).unwrap()).unwrap().generator;
    assert_eq!(generator, Some(range(0xfe10_4000, 0xfe10_4028)));
    // What else were there, the host would lose, too. The bus maps 0x7e000000 to 0xfe000000.
    assert_eq!(
        neighbours(&blob, "/soc", 0x7e10_4000),
        ["rng@7e104000"],
        "by bus addresses"
    );
}

/// Debian's tree of the Pi 5 does not name the generator, Raspberry Pi's own, which its firmware loads, does.
#[test]
fn pi5_has_a_generator_if_its_tree_names_it() {
    let shipped = pi5();
    let read = |blob| Board::read(&Tree::new(blob).unwrap()).unwrap().generator;
    assert_eq!(read(&shipped), None);
    let blob = with_pi5_generator(&shipped);
    assert_eq!(read(&blob), Some(range(0x10_7d20_8000, 0x10_7d20_8028)));
    let soc = "/soc@107c000000";
    assert_eq!(neighbours(&blob, soc, 0x7d20_8000), ["rng@7d208000"]);
}

#[test]
fn pi5_host_is_not_given_the_generator() {
    check_host_tree(&with_pi5_generator(&pi5()), &[0, 0x100, 0x200, 0x300]);
}

/// The node of raspberrypi/linux, `bcm2712-ds.dtsi`, and of Linux since its `bcm2712.dtsi` has one.
fn with_pi5_generator(blob: &[u8]) -> Vec<u8> {
    let mut tree = device_tree::parse(blob).unwrap();
    let reg = [0x7d20_8000, 0x28];
    device_tree::add_generator(&mut tree, "/soc@107c000000", &reg).unwrap();
    tree.to_dtb()
}

/// Nodes of a bus of one address and one size cell that have registers in the page at a bus address.
fn neighbours(blob: &[u8], bus: &str, page: u32) -> Vec<String> {
    let tree = device_tree::parse(blob).unwrap();
    let bus = tree.find_node(bus).unwrap();
    let is_there = |reg: &[u8]| {
        let entries = reg.chunks_exact(8);
        entries.into_iter().any(|entry| {
            let word = |at: usize| u32::from_be_bytes(entry[at..at + 4].try_into().unwrap());
            word(0) < page + 0x1000 && page < word(0) + word(4)
        })
    };
    let inside = bus.children().filter(|node| {
        let reg = node.property("reg");
        reg.is_some_and(|reg| is_there(reg.value()))
    });
    inside.map(|node| node.name().to_owned()).collect()
}

#[test]
fn other_pi_4_boards_are_read_alike() {
    for name in ["bcm2711-rpi-400.dtb", "bcm2711-rpi-cm4-io.dtb"] {
        let blob = as_firmware_leaves_it(name, "/memory@0", &[0, 0, 0x3b40_0000]);
        let board = read(&blob);
        assert_eq!(board.cpus.len(), 4, "{name}");
        assert!(board.console.is_some() && board.gic.is_some(), "{name}");
        assert!(board.generator.is_some(), "{name}");
        assert!(
            Fdt::new(&blob)
                .unwrap()
                .root()
                .property("model")
                .unwrap()
                .value()
                .starts_with(b"Raspberry Pi"),
            "{name}"
        );
    }
}
