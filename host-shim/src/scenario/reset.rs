//! Resets of the machine, one after the other: what the host finds then of what there was before.
//!
//! What step it is stands in memory that the board has reserved, which EL2 never wipes: the machine's last
//! reserved range that may be mapped. The runner puts it into the device tree.

use abi::{DonationKind, ErrorCode};
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::RAM;

use super::guests::Memory;
use super::kit::{RAM_SLOT, code, config, end, expect, words};
use super::protection::{PAGE, SECRET, host_address, refused_everywhere};
use super::remote;
use crate::arch::{fault, mem};
use crate::call;
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::{self, Vm};

/// In the reserved page while the steps run.
const RUNNING: u64 = 0x7265_7365_7421_2121;
/// In memory of the host's own: gone if all memory was wiped.
const MARK: u64 = 0x6d61_726b_6d61_726b;
const SYSTEM_RESET: u32 = 0x8400_0009;

type Step = fn(&Memory, AddrRange) -> Result<(), &'static str>;

/// What a boot finds of what the one before left, and what it leaves to the next.
const STEPS: [(&str, Step, Step); 5] = [
    ("reserved_memory_is_never_donated", not_donated, protected),
    ("a_reset_shows_nothing_of_a_guest", wiped, ended),
    ("a_guest_that_ended_leaves_nothing_to_wipe", kept, open),
    ("without_a_protected_guest_nothing_is_wiped", kept, half),
    (
        "an_unfinished_guest_is_wiped_and_memory_of_the_board_is_not",
        wiped,
        |_, _| Ok(()),
    ),
];

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let (Some(memory), Some(page)) = (Memory::find(machine), reserved(machine)) else {
        return report.check("reset", Err("there is no free memory, or none reserved"));
    };
    if spare(&memory).is_none_or(|spare| machine.board.reserved.overlapping(spare).is_some()) {
        return report.check("reset", Err("there is too little free memory"));
    }
    let number = load(page, 1);
    let number = if load(page, 0) == RUNNING { number } else { 0 };
    let Some((name, look, leave)) = STEPS.get(number as usize) else {
        return report.check("reset", Err("the step is lost"));
    };
    line(format_args!("step {number} of the resets"));
    if let Err(why) = look(&memory, page).and_then(|()| leave(&memory, page)) {
        return report.check(name, Err(why));
    }
    if number as usize + 1 == STEPS.len() {
        for (name, ..) in STEPS {
            report.check(name, Ok::<_, &str>(()));
        }
        return;
    }
    store(page, [RUNNING, number + 1]);
    store(mark(&memory), [MARK, MARK]);
    call::raw(call::Conduit::Hvc, SYSTEM_RESET, [0; 3]);
    report.check(name, Err("the machine was not reset"));
}

/// The machine's last page that is reserved, but may be mapped.
fn reserved(machine: &Machine) -> Option<AddrRange> {
    let board = &machine.board;
    let hidden = |range: &AddrRange| board.no_map.overlapping(*range).is_some();
    let mut ranges = board.set_aside.as_slice().iter().copied().rev();
    let range = ranges.find(|range| !hidden(range))?;
    AddrRange::with_size(range.end() - PAGE_SIZE, PAGE_SIZE)
}

/// Memory that stays the host's, beside what it gives to guests.
fn mark(memory: &Memory) -> AddrRange {
    AddrRange::with_size(memory.state.end(), PAGE_SIZE).unwrap_or(memory.state)
}

/// Memory for another VM's state, behind that.
fn spare(memory: &Memory) -> Option<AddrRange> {
    AddrRange::with_size(mark(memory).end(), memory.state.size())
}

fn load(page: AddrRange, word: u64) -> u64 {
    fault::try_load(page.start() + 8 * word).unwrap_or(!0)
}

/// To the point of coherency: QEMU has no caches, other machines lose them.
fn store(page: AddrRange, values: [u64; 2]) {
    for (at, value) in (page.start()..).step_by(8).zip(values) {
        let _ = fault::try_store(at, value);
    }
    mem::clean_invalidate_to_poc(page);
}

fn not_donated(memory: &Memory, page: AddrRange) -> Result<(), &'static str> {
    let vm = words(Vm::create(config(true), memory.state))?;
    words(vm.create_slot(RAM_SLOT, RAM, page))?;
    let refused = [
        code(vm::donate_heap(page)),
        code(vm.top_up(page)),
        code(vm.donate_memory(RAM, 1, DonationKind::Zeros)),
        code(vm.donate_memory(RAM, 1, DonationKind::Contents)),
    ];
    end(vm)?;
    line(format_args!("  {refused:?}"));
    let all = refused
        .iter()
        .all(|code| *code == Some(ErrorCode::NotPermitted));
    expect(all, "reserved memory was donated")
}

/// Leaves a guest with a secret.
fn protected(memory: &Memory, _: AddrRange) -> Result<(), &'static str> {
    remote::protected(memory)?.store(PAGE, SECRET)?;
    refused_everywhere(host_address(memory, PAGE))
}

/// Neither the guest's memory nor the host's has anything of before.
fn wiped(memory: &Memory, page: AddrRange) -> Result<(), &'static str> {
    let found = fault::try_load(host_address(memory, PAGE)).unwrap_or(0);
    line(format_args!(
        "  where the secret was: {found:#x}, the mark {:#x}",
        load(mark(memory), 0)
    ));
    expect(found != SECRET, "the host reads the guest's secret")?;
    let clean = |range| mem::bytes(range).iter().all(|byte| *byte == 0);
    expect(
        clean(memory.ram) && clean(memory.state),
        "something is left",
    )?;
    expect(
        load(mark(memory), 0) == 0,
        "the host's memory was not wiped",
    )?;
    expect(load(page, 0) == RUNNING, "reserved memory was wiped")
}

/// Leaves what a guest that has ended leaves.
fn ended(memory: &Memory, _: AddrRange) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    guest.store(PAGE, SECRET)?;
    guest.off()?;
    end(guest.vm)
}

/// The host's memory is as it was.
fn kept(memory: &Memory, _: AddrRange) -> Result<(), &'static str> {
    expect(load(mark(memory), 0) == MARK, "the host's memory was wiped")
}

/// Leaves a guest that is not protected.
fn open(memory: &Memory, _: AddrRange) -> Result<(), &'static str> {
    Ok(remote::plain(memory)?.store(PAGE, MARK)?)
}

/// Leaves a guest that is gone, but has not given all back.
fn half(memory: &Memory, _: AddrRange) -> Result<(), &'static str> {
    // A VM that ends while the other one's memory waits does not end the wipe.
    let spare = spare(memory).ok_or("no memory")?;
    let mut guest = remote::protected(memory)?;
    guest.store(PAGE, SECRET)?;
    end(words(Vm::create(config(true), spare))?)?;
    guest.off()?;
    words(guest.vm.destroy())?;
    words(guest.vm.reclaim())?;
    Ok(())
}
