//! The memory that the host keeps: all of RAM, and every device address.

use abi::{Counter, Features};
use board::AddrRange;

use super::kit::expect;
use crate::arch::{fault, mem, mmu};
use crate::call;
use crate::machine::Machine;
use crate::report::Report;

/// A word in each of so much memory is tried: coarse, as an emulator backs each with huge pages.
const STRIDE: u64 = 16 << 20;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    report.check("ram_keeps_what_is_written", ram(machine));
    report.check("empty_address_space_recycles_tables", far_addresses());
    report.check("device_memory_is_never_executable", device_fetch(machine));
}

/// Writes and reads back a word in every 16 MiB of free RAM, first all, then checks all.
fn ram(machine: &Machine) -> Result<(), &'static str> {
    let tried = |address: &u64| {
        AddrRange::with_size(*address, 8).is_some_and(|word| {
            mmu::mapped(word) && machine.board.reserved.overlapping(word).is_none()
        })
    };
    let pattern = |address: u64| address ^ 0x5aa5_0ff0_1234_8765;
    let words = || {
        machine
            .board
            .memory
            .as_slice()
            .iter()
            .flat_map(|ram| (ram.start()..ram.end()).step_by(STRIDE as usize))
            .filter(tried)
    };
    for address in words() {
        let word = AddrRange::with_size(address, 8).ok_or("wrapping address")?;
        mem::bytes_mut(word).copy_from_slice(&pattern(address).to_ne_bytes());
    }
    let mut count = 0;
    for address in words() {
        let word = AddrRange::with_size(address, 8).ok_or("wrapping address")?;
        if mem::bytes(word) != pattern(address).to_ne_bytes() {
            return Err("a word has changed");
        }
        count += 1;
    }
    expect(count > 0, "there was no free RAM to try")
}

/// Reads one word in each 512 GiB of the physical address space, twice over. Nothing answers, but
/// EL2 needs a table for each: it must get by with what it has, and never refuse.
fn far_addresses() -> Result<(), &'static str> {
    let refused = call::counter(Counter::FaultsRefused).unwrap_or(0);
    // An IOMMU that walks the same tables may have fewer bits than the CPUs.
    let isolated = call::features().contains(Features::DMA_ISOLATION);
    let most = if isolated { 42 } else { 48 };
    let bits = crate::arch::physical_bits().min(most);
    for _ in 0..2 {
        for window in 1..1u64 << (bits - 39) {
            fault::expect(|| {
                mmu::read_physical(window << 39 | 0x1000);
            });
        }
    }
    let after = call::counter(Counter::FaultsRefused).unwrap_or(0);
    expect(
        after == refused,
        "EL2 refused an address that belongs to nobody",
    )
}

/// A jump to the console's registers.
fn device_fetch(machine: &Machine) -> Result<(), &'static str> {
    let Some(console) = machine.board.console else {
        return Err("there is no console");
    };
    let fault = fault::expect(|| fault::fetch(console.base));
    expect(
        fault.is_some_and(|f| f.class == 0x21),
        "no instruction abort",
    )
}
