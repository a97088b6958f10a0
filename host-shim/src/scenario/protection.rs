//! A host that wants to know what a protected guest knows, or to change it: every way that there is
//! without taking the guest's device away, each with its refusal; and a guest that tries the same.

use abi::{Counter, DonationKind, ErrorCode, Exit, SlotWord};
use board::{AddrRange, PAGE_SIZE};
use sha2::{Digest, Sha256};
use vmm::platform::RAM;

use super::guests::Memory;
use super::kit::{RAM_SLOT, code, config, end, expect, load, slot, words};
use super::remote::{self, CODE_PAGES, Remote, Stopped};
use crate::arch::fault;
use crate::arch::{guest, mem};
use crate::call;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::{self, Vm};

/// KVM's vendor calls (Linux, `Documentation/virt/kvm/arm/hypercalls.rst`).
pub(super) const HYP_MEMINFO: u32 = 0xc600_0002;
pub(super) const MEM_SHARE: u32 = 0xc600_0003;
pub(super) const MEM_UNSHARE: u32 = 0xc600_0004;
const GUARD_ENROLL: u32 = 0xc600_0006;
const GUARD_MAP: u32 = 0xc600_0007;
pub(super) const MEM_RELINQUISH: u32 = 0xc600_0009;
/// INVALID_PARAMETER and NOT_SUPPORTED (DEN 0028 7.1).
const INVALID: u64 = u64::MAX - 2;
const NOT_SUPPORTED: u64 = u64::MAX;
/// A page that the guest does not need for its code.
pub(super) const PAGE: u64 = RAM + 16 * PAGE_SIZE;
pub(super) const SECRET: u64 = 0x5ec2_e7de_adbe_ef01;

type Check = fn(&Memory) -> Result<(), &'static str>;

const CHECKS: [(&str, Check); 16] = [
    ("protected_memory_is_out_of_the_hosts_reach", out_of_reach),
    ("donated_memory_can_be_given_to_nobody_else", nobody_else),
    ("nothing_enters_a_sealed_vm", sealed),
    ("an_unsealed_vm_never_runs", unsealed),
    ("the_measurement_covers_memory_and_start", measured),
    ("an_unexpected_measurement_never_runs", unexpected),
    (
        "the_host_reaches_what_the_guest_shares_and_no_longer",
        shared,
    ),
    ("ranges_are_shared_up_to_the_first_that_cannot_be", ranges),
    ("a_relinquished_page_comes_back_as_zeros", relinquished),
    ("missing_memory_is_asked_for_and_found_as_zeros", missing),
    ("a_page_taken_from_the_guest_is_wiped_and_aborts", taken),
    ("a_dead_guests_memory_comes_back_wiped", dead),
    ("devices_are_only_where_the_guest_expects_them", guarded),
    ("a_protected_guests_memory_is_no_device", no_device),
    ("a_protected_guest_reaches_nobody_else", beyond),
    ("an_unprotected_guest_has_no_such_calls", plain),
];

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let Some(memory) = Memory::find(machine) else {
        report.check("protection", Err("there is no free memory"));
        return;
    };
    for (name, check) in CHECKS {
        report.check(name, check(&memory));
    }
    super::guest_calls::run(&memory, report);
    super::neighbours::run(&memory, machine.el2, report);
}

/// The host's address of a page of the guest.
pub(super) fn host_address(memory: &Memory, ipa: u64) -> u64 {
    memory.ram.start() + (ipa - RAM)
}

/// Whether every way to touch this address gives one abort that EL2 has counted.
pub(super) fn refused_everywhere(address: u64) -> Result<(), &'static str> {
    let ways: [fn(u64); 5] = [
        fault::load,
        fault::store,
        fault::load_pair,
        fault::load_exclusive,
        fault::fetch,
    ];
    for way in ways {
        let before = call::counter(Counter::FaultsRefused).unwrap_or(0);
        let fault = fault::expect(|| way(address));
        let after = call::counter(Counter::FaultsRefused).unwrap_or(0);
        expect(fault.is_some(), "the host reached a guest's page")?;
        expect(after == before + 1, "EL2 did not count the refusal")?;
    }
    Ok(())
}

