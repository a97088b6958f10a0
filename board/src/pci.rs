//! A PCI host bridge whose configuration space is memory (`pci-host-ecam-generic`): where that
//! is, which windows lead to the devices' registers, which interrupts the devices' pins are.
//!
//! Source: the binding `pci/host-generic-pci` (Linux, `Documentation/devicetree/bindings`), PCI Bus
//! Binding to IEEE 1275 2.1 for the cells of addresses, Devicetree Specification 0.4, 2.4 for
//! `interrupt-map`.

use dtoolkit::fdt::FdtNode;
use dtoolkit::standard::NodeStandard;
use dtoolkit::{Node, Property};
use heapless::Vec;

use crate::tree::{cpu_reg, is_any, is_enabled, number};
use crate::{AddrRange, Tree};

#[cfg(test)]
mod tests;

/// Bytes of a function's configuration space (PCI Express 7.2.2).
const CONFIG_SPACE: u64 = 4096;
/// Functions of a bus.
const FUNCTIONS: u64 = 256;
/// Rows of `interrupt-map` that are kept: four pins of four devices, which the map's mask repeats.
const MAX_ROUTES: usize = 32;
/// Cells of a PCI address: a word about the space, and 64 bits.
const PCI_CELLS: usize = 3;
/// First INTID of a shared peripheral interrupt (GIC binding: type 0).
const FIRST_SPI: u32 = 32;

/// A window of the bridge: CPU addresses that reach the bus.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PciWindow {
    /// Where the CPU sees it.
    pub cpu: AddrRange,
    /// Bus address of its first byte.
    pub bus: u64,
}

impl PciWindow {
    /// The bus addresses behind it; `None` if they wrap.
    #[must_use]
    pub const fn bus_range(&self) -> Option<AddrRange> {
        AddrRange::with_size(self.bus, self.cpu.size())
    }
}

/// Where a device's interrupt pin ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Route {
    address: u32,
    pin: u32,
    intid: u32,
}

/// A host bridge.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PciBridge {
    /// Configuration space: 4 KiB for each function, from the first bus on.
    pub ecam: AddrRange,
    /// First bus.
    pub first_bus: u8,
    /// Last bus, which the configuration space still covers.
    pub last_bus: u8,
    /// The window of memory that devices with 32-bit addresses reach.
    pub memory32: Option<PciWindow>,
    /// The window of memory above 4 GiB.
    pub memory64: Option<PciWindow>,
    address_mask: u32,
    pin_mask: u32,
    routes: Vec<Route, MAX_ROUTES>,
}

impl Tree<'_> {
    /// The first bridge that is enabled; `None` without one, or if what the tree says of it makes no
    /// sense.
    #[must_use]
    pub fn pci_bridge(&self) -> Option<PciBridge> {
        self.find_map(|path| {
            let node = path.last()?;
            if !is_any(node, &["pci-host-ecam-generic"]) || !is_enabled(node) {
                return None;
            }
            let ecam = cpu_reg(path, 0)?;
            let (first_bus, last_bus) = buses(node, ecam)?;
            let mut bridge = PciBridge {
                ecam,
                first_bus,
                last_bus,
                memory32: None,
                memory64: None,
                address_mask: 0,
                pin_mask: 0,
                routes: Vec::new(),
            };
            bridge.read_windows(node);
            bridge.read_interrupts(self, node);
            Some(bridge)
        })
    }
}

/// `bus-range`, cut to what the configuration space has room for.
fn buses(node: &FdtNode<'_>, ecam: AddrRange) -> Option<(u8, u8)> {
    let (first, last) = match number(node, "bus-range") {
        Some(range) => (range >> 32, range & 0xffff_ffff),
        None => (0, 0xff),
    };
    let room = ecam.size() / (FUNCTIONS * CONFIG_SPACE);
    let last = last.min(first.checked_add(room.checked_sub(1)?)?);
    let pair = (u8::try_from(first).ok()?, u8::try_from(last).ok()?);
    (pair.0 <= pair.1).then_some(pair)
}

impl PciBridge {
    /// INTID of the interrupt of a device on the first bus, by its number (0 to 31) and its pin (1 to
    /// 4: INTA to INTD). It is level-triggered and active high.
    #[must_use]
    pub fn interrupt(&self, device: u8, pin: u8) -> Option<u32> {
        let address = u32::from(device) << 11 & self.address_mask;
        let pin = u32::from(pin) & self.pin_mask;
        self.routes
            .iter()
            .find(|route| route.address == address && route.pin == pin)
            .map(|route| route.intid)
    }

    fn read_windows(&mut self, node: &FdtNode<'_>) {
        let Some(property) = node.property("ranges") else {
            return;
        };
        // The parent is the root, whose addresses have two cells on every board with such a bridge.
        let (words, _) = property.value().as_chunks::<4>();
        for row in words.chunks_exact(PCI_CELLS + 4) {
            let word = |at: usize| u64::from(u32::from_be_bytes(row[at]));
            let long = |at: usize| word(at) << 32 | word(at + 1);
            let Some(cpu) = AddrRange::with_size(long(3), long(5)) else {
                continue;
            };
            let window = Some(PciWindow { cpu, bus: long(1) });
            // Bits 25:24 are the space: 1 I/O, 2 memory, 3 memory with 64-bit addresses.
            match word(0) >> 24 & 3 {
                2 => self.memory32 = self.memory32.or(window),
                3 => self.memory64 = self.memory64.or(window),
                _ => {}
            }
        }
    }

    fn read_interrupts(&mut self, tree: &Tree<'_>, node: &FdtNode<'_>) {
        let (Some(mask), Some(map)) = (
            node.property("interrupt-map-mask"),
            node.property("interrupt-map"),
        ) else {
            return;
        };
        let (mask, _) = mask.value().as_chunks::<4>();
        let (mut map, _) = map.value().as_chunks::<4>();
        let word = |words: &[[u8; 4]], at: usize| words.get(at).copied().map(u32::from_be_bytes);
        self.address_mask = word(mask, 0).unwrap_or(0);
        self.pin_mask = word(mask, PCI_CELLS).unwrap_or(0);
        while let Some(parent) = word(map, PCI_CELLS + 1) {
            let Some(cells) = interrupt_parent_cells(tree, parent) else {
                return;
            };
            let specifier = PCI_CELLS + 2 + cells;
            // The GIC binding: type 0 for an SPI, its number, flags.
            if let (Some(address), Some(pin), Some(0), Some(spi)) = (
                word(map, 0),
                word(map, PCI_CELLS),
                word(map, specifier),
                word(map, specifier + 1),
            ) {
                let route = Route {
                    address,
                    pin,
                    intid: FIRST_SPI.saturating_add(spi),
                };
                // What is beyond the last that is kept has no interrupt.
                if self.routes.push(route).is_err() {
                    return;
                }
            }
            map = map.get(specifier + 3..).unwrap_or_default();
        }
    }
}

/// `#address-cells` of the interrupt controller with this phandle, if an interrupt of it has three
/// cells, as a GIC's.
fn interrupt_parent_cells(tree: &Tree<'_>, phandle: u32) -> Option<usize> {
    tree.find_map(|path| {
        let node = path.last()?;
        let found = number(node, "phandle") == Some(u64::from(phandle));
        if !found || number(node, "#interrupt-cells") != Some(3) {
            return None;
        }
        let cells = match node.property("#address-cells") {
            Some(_) => node.address_cells().ok()?,
            None => 0,
        };
        usize::try_from(cells).ok().filter(|cells| *cells <= 2)
    })
}
