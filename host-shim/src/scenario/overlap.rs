//! Slots that overlap in a guest's addresses while it lives: those of one VM are refused, those of
//! two VMs have nothing to do with each other; the guest runs on.

use abi::ErrorCode;
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::RAM;

use super::kit::{RAM_SLOT, code, config, end, expect, load, slot, words};
use super::payload::{Event, Guest, Memory, RAM_SIZE};
use crate::arch::guest;
use crate::report::Report;
use crate::vm::Vm;

pub(super) fn run(memory: &Memory, report: &mut Report) {
    report.check("overlapping_slots_are_refused", overlaps(memory));
}

fn overlaps(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = Guest::create(memory, "run=ask")?;
    let result = converse(&mut guest, memory);
    end(guest.vm)?;
    result
}

fn converse(guest: &mut Guest, memory: &Memory) -> Result<(), &'static str> {
    expect(matches!(guest.go_on(1)?, Event::Asks), "it has not asked")?;
    let end = RAM + RAM_SIZE;
    // The same place, one inside, and ones that cross the beginning and the end.
    for ipa in [RAM, end - PAGE_SIZE, RAM - PAGE_SIZE] {
        let code = create(guest.vm, memory, ipa).err();
        expect(code == Some(ErrorCode::Exists), "slots overlap")?;
        expect(
            matches!(guest.go_on(1)?, Event::Asks),
            "the guest has ended",
        )?;
    }
    // Side by side they can be, and one can't be moved onto another.
    create(guest.vm, memory, end).map_err(|_| "slots can't be side by side")?;
    let moved = code(guest.vm.move_slot(1, end - PAGE_SIZE));
    expect(
        moved == Some(ErrorCode::Exists),
        "a slot was moved onto another",
    )?;
    words(guest.vm.delete_slot(1))?;
    another_vm(memory)?;
    match guest.go_on(0)? {
        Event::Off(_) => Ok(()),
        Event::Asks => Err("the guest does not end"),
    }
}

/// Another VM at the same addresses sees its own memory.
fn another_vm(memory: &Memory) -> Result<(), &'static str> {
    load(memory.other, guest::hello())?;
    let vm = words(Vm::create(config(false), memory.more_state))?;
    let result = words(vm.create_slot(RAM_SLOT, RAM, memory.other))
        .and_then(|()| words(vm.create_vcpu(0)))
        .and_then(|()| words(vm.start_vcpu(0, RAM, 0x1234)))
        .and_then(|()| super::guests::converse(vm));
    end(vm)?;
    result
}

/// A slot of two pages.
fn create(vm: Vm, memory: &Memory, ipa: u64) -> Result<(), ErrorCode> {
    let pages = AddrRange::with_size(memory.other.start(), 2 * PAGE_SIZE);
    let pages = pages.ok_or(ErrorCode::Invalid)?;
    vm.create_slot(slot(1), ipa, pages)
        .map_err(|refused| refused.code)
}
