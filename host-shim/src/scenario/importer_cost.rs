//! What an IOMMU that walks a VM's or the host's tables adds to changes of them, for `make
//! bench-target`: `bench NAME VALUE`, as in [`super::lock_cost`]. Not a part of `all`.

use abi::{DonationKind, Features, SlotWord};
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::RAM;

use super::dma::Setup;
use super::guests;
use super::kit::{RAM_SLOT, end, slot, words};
use super::payload::{Event, Guest, instructions};
use super::remote::{self, CODE_PAGES};
use crate::arch::gic;
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm;

/// A slot of 2 MiB besides the VM's RAM, and where it is.
const SLOT: SlotWord = slot(1);
const IPA: u64 = 0x5000_0000;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    report.check("donations_of_the_hosts_pages", donations(machine));
    if machine.has(Features::DMA_ISOLATION) {
        report.check("changes_with_and_without_a_device", changes(machine));
    }
}

/// What a donation costs, by one page and by many. Without an IOMMU the same is measured: the
/// difference is what the IOMMU adds, which walks the host's tables at all times.
fn donations(machine: &Machine) -> Result<(), &'static str> {
    let memory = guests::Memory::find(machine).ok_or("there is no free memory")?;
    let pages = memory.ram.size() / PAGE_SIZE - CODE_PAGES;
    for (name, step) in [("donate-singly", 1), ("donate-together", pages)] {
        let vm = remote::unsealed(&memory)?;
        let first = RAM + CODE_PAGES * PAGE_SIZE;
        let mut calls = (0..pages).step_by(step as usize);
        let before = gic::now();
        let result = calls.try_for_each(|page| {
            words(vm.donate_memory(first + page * PAGE_SIZE, step, DonationKind::Zeros))
        });
        let ticks = gic::now() - before;
        end(vm)?;
        result?;
        line(format_args!("bench {name} {}", instructions(ticks) / pages));
    }
    Ok(())
}

/// What changes of a VM cost when a device is attached to it, beyond what they cost anyway.
fn changes(machine: &Machine) -> Result<(), &'static str> {
    let setup = Setup::find(machine).ok_or("there is no edu device")?;
    let function = setup.devices[0].function().requester();
    for (suffix, blocks) in [("block", true), ("pages", false)] {
        let alone = measured(&setup, blocks, None)?;
        words(vm::take_device(function))?;
        let attached = measured(&setup, blocks, Some(function));
        words(vm::give_device(function))?;
        let attached = attached?;
        for (what, before, after) in [
            ("remove", alone.removal, attached.removal),
            ("reset", alone.reset, attached.reset),
        ] {
            line(format_args!(
                "  {what} {suffix}: {before} alone, {after} with a device"
            ));
            let added = after.saturating_sub(before);
            line(format_args!("bench importer-{what}-{suffix} {added}"));
        }
    }
    setup.end();
    Ok(())
}

/// Instructions of a VM's changes.
struct Cost {
    /// Removal of a slot.
    removal: u64,
    /// A reset, which removes the leaves of a slot.
    reset: u64,
}

fn measured(setup: &Setup<'_>, blocks: bool, device: Option<u16>) -> Result<Cost, &'static str> {
    let mut guest = Guest::create_with_devices(&setup.memory, "run=ask")?;
    let result = measured_in(&mut guest, setup.memory.more_state, blocks, device);
    end(guest.vm)?;
    result
}

fn measured_in(
    guest: &mut Guest,
    backing: AddrRange,
    blocks: bool,
    device: Option<u16>,
) -> Result<Cost, &'static str> {
    let vm = guest.vm;
    words(vm.lock_slot(RAM_SLOT.id))?;
    if let Some(function) = device {
        words(vm.attach_device(function, true))?;
    }
    let mut mapped = || {
        words(vm.create_slot(SLOT, IPA, backing))?;
        words(vm.lock_slot_as(SLOT.id, blocks))?;
        // Maintenance that is pending is done by a run; what is unlocked then keeps its leaves.
        if !matches!(guest.go_on(1)?, Event::Asks) {
            return Err("the guest has ended");
        }
        words(vm.unlock_slot(SLOT.id))
    };
    mapped()?;
    let removal = timed(|| words(vm.delete_slot(SLOT.id)))?;
    mapped()?;
    let reset = timed(|| words(vm.reset()))?;
    Ok(Cost { removal, reset })
}

fn timed(call: impl FnOnce() -> Result<(), &'static str>) -> Result<u64, &'static str> {
    let before = gic::now();
    call()?;
    Ok(instructions(gic::now() - before))
}
