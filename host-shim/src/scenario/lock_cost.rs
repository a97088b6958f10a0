//! What locking costs, for `make bench-target`: `bench NAME VALUE`, in ticks of the counter, which
//! under QEMU's `-icount shift=0` are instructions at 1 GHz. Not a part of `all`.

use abi::DonationKind;
use board::{AddrRange, PAGE_SIZE, Placement, highest_free};

use super::kit::{RAM_SLOT, config, end, words};
use super::payload::instructions;
use crate::arch::{gic, mem};
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::Vm;

/// The guest's memory.
const RAM: u64 = 1 << 30;
/// Donated: enough for a table for each 2 MiB.
const STATE: u64 = 2 << 20;
/// Where the guest has it.
const IPA: u64 = 0x4000_0000;
/// Behind a boundary of 1 GiB the host's memory begins here: then blocks have 2 MiB.
const SHIFTED: u64 = 2 << 20;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    report.check("lock_by_one_block", measure(machine, 0, true));
    report.check("lock_by_blocks", measure(machine, SHIFTED, true));
    report.check("lock_by_pages", measure(machine, SHIFTED, false));
    report.check("donation", donation(machine));
}

/// What it costs to give a protected guest its memory: by the largest pieces, for each page, with EL2's
/// wiping and less it; and hashed. Over [`RAM`], or as much of it as there is.
///
/// Wiping is what the same pieces cost here. That is not more than it costs EL2, so it flatters nobody:
/// the host's loops over blocks and lines are no longer (`make bench-target` looks at both); of two rounds the quicker counts, since the host's first access to a block is a fault for EL2.
fn donation(machine: &Machine) -> Result<(), &'static str> {
    /// Of which so much is hashed, too.
    const HASHED: u64 = 4 << 20;
    let (ram, state) = memory_to_donate(machine)?;
    let pages = ram.size() / PAGE_SIZE;
    let rounds = [wiping(ram)?, wiping(ram)?];
    let wiping = instructions(rounds[0].min(rounds[1])) / pages;
    let wiped = donated(ram, state, DonationKind::Zeros)?;
    let rest = wiped
        .checked_sub(wiping)
        .ok_or("a donation costs less than its wiping: the wiping is not EL2's")?;
    line(format_args!("bench donate-mib {}", ram.size() >> 20));
    line(format_args!("bench donate-wiped {wiped}"));
    line(format_args!("bench donate {rest}"));
    let less = AddrRange::with_size(ram.start(), HASHED).ok_or("wraps")?;
    let hashed = donated(less, state, DonationKind::Contents)?;
    line(format_args!("bench donate-hashed {hashed}"));
    Ok(())
}

/// Memory for a guest, and for its VM's state.
fn memory_to_donate(machine: &Machine) -> Result<(AddrRange, AddrRange), &'static str> {
    for size in [RAM, RAM / 4] {
        let want = Placement {
            size: size + STATE,
            align: SHIFTED,
            limit: 1 << 40,
        };
        if let Some(range) = highest_free(&machine.board.memory, &machine.board.reserved, want) {
            let part = |at, size| AddrRange::with_size(range.start() + at, size).ok_or("wraps");
            return Ok((part(0, size)?, part(size, STATE)?));
        }
    }
    Err("it takes 258 MiB of free memory")
}

/// The ticks that it takes to wipe memory, as much at once as one donation does.
fn wiping(ram: AddrRange) -> Result<u64, &'static str> {
    let piece = DonationKind::Zeros.max_pages() * PAGE_SIZE;
    let before = gic::now();
    for start in (ram.start()..ram.end()).step_by(piece as usize) {
        let piece = AddrRange::with_size(start, piece).ok_or("wraps")?;
        mem::wipe(piece);
    }
    Ok(gic::now() - before)
}

/// Gives a protected guest all of `ram`; the instructions for each page.
fn donated(ram: AddrRange, state: AddrRange, kind: DonationKind) -> Result<u64, &'static str> {
    let vm = words(Vm::create(config(true), state))?;
    words(vm.create_slot(RAM_SLOT, IPA, ram))?;
    let step = kind.max_pages();
    let mut calls = (IPA..IPA + ram.size()).step_by((step * PAGE_SIZE) as usize);
    let before = gic::now();
    let result = calls.try_for_each(|ipa| words(vm.donate_memory(ipa, step, kind)));
    let ticks = gic::now() - before;
    end(vm)?;
    result?;
    Ok(instructions(ticks) / (ram.size() / PAGE_SIZE))
}

fn measure(machine: &Machine, shift: u64, blocks: bool) -> Result<(), &'static str> {
    let want = Placement {
        size: SHIFTED + RAM + 2 * STATE,
        align: RAM,
        limit: 1 << 40,
    };
    let range = highest_free(&machine.board.memory, &machine.board.reserved, want)
        .ok_or("it takes 1 GiB of free memory in one piece, aligned to its size")?;
    let part = |at: u64, size: u64| AddrRange::with_size(range.start() + at, size).ok_or("wraps");
    let (ram, state) = (part(shift, RAM)?, part(shift + RAM, STATE)?);
    let vm = words(Vm::create(config(false), state))?;
    let result = lock(vm, ram, blocks, shift == 0);
    end(vm)?;
    result
}

fn lock(vm: Vm, ram: AddrRange, blocks: bool, aligned: bool) -> Result<(), &'static str> {
    words(vm.create_slot(RAM_SLOT, IPA, ram))?;
    if !blocks {
        let more = AddrRange::with_size(ram.end() + STATE, STATE).ok_or("wraps")?;
        words(vm.top_up(more))?;
    }
    let before = gic::now();
    let locked = vm.lock_slot_as(0, blocks);
    let ticks = gic::now() - before;
    words(locked)?;
    let instructions = instructions(ticks);
    let (name, value) = match (blocks, aligned) {
        (false, _) => ("lock-page", instructions / (RAM / PAGE_SIZE)),
        (true, true) => ("lock-one-block", instructions),
        (true, false) => ("lock-blocks", instructions),
    };
    line(format_args!("bench {name} {value}"));
    words(vm.unlock_slot(0))
}
