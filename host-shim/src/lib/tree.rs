//! The device tree of a guest.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use vm_fdt::{Error, FdtWriter};

use crate::platform::{
    GICC, GICD, GICR, GICR_STRIDE, MAX_ASSIGNED, PCI_ECAM, PCI_ECAM_SIZE, PCI_INTID, PCI_WINDOW,
    PCI_WINDOW_SIZE, RAM, UART, UART_INTID, UART_SIZE, VIRTIO, VIRTIO_INTID, VIRTIO_STRIDE,
};

/// What the tree says.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// GICv3 instead of v2.
    pub gic_v3: bool,
    /// Command line.
    pub bootargs: &'a str,
    /// IPA range of the ramdisk.
    pub ramdisk: Option<(u64, u64)>,
    /// Seeds for the kernel's randomness, which the host knows, too; `None` if it has none.
    pub seed: Option<[u64; 5]>,
    /// Which virtio devices there are, as a bitmap.
    pub virtio: u32,
    /// There is a PCI bus, with functions of the machine on it.
    pub pci: bool,
}

const INTERRUPT_CONTROLLER: u32 = 1;
const CLOCK: u32 = 2;
/// Interrupt specifiers (arm,gic-v3.yaml, arm,gic.yaml): kind, number, flags.
const SPI: u32 = 0;
const PPI: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Builds the tree.
///
/// # Errors
///
/// The command line holds a NUL.
pub fn build(guest: &Guest<'_>) -> Result<Vec<u8>, Error> {
    let mut tree = FdtWriter::new()?;
    let root = tree.begin_node("")?;
    tree.property_string("compatible", "linux,dummy-virt")?;
    tree.property_string("model", "Ravelin guest")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_u32("interrupt-parent", INTERRUPT_CONTROLLER)?;
    chosen(&mut tree, guest)?;
    let memory = tree.begin_node(&at("memory", RAM))?;
    tree.property_string("device_type", "memory")?;
    tree.property_array_u64("reg", &[RAM, guest.memory])?;
    tree.end_node(memory)?;
    cpus(&mut tree, guest.vcpus)?;
    let psci = tree.begin_node("psci")?;
    tree.property_string_list("compatible", strings(&["arm,psci-1.0", "arm,psci-0.2"]))?;
    tree.property_string("method", "hvc")?;
    tree.end_node(psci)?;
    timer(&mut tree)?;
    interrupt_controller(&mut tree, guest)?;
    uart(&mut tree)?;
    for number in (0..u32::BITS).filter(|number| guest.virtio & 1 << number != 0) {
        virtio(&mut tree, number)?;
    }
    if guest.pci {
        pci(&mut tree)?;
    }
    tree.end_node(root)?;
    tree.finish()
}

fn at(name: &str, address: u64) -> String {
    let mut text = String::from(name);
    // Writing to a string never fails.
    let _ = write!(text, "@{address:x}");
    text
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| String::from(*text)).collect()
}

fn chosen(tree: &mut FdtWriter, guest: &Guest<'_>) -> Result<(), Error> {
    let chosen = tree.begin_node("chosen")?;
    tree.property_string("stdout-path", &at("/pl011", UART))?;
    tree.property_string("bootargs", guest.bootargs)?;
    if let Some((start, end)) = guest.ramdisk {
        tree.property_u64("linux,initrd-start", start)?;
        tree.property_u64("linux,initrd-end", end)?;
    }
    if let Some([kaslr, rng @ ..]) = guest.seed {
        tree.property_u64("kaslr-seed", kaslr)?;
        tree.property_array_u64("rng-seed", &rng)?;
    }
    tree.end_node(chosen)
}

fn cpus(tree: &mut FdtWriter, vcpus: u8) -> Result<(), Error> {
    let cpus = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 1)?;
    tree.property_u32("#size-cells", 0)?;
    for index in 0..vcpus {
        let cpu = tree.begin_node(&at("cpu", index.into()))?;
        tree.property_string("device_type", "cpu")?;
        tree.property_string("compatible", "arm,armv8")?;
        tree.property_u32("reg", index.into())?;
        tree.property_string("enable-method", "psci")?;
        tree.end_node(cpu)?;
    }
    tree.end_node(cpus)
}

