//! The EL2 binary: boots from firmware at EL2, takes its memory, drops the host to EL1 behind a
//! stage 2. Only built for bare metal (`make build`); on a developer's machine the library beside
//! it is what is tested.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(
        clippy::cast_possible_truncation,
        reason = "usize and u64 have the same width on the only target"
    )
)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod after_boot;
#[cfg(target_os = "none")]
mod arch;
#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod entropy;
#[cfg(target_os = "none")]
mod host;
#[cfg(target_os = "none")]
mod hypervisor;
#[cfg(target_os = "none")]
mod iommu;
#[cfg(target_os = "none")]
mod on_board;
#[cfg(target_os = "none")]
mod panic;
#[cfg(target_os = "none")]
mod power;
#[cfg(target_os = "none")]
mod protect;
#[cfg(target_os = "none")]
mod running;
#[cfg(target_os = "none")]
mod smp;
#[cfg(target_os = "none")]
mod trap;
#[cfg(target_os = "none")]
mod vcpu;
#[cfg(target_os = "none")]
mod vm;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!(
        "this is a hypervisor for bare metal: build it with `make build`, try it with `make run`"
    );
    std::process::exit(2);
}
