//! One vCPU on two cores at once: it runs on one, and the other is told [`ErrorCode::Busy`].
//!
//! The guest counts its exits, in a register: a run that starts from what another run has not yet
//! stored would tell a number twice, and one whose registers were lost would tell one again or leave
//! one out. On a machine with one core nothing is tried.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use abi::{ErrorCode, Exit};
use vmm::platform::{RAM, UART};

use super::guests::Memory;
use super::kit::{code, end, expect};
use super::remote;
use crate::arch::{cpu, gic, hostile, mem, ticks_per_second};
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::Vm;
use board::{AddrRange, PAGE_SIZE};

/// Where the guest says that it runs; a cache line behind, the host lets it go.
const WORDS: u64 = 0x4000;
const LET_GO: u64 = 64;
/// Exits that are counted at least, and at most.
const EXITS: u64 = 500;
const MOST: u64 = 64 * NUMBERS as u64;
const NUMBERS: usize = 512;
/// How often a core tries while the vCPU surely runs elsewhere.
const TRIES: u32 = 200;
/// Seconds that the other core may take, on an emulator that has little time.
const PATIENCE: u64 = 20;

static HANDLE: AtomicU64 = AtomicU64::new(0);
/// The other core's runs that came back before the guest was let go.
static LEFT: AtomicU32 = AtomicU32::new(0);
/// Nobody shall run the guest any more.
static STOP: AtomicBool = AtomicBool::new(false);
/// What each core was told.
static TOLD: [Told; 2] = [const { Told::new() }; 2];
/// A bit for each number that the guest has told.
static SEEN: [AtomicU64; NUMBERS] = [const { AtomicU64::new(0) }; NUMBERS];

struct Told {
    ran: AtomicU64,
    busy: AtomicU64,
    /// Numbers that were told before, other exits and other codes.
    wrong: AtomicU64,
}

impl Told {
    const fn new() -> Self {
        Self {
            ran: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
        }
    }
}

pub(super) fn run(machine: &Machine, memory: &Memory, report: &mut Report) {
    let result = on_two_cores(machine, memory);
    report.check("a_vcpu_runs_on_one_core_at_a_time", result);
}

fn on_two_cores(machine: &Machine, memory: &Memory) -> Result<(), &'static str> {
    let Some((number, mpidr)) = machine.other_cores().next() else {
        return Ok(());
    };
    let words_page = AddrRange::with_size(memory.ram.start() + WORDS, PAGE_SIZE).ok_or("wraps")?;
    mem::bytes_mut(words_page).fill(0);
    let vm = remote::with_code(memory, hostile::counter(), false)?;
    HANDLE.store(vm.handle(), Ordering::Relaxed);
    cpu::start(number, mpidr, machine.settings, other_core)?;
    let result = while_it_runs(vm, words_page).and_then(|()| in_turns(vm));
    let_go(words_page);
    STOP.store(true, Ordering::Release);
    cpu::wait_for_off(mpidr)?;
    end(vm)?;
    result.and_then(|()| verdict())
}

/// The other core is in the guest: this one gets neither into it, nor can it end or empty the VM.
fn while_it_runs(vm: Vm, page: AddrRange) -> Result<(), &'static str> {
    let deadline = gic::now() + PATIENCE * ticks_per_second();
    loop {
        mem::clean_invalidate_to_poc(page);
        if mem::bytes(page)[0] != 0 {
            break;
        }
        expect(gic::now() < deadline, "the guest does not start")?;
    }
    let left = LEFT.load(Ordering::Acquire);
    let mut refused = 0;
    for _ in 0..TRIES {
        let codes = [
            vm.run(0, !0, false).err(),
            vm.destroy_step().err(),
            vm.reset_step().err(),
        ];
        let busy = |refused: &Option<crate::vm::Refused>| {
            refused.is_some_and(|refused| refused.code == ErrorCode::Busy)
        };
        refused += u32::from(codes.iter().all(busy));
    }
    let started = code(vm.start_vcpu(0, RAM, 0));
    // Else the other core was out of the guest for a moment.
    let inside = LEFT.load(Ordering::Acquire) == left;
    let_go(page);
    expect(inside, "the guest was left without reason")?;
    expect(
        started == Some(ErrorCode::Exists),
        "a vCPU that is on was turned on",
    )?;
    expect(
        refused == TRIES,
        "a vCPU that runs was run once more, or lost",
    )
}

