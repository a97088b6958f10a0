//! VMs: their life, and what a small guest sees.

use abi::{ErrorCode, Exit, SlotState, SlotWord, VmCounter};
use board::{AddrRange, PAGE_SIZE, Placement, highest_free};
use vmm::platform::{RAM, UART};

use super::kit::{RAM_SLOT, code, config, end, expect, load, slot, words, wrote};
use crate::arch::{cpu, guest, mem, walks};
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::{Refused, Vm};

/// Bytes of the guest's memory.
const RAM_SIZE: u64 = 2 << 20;
/// Donated to a VM: its objects and a few tables.
const STATE_SIZE: u64 = 128 * PAGE_SIZE;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let Some(memory) = Memory::find(machine) else {
        report.check("guests", Err("there is no free memory"));
        return;
    };
    report.check("guest_runs_and_powers_off", hello(&memory));
    report.check("a_guest_that_suspends_leaves_fp_alone", suspended(&memory));
    report.check("guest_memory_is_flushed_once", flushed_once(&memory));
    report.check("donated_memory_comes_back_wiped", wiped(&memory));
    report.check("bad_calls_are_refused", refusals(&memory));
    report.check("slot_memory_is_free_after_its_slot", deleted(&memory));
    report.check("vms_come_and_go", many(&memory));
    report.check("tables_where_nothing_answers", lost_tables(&memory));
    super::fp::run(&memory, report);
    super::counters::run(&memory, report);
    super::sharing::run(&memory, report);
    super::resumes::run(&memory, report);
    super::twice::run(machine, &memory, report);
    if crate::arch::sets_access_flags() {
        report.check("tables_that_the_core_writes", access_flag(&memory));
    }
}

/// Free memory for one VM.
pub(super) struct Memory {
    pub(super) ram: AddrRange,
    pub(super) state: AddrRange,
}

impl Memory {
    pub(super) fn find(machine: &Machine) -> Option<Self> {
        let want = Placement {
            size: RAM_SIZE + STATE_SIZE,
            align: 2 << 20,
            limit: 1 << 40,
        };
        let range = highest_free(&machine.board.memory, &machine.board.reserved, want)?;
        let (ram, state) = (range.start(), range.start() + RAM_SIZE);
        Some(Self {
            ram: AddrRange::with_size(ram, RAM_SIZE)?,
            state: AddrRange::with_size(state, STATE_SIZE)?,
        })
    }

    /// A VM with one slot, and the small guest in it.
    pub(super) fn vm(&self) -> Result<Vm, Refused> {
        let vm = Vm::create(config(false), self.state)?;
        vm.create_slot(RAM_SLOT, RAM, self.ram)?;
        vm.create_vcpu(0)?;
        vm.start_vcpu(0, RAM, 0x1234)?;
        Ok(vm)
    }

    /// Puts the small guest there.
    pub(super) fn load(&self) -> Result<(), &'static str> {
        load(self.ram, guest::hello())
    }
}

/// Runs the guest: it reads and writes a device, calls PSCI, uses FP, and powers off.
pub(super) fn converse(vm: Vm) -> Result<(), &'static str> {
    let mut loaded = 0;
    let mut expected = [
        Exit::MmioWrite {
            ipa: UART,
            size: 4,
            value: 0x1234,
        },
        Exit::MmioRead {
            ipa: UART + 0x18,
            size: 4,
        },
        Exit::MmioWrite {
            ipa: UART + 4,
            size: 1,
            value: 0x8b,
        },
        Exit::MmioWrite {
            ipa: UART + 8,
            size: 8,
            value: 0x1_0001,
        },
        Exit::MmioWrite {
            ipa: UART + 16,
            size: 8,
            value: 0x4010_0000_0000_0000,
        },
        Exit::SystemOff,
    ]
    .into_iter()
    .peekable();
    for _ in 0..10_000 {
        let exit = words(vm.run(0, loaded, false))?;
        if exit == Exit::Interrupted {
            continue;
        }
        if Some(exit) != expected.next() {
            crate::console::line(format_args!("  unexpected {exit:?}"));
            return Err("the guest did something else");
        }
        loaded = if let Exit::MmioRead { .. } = exit {
            0xffff_ff8a
        } else {
            0
        };
        if exit == Exit::SystemOff {
            let later = words(vm.run(0, 0, false))?;
            return expect(later == Exit::VcpuOff, "it went on behind SYSTEM_OFF");
        }
    }
    Err("the guest does not get on")
}

