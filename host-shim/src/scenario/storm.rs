//! Every core attacks at once: calls about VMs that others build, run and destroy meanwhile, accesses to
//! memory that changes hands, guests that share and give away what the host takes.
//!
//! Of most attacks nothing is expected but an answer. But no access ever reaches EL2's memory, and none finds
//! what a protected guest keeps to itself. And each core now and then does something with a VM of its own, of
//! which every answer is known ([`mod@own_turn`]). In the end EL2 must be there, all memory must come back, and
//! a protected guest must work as if nothing had been.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use abi::{Call, DonationKind, Exit, VmConfig};
use board::{AddrRange, Gic, PAGE_SIZE};
use smccc::Hvc;
use smccc::psci::{self, AffinityState, LowestAffinityLevel};
use spin::Once;
use vmm::platform::RAM;

use super::guests::Memory;
use super::kit::{RAM_SLOT, config, end, expect, words};
use super::own_turn::{self, Turn};
use super::remote::{self, CODE_PAGES};
use crate::arch::{cpu, fault, gic, guest, ticks_per_second};
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::{Vm, call};

/// Attacks of each core, and when there is time: that many on up to four cores, less on more, so that eight
/// make no more of them than four. What a call costs an emulator grows with the cores that it must stop.
const ATTACKS: u32 = 2500;
const SOAK: u32 = 200_000;
const FEW_CORES: u32 = 4;
/// Attacks between two turns with a VM of one's own.
const OWN_EVERY: u32 = 25;
/// VMs that are built, attacked and destroyed.
const VMS: u64 = 4;
/// Pages of one VM's state, and of its RAM.
const STATE_PAGES: u64 = 32;
const RAM_PAGES: u64 = 64;
/// The first of the VMs are always protected; their guests share no page from this one on, and write words there
/// whose upper half is this.
const ALWAYS_PROTECTED: u64 = 2;
const PRIVATE: u64 = 32;
const SECRET: u64 = 0x5ec2_e7de;
/// That of words that other guests write.
const NO_SECRET: u64 = 0x7_0b11;
/// Of the RAM, the first page of what single cores have for themselves: others reach four pages behind the VMs'.
const OWN: u64 = VMS * RAM_PAGES + 8;
/// Cores that have some; more than that attack only.
const OWNERS: u64 = (512 - OWN) / own_turn::PAGES;
/// Seconds that the other cores may take longer than the first.
const PATIENCE: u64 = 120;

/// What the cores share.
#[derive(Debug)]
struct Storm {
    gic: Gic,
    ram: AddrRange,
    state: AddrRange,
    el2: u64,
    /// The handles that the storm had at first.
    first: u64,
    ready: AtomicU32,
    cores: u32,
    attacks: u32,
    calls: AtomicU64,
    calls_refused: AtomicU64,
    accesses: AtomicU64,
    accesses_refused: AtomicU64,
    sealed: AtomicU64,
    /// Calls of guests about their memory that did something.
    moved: AtomicU64,
    /// Accesses that found what they must not, or reached EL2.
    breaches: AtomicU64,
    /// Turns of cores with their own VMs, with all answers right.
    own_turns: AtomicU64,
    /// Where one was wrong: its step, and the answer.
    wrong_step: AtomicU64,
    wrong_answer: AtomicU64,
}

static STORM: Once<Storm> = Once::new();

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let result = storm(machine, ATTACKS);
    report.check("attacks_from_every_core_change_nothing", result);
}

/// The same for as long as somebody who has the time would want it.
pub(super) fn soak(machine: &Machine, report: &mut Report) {
    report.check("attacks_without_end_change_nothing", storm(machine, SOAK));
}

