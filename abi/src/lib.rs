//! Ravelin's hypercall ABI: one declaration, used by EL2 and by its host.
//!
//! Calls are SMCCC fast calls (Arm DEN 0028) by `HVC #0` in the vendor-specific hypervisor range.
//! `x0` holds the function id going in and the SMCCC status coming out: [`SMCCC_SUCCESS`], or
//! [`SMCCC_NOT_SUPPORTED`] for an unknown id or a non-zero immediate, which has no other effect.
//! With success, `x1` holds the call's value, or a negative [`ErrorCode`].
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod call;
mod error;
mod guest;

pub use call::{Call, Counter, Features};
pub use error::{ErrorCode, from_register, to_register};
pub use guest::{
    DmaFault, DonationKind, Exit, GUEST_MEASUREMENT, GUEST_MEMORY_ATTRIBUTES, GUEST_TIMER_PPI,
    KICK_SGI, LeafInfo, MAX_VCPUS, SlotState, SlotWord, VmConfig, VmCounter,
};

/// Version of this ABI: major in bits 31:16, minor in 15:0. The major number changes when a call
/// changes its meaning, the minor one when something is added.
pub const VERSION: u32 = 1 << 16 | 3;

/// SMCCC status of a call that was understood (DEN 0028 section 7).
pub const SMCCC_SUCCESS: u64 = 0;
/// SMCCC status of an unknown call: -1.
pub const SMCCC_NOT_SUPPORTED: u64 = u64::MAX;

/// SMCCC vendor-hypervisor "call UID": which hypervisor this is (DEN 0028 section 6.2).
pub const VENDOR_UID: u32 = 0x8600_ff01;

/// Ravelin's UID, the four words that [`VENDOR_UID`] returns in `w0..w3`.
///
/// As a UUID: 4a7d91c2-3f60-4e5b-9d18-726176656c6e (the last six bytes spell "raveln").
pub const RAVELIN_UID: [u32; 4] = [0xc291_7d4a, 0x5b4e_603f, 0x6172_189d, 0x6e6c_6576];
