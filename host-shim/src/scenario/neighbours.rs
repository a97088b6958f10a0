//! Two living guests, each of which looks for the other's memory: at the other's addresses and at the
//! physical ones, by loads, stores and its calls. And a VM whose tables are made of pages full of what
//! could be descriptors.

use abi::{Call, DonationKind, Exit, SlotWord};
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::RAM;

use super::guests::Memory;
use super::kit::{RAM_SLOT, config, end, expect, load, slot, words};
use super::protection::{MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE};
use super::remote::{self, CODE_PAGES, Remote, Stopped};
use crate::arch::{guest, mem};
use crate::console::line;
use crate::report::Report;
use crate::vm::Vm;

/// Where the second guest has more memory, and the first nothing.
const ELSEWHERE: u64 = 0x6000_0000;
const ELSEWHERE_SLOT: SlotWord = slot(1);
/// Where each keeps what it knows; the same address in both.
const PAGE: u64 = RAM + 16 * PAGE_SIZE;
const SECRETS: [u64; 2] = [0x5ec2_e7aa_1111_1111, 0x5ec2_e7bb_2222_2222];
/// Runs of each guest between which the other runs.
const TURNS: u32 = 50;
/// INVALID_PARAMETER and NOT_SUPPORTED (DEN 0028 7.1).
const INVALID: u64 = u64::MAX - 2;
const NOT_SUPPORTED: u64 = u64::MAX;

pub(super) fn run(memory: &Memory, el2: Option<AddrRange>, report: &mut Report) {
    for (name, kinds) in [
        ("two_protected_guests_do_not_meet", [true, true]),
        ("a_plain_guest_does_not_meet_a_protected_one", [true, false]),
        ("two_plain_guests_do_not_meet", [false, false]),
    ] {
        report.check(name, meet(memory, kinds));
    }
    let stale = el2.ok_or("EL2's memory is not known");
    let stale = stale.and_then(|el2| stale_descriptors(memory, el2));
    report.check("old_descriptors_in_donated_pages_map_nothing", stale);
}

/// The half of the memory with this number.
fn half(memory: &Memory, number: u64) -> Result<Memory, &'static str> {
    let part = |range: AddrRange| {
        let size = range.size() / 2;
        AddrRange::with_size(range.start() + number * size, size).ok_or("no memory")
    };
    Ok(Memory {
        ram: part(memory.ram)?,
        state: part(memory.state)?,
    })
}

/// One guest by remote control; the second one has the upper half of its memory elsewhere.
fn guest(memory: &Memory, protected: bool, second: bool) -> Result<Remote, &'static str> {
    mem::bytes_mut(memory.ram).fill(0);
    load(memory.ram, guest::remote())?;
    mem::clean_invalidate_to_poc(memory.ram);
    let vm = words(Vm::create(config(protected), memory.state))?;
    let size = memory.ram.size() / 2;
    let (first, rest) = (
        AddrRange::with_size(memory.ram.start(), size).ok_or("wraps")?,
        AddrRange::with_size(memory.ram.start() + size, size).ok_or("wraps")?,
    );
    let behind = if second { ELSEWHERE } else { RAM + size };
    words(vm.create_slot(RAM_SLOT, RAM, first))?;
    words(vm.create_slot(ELSEWHERE_SLOT, behind, rest))?;
    words(vm.create_vcpu(0))?;
    if protected {
        let pages = size / PAGE_SIZE;
        words(vm.donate_memory(RAM, CODE_PAGES, DonationKind::Contents))?;
        let zeros = RAM + CODE_PAGES * PAGE_SIZE;
        words(vm.donate_memory(zeros, pages - CODE_PAGES, DonationKind::Zeros))?;
        words(vm.donate_memory(behind, pages, DonationKind::Zeros))?;
        words(vm.seal(RAM, 0))?;
    } else {
        words(vm.start_vcpu(0, RAM, 0))?;
    }
    Ok(Remote::new(vm))
}

fn meet(memory: &Memory, protected: [bool; 2]) -> Result<(), &'static str> {
    let memories = [half(memory, 0)?, half(memory, 1)?];
    let mut first = guest(&memories[0], protected[0], false)?;
    let mut second = guest(&memories[1], protected[1], true)?;
    let result = alternate(&mut first, &mut second)
        .and_then(|()| {
            let strangers = [ELSEWHERE, ELSEWHERE + 16 * PAGE_SIZE];
            reach(
                &mut first,
                protected[0],
                second.vm,
                &memories[1],
                &strangers,
            )
        })
        .and_then(|()| {
            // Where the first one has the rest of its memory.
            let strangers = [RAM + memories[0].ram.size() / 2];
            reach(
                &mut second,
                protected[1],
                first.vm,
                &memories[0],
                &strangers,
            )
        })
        .and_then(|()| alternate(&mut first, &mut second));
    end(first.vm)?;
    end(second.vm)?;
    result
}

/// Both use the same address, in turns, on this core: each finds what it has stored there itself.
fn alternate(first: &mut Remote, second: &mut Remote) -> Result<(), &'static str> {
    for turn in 0..u64::from(TURNS) {
        first.store(PAGE, SECRETS[0] ^ turn)?;
        second.store(PAGE, SECRETS[1] ^ turn)?;
        let found = [first.load(PAGE)?, second.load(PAGE)?];
        expect(
            found == SECRETS.map(|secret| secret ^ turn),
            "a guest found what is not its own",
        )?;
    }
    first.store(PAGE, SECRETS[0])?;
    second.store(PAGE, SECRETS[1])?;
    Ok(())
}

