//! The x86 hypervisor's logic that needs no register: capability checks, decoding, decisions
//! and state. Memory is the shared crates': `stage2` with the EPT format, `memslot` with the x86
//! policy.
//!
//! Everything here compiles for a developer's machine and is tested there. The binary
//! (`main.rs`) wraps it in `arch/`, the only place that executes an instruction of VMX.
//!
//! | module | what it decides |
//! |---|---|
//! | [`capability`], [`controls`] | whether this CPU will do, and which control words it runs with |
//! | [`field`], [`exit`] | the VMCS by name, exits in neutral words |
//! | [`handle`] with [`cr`], [`msr`], [`cpuid`] | what happens at an exit |
//! | [`vcpu`], [`start`], [`apic`] | a vCPU, the states in which it starts, its interrupts |
//! | [`payload`] | the files behind the hypervisor in its disk image |
//! | [`linux`] | the 64-bit boot protocol: a kernel's segments and its boot parameters |
//! | [`pc`] | a 16550, two 8259, an 8254 and a clock |
//! | [`ports`] | what a VM sees at its I/O ports |
//! | [`vm`], [`frames`] | a VM: memory on the shared core, mailboxes, counters |
//! | [`shootdown`] | invalidation on every CPU, complete when it returns |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod apic;
pub mod capability;
pub mod controls;
pub mod cpuid;
pub mod cr;
pub mod exit;
pub mod field;
pub mod frames;
pub mod handle;
pub mod linux;
pub mod msr;
pub mod payload;
pub mod pc;
pub mod ports;
pub mod shootdown;
pub mod start;
mod sync;
pub mod vcpu;
pub mod vm;