fn storm(machine: &Machine, attacks: u32) -> Result<(), &'static str> {
    let memory = Memory::find(machine).ok_or("there is no free memory")?;
    let gic = machine
        .board
        .gic
        .ok_or("no interrupt controller that is known")?;
    let cores = machine.other_cores().count() as u32 + 1;
    let storm = STORM.call_once(|| Storm {
        gic,
        ram: memory.ram,
        state: memory.state,
        el2: machine.el2.map_or(0, AddrRange::start),
        first: 0x1000,
        ready: AtomicU32::new(0),
        cores,
        attacks: attacks * FEW_CORES / cores.max(FEW_CORES),
        calls: AtomicU64::new(0),
        calls_refused: AtomicU64::new(0),
        accesses: AtomicU64::new(0),
        accesses_refused: AtomicU64::new(0),
        sealed: AtomicU64::new(0),
        moved: AtomicU64::new(0),
        breaches: AtomicU64::new(0),
        own_turns: AtomicU64::new(0),
        wrong_step: AtomicU64::new(0),
        wrong_answer: AtomicU64::new(0),
    });
    for (number, mpidr) in machine.other_cores() {
        cpu::start(number, mpidr, machine.settings, secondary)?;
    }
    attack(storm, 1);
    let deadline = gic::now() + PATIENCE * ticks_per_second();
    let all_off = || {
        machine.other_cores().all(|(_, mpidr)| {
            let info = psci::affinity_info::<Hvc>(mpidr, LowestAffinityLevel::All);
            info == Ok(AffinityState::Off)
        })
    };
    while !all_off() {
        expect(gic::now() < deadline, "a core does not come back")?;
        core::hint::spin_loop();
    }
    aftermath(storm, &memory)
}

fn secondary(number: usize) -> ! {
    if let Some(storm) = STORM.get() {
        attack(storm, number as u64 + 2);
    }
    // Only fails while this core is the last.
    let _ = psci::cpu_off::<Hvc>();
    crate::arch::halt()
}

/// What must be as before.
fn aftermath(storm: &Storm, memory: &Memory) -> Result<(), &'static str> {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    line(format_args!(
        "  {} cores: {} calls ({} refused), {} accesses ({} refused), {} protected VMs sealed, {} calls of guests, {} turns with known answers",
        storm.cores,
        read(&storm.calls),
        read(&storm.calls_refused),
        read(&storm.accesses),
        read(&storm.accesses_refused),
        read(&storm.sealed),
        read(&storm.moved),
        read(&storm.own_turns)
    ));
    if read(&storm.wrong_step) != 0 {
        line(format_args!(
            "  step {} of a turn was answered {:#x}",
            read(&storm.wrong_step),
            read(&storm.wrong_answer)
        ));
    }
    for handle in storm.first..storm.first + 0xff {
        let vm = Vm::from_handle(handle);
        if vm.destroy().is_ok() {
            while words(vm.reclaim())?.is_some() {}
        }
    }
    for range in [storm.ram, storm.state] {
        for page in (range.start()..range.end()).step_by(4096) {
            expect(fault::try_store(page, 0).is_ok(), "memory is lost")?;
        }
    }
    expect(
        read(&storm.sealed) != 0,
        "no protected VM was ever complete",
    )?;
    expect(read(&storm.accesses_refused) != 0, "no access was refused")?;
    expect(read(&storm.moved) != 0, "no guest moved a page")?;
    expect(
        read(&storm.breaches) == 0,
        "the host reached EL2, or found a secret",
    )?;
    expect(
        read(&storm.wrong_step) == 0,
        "a call about a core's own VM had another answer than it must have",
    )?;
    expect(
        read(&storm.own_turns) != 0,
        "no core got to the end of its own VM",
    )?;
    let mut guest = remote::protected(memory)?;
    let page = RAM + CODE_PAGES * PAGE_SIZE;
    guest.store(page, 0x600d)?;
    let kept = guest.load(page)?;
    guest.off()?;
    end(guest.vm)?;
    expect(kept == 0x600d, "a protected guest does not work any more")
}

/// A linear congruential generator (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn attack(storm: &Storm, seed: u64) {
    if gic::enable(&storm.gic).is_err() {
        return;
    }
    storm.ready.fetch_add(1, Ordering::AcqRel);
    while storm.ready.load(Ordering::Acquire) < storm.cores {
        core::hint::spin_loop();
    }
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    for number in 0..storm.attacks {
        if number % OWN_EVERY == 0 {
            own_turn(storm, seed - 1);
        }
        match random.below(10) {
            0 => build(storm, &mut random),
            1..4 => touch(storm, &mut random),
            4..7 => guest_runs(storm, &mut random),
            _ => any_call(storm, &mut random),
        }
    }
    gic::stop_timer();
    while gic::take(&storm.gic).is_some() {}
}

/// What this core does with memory that no other one touches.
fn own_turn(storm: &Storm, core: u64) {
    if core >= OWNERS {
        return;
    }
    let pages = storm.ram.start() + (OWN + core * own_turn::PAGES) * PAGE_SIZE;
    match own_turn::turn(&storm.gic, pages, storm.first + VMS) {
        Turn::Done => drop(storm.own_turns.fetch_add(1, Ordering::Relaxed)),
        Turn::CutShort => {}
        Turn::Wrong(step, answer) => {
            storm.wrong_answer.store(answer, Ordering::Relaxed);
            storm.wrong_step.store(step, Ordering::Relaxed);
        }
    }
}

