//! What the host does to single pages of an unprotected VM: takes them back and lends them again, asks
//! whether they were used, and lets the guest write before it asks.

use abi::{ErrorCode, Exit, SlotWord, VmCounter};
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::RAM;

use super::guests::Memory;
use super::kit::{code, end, expect, slot, words};
use super::remote::{self, Remote, Stopped};
use crate::arch::mem;
use crate::report::Report;
use crate::vm::Vm;

/// The slot of the guest's memory, and its flag for a dirty log.
const SLOT: u16 = 0;
const LOG: u32 = 1;
/// Pages of the slot that the guest does not need for its code.
const PAGE: u64 = 16;
const OTHER: u64 = 17;
const SECRET: u64 = 0x5ec2_e7de_adbe_ef01;
const READ: u64 = 1;
const WRITE: u64 = 2;

type Check = fn(&Memory) -> Result<(), &'static str>;

const CHECKS: [(&str, Check); 5] = [
    ("a_page_is_young_after_its_use_and_not_before", young),
    (
        "a_page_taken_back_comes_back_as_the_host_left_it",
        taken_back,
    ),
    ("a_relaxed_page_is_written_without_a_fault", relaxed),
    ("pages_of_a_locked_slot_are_left_alone", locked),
    ("a_protected_guests_pages_are_left_alone", protected),
];

pub(super) fn run(memory: &Memory, report: &mut Report) {
    for (name, check) in CHECKS {
        report.check(name, check(memory));
    }
}

const fn ipa(page: u64) -> u64 {
    RAM + page * PAGE_SIZE
}

/// A guest by remote control, its memory mapped by pages.
fn with_guest(
    memory: &Memory,
    check: impl FnOnce(&mut Remote) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    let mut guest = remote::plain(memory)?;
    let vm = guest.vm;
    let logged = SlotWord {
        flags: LOG,
        ..slot(SLOT)
    };
    let checked = words(vm.set_slot_flags(logged)).and_then(|()| check(&mut guest));
    end(vm)?;
    checked
}

/// The first word of a page, as the host sees it.
fn word(memory: &Memory, page: u64) -> Result<&'static mut [u8], &'static str> {
    let address = memory.ram.start() + page * PAGE_SIZE;
    let range = AddrRange::with_size(address, PAGE_SIZE).ok_or("there is no such page")?;
    mem::bytes_mut(range).get_mut(..8).ok_or("a short page")
}

fn young(memory: &Memory) -> Result<(), &'static str> {
    with_guest(memory, |guest| {
        let vm = guest.vm;
        let used = |page| words(vm.young(SLOT, page, 1, false));
        expect(used(PAGE)? == 0, "used before its first use")?;
        guest.store(ipa(PAGE), SECRET)?;
        guest.store(ipa(OTHER), SECRET)?;
        let all = words(vm.young(SLOT, 0, 512, true))?;
        expect(all >= 3, "used pages were not counted")?;
        let all = words(vm.young(SLOT, 0, 512, false))?;
        expect(all == 0, "pages are still young")?;
        guest.load(ipa(OTHER))?;
        expect(used(OTHER)? == 1, "a use was not noticed")?;
        expect(used(PAGE)? == 0, "used without a use")?;
        let value = guest.load(ipa(PAGE))?;
        expect(value == SECRET, "another value")?;
        expect(used(PAGE)? == 1, "a use was not noticed")
    })
}

fn taken_back(memory: &Memory) -> Result<(), &'static str> {
    with_guest(memory, |guest| {
        let vm = guest.vm;
        guest.store(ipa(PAGE), SECRET)?;
        words(vm.unshare(SLOT, PAGE, 1))?;
        let seen = word(memory, PAGE)?;
        expect(*seen == SECRET.to_le_bytes(), "the guest's value is lost")?;
        let missing = Stopped::Exit(Exit::MemoryMissing { ipa: ipa(PAGE) });
        expect(
            guest.load(ipa(PAGE)) == Err(missing),
            "the guest reached it",
        )?;
        seen.copy_from_slice(&(!SECRET).to_le_bytes());
        let again = code(vm.unshare(SLOT, PAGE, 1));
        expect(again == Some(ErrorCode::Exists), "taken back twice")?;
        words(vm.share(SLOT, PAGE, 1))?;
        let [value, ..] = guest.access()?;
        expect(value == !SECRET, "not what the host left")?;
        let again = code(vm.share(SLOT, PAGE, 1));
        expect(again == Some(ErrorCode::Invalid), "lent twice")
    })
}