fn out_of_reach(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    guest.store(PAGE, SECRET)?;
    let mut result = Ok(());
    for page in (0..memory.ram.size()).step_by(61 * 4096) {
        result = result.and(refused_everywhere(memory.ram.start() + page + 8));
    }
    // Every page, at least once.
    for address in (memory.ram.start()..memory.ram.end()).step_by(4096) {
        let reached = fault::try_load(address).is_ok() || fault::try_store(address, 0).is_ok();
        result = result.and(expect(!reached, "the host reached a guest's page"));
    }
    let kept = guest.load(PAGE)?;
    guest.off()?;
    end(guest.vm)?;
    result?;
    expect(kept == SECRET, "the guest's memory has changed")
}

/// A read-only slot would show the host what the guest writes, and keep it from being written; and the
/// measurement does not tell.
fn no_device(memory: &Memory) -> Result<(), &'static str> {
    let vm = words(Vm::create(config(true), memory.state))?;
    let slot = SlotWord {
        flags: 2,
        ..RAM_SLOT
    };
    let created = code(vm.create_slot(slot, RAM, memory.ram));
    if created.is_some() {
        end(vm)?;
        return Ok(());
    }
    mem::bytes_mut(memory.ram).fill(0);
    load(memory.ram, guest::remote())?;
    words(vm.create_vcpu(0))?;
    words(vm.donate_memory(RAM, CODE_PAGES, DonationKind::Contents))?;
    let rest = memory.ram.size() / PAGE_SIZE - CODE_PAGES;
    words(vm.donate_memory(RAM + CODE_PAGES * PAGE_SIZE, rest, DonationKind::Zeros))?;
    words(vm.seal(RAM, 0))?;
    let same = words(vm.measurement())? == by_hand(memory.ram.size());
    let mut guest = Remote::new(vm);
    let stored = guest.store(PAGE, SECRET);
    crate::console::line(format_args!(
        "  same measurement: {same}, the guest's store: {stored:?}"
    ));
    end(guest.vm)?;
    Err("a slot that the guest can't write was created")
}

fn nobody_else(memory: &Memory) -> Result<(), &'static str> {
    let half = memory.state.size() / 2;
    let part = |start| AddrRange::with_size(start, half).ok_or("no state");
    let more = part(memory.state.start() + half)?;
    let memory = &Memory {
        ram: memory.ram,
        state: part(memory.state.start())?,
    };
    let mut guest = remote::protected(memory)?;
    let page = AddrRange::with_size(host_address(memory, PAGE), PAGE_SIZE).ok_or("no page")?;
    let other = words(Vm::reserve())?;
    let refused = [
        code(vm::donate_heap(page)),
        code(guest.vm.top_up(page)),
        code(other.create_reserved(config(false), page)),
        code(guest.vm.donate_memory(PAGE, 1, DonationKind::Zeros)),
    ];
    words(other.create_reserved(config(false), more))?;
    let lent = code(other.create_slot(RAM_SLOT, RAM, page));
    let other_refused = [lent, code(other.top_up(page))];
    end(other)?;
    guest.store(PAGE, SECRET)?;
    let kept = guest.load(PAGE)?;
    guest.off()?;
    end(guest.vm)?;
    let not_permitted = |code: &Option<ErrorCode>| *code == Some(ErrorCode::NotPermitted);
    expect(
        not_permitted(&refused[0]),
        "EL2 took a guest's page as heap",
    )?;
    expect(not_permitted(&refused[1]), "a guest's page became a table")?;
    expect(refused[2].is_some(), "a VM was made of a guest's page")?;
    expect(
        other_refused.iter().all(not_permitted),
        "another VM got a guest's page",
    )?;
    expect(not_permitted(&refused[3]), "a page was donated twice")?;
    expect(kept == SECRET, "the guest's page has changed")
}