fn let_go(page: AddrRange) {
    mem::bytes_mut(page)[LET_GO as usize] = 1;
    mem::clean_invalidate_to_poc(page);
}

/// Both run it, each as often as it gets it, until both outcomes have been seen by both.
fn in_turns(vm: Vm) -> Result<(), &'static str> {
    let deadline = gic::now() + PATIENCE * ticks_per_second();
    loop {
        step(vm, &TOLD[0]);
        let read = |value: fn(&Told) -> &AtomicU64| TOLD.each_ref().map(|t| count(value(t)));
        let (ran, busy) = (read(|told| &told.ran), read(|told| &told.busy));
        let total: u64 = ran.iter().sum();
        let both = ran.iter().all(|n| *n != 0) && busy.iter().sum::<u64>() != 0;
        if (total >= EXITS && both) || total >= MOST - 2 || gic::now() > deadline {
            return Ok(());
        }
    }
}

fn count(value: &AtomicU64) -> u64 {
    value.load(Ordering::Relaxed)
}

/// One try; what it gave is counted.
fn step(vm: Vm, told: &Told) {
    let one = match vm.run(0, !0, false) {
        Ok(Exit::Interrupted) => return,
        Ok(Exit::MmioWrite {
            ipa: UART,
            size: 8,
            value,
        }) if is_new(value) => &told.ran,
        Err(refused) if refused.code == ErrorCode::Busy => &told.busy,
        _ => &told.wrong,
    };
    one.fetch_add(1, Ordering::Relaxed);
    if core::ptr::eq(one, &raw const told.ran) && !count(one).is_multiple_of(2) {
        let_other_try(told);
    }
}

/// Waits until the other core has tried, but not for long.
fn let_other_try(told: &Told) {
    let others = || {
        let others = TOLD.iter().filter(|other| !core::ptr::eq(*other, told));
        others.map(|o| count(&o.ran) + count(&o.busy)).sum::<u64>()
    };
    let (before, deadline) = (others(), gic::now() + ticks_per_second() / 100);
    while others() == before && gic::now() < deadline && !STOP.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
}

/// Notes a number; whether it is the first time.
fn is_new(value: u64) -> bool {
    let bit = 1 << (value % 64);
    let word = usize::try_from(value / 64).ok().and_then(|n| SEEN.get(n));
    word.is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
}

fn verdict() -> Result<(), &'static str> {
    let sum = |value: fn(&Told) -> &AtomicU64| TOLD.iter().map(|t| count(value(t))).sum::<u64>();
    let (ran, busy) = (sum(|told| &told.ran), sum(|told| &told.busy));
    line(format_args!(
        "  ran {} and {} times, busy {} and {} times",
        count(&TOLD[0].ran),
        count(&TOLD[1].ran),
        count(&TOLD[0].busy),
        count(&TOLD[1].busy)
    ));
    expect(
        sum(|told| &told.wrong) == 0,
        "a number was told twice, or something else came back",
    )?;
    expect(
        TOLD.iter().all(|told| count(&told.ran) != 0),
        "one core never got the vCPU",
    )?;
    expect(busy != 0, "the cores never met")?;
    // The guest counts from 1.
    let without_gap = (1..=ran).all(|n| count(&SEEN[n as usize / 64]) >> (n % 64) & 1 != 0);
    expect(without_gap, "the guest has lost a number")
}

/// What the other core does: enters the guest first, and shares it when it is let go.
fn other_core(_: usize) -> ! {
    let vm = Vm::from_handle(HANDLE.load(Ordering::Relaxed));
    while !STOP.load(Ordering::Acquire) {
        step(vm, &TOLD[1]);
        LEFT.fetch_add(1, Ordering::Release);
    }
    cpu::retire()
}