/// Makes a call and counts it.
fn counted(storm: &Storm, id: Call, args: [u64; 6]) -> bool {
    let refused = call(id, args).is_err();
    storm.calls.fetch_add(1, Ordering::Relaxed);
    storm
        .calls_refused
        .fetch_add(u64::from(refused), Ordering::Relaxed);
    !refused
}

/// The pieces of memory of VM `n`.
fn pieces(storm: &Storm, n: u64) -> (u64, u64) {
    let state = storm.state.start() + n * STATE_PAGES * PAGE_SIZE;
    (state, storm.ram.start() + n * RAM_PAGES * PAGE_SIZE)
}

/// All that it takes to make a VM, while others may take every step of it away.
fn build(storm: &Storm, random: &mut Random) {
    let n = random.below(VMS);
    let handle = storm.first + n;
    let (state, ram) = pieces(storm, n);
    let protected = n < ALWAYS_PROTECTED || random.below(4) != 0;
    let config = VmConfig {
        vcpus: 2,
        ..config(protected)
    };
    let word = RAM_SLOT;
    for (place, bytes) in (ram..).step_by(8).zip(guest::storm().chunks(8)) {
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(bytes) {
            *to = *from;
        }
        let _ = fault::try_store(place, u64::from_ne_bytes(word));
    }
    let rest = RAM_PAGES - CODE_PAGES;
    let zeros = RAM + CODE_PAGES * PAGE_SIZE;
    reserve(storm);
    counted(
        storm,
        Call::VmCreate,
        [handle, state, STATE_PAGES, config.bits(), 0, 0],
    );
    counted(
        storm,
        Call::SlotCreate,
        [handle, word.bits(), RAM, RAM_PAGES, ram, 0],
    );
    counted(
        storm,
        Call::VcpuCreate,
        [handle, random.below(2), 0, 0, 0, 0],
    );
    let contents = DonationKind::Contents as u64;
    counted(
        storm,
        Call::MemoryDonate,
        [handle, RAM, CODE_PAGES, contents, 0, 0],
    );
    let part = random.below(rest) + 1;
    counted(storm, Call::MemoryDonate, [handle, zeros, part, 0, 0, 0]);
    counted(storm, Call::VcpuCreate, [handle, 0, 0, 0, 0, 0]);
    if protected {
        let sealed = counted(storm, Call::VmSeal, [handle, RAM, 0, 0, 0, 0]);
        storm.sealed.fetch_add(u64::from(sealed), Ordering::Relaxed);
    } else {
        counted(storm, Call::VcpuStart, [handle, 0, RAM, 0, 0, 0]);
    }
}

/// Reserves a handle; one that nobody attacks is given back, or there would soon be none.
fn reserve(storm: &Storm) {
    storm.calls.fetch_add(1, Ordering::Relaxed);
    match Vm::reserve() {
        Ok(vm) if vm.handle() >= storm.first + VMS => {
            counted(storm, Call::VmReclaim, [vm.handle(), 0, 0, 0, 0, 0]);
        }
        Ok(_) => {}
        Err(_) => drop(storm.calls_refused.fetch_add(1, Ordering::Relaxed)),
    }
}

/// Memory that is now the host's, now a guest's, now EL2's.
fn touch(storm: &Storm, random: &mut Random) {
    let (state, ram) = pieces(storm, random.below(VMS));
    let (is_el2, page) = match random.below(8) {
        0 => (true, storm.el2 + random.below(256) * PAGE_SIZE),
        1 | 2 => (false, state + random.below(STATE_PAGES) * PAGE_SIZE),
        _ => (false, ram + random.below(RAM_PAGES) * PAGE_SIZE),
    };
    // A guest writes the first word of a page.
    let address = page + random.below(2) * random.below(512) * 8;
    let result = match random.below(4) {
        0 | 1 => fault::try_load(address),
        2 if is_el2 => fault::try_fetch(address),
        _ => fault::try_store(address, random.below(u64::MAX)).map(|_| 0),
    };
    let breach = match result {
        Ok(found) => is_el2 || found >> 32 == SECRET,
        Err(_) => false,
    };
    let refused = u64::from(result.is_err());
    storm.accesses.fetch_add(1, Ordering::Relaxed);
    storm.accesses_refused.fetch_add(refused, Ordering::Relaxed);
    storm.breaches.fetch_add(breach.into(), Ordering::Relaxed);
}

