//! Everything that names an Arm register, an instruction or a raw address.
//!
//! All `unsafe` of EL2 is in this folder. Two facts carry most of its SAFETY comments:
//!
//! 1. EL2's map is the identity: a physical address is the address of a reference to it, both
//!    before the MMU is on and after.
//! 2. EL2's memory (image, stacks, CPU data, page states, pool) is owned by EL2 alone from the
//!    moment it is placed: no one else runs then, and later the host's stage 2 refuses it.

pub(crate) mod controls;
pub(crate) mod cpu;
pub(crate) mod exceptions;
pub(crate) mod firmware;
pub(crate) mod frames;
pub(crate) mod gic;
pub(crate) mod host_regs;
pub(crate) mod instructions;
pub(crate) mod mem;
pub(crate) mod mmio;
pub(crate) mod mmu;
pub(crate) mod owned;
pub(crate) mod profiling;
pub(crate) mod regs;
pub(crate) mod self_test;
pub(crate) mod smmu;
pub(crate) mod tables;
pub(crate) mod tlb;
pub(crate) mod windows;
pub(crate) mod world;

core::arch::global_asm!(
    include_str!("common.S"),
    include_str!("entry.S"),
    include_str!("vectors.S"),
    include_str!("guest.S"),
);

/// The host that EL2 starts at EL1: `host-shim`, a flat arm64 Image that `scripts/build.sh` has
/// built before and names in the environment.
#[used]
#[unsafe(link_section = ".shim")]
static SHIM: [u8; include_bytes!(env!("RAVELIN_SHIM")).len()] =
    *include_bytes!(env!("RAVELIN_SHIM"));
