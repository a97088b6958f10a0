//! The host's event counters: they must tell it nothing of what a protected guest does.

use abi::Exit;

use super::guests::Memory;
use super::kit::{end, expect, words};
use crate::arch::counters;
use crate::report::Report;

pub(super) fn run(memory: &Memory, report: &mut Report) {
    if counters::exist() {
        report.check(
            "the_hosts_counters_stand_still_for_a_protected_guest",
            check(memory),
        );
    }
}

fn check(memory: &Memory) -> Result<(), &'static str> {
    let open = cycles(memory, false)?;
    let protected = cycles(memory, true)?;
    if open / 4 < protected {
        crate::console::line(format_args!(
            "  {open} cycles of a guest, {protected} of a protected one"
        ));
    }
    expect(
        open / 4 >= protected,
        "the cycles of a protected guest count",
    )
}

/// What the host counts while a guest makes 64 million instructions.
fn cycles(memory: &Memory, protected: bool) -> Result<u64, &'static str> {
    let vm = super::remote::ready(memory, counters::spin(), protected)?;
    counters::start();
    let exit = loop {
        match words(vm.run(0, 0, false)) {
            Ok(Exit::Interrupted) => {}
            other => break other,
        }
    };
    let (cycles, counting) = counters::stop();
    end(vm)?;
    expect(exit == Ok(Exit::SystemOff), "it does not end")?;
    expect(counting, "the host's counters do not go on")?;
    Ok(cycles)
}
