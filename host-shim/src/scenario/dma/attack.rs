//! DMA to memory that is not the host's: refused, recorded, without effect.

use alloc::vec::Vec;
use board::PAGE_SIZE;
use vmm::platform::RAM;

use super::setup::{Setup, faults};
use crate::arch::mem;
use crate::call;
use crate::edu::{Direction, Edu};
use crate::scenario::kit::{end, expect, words};
use crate::scenario::remote;

/// Bytes of each transfer.
const BYTES: u64 = 64;
/// What the devices have in their buffers.
const CANARY: u8 = 0xc3;
/// What is where they write their buffers.
const BLANK: u8 = 0x77;
/// Number of the event: no translation (IHI 0070 7.3.13).
const TRANSLATION: u8 = 0x10;
/// A page that the guest does not need for its code.
const PAGE: u64 = RAM + 16 * PAGE_SIZE;
const SECRET: u64 = 0x5ec2_e7de_adbe_ef01;

/// EL2's memory, from end to end.
pub(super) fn el2(setup: &Setup<'_>) -> Result<(), &'static str> {
    let el2 = setup.machine.el2.ok_or("nobody says where EL2 is")?;
    let spread = (1..16).map(|part| el2.start() + ((el2.size() / 16 * part) & !0xfff) + 8 * part);
    let edges = [el2.start(), el2.end() - BYTES, el2.end() - PAGE_SIZE];
    let targets: Vec<u64> = edges.into_iter().chain(spread).collect();
    refused(setup, &targets)?;
    let answers = call::hypercall(abi::Call::Version, 0).is_ok();
    expect(answers, "EL2 does not answer any more")
}

/// One that begins in the host's memory.
pub(super) fn across(setup: &Setup<'_>) -> Result<(), &'static str> {
    let el2 = setup.machine.el2.ok_or("nobody says where EL2 is")?;
    let half = BYTES / 2;
    let mine = el2.start() - half;
    if setup.machine.board.memory.find(mine).is_none() {
        return Ok(());
    }
    let device = setup.devices[0];
    let before = faults(device)?.count;
    load(setup, 1)?;
    let border = board::AddrRange::with_size(mine, half).ok_or("wraps")?;
    mem::bytes_mut(border).fill(BLANK);
    setup.transfers(Direction::ToMemory, [mine].into_iter(), BYTES)?;
    let written = mem::bytes(border).iter().all(|byte| *byte == CANARY);
    let after = faults(device)?;
    expect(written, "the host's part was not written")?;
    expect(after.count > before, "EL2 has no record of it")?;
    expect(after.address >= el2.start(), "the host's part was refused")
}

/// A protected guest's memory, and what it shares, for as long as it does.
pub(super) fn protected(setup: &Setup<'_>) -> Result<(), &'static str> {
    use crate::scenario::protection::{MEM_SHARE, MEM_UNSHARE};
    let mut guest = remote::protected(&setup.guest)?;
    let here = setup.guest.ram.start() + (PAGE - RAM);
    for word in (0..BYTES).step_by(8) {
        guest.store(PAGE + word, SECRET + word)?;
    }
    let result = refused(setup, &[here, setup.guest.ram.start(), here - BYTES]);
    let mut kept = true;
    for word in (0..BYTES).step_by(8) {
        kept &= guest.load(PAGE + word)? == SECRET + word;
    }
    guest.call(MEM_SHARE, [PAGE, 0, 0])?;
    load(setup, 1)?;
    setup.transfers(Direction::ToMemory, [here].into_iter(), 8)?;
    let shared = guest.load(PAGE)?;
    guest.call(MEM_UNSHARE, [PAGE, 0, 0])?;
    guest.store(PAGE, SECRET)?;
    let again = refused(setup, &[here]);
    let at_last = guest.load(PAGE)?;
    guest.off()?;
    end(guest.vm)?;
    result?;
    expect(kept, "the guest's memory has changed")?;
    let canary = u64::from_ne_bytes([CANARY; 8]);
    expect(shared == canary, "a device can't write a shared page")?;
    again?;
    expect(at_last == SECRET, "the guest's memory has changed later")?;
    given_back(setup, here)
}

/// Pages that were donated to a VM for its state.
pub(super) fn state(setup: &Setup<'_>) -> Result<(), &'static str> {
    setup.guest.load()?;
    let vm = words(setup.guest.vm())?;
    let state = setup.guest.state;
    let targets: Vec<u64> = (state.start()..state.end())
        .step_by((16 * PAGE_SIZE) as usize)
        .collect();
    let result = refused(setup, &targets);
    let runs = crate::scenario::guests::converse(vm);
    end(vm)?;
    result?;
    runs?;
    given_back(setup, state.start())
}

/// Memory that was the host's before is again.
fn given_back(setup: &Setup<'_>, address: u64) -> Result<(), &'static str> {
    load(setup, 1)?;
    setup.transfers(Direction::ToMemory, [address].into_iter(), BYTES)?;
    let range = board::AddrRange::with_size(address, BYTES).ok_or("wraps")?;
    let written = mem::bytes(range).iter().all(|byte| *byte == CANARY);
    expect(written, "memory that came back is still out of reach")
}

/// Reads and writes each target with a device of its own.
pub(super) fn refused(setup: &Setup<'_>, targets: &[u64]) -> Result<(), &'static str> {
    for some in targets.chunks(setup.devices.len()) {
        reads(setup, some)?;
        writes(setup, some)?;
    }
    Ok(())
}

/// Fills the buffers of the first `count` devices.
fn load(setup: &Setup<'_>, count: usize) -> Result<(), &'static str> {
    let canary = setup.filled(0, CANARY)?.start();
    let places = core::iter::repeat_n(canary, count);
    setup.transfers(Direction::FromMemory, places, BYTES)
}

/// What a device finds there is neither the target's content nor anything else.
fn reads(setup: &Setup<'_>, targets: &[u64]) -> Result<(), &'static str> {
    load(setup, targets.len())?;
    attempt(setup, Direction::FromMemory, targets)?;
    let mut pages = Vec::new();
    for number in 0..targets.len() {
        pages.push(setup.filled(1 + number, BLANK)?);
    }
    let places = pages.iter().map(|page| page.start());
    setup.transfers(Direction::ToMemory, places, BYTES)?;
    for page in pages {
        let (found, rest) = mem::bytes(page).split_at(BYTES as usize);
        let all = |wanted| found.iter().all(|byte| *byte == wanted);
        expect(all(CANARY) || all(0), "a device has read something")?;
        let kept = rest.iter().all(|byte| *byte == BLANK);
        expect(kept, "a device has written too much")?;
    }
    Ok(())
}

fn writes(setup: &Setup<'_>, targets: &[u64]) -> Result<(), &'static str> {
    load(setup, targets.len())?;
    attempt(setup, Direction::ToMemory, targets)
}

/// Each device, at its target, is refused and recorded.
fn attempt(setup: &Setup<'_>, direction: Direction, targets: &[u64]) -> Result<(), &'static str> {
    let users = || setup.devices.iter().copied().zip(targets.iter().copied());
    let before: Result<Vec<_>, _> = users().map(|(device, _)| faults(device)).collect();
    setup.transfers(direction, targets.iter().copied(), BYTES)?;
    for ((device, target), before) in users().zip(before?) {
        recorded(device, target, direction, before.count)?;
    }
    Ok(())
}

fn recorded(
    device: Edu,
    target: u64,
    direction: Direction,
    before: u64,
) -> Result<(), &'static str> {
    let found = faults(device)?;
    let result = expect(found.count > before, "EL2 has no record of a DMA")
        .and(expect(
            (target..target + BYTES).contains(&found.address),
            "the record has another address",
        ))
        .and(expect(
            found.last.write == (direction == Direction::ToMemory),
            "the record takes reads for writes",
        ))
        .and(expect(
            found.last.event == TRANSLATION && found.last.vmid == 0,
            "the record is no fault of the host's translation",
        ));
    if result.is_err() {
        let function = device.function();
        crate::console::line(format_args!("  {function} at {target:#x}: {found:x?}"));
    }
    result
}
