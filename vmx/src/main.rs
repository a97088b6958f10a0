//! The x86 binary: boots from a flat disk image into VMX root operation and runs guests there.
//! Only built for bare metal (`scripts/build-x86.sh`); on a developer's machine the library
//! beside it is what is tested.
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
mod arch;
#[cfg(target_os = "none")]
mod guest;
#[cfg(target_os = "none")]
mod owner;
#[cfg(target_os = "none")]
mod panic;

#[cfg(target_os = "none")]
use arch::serial::say;

/// Called by the boot CPU once it has a heap and descriptor tables.
#[cfg(target_os = "none")]
fn start() -> ! {
    use arch::{power, smp};
    use owner::{linux, suite};
    use vmx::payload::Payload;

    say!("ravelin: x86, {} MiB of RAM", arch::total_memory() >> 20);
    let cpu = smp::boot_cpu();
    for missing in cpu.capabilities.absent() {
        say!("ravelin: this CPU has no {missing}: another way is taken");
    }
    let cpus = smp::start_others();
    say!(
        "ravelin: {cpus} CPUs in VMX root operation, {} MHz, physical addresses of {} bits",
        arch::time::hz() / 1_000_000,
        cpu.capabilities.ept.output_bits
    );
    let Some(files) = Payload::new(arch::payload::bytes()) else {
        power::off(suite::run(&cpu))
    };
    match files.argument("run") {
        None | Some("checks") => power::off(suite::run(&cpu)),
        Some("linux") => power::off(linux::run(&cpu, &files)),
        Some(other) => power::fatal(format_args!("cannot run '{other}'")),
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!(
        "this is a hypervisor for bare metal: build it with `make build-x86`, try it with `make run-x86`"
    );
    std::process::exit(2);
}
