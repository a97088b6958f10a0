//! What the payload can exercise, by the name in `run=`.

mod attributes;
mod bench;
pub mod demo;
mod edu;
mod fp;
mod hello;
mod interrupts;
mod memory;
mod mmio;
mod power;
mod protected;
mod sysreg;
mod timer;

use crate::machine::{Arguments, Report};
use crate::tree::Tree;

type Run = fn(&Arguments, &mut Report);
type EarlyRun = fn(&Arguments, Option<Tree>, &mut Report);

/// With the MMU on.
pub const ALL: &[(&str, Run)] = &[
    ("hello", hello::run),
    ("ask", bench::ask),
    ("attributes", attributes::run),
    ("bench", bench::run),
    ("code", memory::code),
    ("edges", attributes::edges),
    ("edu", edu::run),
    ("faults", memory::faults),
    ("flood", power::flood),
    ("fp", fp::run),
    ("gic", interrupts::run),
    ("mmio", mmio::run),
    ("nowhere", memory::nowhere),
    ("power", power::run),
    ("protected", protected::run),
    ("smp", interrupts::several_cpus),
    ("spin", power::spin),
    ("talk", hello::talk),
    ("sysreg", sysreg::run),
    ("timer", timer::run),
];

/// With the MMU off.
pub const EARLY: &[(&str, EarlyRun)] = &[
    ("reader", memory::reader),
    ("reset", power::reset_loop),
    ("spin-uncached", power::spin_uncached),
];

/// The scenario with this name.
pub fn find<T: Copy>(list: &[(&str, T)], name: &str) -> Option<T> {
    list.iter()
        .find(|(known, _)| *known == name)
        .map(|(_, run)| *run)
}
