//! Two vCPUs of a VM with locked memory run for the first time, on two cores at once: the
//! maintenance that the lock has put off is done once, before either has executed an instruction.
//! On a machine with one core they run one after the other.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use abi::{ErrorCode, Exit, Features, SlotState, VmConfig, VmCounter};
use vmm::platform::RAM;

use super::kit::{RAM_SLOT, config, end, expect, load, words};
use super::payload::{Memory, RAM_SIZE};
use crate::arch::{cpu, gic, mem, ticks_per_second};
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::Vm;

/// First runs: the first one, and one after each reset.
const ROUNDS: u32 = 8;
/// Seconds that the other core may take, on an emulator that has little time.
const PATIENCE: u64 = 20;
/// PSCI CPU_OFF: `mov w0, #2`; `movk w0, #0x8400, lsl #16`; `hvc #0`.
const CODE: [u32; 3] = [0x5280_0040, 0x72b0_8000, 0xd400_0002];

/// Handle of the VM whose second vCPU the other core runs.
static HANDLE: AtomicU64 = AtomicU64::new(0);
/// Counts up: the other core waits (odd), both go (even).
static TURN: AtomicU32 = AtomicU32::new(0);
/// How many of the other core's runs have ended well.
static DONE: AtomicU32 = AtomicU32::new(0);
/// The other core shall turn itself off.
const END: u32 = u32::MAX;

pub(super) fn run(machine: &Machine, memory: &Memory, report: &mut Report) {
    report.check("two_first_runs_at_once_flush_once", races(machine, memory));
}

fn races(machine: &Machine, memory: &Memory) -> Result<(), &'static str> {
    let config = VmConfig {
        vcpus: 2,
        ..config(false)
    };
    let vm = words(Vm::create(config, memory.state))?;
    let result = prepare(vm, memory).and_then(|()| with_other_core(machine, vm));
    end(vm)?;
    result
}

fn prepare(vm: Vm, memory: &Memory) -> Result<(), &'static str> {
    words(vm.create_slot(RAM_SLOT, RAM, memory.ram))?;
    words(vm.create_vcpu(0))?;
    words(vm.create_vcpu(1))?;
    words(vm.lock_slot(RAM_SLOT.id))?;
    // After the lock: what is flushed must have this in it.
    let code = CODE.map(u32::to_le_bytes);
    load(memory.ram, code.as_flattened())
}

/// Has another core, if there is one, run the second vCPU in each round.
fn with_other_core(machine: &Machine, vm: Vm) -> Result<(), &'static str> {
    let Some((number, mpidr)) = machine.other_cores().next() else {
        return rounds(machine, vm, || run_to_off(vm, 1));
    };
    HANDLE.store(vm.handle(), Ordering::Relaxed);
    TURN.store(0, Ordering::Relaxed);
    DONE.store(0, Ordering::Relaxed);
    cpu::start(number, mpidr, machine.settings, other_core)?;
    let mut done = 0;
    let result = rounds(machine, vm, || {
        done += 1;
        wait_for(&DONE, done)
    });
    TURN.store(END, Ordering::Release);
    cpu::wait_for_off(mpidr)?;
    result
}

/// Waits until the other core, if there is one, is at the start, and lets it go.
fn set_off(round: u32) -> Result<(), &'static str> {
    if HANDLE.load(Ordering::Relaxed) != 0 {
        wait_for(&TURN, 2 * round + 1)?;
        TURN.store(2 * round + 2, Ordering::Release);
    }
    Ok(())
}

fn rounds(
    machine: &Machine,
    vm: Vm,
    mut second: impl FnMut() -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    let forced = machine.has(Features::FORCE_WRITE_BACK);
    let lines = if forced {
        0
    } else {
        RAM_SIZE / mem::line_size()
    };
    for round in 0..ROUNDS {
        words(vm.start_vcpu(0, RAM, 0))?;
        words(vm.start_vcpu(1, RAM, 0))?;
        let before = words(vm.counter(VmCounter::LinesFlushed))?;
        expect(
            before == u64::from(round) * lines,
            "lines were flushed before the run",
        )?;
        set_off(round)?;
        run_to_off(vm, 0)?;
        second()?;
        let after = words(vm.counter(VmCounter::LinesFlushed))?;
        expect(
            after == u64::from(round + 1) * lines,
            "not the slot's lines were flushed once",
        )?;
        let state = words(vm.slot_state(RAM_SLOT.id))?;
        expect(state == Some(SlotState::LockedClean), "it is not clean")?;
        words(vm.reset())?;
    }
    Ok(())
}

fn run_to_off(vm: Vm, index: u8) -> Result<(), &'static str> {
    loop {
        match vm.run(index, 0, false) {
            // The other one does the maintenance.
            Err(refused) if matches!(refused.code, ErrorCode::Again | ErrorCode::Busy) => {}
            result => match words(result)? {
                Exit::VcpuOff => return Ok(()),
                Exit::Interrupted => {}
                _ => return Err("a vCPU did something else"),
            },
        }
    }
}

/// Waits until both cores are where they should be.
fn wait_for(value: &AtomicU32, wanted: u32) -> Result<(), &'static str> {
    let deadline = gic::now() + PATIENCE * ticks_per_second();
    while value.load(Ordering::Acquire) != wanted {
        if gic::now() > deadline {
            return Err("the other core does not get on");
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// What the other core does: the second vCPU of each round.
fn other_core(_: usize) -> ! {
    let vm = Vm::from_handle(HANDLE.load(Ordering::Relaxed));
    let mut turn = 0;
    loop {
        // Says that it is here; fails if it is to end instead.
        let here = TURN.compare_exchange(turn, turn + 1, Ordering::AcqRel, Ordering::Acquire);
        turn += 2;
        while here.is_ok() && TURN.load(Ordering::Acquire) == turn - 1 {
            core::hint::spin_loop();
        }
        if TURN.load(Ordering::Acquire) != turn || run_to_off(vm, 1).is_err() {
            cpu::retire()
        }
        DONE.fetch_add(1, Ordering::Release);
    }
}
