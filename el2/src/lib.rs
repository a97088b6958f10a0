//! The EL2 hypervisor's logic that needs no register: decoding, decisions and state.
//!
//! Everything here compiles for a developer's machine and is tested there. The binary
//! (`main.rs`) wraps it in `arch/`, the only place that names an Arm register.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod call_args;
pub mod calls;
pub mod core_interrupts;
pub mod counters;
pub mod devices;
pub mod esr;
pub mod exits;
pub mod features;
pub mod fine_grained;
pub mod guest;
pub mod guest_frames;
pub mod guest_memory;
pub mod host_map;
pub mod hvc;
pub mod inject;
pub mod kick;
pub mod layout;
pub mod machine;
pub mod measure;
pub mod overwrite;
pub mod ownership;
pub mod page_state;
pub mod protection;
pub mod psci;
pub mod redistributor;
pub mod rng200;
pub mod slice;
pub mod smc;
pub mod smmu;
pub mod sync;
#[cfg(all(any(test, feature = "testing"), not(loom)))]
pub mod testing;
pub mod vgic;
pub mod vm_counters;
pub mod vm_error;
pub mod vm_state;
pub mod vm_table;