/// Interrupts of the secure, non-secure, virtual and hypervisor timers (arm,arch_timer.yaml).
fn timer(tree: &mut FdtWriter) -> Result<(), Error> {
    let timer = tree.begin_node("timer")?;
    tree.property_string_list("compatible", strings(&["arm,armv8-timer"]))?;
    let ppis = [13, 14, 11, 10].map(|number| [PPI, number, LEVEL_HIGH]);
    tree.property_array_u32("interrupts", ppis.as_flattened())?;
    tree.property_null("always-on")?;
    tree.end_node(timer)
}

fn interrupt_controller(tree: &mut FdtWriter, guest: &Guest<'_>) -> Result<(), Error> {
    let node = tree.begin_node(&at("intc", GICD))?;
    let (compatible, second) = if guest.gic_v3 {
        ("arm,gic-v3", [GICR, GICR_STRIDE * u64::from(guest.vcpus)])
    } else {
        ("arm,cortex-a15-gic", [GICC, 0x2000])
    };
    tree.property_string("compatible", compatible)?;
    let [second_start, second_size] = second;
    tree.property_array_u64("reg", &[GICD, 0x1_0000, second_start, second_size])?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 3)?;
    tree.property_phandle(INTERRUPT_CONTROLLER)?;
    tree.end_node(node)
}

fn uart(tree: &mut FdtWriter) -> Result<(), Error> {
    let clock = tree.begin_node("apb-pclk")?;
    tree.property_string("compatible", "fixed-clock")?;
    tree.property_u32("#clock-cells", 0)?;
    tree.property_u32("clock-frequency", 24_000_000)?;
    tree.property_phandle(CLOCK)?;
    tree.end_node(clock)?;
    let uart = tree.begin_node(&at("pl011", UART))?;
    tree.property_string_list("compatible", strings(&["arm,pl011", "arm,primecell"]))?;
    tree.property_array_u64("reg", &[UART, UART_SIZE])?;
    tree.property_array_u32("interrupts", &[SPI, UART_INTID - 32, LEVEL_HIGH])?;
    tree.property_array_u32("clocks", &[CLOCK, CLOCK])?;
    tree.property_string_list("clock-names", strings(&["uartclk", "apb_pclk"]))?;
    tree.end_node(uart)
}

/// A virtio device (mmio.yaml of virtio). Its memory accesses are the host's, which are cached.
fn virtio(tree: &mut FdtWriter, number: u32) -> Result<(), Error> {
    let base = VIRTIO + VIRTIO_STRIDE * u64::from(number);
    let node = tree.begin_node(&at("virtio_mmio", base))?;
    tree.property_string("compatible", "virtio,mmio")?;
    tree.property_array_u64("reg", &[base, VIRTIO_STRIDE])?;
    tree.property_array_u32("interrupts", &[SPI, VIRTIO_INTID - 32 + number, LEVEL_HIGH])?;
    tree.property_null("dma-coherent")?;
    tree.end_node(node)
}

