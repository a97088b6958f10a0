//! What exits cost, in ticks of the time-stamp counter; on Bochs a tick is an instruction.

use alloc::sync::Arc;

use memslot::policy::EptPolicy;
use memslot::slot::{SlotFlags, SlotKind};

use super::Scenario;
use super::kit::{Check, Driven, MIB, Op, ensure};
use crate::arch::serial::say;
use crate::arch::{Cpu, cpu::timestamp};

pub(super) const ALL: &[Scenario] = &[
    ("cost/exits", exits),
    ("cost/hypercalls", hypercalls),
    ("cost/faults", faults),
];

const TODAY: EptPolicy = EptPolicy::TODAY;

/// Fails beyond a generous bound, so that a lost fast path shows.
fn report(what: &str, ticks: u64, rounds: u64, most: u64) -> Check {
    let each = ticks / rounds;
    say!("ravelin: cost: {each} {what}");
    ensure!(each <= most, "{each} ticks, expected at most {most}");
    Ok(())
}

/// CPUID in a loop: from the guest through the handlers and back.
fn exits(cpu: &Cpu) -> Check {
    const ROUNDS: u64 = 1000;
    let mut g = Driven::new(cpu, TODAY)?;
    let start = timestamp();
    g.must(Op::Rounds, 0, ROUNDS)?;
    report("CPUID round trip", timestamp() - start, ROUNDS, 2000)
}

/// VMCALL: to the VM's owner and back, with everything that changes hands on the way.
fn hypercalls(cpu: &Cpu) -> Check {
    const ROUNDS: u64 = 1000;
    let mut g = Driven::new(cpu, TODAY)?;
    let start = timestamp();
    for _ in 0..ROUNDS {
        g.must(Op::Nothing, 0, 0)?;
    }
    report(
        "VMCALL round trip to the VM's owner",
        timestamp() - start,
        ROUNDS,
        4000,
    )
}

/// First writes to pages that are mapped one by one.
fn faults(cpu: &Cpu) -> Check {
    const PAGES: u64 = 512;
    let mut g = Driven::new(cpu, TODAY)?;
    let logged = SlotFlags::DIRTY_LOG;
    g.add(1, 16 * MIB, PAGES * 4096, logged, SlotKind::Ram)?;
    let before = g.vm.vm.exits.of("memory fault");
    let start = timestamp();
    g.must(Op::Touch, 16 * MIB, PAGES)?;
    let ticks = timestamp() - start;
    let vm = Arc::clone(&g.vm);
    let faults = vm.vm.exits.of("memory fault") - before;
    ensure!(faults == PAGES, "{faults} faults for {PAGES} pages");
    report("EPT-violation fault of a 4 KiB page", ticks, PAGES, 4000)
}
