//! A protected guest's calls about more than one page, as Linux with ARM_PKVM_GUEST makes them: `x1` of
//! the answer says how many pages were done, and the guest calls again for the rest.

use abi::{DonationKind, Exit};
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::{RAM, UART};

use super::guests::Memory;
use super::kit::{end, expect, words};
use super::protection::{MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE};
use super::remote::{self, Remote, Stopped};
use crate::arch::{fault, mem};
use crate::report::Report;

const GUARD_ENROLL: u32 = 0xc600_0006;
const GUARD_RANGE_MAP: u32 = 0xc600_000a;
const GUARD_RANGE_UNMAP: u32 = 0xc600_000b;
/// INVALID_PARAMETER (DEN 0028 7.1).
const INVALID: u64 = u64::MAX - 2;
/// Where the host has more devices.
const DEVICES: u64 = 0x0a00_0000;
/// Most separate ranges of guarded pages.
const MAX_GUARDED: u64 = 64;
const SECRET: u64 = 0x5ec2_e7de_adbe_ef01;

pub(super) fn run(memory: &Memory, report: &mut Report) {
    for (name, check) in [
        ("devices_are_named_by_ranges", guarded as Check),
        (
            "ranges_are_given_away_up_to_the_first_that_cannot_be",
            given,
        ),
        ("a_range_is_shared_by_as_many_calls_as_it_takes", shared),
    ] {
        let result = remote::protected(memory).and_then(|mut guest| {
            let result = check(memory, &mut guest).and_then(|()| Ok(guest.off()?));
            end(guest.vm).and(result)
        });
        report.check(name, result);
    }
}

type Check = fn(&Memory, &mut Remote) -> Result<(), &'static str>;

const fn page(number: u64) -> u64 {
    RAM + number * PAGE_SIZE
}

/// Whether a load at a device's address gets to the host.
fn is_device(guest: &mut Remote, ipa: u64) -> Result<bool, &'static str> {
    match guest.load(ipa) {
        Err(Stopped::Exit(Exit::MmioRead { ipa: at, size: 8 })) if at == ipa => {
            guest.access()?;
            Ok(true)
        }
        // A data abort at EL1 (0x25), synchronous external (0x10).
        Err(Stopped::Abort(esr)) if esr >> 26 == 0x25 && esr & 0x3f == 0x10 => Ok(false),
        other => {
            crate::console::line(format_args!("  {ipa:#x}: {other:x?}"));
            Err("a device's address is neither the host's nor nobody's")
        }
    }
}

/// Makes a call with a range, and expects `x0` and `x1`.
fn answers(
    guest: &mut Remote,
    id: u32,
    first: u64,
    count: u64,
    expected: [u64; 2],
) -> Result<(), &'static str> {
    let [x0, x1, _] = guest.call(id, [first, count, 0])?;
    if [x0, x1] == expected {
        return Ok(());
    }
    crate::console::line(format_args!(
        "  {id:#x}({first:#x}, {count}): {x0:#x}, {x1:#x}"
    ));
    Err("a call about a range has another answer")
}

fn devices(guest: &mut Remote, expected: &[(u64, bool)]) -> Result<(), &'static str> {
    for (number, is) in expected {
        let found = is_device(guest, DEVICES + number * PAGE_SIZE + 8)?;
        expect(found == *is, "not the named pages have devices")?;
    }
    Ok(())
}

fn guarded(_: &Memory, guest: &mut Remote) -> Result<(), &'static str> {
    const MAP: u32 = GUARD_RANGE_MAP;
    const UNMAP: u32 = GUARD_RANGE_UNMAP;
    answers(guest, MAP, UART, 0, [0, 1])?;
    answers(guest, MAP, DEVICES, 6, [0, 6])?;
    answers(guest, GUARD_ENROLL, 0, 0, [0, 0])?;
    devices(guest, &[(0, true), (5, true), (6, false)])?;
    // From the middle: what is at both ends stays.
    let at = |number: u64| DEVICES + number * PAGE_SIZE;
    answers(guest, UNMAP, at(2), 2, [0, 2])?;
    devices(guest, &[(1, true), (2, false), (3, false), (4, true)])?;
    // One of them is not named: none is forgotten.
    answers(guest, UNMAP, at(1), 2, [INVALID, 0])?;
    answers(guest, UNMAP, at(6), 1, [INVALID, 0])?;
    devices(guest, &[(1, true), (4, true), (5, true)])?;
    // Over the hole, and what is named already.
    answers(guest, MAP, at(1), 4, [0, 4])?;
    devices(
        guest,
        &[(0, true), (2, true), (3, true), (5, true), (6, false)],
    )?;
    // Wrong ones.
    answers(guest, MAP, at(9) + 8, 1, [INVALID, 0])?;
    answers(guest, MAP, u64::MAX - 4095, 2, [INVALID, 0])?;
    answers(guest, MAP, at(9), u64::MAX, [INVALID, 0])?;
    // Two ranges there are; so many more that there is no room, and still all of them.
    for n in 2..MAX_GUARDED {
        answers(guest, MAP, at(10 * n), 2, [0, 2])?;
    }
    answers(guest, MAP, at(5000), 1, [INVALID, 0])?;
    answers(guest, UNMAP, at(0), 6, [0, 6])?;
    answers(guest, MAP, at(5000), 1, [0, 1])?;
    devices(guest, &[(0, false), (21, true), (22, false), (5000, true)])
}