fn sealed(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let vm = guest.vm;
    let spare = AddrRange::with_size(memory.state.end(), PAGE_SIZE).ok_or("no page")?;
    let refused = [
        code(vm.create_slot(slot(1), 0x8000_0000, spare)),
        code(vm.delete_slot(0)),
        code(vm.move_slot(0, 0x8000_0000)),
        code(vm.set_slot_flags(SlotWord {
            flags: 2,
            ..RAM_SLOT
        })),
        code(vm.lock_slot(0)),
        code(vm.unlock_slot(0)),
        code(vm.reset()),
        code(vm.start_vcpu(0, RAM, 0)),
        code(vm.seal(RAM + 8, 0)),
        code(vm.expect([0; 4])),
        code(vm.mapping(RAM)),
        code(vm.noncoherent_device(true)),
        code(vm.donate_memory(PAGE, 1, DonationKind::Contents)),
    ];
    let runs = guest.store(PAGE, 1);
    guest.off()?;
    end(vm)?;
    runs?;
    for (number, code) in refused.iter().enumerate() {
        if *code != Some(ErrorCode::NotPermitted) {
            crate::console::line(format_args!("  change {number}: {code:?}"));
            return Err("a sealed VM was changed");
        }
    }
    Ok(())
}

fn unsealed(memory: &Memory) -> Result<(), &'static str> {
    let vm = remote::unsealed(memory)?;
    let started = code(vm.start_vcpu(0, RAM, 0));
    let ran = code(vm.run(0, 0, false));
    let measured = code(vm.measurement());
    end(vm)?;
    expect(started == Some(ErrorCode::NotPermitted), "it was started")?;
    expect(measured.is_some(), "it has a measurement")?;
    expect(ran == Some(ErrorCode::NotPermitted), "it ran")
}

/// The measurement by its definition in docs/protection.md: first code, then zeros.
fn by_hand(memory_size: u64) -> [u64; 4] {
    let mut hash = Sha256::new();
    let code = guest::remote();
    hash.update(code);
    let filler = (CODE_PAGES * PAGE_SIZE) as usize - code.len();
    (0..filler).for_each(|_| hash.update([0]));
    let mut update = |words: &[u64]| words.iter().for_each(|w| hash.update(w.to_le_bytes()));
    update(&[1, RAM, CODE_PAGES * PAGE_SIZE]);
    let behind = CODE_PAGES * PAGE_SIZE;
    update(&[0, RAM + behind, memory_size - behind]);
    update(&[0x5241_5645_4c49_4e01, 1, RAM, 0]);
    let bytes: [u8; 32] = hash.finalize().into();
    let mut words = [0; 4];
    for (word, eight) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*eight);
    }
    words
}

fn measured(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let told = words(guest.vm.measurement())?;
    let [_, a, b] = guest.call(abi::GUEST_MEASUREMENT, [0, 0, 0])?;
    let [_, c, d] = guest.call(abi::GUEST_MEASUREMENT, [1, 0, 0])?;
    guest.off()?;
    end(guest.vm)?;
    expect(
        told == by_hand(memory.ram.size()),
        "it is not the documented one",
    )?;
    expect(told == [a, b, c, d], "the guest is told another one")
}

fn unexpected(memory: &Memory) -> Result<(), &'static str> {
    let sealed = |expected: [u64; 4]| -> Result<_, &'static str> {
        let vm = words(Vm::create(config(true), memory.state))?;
        words(vm.expect(expected))?;
        let again = code(vm.expect(expected));
        end(vm)?;
        let vm = remote::unsealed_expecting(memory, Some(expected))?;
        let rest = memory.ram.size() / PAGE_SIZE - CODE_PAGES;
        words(vm.donate_memory(RAM + CODE_PAGES * PAGE_SIZE, rest, DonationKind::Zeros))?;
        let sealed = code(vm.seal(RAM, 0));
        let once_more = code(vm.seal(RAM, 0));
        let ran = code(vm.run(0, 0, false));
        end(vm)?;
        Ok((again, sealed, once_more, ran))
    };
    let right = by_hand(memory.ram.size());
    let mut wrong = right;
    wrong[3] ^= 1 << 63;
    let not_permitted = Some(ErrorCode::NotPermitted);
    let (again, good, ..) = sealed(right)?;
    let (_, bad, once_more, ran) = sealed(wrong)?;
    expect(again == not_permitted, "the expectation was changed")?;
    expect(good.is_none(), "the right one was refused")?;
    expect(bad == Some(ErrorCode::Mismatch), "a wrong one was sealed")?;
    expect(once_more == not_permitted, "a refused VM was sealed")?;
    expect(ran == not_permitted, "a refused VM ran")
}