fn hello(memory: &Memory) -> Result<(), &'static str> {
    memory.load()?;
    let vm = words(memory.vm())?;
    let result = converse(vm);
    end(vm)?;
    result
}

/// A guest that uses FP, and loses its registers by its own wish, loses only its own.
fn suspended(memory: &Memory) -> Result<(), &'static str> {
    const MINE: u64 = 0x1234_5678_9abc_def0;
    load(memory.ram, guest::suspend())?;
    let vm = words(memory.vm())?;
    cpu::set_d8(MINE);
    let mut kept = true;
    let mut exit = Exit::Interrupted;
    for _ in 0..1000 {
        exit = words(vm.run(0, 0, false))?;
        kept &= cpu::d8() == MINE;
        if exit != Exit::Interrupted {
            break;
        }
    }
    end(vm)?;
    expect(
        matches!(exit, Exit::WaitForInterrupt { .. }),
        "it does not suspend itself",
    )?;
    expect(kept, "the host's FP registers are lost")
}

/// What was written after the lock is seen, and the lines are flushed at the first run only.
fn flushed_once(memory: &Memory) -> Result<(), &'static str> {
    let vm = words(memory.vm())?;
    words(vm.lock_slot(0))?;
    let at_lock = words(vm.counter(VmCounter::LinesFlushed))?;
    let dirty = words(vm.slot_state(0))?;
    memory.load()?;
    let result = converse(vm);
    let at_end = words(vm.counter(VmCounter::LinesFlushed))?;
    let clean = words(vm.slot_state(0))?;
    end(vm)?;
    result?;
    expect(at_lock == 0, "lines were flushed at lock")?;
    expect(
        clean == Some(SlotState::LockedClean),
        "it is not clean after",
    )?;
    let forced = crate::call::features().contains(abi::Features::FORCE_WRITE_BACK);
    if forced {
        expect(dirty == Some(SlotState::LockedClean), "nothing was pending")?;
        return expect(at_end == 0, "lines were flushed for forced write-back");
    }
    expect(dirty == Some(SlotState::LockedDirty), "nothing was pending")?;
    let lines = RAM_SIZE / crate::arch::mem::line_size();
    expect(at_end == lines, "not the slot's lines were flushed")
}

fn wiped(memory: &Memory) -> Result<(), &'static str> {
    mem::bytes_mut(memory.state).fill(0x55);
    let vm = words(memory.vm())?;
    end(vm)?;
    let clean = mem::bytes(memory.state).iter().all(|byte| *byte == 0);
    expect(clean, "something of the VM is left")
}

fn refusals(memory: &Memory) -> Result<(), &'static str> {
    let vm = words(memory.vm())?;
    let again = code(vm.create_slot(RAM_SLOT, RAM, memory.ram));
    let donated = code(vm.top_up(memory.ram));
    let el2s = code(vm.create_slot(slot(1), 0, memory.state));
    let first = AddrRange::with_size(0, PAGE_SIZE).and_then(|page| code(vm.top_up(page)));
    let twice = code(vm.create_vcpu(0));
    let beyond = code(vm.create_vcpu(1));
    let missing = code(vm.run(1, 0, false));
    end(vm)?;
    expect(
        again == Some(ErrorCode::Exists),
        "a slot number was used twice",
    )?;
    expect(
        donated == Some(ErrorCode::Busy),
        "a slot's memory was donated",
    )?;
    expect(
        el2s == Some(ErrorCode::NotPermitted),
        "EL2's memory in a slot",
    )?;
    // Where that is RAM, too: EL2 has no pointer to it.
    expect(
        first == Some(ErrorCode::NotPermitted),
        "the page at address 0 was taken",
    )?;
    expect(twice == Some(ErrorCode::Exists), "a vCPU was created twice")?;
    expect(beyond == Some(ErrorCode::Invalid), "a vCPU beyond the last")?;
    expect(missing == Some(ErrorCode::NotFound), "a missing vCPU ran")
}