/// The bridge to the functions that are the guest's own (host-generic-pci.yaml). Each device has an
/// interrupt of its own, whichever pin it asserts. Their memory accesses are snooped.
fn pci(tree: &mut FdtWriter) -> Result<(), Error> {
    const MEMORY: u32 = 2 << 24;
    const PIN_A: u32 = 1;
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let (start, size) = (low(PCI_WINDOW), low(PCI_WINDOW_SIZE));
    let node = tree.begin_node(&at("pcie", PCI_ECAM))?;
    tree.property_string("compatible", "pci-host-ecam-generic")?;
    tree.property_string("device_type", "pci")?;
    tree.property_u32("#address-cells", 3)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_array_u64("reg", &[PCI_ECAM, PCI_ECAM_SIZE])?;
    tree.property_array_u32("bus-range", &[0, 0])?;
    tree.property_u32("linux,pci-domain", 0)?;
    // Bus addresses are IPAs.
    tree.property_array_u32("ranges", &[MEMORY, 0, start, 0, start, 0, size])?;
    tree.property_u32("#interrupt-cells", 1)?;
    tree.property_array_u32("interrupt-map-mask", &[31 << 11, 0, 0, 7])?;
    let routes: Vec<u32> = (1..)
        .zip(PCI_INTID - 32..)
        .take(MAX_ASSIGNED)
        .flat_map(|(device, spi)| {
            let (address, controller) = (device << 11, INTERRUPT_CONTROLLER);
            [address, 0, 0, PIN_A, controller, SPI, spi, LEVEL_HIGH]
        })
        .collect();
    tree.property_array_u32("interrupt-map", &routes)?;
    tree.property_null("dma-coherent")?;
    tree.end_node(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use board::dtoolkit::{Node, Property};
    use board::{Board, Gic, Tree};

    const GUEST: Guest<'_> = Guest {
        vcpus: 3,
        memory: 64 << 20,
        gic_v3: true,
        bootargs: "quiet",
        ramdisk: Some((0x4300_0000, 0x4310_0000)),
        seed: Some([1, 2, 3, 4, 5]),
        virtio: 0b101,
        pci: true,
    };

    fn board(guest: &Guest<'_>) -> Board<'static> {
        let blob = build(guest).unwrap().leak();
        Board::read(&Tree::new(blob).unwrap()).unwrap()
    }

    #[test]
    fn a_guest_reads_its_own_machine() {
        let board = board(&GUEST);
        assert_eq!(board.memory.as_slice()[0].start(), 0x4000_0000);
        assert_eq!(board.memory.total(), 64 << 20);
        assert_eq!(board.cpus.len(), 3);
        assert_eq!(board.cpus[2].mpidr, 2);
        assert_eq!(board.chosen.bootargs, "quiet");
        let initrd = board.chosen.initrd.unwrap();
        assert_eq!((initrd.start(), initrd.size()), (0x4300_0000, 1 << 20));
        assert_eq!(board.console.unwrap().base, 0x0900_0000);
        assert_eq!(board.psci, Some(board::PsciConduit::Hvc));
    }

    #[test]
    fn the_controller_is_that_of_its_version() {
        let Some(Gic::V3 { gicd, gicr }) = board(&GUEST).gic else {
            panic!("not a GICv3");
        };
        assert_eq!((gicd.start(), gicr.start()), (0x0800_0000, 0x080a_0000));
        assert_eq!(gicr.size(), 3 * 0x2_0000);
        let v2 = Guest {
            gic_v3: false,
            ..GUEST
        };
        let Some(Gic::V2 { gicc, gich, .. }) = board(&v2).gic else {
            panic!("not a GICv2");
        };
        assert_eq!(gicc.start(), 0x0801_0000);
        assert_eq!(gich, None, "no virtualization inside a guest");
    }

    #[test]
    fn virtio_devices_are_where_qemus_are() {
        let blob = build(&GUEST).unwrap().leak();
        let tree = Tree::new(blob).unwrap();
        let value = |path: &str, name: &str| {
            let node = tree.fdt().find_node(path)?;
            Some(node.property(name)?.value().to_vec())
        };
        let interrupts = value("/virtio_mmio@a000400", "interrupts").unwrap();
        assert_eq!(interrupts, [0, 0, 0, 0, 0, 0, 0, 18, 0, 0, 0, 4]);
        assert!(value("/virtio_mmio@a000000", "dma-coherent").is_some());
        assert!(value("/virtio_mmio@a000200", "reg").is_none());
        assert_eq!(value("/chosen", "rng-seed").unwrap().len(), 32);
        let bare = Guest {
            seed: None,
            ..GUEST
        };
        let blob = build(&bare).unwrap().leak();
        let chosen = Tree::new(blob).unwrap().fdt().find_node("/chosen").unwrap();
        assert!(chosen.property("kaslr-seed").is_none());
    }

    #[test]
    fn the_pci_bus_is_where_a_guest_expects_it() {
        let blob = build(&GUEST).unwrap().leak();
        let bridge = Tree::new(blob).unwrap().pci_bridge().unwrap();
        assert_eq!(bridge.ecam.start(), 0x3f00_0000);
        assert_eq!((bridge.first_bus, bridge.last_bus), (0, 0));
        let window = bridge.memory32.unwrap();
        assert_eq!((window.cpu.start(), window.bus), (0x1000_0000, 0x1000_0000));
        assert_eq!(window.cpu.end(), 0x3eff_0000);
        assert_eq!(bridge.memory64, None);
        let interrupts = [1, 2, 3, 4, 5].map(|device| bridge.interrupt(device, 1));
        assert_eq!(interrupts, [Some(35), Some(36), Some(37), Some(38), None]);
        let without = Guest {
            pci: false,
            ..GUEST
        };
        let blob = build(&without).unwrap().leak();
        assert_eq!(Tree::new(blob).unwrap().pci_bridge(), None);
    }

    #[test]
    fn a_command_line_with_a_nul_is_refused() {
        let guest = Guest {
            bootargs: "a\0b",
            ..GUEST
        };
        assert!(build(&guest).is_err());
    }
}