fn shared(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let here = host_address(memory, PAGE);
    guest.store(PAGE, SECRET)?;
    let [size, ranges, _] = guest.call(HYP_MEMINFO, [0; 3])?;
    let [first, ..] = guest.call(MEM_SHARE, [PAGE, 0, 0])?;
    let [again, ..] = guest.call(MEM_SHARE, [PAGE, 0, 0])?;
    let seen = fault::try_load(here);
    let written = fault::try_store(here, !SECRET);
    let neighbours = fault::try_load(here - 8).is_ok() || fault::try_load(here + 4096).is_ok();
    mem::clean_invalidate_to_poc(AddrRange::with_size(here, PAGE_SIZE).ok_or("no page")?);
    let found = guest.load(PAGE)?;
    let [back, ..] = guest.call(MEM_UNSHARE, [PAGE, 0, 0])?;
    let [twice, ..] = guest.call(MEM_UNSHARE, [PAGE, 0, 0])?;
    let later = refused_everywhere(here);
    let kept = guest.load(PAGE)?;
    guest.off()?;
    end(guest.vm)?;
    expect(
        [size, ranges] == [4096, 1],
        "HYP_MEMINFO says something else",
    )?;
    expect([first, back] == [0, 0], "sharing was refused")?;
    expect(again == INVALID, "a page was shared twice")?;
    expect(twice == INVALID, "sharing ended twice")?;
    expect(
        matches!(seen, Ok(SECRET)),
        "the host does not see a shared page",
    )?;
    expect(written.is_ok(), "the host can't write a shared page")?;
    expect(!neighbours, "the host reaches a neighbour")?;
    expect(
        found == !SECRET && kept == !SECRET,
        "the guest does not see it",
    )?;
    later
}

fn ranges(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let [_, eight, _] = guest.call(MEM_SHARE, [PAGE, 8, 0])?;
    // One that overlaps does nothing but what it can: its first page, if that.
    let [before, done, _] = guest.call(MEM_SHARE, [PAGE - PAGE_SIZE, 4, 0])?;
    let [inside, ..] = guest.call(MEM_SHARE, [PAGE, 4, 0])?;
    let [outside, ..] = guest.call(MEM_SHARE, [RAM - PAGE_SIZE, 1, 0])?;
    let [unaligned, ..] = guest.call(MEM_SHARE, [PAGE + 8, 1, 0])?;
    let last = RAM + memory.ram.size() - PAGE_SIZE;
    let [_, end_only, _] = guest.call(MEM_SHARE, [last, 512, 0])?;
    let reached = (0..9).filter(|n| fault::try_load(host_address(memory, PAGE) + n * 4096).is_ok());
    let reached = reached.count();
    let [_, undone, _] = guest.call(MEM_UNSHARE, [PAGE, 8, 0])?;
    guest.off()?;
    end(guest.vm)?;
    expect(
        eight == 8 && undone == 8,
        "a range of eight was not shared as one",
    )?;
    expect(
        [before, done] == [0, 1],
        "a range went on over a shared page",
    )?;
    expect(inside == INVALID, "shared pages were shared again")?;
    expect(
        outside == INVALID && unaligned == INVALID,
        "a wrong address was shared",
    )?;
    expect(end_only == 1, "a range went on behind the memory")?;
    expect(reached == 8, "the host reaches not exactly what was shared")
}

