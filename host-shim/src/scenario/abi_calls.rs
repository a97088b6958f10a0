//! The hypercall ABI.

use abi::{Call, Counter, ErrorCode};

use super::kit::expect;
use crate::call::{self, Conduit, raw};
use crate::machine::Machine;
use crate::report::Report;

const NOT_SUPPORTED: u64 = abi::SMCCC_NOT_SUPPORTED;

pub(super) fn run(_: &Machine, report: &mut Report) {
    report.check("abi_version_matches", version());
    report.check("abi_uid_is_ravelin", uid());
    report.check("abi_unknown_calls_are_not_supported", unknown());
    report.check("abi_bad_counter_is_invalid", bad_counter());
    report.check("abi_hypercalls_are_counted", counted());
    report.check("abi_smc_does_not_reach_hypercalls", by_smc());
    report.check("abi_strange_ids_leave_el2_alive", fuzz());
}

fn version() -> Result<(), &'static str> {
    match call::hypercall(Call::Version, 0) {
        Ok(version) if version == u64::from(abi::VERSION) => Ok(()),
        _ => Err("EL2 has another version"),
    }
}

fn uid() -> Result<(), &'static str> {
    let answer = raw(Conduit::Hvc, abi::VENDOR_UID, [0; 3]);
    expect(
        answer == abi::RAVELIN_UID.map(u64::from),
        "it is somebody else's",
    )
}

fn unknown() -> Result<(), &'static str> {
    for id in [
        0xc600_01ff,
        0x8600_0000,
        0xc600_ffff,
        0x8600_ff03,
        0,
        0x7fff_ffff,
    ] {
        if raw(Conduit::Hvc, id, [0; 3])[0] != NOT_SUPPORTED {
            return Err("an unknown id was answered");
        }
    }
    Ok(())
}

fn bad_counter() -> Result<(), &'static str> {
    for number in [Counter::COUNT as u64, u64::MAX, 1 << 32] {
        if call::hypercall(Call::HostCounter, number) != Err(ErrorCode::Invalid) {
            return Err("it was accepted");
        }
    }
    Ok(())
}

fn counted() -> Result<(), &'static str> {
    let before = call::counter(Counter::Hypercalls).unwrap_or(0);
    for _ in 0..10 {
        let [status, ..] = raw(Conduit::Hvc, Call::Version as u32, [0; 3]);
        expect(status == 0, "VERSION failed")?;
    }
    let after = call::counter(Counter::Hypercalls).unwrap_or(0);
    expect(after == before + 11, "the count is wrong")
}

fn by_smc() -> Result<(), &'static str> {
    let [status, ..] = raw(Conduit::Smc, Call::Version as u32, [0; 3]);
    expect(status == NOT_SUPPORTED, "it did")
}

/// Ids from a linear congruential sequence, with PSCI's left out: they could end the machine.
fn fuzz() -> Result<(), &'static str> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for _ in 0..1000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let id = (state >> 32) as u32;
        if id & !0x4000_001f != 0x8400_0000 {
            raw(Conduit::Hvc, id, [state, !state, state << 7]);
        }
    }
    version()
}
