//! Memory types as a guest finds them by AT S12E1R, while the devices of its VM come and go: before
//! the edges of the non-coherent count, after each, for slots that are flagged, and for devices.
//!
//! The guest is the payload's `run=edges`, which combines each stage-2 type with five of stage 1.

use abi::{Features, SlotWord};
use vmm::platform::RAM;

use super::kit::{RAM_SLOT, end, words};
use super::payload::{Event, Guest, Memory, RAM_SIZE, device_page};
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::Vm;

/// Where the payload expects its slots besides RAM.
const FLAGGED: u64 = 0x5000_0000;
const DEVICE: u64 = 0x0c00_0000;
const COMBINING: u64 = 0x0c01_0000;
/// Flags of a slot (memslot's `SlotFlags`).
const NONCOHERENT_DMA: u32 = 1 << 3;
const WRITE_COMBINING: u32 = 1 << 4;

/// Registers that can be read at any time without an effect, on boards whose model contains the
/// word: the clock (PL031) and GPIO (PL061) of QEMU's virt, system timer and GPIO of BCM2711.
const HARMLESS: [(&str, u64, u64); 2] = [
    ("dummy-virt", 0x0901_0000, 0x0903_0000),
    ("Raspberry Pi 4", 0xfe00_3000, 0xfe20_0000),
];

/// What happens to the VM's devices, and whether the guest's own type of RAM counts afterwards.
const STEPS: [(&str, Option<bool>, bool); 5] = [
    ("no device", None, false),
    ("a device that does not snoop", Some(true), true),
    ("a second one", Some(true), true),
    ("one of them is gone", Some(false), true),
    ("the other one, too", Some(false), false),
];
/// Checks of the guest: four slots, each under all five types of stage 1; and its device tree.
const CHECKS: u32 = 1 + STEPS.len() as u32 * 4;

pub(super) fn run(machine: &Machine, memory: &Memory, report: &mut Report) {
    let locked = follow(machine, memory, true);
    report.check("locked_memory_has_the_type_of_the_moment", locked);
    let on_demand = follow(machine, memory, false);
    report.check("memory_on_demand_has_the_type_of_the_moment", on_demand);
}

/// Two devices of this board.
fn devices(machine: &Machine) -> Result<(u64, u64), &'static str> {
    let model = machine.board.model;
    let found = HARMLESS.iter().find(|(word, ..)| model.contains(word));
    let (_, first, second) = found.ok_or("no device of this board is known to be harmless")?;
    Ok((*first, *second))
}

fn follow(machine: &Machine, memory: &Memory, locked: bool) -> Result<(), &'static str> {
    let devices = devices(machine)?;
    let mut guest = Guest::create(memory, "run=edges")?;
    let result = give_slots(guest.vm, memory, devices, locked)
        .and_then(|()| converse(&mut guest, machine.has(Features::FORCE_WRITE_BACK)));
    end(guest.vm)?;
    result
}

fn give_slots(
    vm: Vm,
    memory: &Memory,
    devices: (u64, u64),
    locked: bool,
) -> Result<(), &'static str> {
    let slot = |id: u16, device: bool, flags: u32| SlotWord { id, device, flags };
    let (device, combining) = (device_page(devices.0)?, device_page(devices.1)?);
    words(vm.create_slot(slot(1, false, NONCOHERENT_DMA), FLAGGED, memory.other))?;
    words(vm.create_slot(slot(2, true, 0), DEVICE, device))?;
    words(vm.create_slot(slot(3, true, WRITE_COMBINING), COMBINING, combining))?;
    if locked {
        words(vm.lock_slot(RAM_SLOT.id))?;
        words(vm.lock_slot(1))?;
    }
    Ok(())
}

/// Answers each of the guest's questions with what it must find next.
fn converse(guest: &mut Guest, forced: bool) -> Result<(), &'static str> {
    let mut answer = 0;
    let mut steps = STEPS.iter();
    loop {
        match guest.go_on(answer)? {
            Event::Off(CHECKS) => return Ok(()),
            Event::Off(_) => return Err("the guest made another number of checks"),
            Event::Asks => {}
        }
        answer = 0;
        if let Some((what, edge, honoured)) = steps.next() {
            line(format_args!("  {what}"));
            if let Some(register) = edge {
                words(guest.vm.noncoherent_device(*register))?;
            }
            answer = order(forced, *honoured);
        }
    }
}

/// What the guest must find: bit 31 set, bit 0 forced write-back, from bit 4 on the MemAttr of RAM,
/// of the flagged slot, of the device, and of the one with write combining (memory types on arm64).
fn order(forced: bool, honoured: bool) -> u32 {
    let (ram, flagged) = match (forced, honoured) {
        (false, _) => (0xf, 0xf),
        (true, false) => (6, 7),
        (true, true) => (7, 7),
    };
    1 << 31 | u32::from(forced) | ram << 4 | flagged << 8 | 1 << 12 | 5 << 16
}

// The slots do not overlap.
const _: () = assert!(FLAGGED >= RAM + RAM_SIZE);
