//! The host that EL2 starts at EL1.
//!
//! It prints what it found, then does what it was given: runs its scenarios (`shim.run=all` on the
//! command line), the guests of a FIT image, or Linux as host; without any, a small guest that is
//! linked in. It powers off with a result line. It trusts EL2 as any host must, and is trusted by nobody.
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
mod call;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod edu;
#[cfg(target_os = "none")]
mod linux;
#[cfg(target_os = "none")]
mod machine;
#[cfg(target_os = "none")]
#[path = "vmm/mod.rs"]
mod monitor;
#[cfg(target_os = "none")]
mod pci;
#[cfg(target_os = "none")]
mod report;
#[cfg(target_os = "none")]
mod scenario;
#[cfg(target_os = "none")]
mod vm;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is the EL1 half of a bare-metal image: build it with `make build`");
    std::process::exit(2);
}

#[cfg(target_os = "none")]
mod run {
    use abi::Features;
    use alloc::vec;
    use board::{AddrRange, Board};
    use vmm::fit;

    use crate::arch::mem;

    use crate::machine::{self, Machine};
    use crate::report::Report;
    use crate::{call, console, linux, monitor, scenario};

    /// A guest for machines that were given none: tests/guests/payload.
    pub(crate) static DEMO: &[u8] =
        include_bytes!(env!("RAVELIN_DEMO", "build it with scripts/build.sh"));
    /// Its vCPUs, at most.
    const DEMO_VCPUS: usize = 4;

    /// Reads the machine, does what was asked, ends the machine.
    pub(crate) fn run(tree: u64) -> ! {
        let machine = match machine::read(tree) {
            Ok(machine) => machine,
            Err(error) => {
                console::line(format_args!("host: can't read the device tree: {error}"));
                call::system_off()
            }
        };
        machine.print();
        let mut report = Report::default();
        if let Some(fit) = machine.board.chosen.initrd {
            run_payload(&machine, fit, &mut report);
        } else {
            run_scenarios(&machine, &mut report);
        }
        report.close();
        call::system_off()
    }

    /// Runs the guests of a FIT, or Linux as host if it has none.
    fn run_payload(machine: &Machine, file: AddrRange, report: &mut Report) {
        let configs = || {
            let file = mem::bytes(file);
            fit::guests(file).map_err(|error| {
                console::line(format_args!("host: {error}"));
                "the initrd can't be used"
            })
        };
        match monitor::run(machine, configs) {
            Err(monitor::NO_GUESTS) => {
                // Returns only if there is nothing to boot.
                let why = linux::boot(machine, file);
                console::line(format_args!("host: can't boot from the initrd: {why}"));
                report.check("payload", Err(why));
            }
            result => report.check("guests_power_off", result),
        }
    }

    fn run_scenarios(machine: &Machine, report: &mut Report) {
        match asked(&machine.board) {
            Some(which) => scenario::run(machine, which, report),
            None => {
                scenario::greet(report);
                run_demo(machine, report);
            }
        }
    }

    /// Runs the guest that is linked in, on as many cores as there are, up to four.
    fn run_demo(machine: &Machine, report: &mut Report) {
        if !machine.has(Features::GUESTS) {
            console::line(format_args!("host: this machine can't have guests"));
            return;
        }
        let vcpus = machine.board.cpus.len().min(DEMO_VCPUS);
        let result = monitor::run(machine, || Ok(vec![Ok(fit::demo(DEMO, vcpus as u8))]));
        report.check("demo_powers_off", result);
    }

    /// What `shim.run=` asks for.
    fn asked<'a>(board: &Board<'a>) -> Option<&'a str> {
        board
            .chosen
            .bootargs
            .split_whitespace()
            .find_map(|word| word.strip_prefix("shim.run="))
    }
}