fn relaxed(memory: &Memory) -> Result<(), &'static str> {
    with_guest(memory, |guest| {
        let vm = guest.vm;
        let absent = code(vm.relax(SLOT, PAGE, WRITE));
        expect(absent == Some(ErrorCode::NotFound), "nothing was relaxed")?;
        for page in [PAGE, OTHER] {
            guest.load(ipa(page))?;
        }
        words(vm.dirty(SLOT, 0))?;
        words(vm.relax(SLOT, PAGE, READ | WRITE))?;
        let faults = || words(vm.counter(VmCounter::Faults));
        let before = faults()?;
        guest.store(ipa(PAGE), SECRET)?;
        expect(faults()? == before, "the guest had to ask")?;
        guest.store(ipa(OTHER), SECRET)?;
        expect(faults()? == before + 1, "it was not read-only before")?;
        let dirty = words(vm.dirty(SLOT, 0))?;
        expect(dirty == 1 << PAGE | 1 << OTHER, "not these were written")
    })
}

/// Each call about one page, refused with this code; and arguments that no slot allows.
fn refused_with(vm: Vm, page: u64, expected: ErrorCode) -> Result<(), &'static str> {
    let refused = Some(expected);
    let codes = [
        code(vm.unshare(SLOT, page, 1)),
        code(vm.share(SLOT, page, 1)),
        code(vm.young(SLOT, page, 1, true)),
        code(vm.relax(SLOT, page, WRITE)),
    ];
    expect(codes == [refused; 4], "another answer")
}

fn locked(memory: &Memory) -> Result<(), &'static str> {
    let vm = words(memory.vm())?;
    words(vm.lock_slot_as(SLOT, false))?;
    refused_with(vm, PAGE, ErrorCode::Busy)?;
    let pages = memory.ram.size() / PAGE_SIZE;
    let mapped = words(vm.young(SLOT, 0, pages, false))?;
    expect(mapped == pages, "a locked page is not young")?;
    words(vm.reset())?;
    words(vm.unlock_slot(SLOT))?;
    for (page, count) in [(0, 0), (0, 513), (pages, 1), (pages - 1, 2), (u64::MAX, 2)] {
        let codes = [
            code(vm.unshare(SLOT, page, count)),
            code(vm.share(SLOT, page, count)),
            code(vm.young(SLOT, page, count, true)),
        ];
        let invalid = [Some(ErrorCode::Invalid); 3];
        expect(codes == invalid, "a range that is none was taken")?;
    }
    let bits = code(vm.relax(SLOT, PAGE, 8));
    expect(bits == Some(ErrorCode::Invalid), "unknown permissions")?;
    // EL2's own slot of the guest's interrupt controller, and one that does not exist.
    let own = code(vm.unshare(63, 0, 1));
    expect(own == Some(ErrorCode::Invalid), "EL2's slot was reached")?;
    let none = code(vm.unshare(1, 0, 1));
    expect(none == Some(ErrorCode::NotFound), "a slot that is none")?;
    end(vm)
}

fn protected(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    guest.store(ipa(PAGE), SECRET)?;
    let vm = guest.vm;
    let refused = refused_with(vm, PAGE, ErrorCode::NotPermitted);
    let looked = code(vm.young(SLOT, PAGE, 1, false));
    let kept = guest.load(ipa(PAGE))?;
    guest.off()?;
    end(vm)?;
    refused?;
    let not_permitted = Some(ErrorCode::NotPermitted);
    expect(looked == not_permitted, "the host may look")?;
    expect(kept == SECRET, "the guest lost it")
}
