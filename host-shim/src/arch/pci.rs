//! The configuration space of PCI functions (ECAM, PCI Express 7.2.2).

use board::uart::UartRegs;
use board::{AddrRange, PciBridge};
use vmm::pci::{ConfigSpace, Function};

use super::Mmio;

/// Bytes of a function's space.
const SIZE: u64 = 4096;

/// The space behind a bridge, which the device tree names. Device memory is mapped, and whole words
/// are loaded and stored by instructions that a hypervisor can decode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ecam {
    range: AddrRange,
    first_bus: u8,
}

impl Ecam {
    /// Of this bridge.
    pub(crate) const fn new(bridge: &PciBridge) -> Self {
        Self {
            range: bridge.ecam,
            first_bus: bridge.first_bus,
        }
    }

    /// Address of a register, if the space reaches so far.
    fn address(&self, function: Function, offset: u16) -> Option<u64> {
        let first = u64::from(self.first_bus) << 8;
        let number = u64::from(function.requester()).checked_sub(first)?;
        let address = self.range.start() + number * SIZE + u64::from(offset & 0xffc);
        self.range.contains(address).then_some(address)
    }
}

impl ConfigSpace for Ecam {
    fn read(&self, function: Function, offset: u16) -> u32 {
        let address = self.address(function, offset);
        address.map_or(u32::MAX, |address| Mmio::new(address).read(0))
    }

    fn write(&self, function: Function, offset: u16, value: u32) {
        if let Some(address) = self.address(function, offset) {
            Mmio::new(address).write(0, value);
        }
    }
}
