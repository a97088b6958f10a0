//! Scenarios: each runs guests on this machine and checks what the hardware did, down to the EPT
//! entries as the walker reads them.

mod cost;
mod exits;
mod kit;
mod memory;
mod policy;
mod smp;

use kit::Check;

use crate::arch::power::Status;
use crate::arch::serial::say;
use crate::arch::{self, Cpu};

/// A scenario.
type Scenario = (&'static str, fn(&Cpu) -> Check);

/// Runs all and prints a line for each, then `N passed, N failed`.
pub(crate) fn run(cpu: &Cpu) -> Status {
    let several: &[Scenario] = if arch::smp::count() > 1 {
        smp::ALL
    } else {
        &[]
    };
    let lists = [exits::ALL, memory::ALL, policy::ALL, several, cost::ALL];
    let (mut passed, mut failed) = (0, 0);
    for (name, scenario) in lists.into_iter().flatten() {
        match scenario(cpu) {
            Ok(()) => {
                passed += 1;
                say!("{name} ok");
            }
            Err(why) => {
                failed += 1;
                say!("{name} FAILED {why}");
            }
        }
    }
    say!("{passed} passed, {failed} failed");
    if failed == 0 {
        Status::Success
    } else {
        Status::Failure
    }
}