fn relinquished(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let here = host_address(memory, PAGE);
    guest.store(PAGE, SECRET)?;
    guest.call(MEM_SHARE, [PAGE + PAGE_SIZE, 0, 0])?;
    let [shared, ..] = guest.call(MEM_RELINQUISH, [PAGE + PAGE_SIZE, 0, 0])?;
    let [given, ..] = guest.call(MEM_RELINQUISH, [PAGE, 0, 0])?;
    let wiped = (0..512).all(|n| matches!(fault::try_load(here + 8 * n), Ok(0)));
    let written = fault::try_store(here, SECRET);
    // The guest asks for it again, and finds zeros once more.
    let asked = guest.load(PAGE);
    words(guest.vm.donate_memory(PAGE, 1, DonationKind::Zeros))?;
    let [found, ..] = guest.access()?;
    let later = refused_everywhere(here);
    guest.off()?;
    end(guest.vm)?;
    expect(shared == INVALID, "a shared page was given away")?;
    expect(given == 0, "a page can't be given away")?;
    expect(wiped, "the host finds what the guest had")?;
    expect(written.is_ok(), "the host can't write its page")?;
    let missing = Exit::MemoryMissing { ipa: PAGE };
    expect(
        asked == Err(Stopped::Exit(missing)),
        "the guest still has it",
    )?;
    expect(found == 0, "the guest finds what the host wrote")?;
    later
}

fn missing(memory: &Memory) -> Result<(), &'static str> {
    let vm = remote::unsealed(memory)?;
    words(vm.seal(RAM, 0))?;
    let mut guest = Remote::new(vm);
    let asked = guest.load(PAGE);
    let here = fault::try_store(host_address(memory, PAGE), SECRET);
    words(vm.donate_memory(PAGE, 1, DonationKind::Zeros))?;
    let [found, ..] = guest.access()?;
    // A share of what is not there yet asks for it, and is then done.
    let page = PAGE + PAGE_SIZE;
    let share = guest.call(MEM_SHARE, [page, 0, 0]);
    words(vm.donate_memory(page, 1, DonationKind::Zeros))?;
    let [done, ..] = guest.go_on()?;
    guest.off()?;
    end(vm)?;
    let missing = |ipa| Stopped::Exit(Exit::MemoryMissing { ipa });
    expect(asked == Err(missing(PAGE)), "it was not asked for")?;
    expect(here.is_ok(), "the host lost what it has not donated")?;
    expect(found == 0, "the guest finds what the host wrote")?;
    expect(share == Err(missing(page)) && done == 0, "a share was lost")
}

fn taken(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let here = host_address(memory, PAGE);
    guest.store(PAGE, SECRET)?;
    guest.store(PAGE + PAGE_SIZE, SECRET)?;
    words(vm::reclaim_page(here))?;
    let wiped = (0..512).all(|n| matches!(fault::try_load(here + 8 * n), Ok(0)));
    let load = guest.load(PAGE);
    let share = guest.call(MEM_SHARE, [PAGE, 0, 0])?;
    let again = code(guest.vm.donate_memory(PAGE, 1, DonationKind::Zeros));
    let neighbour = guest.load(PAGE + PAGE_SIZE)?;
    let not_its = code(vm::reclaim_page(here));
    let nobodys = code(vm::reclaim_page(0));
    guest.off()?;
    end(guest.vm)?;
    expect(wiped, "the host finds what the guest had")?;
    // A data abort at EL1 (0x25), synchronous external (0x10).
    let external =
        matches!(load, Err(Stopped::Abort(esr)) if esr >> 26 == 0x25 && esr & 0x3f == 0x10);
    expect(external, "the guest did not get an abort")?;
    expect(share[0] == INVALID, "the guest shares what it has not")?;
    expect(
        again == Some(ErrorCode::NotPermitted),
        "it was replaced behind the guest's back",
    )?;
    expect(neighbour == SECRET, "the neighbour is gone, too")?;
    expect(
        not_its == Some(ErrorCode::NotFound),
        "the host's page was taken",
    )?;
    expect(
        nobodys == Some(ErrorCode::NotFound),
        "a page of nobody was taken",
    )
}

