//! Firmware calls: what reaches firmware, and what does not.

use abi::{Counter, Features};

use super::kit::expect;
use crate::arch::fault;
use crate::call::{self, Conduit, raw};
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;

const NOT_SUPPORTED: u64 = abi::SMCCC_NOT_SUPPORTED;
/// Random numbers (Arm DEN 0098).
const TRNG_VERSION: u32 = 0x8400_0050;
const TRNG_GET_UUID: u32 = 0x8400_0052;
const TRNG_RND64: u32 = 0xc400_0053;
/// EL2's own TRNG, as opposed to firmware's: 6e9f3c4a-2d0b-47f1-9a36-5c1e88d0b7e2, little-endian words.
const UUID: [u64; 4] = [0x4a3c_9f6e, 0xf147_0b2d, 0x1e5c_369a, 0xe2b7_d088];
/// CTRL and FIFO_COUNT of an RNG200: a load from them changes nothing.
const UNCHANGED_BY_LOADS: [u64; 2] = [0x00, 0x24];
/// None right now.
const NO_ENTROPY: u64 = u64::MAX - 2;

/// MEM_PROTECT and MEM_PROTECT_CHECK_RANGE (DEN 0022 5.1).
const MEM_PROTECT: [u32; 3] = [0x8400_0013, 0x8400_0014, 0xc400_0014];

pub(super) fn run(machine: &Machine, report: &mut Report) {
    report.check("psci_is_1_1_by_hvc_and_by_smc", psci_version());
    report.check("psci_features_lists_what_is_served", psci_features());
    report.check("psci_migrate_info_needs_no_migration", migrate());
    report.check("smccc_version_is_1_2", smccc_version());
    report.check("smc_outside_the_list_is_not_supported", refused());
    report.check("memory_protection_is_not_the_hosts", mem_protect());
    report.check("smc_with_wide_id_is_not_supported", wide());
    report.check("smc_is_trapped_and_counted", counted());
    report.check("smc_on_the_list_is_answered", listed(machine));
    report.check("el2s_generator_is_out_of_reach", generator(machine));
    report.check("the_hosts_generator_is_within_reach", kept(machine));
}

fn psci_version() -> Result<(), &'static str> {
    let both = call::psci_versions() == [Some((1, 1)); 2];
    expect(both, "PSCI_VERSION says something else")
}

fn psci_features() -> Result<(), &'static str> {
    let feature = |id: u64| raw(Conduit::Hvc, 0x8400_000a, [id, 0, 0])[0];
    for id in [
        0x8400_0000,
        0xc400_0001,
        0x8400_0002,
        0xc400_0003,
        0xc400_0004,
        0x8400_0006,
        0x8400_0008,
        0x8400_0009,
        0x8000_0000,
    ] {
        expect(feature(id) == 0, "a served call is missing")?;
    }
    let not_served = [0x8400_0005, 0xc400_000e, 0xc600_0100, 0].into_iter();
    for id in not_served.chain(MEM_PROTECT.map(u64::from)) {
        expect(
            feature(id) == NOT_SUPPORTED,
            "a call is listed that is not served",
        )?;
    }
    Ok(())
}

fn migrate() -> Result<(), &'static str> {
    expect(
        raw(Conduit::Smc, 0x8400_0006, [0; 3])[0] == 2,
        "it is not 2",
    )
}

fn smccc_version() -> Result<(), &'static str> {
    let by = |conduit| raw(conduit, 0x8000_0000, [0; 3])[0];
    expect(
        by(Conduit::Hvc) == 0x1_0002 && by(Conduit::Smc) == 0x1_0002,
        "it is not",
    )
}

/// Firmware that has it must not be told by the host whether a reset wipes memory.
fn mem_protect() -> Result<(), &'static str> {
    for id in MEM_PROTECT {
        for conduit in [Conduit::Hvc, Conduit::Smc] {
            let answer = raw(conduit, id, [0x4000_0000, 0x1000, 0])[0];
            expect(answer == NOT_SUPPORTED, "one was answered")?;
        }
    }
    Ok(())
}

/// FF-A, a SiP service, a trusted OS, an OEM service: nothing of that may reach firmware.
fn refused() -> Result<(), &'static str> {
    for id in [
        0x8400_0063,
        0xc400_0073,
        0x8200_ff01,
        0xb200_0000,
        0x8300_0000,
        0,
    ] {
        expect(
            raw(Conduit::Smc, id, [0; 3])[0] == NOT_SUPPORTED,
            "one was answered",
        )?;
    }
    Ok(())
}

/// PSCI_VERSION with a set bit above the function id: a filter must not look at half of it.
fn wide() -> Result<(), &'static str> {
    let answer = call::smc_with_x0(0x1_8400_0000);
    expect(answer == NOT_SUPPORTED, "it was answered")
}

fn counted() -> Result<(), &'static str> {
    let before = call::counter(Counter::TrappedSmcs).unwrap_or(0);
    for _ in 0..7 {
        raw(Conduit::Smc, 0x8400_0000, [0; 3]);
    }
    let after = call::counter(Counter::TrappedSmcs).unwrap_or(0);
    expect(after == before + 7, "the count is wrong")
}

/// TRNG_VERSION: firmware's answer where there is firmware, EL2's where the generator is EL2's, else
/// NOT_SUPPORTED; never a hang.
fn listed(machine: &Machine) -> Result<(), &'static str> {
    let answer = raw(Conduit::Smc, TRNG_VERSION, [0; 3])[0];
    let firmware = call::features().contains(Features::FIRMWARE_CALLS);
    let refusal = answer as u32 == u32::MAX;
    let is_el2s = machine.generator.is_some() && answer == 0x1_0000;
    expect(
        firmware || refusal || is_el2s,
        "someone else answered although there is no firmware",
    )
}

/// What EL2 has taken is not mapped, and TRNG gives what comes out of it, or says that there is none
/// right now. A node that firmware has disabled is not EL2's, and not touched: TRNG is not EL2's then. The line is for
/// who knows which it has to be.
fn generator(machine: &Machine) -> Result<(), &'static str> {
    let Some(registers) = machine.generator else {
        return Ok(());
    };
    if raw(Conduit::Smc, TRNG_GET_UUID, [0; 3]) != UUID {
        line(format_args!("host: a generator is disabled, and not EL2's"));
        return Ok(());
    }
    line(format_args!("host: a generator is EL2's"));
    for register in (registers.start()..registers.end()).step_by(4) {
        let refused = [fault::load_register, fault::store_register]
            .map(|access| fault::expect(|| access(register)));
        expect(refused.iter().all(Option::is_some), "it was accessed")?;
    }
    for conduit in [Conduit::Hvc, Conduit::Smc] {
        let version = raw(conduit, TRNG_VERSION, [0; 3])[0];
        expect(version == 0x1_0000, "there is no TRNG in its place")?;
        let [status, _, _, word] = raw(conduit, TRNG_RND64, [64, 0, 0]);
        let is_honest = status == 0 || (status == NO_ENTROPY && word == 0);
        expect(is_honest, "TRNG_RND64 says something else")?;
    }
    Ok(())
}

/// One that the tree names as enabled is the host's.
fn kept(machine: &Machine) -> Result<(), &'static str> {
    let Some(registers) = machine.board.generator else {
        return Ok(());
    };
    for offset in UNCHANGED_BY_LOADS {
        let fault = fault::expect(|| fault::load_register(registers.start() + offset));
        expect(fault.is_none(), "it is not mapped")?;
    }
    line(format_args!("host: a generator is the host's"));
    Ok(())
}
