//! The interrupt controller is a device, too: a GICv3 reads and writes tables in memory where software
//! tells it to. The host can't.

use board::{Gic, PAGE_SIZE};

use crate::arch::{fault, gic};
use crate::machine::Machine;
use crate::report::Report;

/// GITS_CBASER and GITS_BASER0.
const COMMANDS: u64 = 0x80;
const FIRST_TABLE: u64 = 0x100;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let Some(Gic::V3 { gicr, .. }) = &machine.board.gic else {
        return; // A GICv2 has no tables.
    };
    report.check("no_table_of_lpis_is_used", gic::enable_lpis(gicr.start()));
    report.check("no_its_is_in_reach", no_its(machine));
}

fn no_its(machine: &Machine) -> Result<(), &'static str> {
    let registers = machine.board.gic_tables.iter();
    for start in registers.map(|range| range.start() - range.start() % PAGE_SIZE) {
        for offset in [0, COMMANDS, FIRST_TABLE] {
            for access in [fault::load, fault::store] {
                if fault::expect(|| access(start + offset)).is_none() {
                    return Err("a register of it was accessed");
                }
            }
        }
    }
    Ok(())
}
