//! What the host tries, one file per subject. Each check is one behaviour and prints one line.

mod abi_calls;
mod any_call;
mod cores;
mod counters;
mod dma;
mod firmware;
mod fp;
mod guest_calls;
mod guests;
mod importer_cost;
mod interrupts;
mod isolation;
mod kit;
mod lock_cost;
mod memory;
mod neighbours;
mod overlap;
mod own_turn;
mod payload;
mod protection;
mod race;
mod remote;
mod reset;
mod resumes;
mod sharing;
mod steps;
mod storm;
mod switch_cost;
mod tables;
mod twice;
mod types;

use crate::call;
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;

type Scenario = fn(&Machine, &mut Report);

const ALL: [(&str, Scenario); 13] = [
    ("abi", abi_calls::run),
    ("firmware", firmware::run),
    ("memory", memory::run),
    ("isolation", isolation::run),
    ("tables", tables::run),
    ("cores", cores::run),
    ("guests", guests::run),
    ("interrupts", interrupts::run),
    ("memory-of-guests", memory_of_guests),
    ("protection", protection::run),
    ("dma", dma::run),
    ("storm", storm::run),
    ("any-call", any_call::run),
];

/// Only when asked for by name: what measures, takes long, or resets the machine.
const MEASUREMENTS: [(&str, Scenario); 5] = [
    ("reset-leak", reset::run),
    ("importer-cost", importer_cost::run),
    ("lock-cost", lock_cost::run),
    ("switch-cost", switch_cost::run),
    ("soak", storm::soak),
];

/// Runs the scenarios that the comma-separated list names, or `all`.
pub(crate) fn run(machine: &Machine, which: &str, report: &mut Report) {
    for name in which.split(',') {
        let mut known = false;
        for (scenario, run) in ALL {
            if name == scenario || name == "all" {
                known = true;
                run(machine, report);
            }
        }
        for (measurement, run) in MEASUREMENTS {
            if name == measurement {
                known = true;
                run(machine, report);
            }
        }
        if !known {
            report.check(name, Err("there is no such scenario"));
        }
    }
}

/// What the lock and the memory types of guests do while they run.
fn memory_of_guests(machine: &Machine, report: &mut Report) {
    let Some(memory) = payload::Memory::find(machine) else {
        return report.check("memory-of-guests", Err("there is no free memory"));
    };
    types::run(machine, &memory, report);
    race::run(machine, &memory, report);
    overlap::run(&memory, report);
    steps::run(machine, &memory, report);
}

/// What a bare board does that was not asked for anything: it shows that EL2 is there.
pub(crate) fn greet(report: &mut Report) {
    let version = call::hypercall(abi::Call::Version, 0);
    if let Ok(version) = version {
        line(format_args!(
            "host: EL2 speaks ABI {}.{}; ask for scenarios with shim.run=all on the command line",
            version >> 16,
            version & 0xffff
        ));
    }
    report.check(
        "el2_answers",
        version.map(|_| ()).map_err(|_| "it does not"),
    );
}