/// `guest` tries the memory of another VM: physical addresses and IPAs that only that one has.
fn reach(
    guest: &mut Remote,
    protected: bool,
    other: Vm,
    memory: &Memory,
    ipas: &[u64],
) -> Result<(), &'static str> {
    let theirs = memory.ram.start() + (PAGE - RAM);
    let physical = [memory.ram.start(), theirs, memory.state.start()];
    for address in physical.iter().chain(ipas) {
        nothing_at(guest, *address)?;
        for id in [MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH] {
            let expected = if protected { INVALID } else { NOT_SUPPORTED };
            let [answer, ..] = guest.call(id, [*address, 0, 0])?;
            expect(answer == expected, "a guest moved a page that it has not")?;
        }
    }
    for id in [Call::VmDestroy, Call::VmMapping, Call::MemoryReclaim] {
        let [answer, ..] = guest.call(id as u32, [other.handle(), PAGE, 0])?;
        expect(answer == NOT_SUPPORTED, "a guest made a call of the host's")?;
    }
    Ok(())
}

/// Neither a load nor a store of the guest finds memory there: the host is asked, as for a device.
fn nothing_at(guest: &mut Remote, ipa: u64) -> Result<(), &'static str> {
    let read = guest.load(ipa);
    match read {
        Err(Stopped::Exit(Exit::MmioRead { ipa: at, .. })) if at == ipa => guest.access()?,
        Err(Stopped::Abort(_)) => [0; 3],
        other => {
            line(format_args!("  load at {ipa:#x}: {other:x?}"));
            return Err("a guest reached what it has not");
        }
    };
    let written = guest.store(ipa, !0);
    match written {
        Err(Stopped::Exit(Exit::MmioWrite { ipa: at, .. })) if at == ipa => guest.access()?,
        Err(Stopped::Abort(_)) => [0; 3],
        other => {
            line(format_args!("  store at {ipa:#x}: {other:x?}"));
            return Err("a guest wrote what it has not");
        }
    };
    Ok(())
}

/// What a descriptor for all of a guest's accesses has besides address and type: read-write, inner
/// shareable, accessed, normal write-back (Arm ARM D8.3.2).
const ATTRIBUTES: u64 = 1 << 10 | 3 << 8 | 3 << 6 | 0xf << 2;
const BLOCK: u64 = 1;
const TABLE_OR_PAGE: u64 = 3;

/// A VM is made of pages that are full of valid descriptors: blocks and pages of EL2's memory and of the
/// host's, and tables that the host has made. Its guest finds nothing but its slot, which is half of
/// what each table of pages, or of blocks, could map.
fn stale_descriptors(memory: &Memory, el2: AddrRange) -> Result<(), &'static str> {
    // The last page of the guest's half that no slot has: the host's own.
    let table = memory.ram.end() - PAGE_SIZE;
    let host = memory.ram.start() + memory.ram.size() / 2;
    for (target, kind) in [
        (el2.start() & !0x1f_ffff, BLOCK),
        (el2.start(), TABLE_OR_PAGE),
        (host, TABLE_OR_PAGE),
        (table, TABLE_OR_PAGE),
    ] {
        for protected in [false, true] {
            fill(memory.state, target | ATTRIBUTES | kind)?;
            let page = AddrRange::with_size(table, PAGE_SIZE).ok_or("no page")?;
            fill(page, el2.start() | ATTRIBUTES | TABLE_OR_PAGE)?;
            over_stale_pages(memory, protected)?;
        }
    }
    Ok(())
}

fn fill(range: AddrRange, descriptor: u64) -> Result<(), &'static str> {
    let bytes = descriptor.to_le_bytes();
    let words = mem::bytes_mut(range).as_chunks_mut::<8>().0;
    words.iter_mut().for_each(|word| *word = bytes);
    mem::clean_invalidate_to_poc(range);
    Ok(())
}

fn over_stale_pages(memory: &Memory, protected: bool) -> Result<(), &'static str> {
    let size = memory.ram.size() / 4;
    let ram = AddrRange::with_size(memory.ram.start(), size).ok_or("no memory")?;
    let small = Memory {
        ram,
        state: memory.state,
    };
    let vm = remote::with_code(&small, guest::remote(), protected)?;
    let mut guest = Remote::new(vm);
    let result = finds_its_slot(&mut guest, protected, size);
    end(vm)?;
    result
}

fn finds_its_slot(guest: &mut Remote, protected: bool, size: u64) -> Result<(), &'static str> {
    guest.store(PAGE, SECRETS[0])?;
    let around = [
        RAM - PAGE_SIZE,
        RAM + size,
        RAM + (2 << 20) - 8,
        RAM + (2 << 20),
    ];
    let blocks = (0..64)
        .map(|n| n << 30 | 0x1000)
        .filter(|ipa| *ipa >> 30 != 1);
    let others = [3 << 37, (1 << 39) - 8];
    for ipa in around.into_iter().chain(blocks).chain(others) {
        // The interrupt controller's page is EL2's.
        nothing_at(guest, ipa)?;
    }
    let kept = guest.load(PAGE)?;
    expect(kept == SECRETS[0], "the guest's own page has changed")?;
    if protected {
        return Ok(());
    }
    let mut ipa = 0;
    while let Ok((start, _, leaf)) = guest.vm.mapping(ipa) {
        let end = start + leaf.pages * PAGE_SIZE;
        // EL2's own mapping: the interrupt controller's CPU interface.
        let interface = start == 0x0801_0000;
        expect(
            interface || (start >= RAM && end <= RAM + size),
            "a leaf is outside of the slot",
        )?;
        ipa = end;
    }
    expect(ipa > RAM, "the guest's memory is not mapped")
}
