//! The least that a guest expects.

use crate::arch::cpu::{self, psci};
use crate::arch::mrs;
use crate::console;
use crate::machine::{Arguments, Report};

/// Level, number, counter, PSCI.
pub fn run(_: &Arguments, report: &mut Report) {
    console::line(format_args!("hello from EL{}", mrs!("CurrentEL") >> 2));
    report.expect("exception level", mrs!("CurrentEL") >> 2, 1);
    // Affinities 0, RES1 bit 31 set; U (bit 30) and MT (bit 24) clear as on a multiprocessor.
    report.expect(
        "MPIDR_EL1 names CPU 0",
        mrs!("mpidr_el1") & !(1 << 30),
        1 << 31,
    );
    report.check(
        "counter has a frequency",
        (1_000_000..=10_000_000_000).contains(&cpu::frequency()),
    );
    let before = cpu::ticks();
    report.check("counter counts", cpu::wait(1_000, || cpu::ticks() > before));
    let version = psci::call(psci::VERSION, 0, 0, 0);
    report.check("PSCI is 1.0 or later", version >= 0x1_0000);
}

/// Lines of [`talk`].
const LINES: u32 = 150;

/// Prints as fast as it can: every line must arrive, whole and in order, whoever else prints meanwhile.
pub fn talk(_: &Arguments, report: &mut Report) {
    for number in 0..LINES {
        console::line(format_args!(
            "line {number:03} the quick brown fox jumps over the lazy dog"
        ));
    }
    report.check("all lines are printed", true);
}