/// The host reaches exactly these of the pages from number 16 on.
fn reached(memory: &Memory, expected: &[u64]) -> Result<(), &'static str> {
    for number in 16..40 {
        let address = memory.ram.start() + number * PAGE_SIZE;
        let reached = fault::try_load(address + 8).is_ok();
        expect(
            reached == expected.contains(&number),
            "the host reaches not exactly the guest's pages that it should",
        )?;
    }
    Ok(())
}

fn given(memory: &Memory, guest: &mut Remote) -> Result<(), &'static str> {
    for number in 16..26 {
        guest.store(page(number), SECRET)?;
    }
    answers(guest, MEM_SHARE, page(20), 1, [0, 1])?;
    answers(guest, MEM_RELINQUISH, page(22), 4, [0, 4])?;
    reached(memory, &[20, 22, 23, 24, 25])?;
    let start = memory.ram.start() + 22 * PAGE_SIZE;
    let back = AddrRange::with_size(start, 4 * PAGE_SIZE).ok_or("wraps")?;
    let wiped = mem::bytes(back).iter().all(|byte| *byte == 0);
    expect(wiped, "the host finds what the guest had")?;
    // Four that are its own, a shared one behind: so many as it takes, then the refusal.
    let mut at = 17;
    let mut calls = 0;
    loop {
        let [x0, done, _] = guest.call(MEM_RELINQUISH, [page(at), 26 - at, 0])?;
        if x0 != 0 {
            expect([x0, done] == [INVALID, 0], "refused otherwise")?;
            break;
        }
        calls += 1;
        expect(done >= 1 && at + done <= 20, "it gave a shared page away")?;
        at += done;
    }
    expect(at == 20 && calls >= 1, "not all pages before it were given")?;
    answers(guest, MEM_RELINQUISH, page(22), 2, [INVALID, 0])?;
    answers(guest, MEM_RELINQUISH, page(10), 1 << 40, [0, 1])?;
    answers(guest, MEM_RELINQUISH, RAM - PAGE_SIZE, 2, [INVALID, 0])?;
    reached(memory, &[17, 18, 19, 20, 22, 23, 24, 25])?;
    expect(guest.load(page(16))? == SECRET, "a neighbour is gone")?;
    expect(guest.load(page(21))? == SECRET, "a neighbour is gone")
}

fn shared(memory: &Memory, guest: &mut Remote) -> Result<(), &'static str> {
    answers(guest, MEM_RELINQUISH, page(20), 1, [0, 1])?;
    // Up to the page that it gave away, page by page.
    for number in 16..20 {
        answers(guest, MEM_SHARE, page(number), 24 - number, [0, 1])?;
    }
    // That one it wants back now: the host is asked, and the call repeated.
    let missing = guest.call(MEM_SHARE, [page(20), 4, 0]);
    let asked = Err(Stopped::Exit(Exit::MemoryMissing { ipa: page(20) }));
    expect(missing == asked, "the host was not asked for it")?;
    words(guest.vm.donate_memory(page(20), 1, DonationKind::Zeros))?;
    let [x0, x1, _] = guest.go_on()?;
    expect([x0, x1] == [0, 4], "the rest was not shared at once")?;
    reached(memory, &[16, 17, 18, 19, 20, 21, 22, 23])?;
    // Part of it back; then a range that begins before what is still shared, and one that ends behind.
    answers(guest, MEM_UNSHARE, page(18), 3, [0, 3])?;
    reached(memory, &[16, 17, 21, 22, 23])?;
    answers(guest, MEM_UNSHARE, page(20), 2, [INVALID, 0])?;
    answers(guest, MEM_UNSHARE, page(22), 9, [0, 1])?;
    answers(guest, MEM_UNSHARE, page(23), 9, [0, 1])?;
    answers(guest, MEM_UNSHARE, page(24), 9, [INVALID, 0])?;
    reached(memory, &[16, 17, 21])
}