fn dead(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    guest.store(PAGE, SECRET)?;
    guest.call(MEM_SHARE, [PAGE + PAGE_SIZE, 3, 0])?;
    words(guest.vm.destroy())?;
    let ran = code(guest.vm.run(0, 0, false));
    let still = refused_everywhere(host_address(memory, PAGE));
    let taken = code(vm::reclaim_page(host_address(memory, PAGE)));
    while words(guest.vm.reclaim())?.is_some() {}
    let clean = mem::bytes(memory.ram).iter().all(|byte| *byte == 0);
    still?;
    expect(ran == Some(ErrorCode::NotFound), "a dead guest ran")?;
    expect(
        taken.is_some(),
        "a dead guest's page was taken past its reclaim",
    )?;
    expect(clean, "the host finds what the guest had")
}

fn guarded(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let uart = 0x0900_0000;
    let before = guest.load(uart + 0x1000);
    // The run goes on with whatever the device says.
    guest.access()?;
    let [mapped, ..] = guest.call(GUARD_MAP, [uart, 0, 0])?;
    let [enrolled, ..] = guest.call(GUARD_ENROLL, [0, 0, 0])?;
    let after = guest.load(uart + 0x1000);
    let unmapped = guest.load(0x5000_0000);
    guest.off()?;
    end(guest.vm)?;
    let exit = Stopped::Exit(Exit::MmioRead {
        ipa: uart + 0x1000,
        size: 8,
    });
    expect(before == Err(exit), "a device was refused without reason")?;
    expect(mapped == 0 && enrolled == 0, "the guard was refused")?;
    expect(
        matches!(after, Err(Stopped::Abort(_))),
        "a device is where none is expected",
    )?;
    expect(
        matches!(unmapped, Err(Stopped::Abort(_))),
        "so is one at another address",
    )
}

/// The guest's calls and accesses with addresses that are not its.
fn beyond(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::protected(memory)?;
    let ours = memory.state.end();
    let mut strange = 0;
    for address in [
        0,
        0x0800_0000,
        ours,
        memory.ram.start(),
        1 << 39,
        1 << 47,
        u64::MAX - 4095,
    ] {
        for id in [MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH] {
            let [answer, ..] = guest.call(id, [address, 0, 0])?;
            strange += u32::from(answer != INVALID);
        }
    }
    for address in [0x0800_0000, ours, 1 << 39, 1 << 47, 1 << 51] {
        match guest.load(address) {
            // At best there is a device of the host, which says what it likes.
            Err(Stopped::Exit(Exit::MmioRead { ipa, .. })) if ipa == address => {
                guest.access()?;
            }
            Err(Stopped::Abort(_)) => {}
            // The interrupt controller is EL2's own.
            Ok(_) if address == 0x0800_0000 => {}
            other => {
                crate::console::line(format_args!("  {address:#x}: {other:?}"));
                strange += 1;
            }
        }
    }
    for id in [
        abi::Call::VmDestroy as u32,
        abi::Call::MemoryReclaim as u32,
        0xc600_0040,
    ] {
        let [answer, ..] = guest.call(id, [0x1000, 0, 0])?;
        strange += u32::from(answer != NOT_SUPPORTED);
    }
    guest.off()?;
    end(guest.vm)?;
    expect(strange == 0, "something was not refused")
}

fn plain(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = remote::plain(memory)?;
    let vm = guest.vm;
    let mut known = 0;
    for id in HYP_MEMINFO..HYP_MEMINFO + 10 {
        known += u32::from(guest.call(id, [PAGE, 0, 0])?[0] != NOT_SUPPORTED);
    }
    let donated = vm.donate_memory(PAGE, 1, DonationKind::Zeros);
    let sealed = vm.seal(RAM, 0);
    guest.off()?;
    end(vm)?;
    expect(known == 0, "it has")?;
    let refused = Some(ErrorCode::NotPermitted);
    let codes = [donated, sealed].map(code);
    expect(
        codes == [refused; 2],
        "the host protects what is not protected",
    )
}
