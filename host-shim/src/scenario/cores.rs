//! Turning cores off and on by PSCI.

use smccc::psci::{self, AffinityState, LowestAffinityLevel, error::Error};
use smccc::{Hvc, Smc};

use super::kit::expect;
use crate::arch::cpu;
use crate::machine::Machine;
use crate::report::Report;

/// How often every core goes on and off.
const ROUNDS: usize = 5;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    report.check("every_core_turns_on_and_off_again", rounds(machine));
    report.check("cpu_suspend_ends_with_a_timer", standby(machine));
    report.check(
        "cpu_suspend_with_powerdown_comes_back_at_its_entry",
        power_down(machine),
    );
    report.check(
        "cpu_suspend_into_el2_is_an_invalid_address",
        suspend_into_el2(machine),
    );
    report.check("cpu_on_of_an_unknown_core_is_invalid", unknown());
    report.check("cpu_on_of_the_caller_is_already_on", already_on());
    report.check("cpu_on_into_el2_is_an_invalid_address", into_el2(machine));
    report.check("cpu_on_outside_ram_is_an_invalid_address", outside(machine));
    report.check(
        "affinity_info_of_an_unknown_core_is_invalid",
        affinity_unknown(),
    );
}

fn rounds(machine: &Machine) -> Result<(), &'static str> {
    for _ in 0..ROUNDS {
        for (number, mpidr) in machine.other_cores() {
            cpu::turn_on(number, mpidr, machine.settings)?;
        }
        for (number, mpidr) in machine.other_cores() {
            cpu::turn_off(number, mpidr)?;
        }
    }
    Ok(())
}

/// A standby state ends when an interrupt is pending, although it is masked, and not before.
fn standby(machine: &Machine) -> Result<(), &'static str> {
    let gic = machine.board.gic.ok_or("no GIC that is known")?;
    for milliseconds in [5, 20] {
        let microseconds = cpu::standby(&gic, milliseconds)?;
        expect(
            microseconds >= milliseconds * 1000,
            "it ended before the timer",
        )?;
    }
    Ok(())
}

fn power_down(machine: &Machine) -> Result<(), &'static str> {
    let Some(gic) = &machine.board.gic else {
        return Err("no GIC that is known");
    };
    for (number, mpidr) in machine.other_cores() {
        cpu::turn_on(number, mpidr, machine.settings)?;
        cpu::power_down(number, gic)?;
        cpu::power_down(number, gic)?;
        cpu::turn_off(number, mpidr)?;
    }
    Ok(())
}

/// A powerdown state's entry point would be executed by the host, like that of CPU_ON.
fn suspend_into_el2(machine: &Machine) -> Result<(), &'static str> {
    const POWERDOWN: u32 = 1 << 16;
    let el2 = machine
        .el2
        .ok_or("the device tree does not say where EL2 is")?;
    for entry in [el2.start(), el2.end() - 4, u64::MAX, 2] {
        let answer = psci::cpu_suspend::<Hvc>(POWERDOWN, entry, 0);
        expect(answer == Err(Error::InvalidAddress), "it is not")?;
    }
    Ok(())
}

fn unknown() -> Result<(), &'static str> {
    for mpidr in [0xff_00ff_ffff, 0x7fff_ffff, 1 << 31] {
        let answers = [
            psci::cpu_on::<Hvc>(mpidr, cpu::entry(), 0),
            psci::cpu_on::<Smc>(mpidr, cpu::entry(), 0),
        ];
        expect(answers == [Err(Error::InvalidParameters); 2], "it is not")?;
    }
    Ok(())
}

fn already_on() -> Result<(), &'static str> {
    let me = crate::arch::mpidr();
    expect(
        psci::cpu_on::<Hvc>(me, cpu::entry(), 0) == Err(Error::AlreadyOn),
        "it is not",
    )?;
    let info = psci::affinity_info::<Hvc>(me, LowestAffinityLevel::All);
    expect(
        info == Ok(AffinityState::On),
        "AFFINITY_INFO does not say on",
    )
}

/// The entry point would be executed by the host: it must be the host's own memory.
fn into_el2(machine: &Machine) -> Result<(), &'static str> {
    let Some(el2) = machine.el2 else {
        return Err("the device tree does not say where EL2 is");
    };
    for (_, mpidr) in machine.other_cores() {
        for entry in [el2.start(), el2.end() - 4, el2.start() + 0x1000] {
            let answer = psci::cpu_on::<Hvc>(mpidr, entry, 0);
            expect(answer == Err(Error::InvalidAddress), "it is not")?;
        }
        let info = psci::affinity_info::<Hvc>(mpidr, LowestAffinityLevel::All);
        expect(
            info == Ok(AffinityState::Off),
            "the core is not off any more",
        )?;
    }
    Ok(())
}

fn outside(machine: &Machine) -> Result<(), &'static str> {
    for (_, mpidr) in machine.other_cores() {
        for entry in [u64::MAX, 1 << 47, cpu::entry() + 1] {
            let answer = psci::cpu_on::<Hvc>(mpidr, entry, 0);
            expect(answer == Err(Error::InvalidAddress), "it is not")?;
        }
    }
    Ok(())
}

fn affinity_unknown() -> Result<(), &'static str> {
    let answer = psci::affinity_info::<Hvc>(0xff_00ff_ffff, LowestAffinityLevel::All);
    expect(answer == Err(Error::InvalidParameters), "it is not")
}
