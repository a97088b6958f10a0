//! What a device tree says about a board.
//!
//! A board is a device tree, never a `cfg`: everything that Ravelin needs to know about the
//! machine (memory, CPUs and how to start them, console, interrupt controller, power control,
//! what the user asked for under `/chosen`) is read here, once, into plain bounded values.
//! EL2, the EL1 host shim and the host-side tests share this crate, so that a real board's tree
//! can be checked on a developer's machine.
//!
//! The device tree comes from firmware. It is trusted to tell the truth but not to be well
//! formed: every function here returns an error instead of panicking on bad input.
//!
//! Source: Devicetree Specification 0.4; bindings as named at each function.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod edit;
mod error;
mod info;
mod iommu;
mod pci;
mod place;
mod ranges;
#[cfg(test)]
mod tests;
mod tree;
pub mod uart;

pub use dtoolkit;
pub use edit::{HostTree, patch_for_host};
pub use error::{BoardError, EditError};
pub use info::{
    Board, Chosen, Console, Cpu, Gic, MAX_CPUS, MAX_GIC_TABLES, MAX_MEMORY, MAX_RESERVED,
    MAX_VIRTIO, Power, PsciConduit, SelfTest, StartMethod, UartKind, check_header,
};
pub use iommu::{Iommu, MAX_DOORBELLS, MAX_STREAM_MAPS, StreamMap};
pub use pci::{PciBridge, PciWindow};
pub use place::{Placement, highest_free, lowest_free};
pub use ranges::{AddrRange, PAGE_SIZE, RangeList};
pub use tree::Tree;
