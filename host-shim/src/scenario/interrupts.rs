//! Interrupts of a guest on a core that is turned off and on: what EL2 needs of the core's private ones
//! is there again, and ends the guest's run or its wait.
//!
//! The guest runs on another core, which takes no interrupt of the host's: only EL2's own get it out.

use core::sync::atomic::{AtomicU64, Ordering};

use abi::Exit;
use board::Gic;
use spin::Mutex;
use vmm::platform::{RAM, UART};

use super::guests::Memory;
use super::kit::{RAM_SLOT, config, end, expect, load, words};
use crate::arch::{cpu, gic, guest, ticks_per_second};
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::Vm;

/// The shared interrupt that the guest waits for.
const LINE: u32 = 40;
/// Seconds that a guest may take for its next word: more than its own patience.
const PATIENCE: u64 = 20;
/// Times as long as it should (1/64 s) that a wait may take, on an emulator that has little time: half of
/// [`PATIENCE`], after which it is woken.
const SLOW: u64 = 640;

/// What the other core is given.
static GIVEN: Mutex<Option<(Vm, Gic)>> = Mutex::new(None);
/// What its guest has told: how often, and the words.
static TOLD: AtomicU64 = AtomicU64::new(0);
static WORDS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
/// The other core is done with its guest.
const DONE: u64 = u64::MAX;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let (Some(memory), Some(gic)) = (Memory::find(machine), &machine.board.gic) else {
        return report.check("interrupts", Err("there is no free memory, or no GIC"));
    };
    let rounds = [(); 2].map(|()| round(machine, &memory, gic));
    report.check("interrupts_end_a_guests_run", arrive(rounds[0]));
    report.check("interrupts_are_there_after_cpu_off", arrive(rounds[1]));
    report.check("a_timer_set_anew_ends_a_wait_at_el2", wakes(rounds[0]));
}

type Told = Result<Option<[u64; 4]>, &'static str>;

/// Both interrupts came.
fn arrive(told: Told) -> Result<(), &'static str> {
    let Some([timer, line, ..]) = told? else {
        return Ok(());
    };
    expect(timer == 1, "the timer's did not come")?;
    expect(line == 1, "the device's did not come")
}

fn wakes(told: Told) -> Result<(), &'static str> {
    let Some([_, _, waited, wanted]) = told? else {
        return Ok(());
    };
    expect(waited < wanted * SLOW, "it woke too late")
}

/// Turns another core on, on which the guest runs, and off. Nothing on a machine without one.
fn round(machine: &Machine, memory: &Memory, gic: &Gic) -> Told {
    let Some((number, mpidr)) = machine.other_cores().next_back() else {
        return Ok(None);
    };
    load(memory.ram, guest::interrupts())?;
    let version = match gic {
        Gic::V2 { .. } => 2,
        Gic::V3 { .. } => 3,
    };
    let vm = words(Vm::create(config(false), memory.state))?;
    words(vm.create_slot(RAM_SLOT, RAM, memory.ram))?;
    words(vm.create_vcpu(0))?;
    words(vm.start_vcpu(0, RAM, version))?;
    *GIVEN.lock() = Some((vm, *gic));
    TOLD.store(0, Ordering::Relaxed);
    for word in &WORDS {
        word.store(0, Ordering::Relaxed);
    }
    cpu::start(number, mpidr, machine.settings, other_core)?;
    let result = beside(vm);
    cpu::wait_for_off(mpidr)?;
    end(vm)?;
    result.map(|()| Some([0, 1, 2, 3].map(|n: usize| WORDS[n].load(Ordering::Relaxed))))
}

/// While the guest runs: raises its line when it waits for that, and wakes it if it does not wake itself.
fn beside(vm: Vm) -> Result<(), &'static str> {
    wait_for(1)?;
    // It spins by now; if not, it has the line without a kick, and the check is weaker.
    let soon = gic::now() + ticks_per_second() / 16;
    while gic::now() < soon {
        core::hint::spin_loop();
    }
    words(vm.set_line(LINE, true))?;
    if wait_for(DONE).is_err() {
        words(vm.set_line(LINE, true))?;
        return wait_for(DONE);
    }
    Ok(())
}

fn wait_for(told: u64) -> Result<(), &'static str> {
    let deadline = gic::now() + PATIENCE * ticks_per_second();
    while TOLD.load(Ordering::Acquire) < told {
        if gic::now() > deadline {
            return Err("the guest does not get on");
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// What the other core does.
fn other_core(_: usize) -> ! {
    let given = *GIVEN.lock();
    if let Some((vm, gic)) = given
        && gic::enable(&gic).is_ok()
    {
        gic::disable_private(&gic);
        // A failure shows as words that were not told.
        while tell(vm, &gic) {}
    }
    TOLD.store(DONE, Ordering::Release);
    cpu::retire()
}

/// Runs the guest until it leaves; says whether it goes on. The host has nothing else for this core.
fn tell(vm: Vm, gic: &Gic) -> bool {
    match vm.run(0, 0, true) {
        Ok(Exit::MmioWrite {
            ipa,
            size: 8,
            value,
        }) => {
            let place = (ipa.wrapping_sub(UART) / 8).wrapping_sub(1);
            let Some(word) = WORDS.get(place as usize) else {
                return false;
            };
            word.store(value, Ordering::Relaxed);
            TOLD.store(place + 1, Ordering::Release);
            // Before it goes on: nothing but its timer shall wake it then.
            place != 1 || vm.set_line(LINE, false).is_ok()
        }
        Ok(Exit::Interrupted) => {
            let _: Option<u32> = gic::take(gic);
            true
        }
        _ => false,
    }
}