/// Memory of a slot can be donated when the slot is gone, and comes back wiped with the VM.
fn deleted(memory: &Memory) -> Result<(), &'static str> {
    memory.load()?;
    let vm = words(memory.vm())?;
    words(vm.lock_slot(0))?;
    let locked = code(vm.delete_slot(0));
    let ran = converse(vm);
    words(vm.reset())?;
    words(vm.unlock_slot(0))?;
    words(vm.delete_slot(0))?;
    words(vm.top_up(memory.ram))?;
    end(vm)?;
    ran?;
    expect(locked == Some(ErrorCode::Busy), "a locked slot was deleted")?;
    let clean = mem::bytes(memory.ram).iter().all(|byte| *byte == 0);
    expect(clean, "the guest's memory is left in what came back")
}

/// VMIDs are used again: no translation of the one before may be left.
fn many(memory: &Memory) -> Result<(), &'static str> {
    for round in 0..20 {
        memory.load()?;
        let vm = words(memory.vm())?;
        let result = converse(vm);
        end(vm)?;
        result?;
        expect(vm.handle() == 0x1000, "a handle leaks")?;
        mem::bytes_mut(memory.ram).fill(round);
    }
    Ok(())
}

/// Runs the guest until it wants something.
fn next_exit(vm: Vm) -> Result<Exit, Refused> {
    loop {
        match vm.run(0, 0, false) {
            Ok(Exit::Interrupted) => {}
            exit => return exit,
        }
    }
}

/// A guest's tables in a device's memory that no device answers for: the walk that EL2 makes there for
/// the guest meets a bus error, which must end neither EL2 nor the guest.
fn lost_tables(memory: &Memory) -> Result<(), &'static str> {
    /// Above the RAM and below the PCIe windows of the machines that we know.
    const NOWHERE: u64 = 64 << 30;
    const TABLES: u64 = 0x1000_0000;
    const DEVICE: SlotWord = SlotWord {
        id: 1,
        device: true,
        flags: 1 << 4,
    };
    let nowhere = AddrRange::with_size(NOWHERE, PAGE_SIZE).ok_or("wrapping address")?;
    load(memory.ram, walks::lost_tables())?;
    let vm = words(Vm::create(config(false), memory.state))?;
    words(vm.create_slot(RAM_SLOT, RAM, memory.ram))?;
    words(vm.create_slot(DEVICE, TABLES, nowhere))?;
    words(vm.create_vcpu(0))?;
    words(vm.start_vcpu(0, RAM, TABLES))?;
    let exits = [(); 3].map(|()| next_exit(vm));
    end(vm)?;
    // INVALID_PARAMETER of SMCCC.
    expect(exits[0] == Ok(wrote(0, u64::MAX - 2)), "not refused")?;
    expect(
        exits[1] == Ok(wrote(8, 0xee)),
        "a thread register has changed",
    )?;
    expect(exits[2] == Ok(Exit::SystemOff), "it does not go on")
}

/// The core sets an access flag in a table whose page logs writes, and is protected: the fault is one
/// of a walk that was for a load, and yet the page has to become writable.
fn access_flag(memory: &Memory) -> Result<(), &'static str> {
    const LOGGED: SlotWord = SlotWord {
        flags: 1,
        ..RAM_SLOT
    };
    load(memory.ram, walks::access_flag())?;
    let vm = words(Vm::create(config(false), memory.state))?;
    words(vm.create_slot(LOGGED, RAM, memory.ram))?;
    words(vm.create_vcpu(0))?;
    words(vm.start_vcpu(0, RAM, 0))?;
    let ready = next_exit(vm);
    let dirty = vm.dirty(0, 0);
    let set = next_exit(vm);
    end(vm)?;
    expect(ready == Ok(wrote(0, 0)), "the guest does not start")?;
    expect(dirty == Ok(1 << 16), "not the table alone was written")?;
    expect(set == Ok(wrote(8, 0x400)), "the flag is not set")
}
