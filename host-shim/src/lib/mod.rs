//! What a small virtual machine monitor needs that is not tied to a machine: the payloads' file,
//! the guest's device tree and memory layout, its devices, the keys of the console.
//!
//! The binary beside it runs at EL1 and drives EL2; everything here is tested on any host.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod fit;
pub mod image;
pub mod keys;
pub mod pci;
pub mod pl011;
pub mod random;
pub mod tree;
pub mod virtio;

/// The guest platform's addresses and interrupts, those of QEMU's `virt` (docs/guest-platform.md).
pub mod platform {
    /// Start of RAM.
    pub const RAM: u64 = 0x4000_0000;
    /// PL011.
    pub const UART: u64 = 0x0900_0000;
    /// Its size.
    pub const UART_SIZE: u64 = 0x1000;
    /// Its interrupt: SPI 1.
    pub const UART_INTID: u32 = 33;
    /// First of the virtio devices' registers (VIRTIO over MMIO).
    pub const VIRTIO: u64 = 0x0a00_0000;
    /// From one to the next, and size of each.
    pub const VIRTIO_STRIDE: u64 = 0x200;
    /// Interrupt of the first: SPI 16; the next ones follow.
    pub const VIRTIO_INTID: u32 = 48;
    /// Memory window of the PCI bus; bus addresses are IPAs.
    pub const PCI_WINDOW: u64 = 0x1000_0000;
    /// Its size.
    pub const PCI_WINDOW_SIZE: u64 = 0x2eff_0000;
    /// Configuration space of the PCI bus (ECAM): one bus.
    pub const PCI_ECAM: u64 = 0x3f00_0000;
    /// Its size.
    pub const PCI_ECAM_SIZE: u64 = 0x10_0000;
    /// Interrupt of the first PCI function: SPI 3; the next ones follow.
    pub const PCI_INTID: u32 = 35;
    /// Most functions of the machine that a VM can have.
    pub const MAX_ASSIGNED: usize = 4;
    /// Distributor.
    pub const GICD: u64 = 0x0800_0000;
    /// CPU interface of a GICv2.
    pub const GICC: u64 = 0x0801_0000;
    /// Redistributors of a GICv3.
    pub const GICR: u64 = 0x080a_0000;
    /// Bytes of one vCPU's redistributor.
    pub const GICR_STRIDE: u64 = 0x2_0000;
}
