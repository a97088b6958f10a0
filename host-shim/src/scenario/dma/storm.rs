//! All devices at once, again and again, at addresses that are refused.

use super::attack::refused;
use super::own;
use super::setup::{Setup, faults};
use crate::arch::ticks;
use crate::call;
use crate::edu::{Direction, MAX_BYTES};
use crate::scenario::kit::expect;

/// Rounds: each is thousands of refused accesses, many more than a queue of events holds.
const ROUNDS: usize = 10;
/// Hypercalls whose time is compared.
const CALLS: u32 = 1000;
/// How much longer they may take together in a storm.
const SLOWER: u64 = 50;

/// EL2 goes on, and so does the host, and later refusals are still counted.
pub(super) fn survived(setup: &Setup<'_>) -> Result<(), &'static str> {
    let el2 = setup.machine.el2.ok_or("nobody says where EL2 is")?;
    let before: u64 = count(setup)?;
    let quiet = calls()?;
    for _ in 0..ROUNDS {
        for device in &setup.devices {
            device.start(Direction::FromMemory, el2.start(), MAX_BYTES);
        }
        let busy = calls()?;
        expect(busy < quiet.max(1) * SLOWER, "EL2 has no time for the host")?;
        setup.finish()?;
    }
    let after = count(setup)?;
    let least = (ROUNDS * setup.devices.len()) as u64;
    expect(after - before >= least, "refused accesses were not counted")?;
    refused(setup, &[el2.start()])?;
    own::reached(setup)
}

fn count(setup: &Setup<'_>) -> Result<u64, &'static str> {
    let counts = setup.devices.iter().map(|device| faults(*device));
    counts.map(|found| found.map(|found| found.count)).sum()
}

/// Ticks that some hypercalls take.
fn calls() -> Result<u64, &'static str> {
    let before = ticks();
    for _ in 0..CALLS {
        call::hypercall(abi::Call::Version, 0).map_err(|_| "EL2 does not answer")?;
    }
    Ok(ticks() - before)
}