/// Runs a vCPU; if its guest asks, it is told to do something with its memory, which it gets if it lacks it.
fn guest_runs(storm: &Storm, random: &mut Random) {
    let n = random.below(VMS);
    let handle = storm.first + n;
    let number = CODE_PAGES + random.below(RAM_PAGES - CODE_PAGES);
    let what = match random.below(4) {
        // Two pages at most.
        1 if n < ALWAYS_PROTECTED && number + 1 >= PRIVATE => 0,
        other => other,
    };
    let upper = if n < ALWAYS_PROTECTED && number >= PRIVATE {
        SECRET
    } else {
        NO_SECRET
    };
    let command = upper << 32 | random.below(3) << 16 | number << 8 | what;
    for _ in 0..6 {
        // A guest of rubble may never end its run: the host's timer does.
        gic::set_timer(gic::now() + 2000);
        let answer = call(
            Call::VcpuRun,
            [handle, random.below(8) / 7, command, 0, 0, 0],
        );
        storm.calls.fetch_add(1, Ordering::Relaxed);
        let refused = u64::from(answer.is_err());
        storm.calls_refused.fetch_add(refused, Ordering::Relaxed);
        while gic::take(&storm.gic).is_some() {}
        match answer.ok().and_then(Exit::from_registers) {
            Some(Exit::MmioWrite { value: 0, .. }) => {
                storm.moved.fetch_add(1, Ordering::Relaxed);
            }
            Some(Exit::MemoryMissing { ipa }) => {
                counted(storm, Call::MemoryDonate, [handle, ipa, 1, 0, 0, 0]);
            }
            _ => {}
        }
    }
}

/// One call, most of its arguments possible.
fn any_call(storm: &Storm, random: &mut Random) {
    let n = random.below(VMS);
    let handle = storm.first + n;
    let (state, ram) = pieces(storm, random.below(VMS));
    let ipa = RAM + random.below(RAM_PAGES) * PAGE_SIZE;
    let page = ram + random.below(RAM_PAGES) * PAGE_SIZE;
    let pages = 1 + random.below(4);
    let (slot, number) = (random.below(2), random.below(RAM_PAGES));
    match random.below(16) {
        0 => counted(storm, Call::VmDestroy, [handle, 0, 0, 0, 0, 0]),
        1 | 2 => counted(storm, Call::VmReclaim, [handle, 0, 0, 0, 0, 0]),
        3 => counted(storm, Call::MemoryReclaim, [page, 0, 0, 0, 0, 0]),
        4 => counted(
            storm,
            Call::MemoryDonate,
            [handle, ipa, pages, random.below(2), 0, 0],
        ),
        5 => counted(storm, Call::VmTopUp, [handle, page, pages, 0, 0, 0]),
        6 => counted(storm, Call::VmTopUp, [handle, state, pages, 0, 0, 0]),
        7 => counted(
            storm,
            Call::SlotCreate,
            [handle, 1, RAM + (1 << 30), pages, page, 0],
        ),
        8 => counted(
            storm,
            Call::SlotLock,
            [handle, 1, random.below(2), 3 | 1 << 8, 0, 0],
        ),
        9 => counted(
            storm,
            Call::SlotDelete,
            [handle, random.below(2), 0, 0, 0, 0],
        ),
        10 => counted(storm, Call::VmReset, [handle, 0, 0, 0, 0, 0]),
        11 => counted(storm, Call::SlotMove, [handle, slot, ipa, 0, 0, 0]),
        12 => counted(
            storm,
            Call::SlotFlags,
            [handle, random.below(2), 0, 0, 0, 0],
        ),
        13 => {
            let call = [Call::SlotUnshare, Call::SlotShare][random.below(2) as usize];
            counted(storm, call, [handle, slot, number, pages, 0, 0])
        }
        14 => {
            let call = [Call::SlotYoung, Call::SlotRelax][random.below(2) as usize];
            let last = if call == Call::SlotYoung { 1 } else { 0 };
            counted(storm, call, [handle, slot, number, pages, last, 0])
        }
        _ => counted(storm, Call::VmMapping, [handle, ipa, 0, 0, 0, 0]),
    };
}
