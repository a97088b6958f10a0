//! PSCI: CPUs on and off, suspend, reset; and guests that misbehave.

use crate::arch::cpu::{self, psci};
use crate::arch::{gic, instruction, mem, msr};
use crate::console;
use crate::machine::{Arguments, Report};
use crate::tree::Tree;
use core::sync::atomic::{AtomicU64, Ordering};

/// Turns of a CPU on and off.
const TURNS: u64 = 50;
static RUNS: AtomicU64 = AtomicU64::new(0);
/// What a CPU sends itself in [`off_in_handler`], one SGI each time.
const SGIS: [u32; 2] = [12, 13];

/// Calls that do not end the machine.
pub fn run(arguments: &Arguments, report: &mut Report) {
    identification(arguments, report);
    refusals(arguments, report);
    let cpus = cpu::count();
    for cpu in 1..cpus {
        RUNS.store(0, Ordering::SeqCst);
        let turns = (0..TURNS).take_while(|_| turn(cpu)).count() as u64;
        report.expect(
            "turns on and off",
            (turns, RUNS.load(Ordering::SeqCst)),
            (TURNS, TURNS),
        );
    }
    report.expect("AFFINITY_INFO of itself", psci::affinity_info(0), 0);
    let own = psci::call(psci::CPU_ON, 0, cpu::entry_point(), 0);
    report.expect("CPU_ON of itself", own, psci::ALREADY_ON);
    if cpus > 1 && gic::is_v3() {
        off_in_handler(report);
    }
    standby(report);
}

/// A CPU that turns itself off while it runs an interrupt comes back running none: its interface was
/// reset with it (IHI 0069H, ICC_AP1R<n>_EL1). A GICv2's interface is not part of the core.
fn off_in_handler(report: &mut Report) {
    RUNS.store(0, Ordering::SeqCst);
    for sgi in SGIS {
        let taken = cpu::start(1, take_own_sgi) == 0 && cpu::join(1);
        report.check("turns off with an interrupt running", taken);
        report.expect("takes its SGI", RUNS.load(Ordering::SeqCst), sgi.into());
    }
}

/// Sends itself the next SGI, takes it, and never says that it is done with it.
fn take_own_sgi(number: usize) {
    let next = if RUNS.load(Ordering::SeqCst) == 0 {
        SGIS[0]
    } else {
        SGIS[1]
    };
    gic::enable_cpu();
    gic::send(next, 1 << number);
    let end = cpu::ticks() + cpu::micros(1_000_000);
    let mut taken = gic::acknowledge().0;
    while taken >= gic::SPECIAL && cpu::ticks() < end {
        taken = gic::acknowledge().0;
    }
    RUNS.store(taken.into(), Ordering::SeqCst);
    gic::clear_active(next);
}

fn turn(cpu: usize) -> bool {
    cpu::start(cpu, |_| {
        RUNS.fetch_add(1, Ordering::SeqCst);
    }) == 0
        && cpu::join(cpu)
}

fn identification(arguments: &Arguments, report: &mut Report) {
    let feature = |id| psci::call(psci::FEATURES, id, 0, 0);
    for id in [
        psci::VERSION,
        psci::CPU_OFF,
        psci::CPU_ON,
        psci::AFFINITY_INFO,
        psci::SYSTEM_OFF,
        psci::SYSTEM_RESET,
    ] {
        report.check("PSCI_FEATURES of what must be there", feature(id) >= 0);
    }
    report.expect(
        "PSCI_FEATURES of nothing",
        feature(0x8400_001e),
        psci::NOT_SUPPORTED,
    );
    report.expect(
        "MIGRATE_INFO_TYPE",
        psci::call(psci::MIGRATE_INFO_TYPE, 0, 0, 0),
        2,
    );
    if arguments.is_guest() {
        report.expect(
            "PSCI_VERSION is 1.1",
            psci::call(psci::VERSION, 0, 0, 0),
            0x1_0001,
        );
        report.expect("SYSTEM_RESET2 is there", feature(psci::SYSTEM_RESET2), 0);
        report.expect("SMCCC is 1.2", psci::call(0x8000_0000, 0, 0, 0), 0x1_0002);
        let uid = cpu::hvc([0x8600_ff01, 0, 0, 0]);
        report.expect(
            "vendor is KVM",
            uid,
            [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d],
        );
    }
}

fn refusals(arguments: &Arguments, report: &mut Report) {
    let on = |target, entry| psci::call(psci::CPU_ON, target, entry, 0);
    report.expect(
        "CPU_ON of nobody",
        on(0x99, cpu::entry_point()),
        psci::INVALID_PARAMETERS,
    );
    report.expect(
        "CPU_ON in another cluster",
        on(0xff00, cpu::entry_point()),
        psci::INVALID_PARAMETERS,
    );
    report.expect(
        "AFFINITY_INFO of nobody",
        psci::affinity_info(0x99),
        psci::INVALID_PARAMETERS,
    );
    report.expect(
        "unknown function",
        psci::call(0x8400_001d, 0, 0, 0),
        psci::NOT_SUPPORTED,
    );
    if arguments.is_guest() {
        if cpu::count() > 1 {
            report.expect(
                "CPU_ON at a device",
                on(1, 0x0900_0000),
                psci::INVALID_ADDRESS,
            );
        }
        report.expect(
            "reserved power state",
            psci::call(psci::CPU_SUSPEND, 1 << 20, 0, 0),
            psci::INVALID_PARAMETERS,
        );
        report.expect(
            "host's call",
            psci::call(0xc600_0110, 0, 0, 0),
            psci::NOT_SUPPORTED,
        );
        for strange in [u64::MAX, 0, 1 << 32 | psci::VERSION] {
            report.expect(
                "no call at all",
                psci::call(strange, 0, 0, 0),
                psci::NOT_SUPPORTED,
            );
        }
        let reset = psci::call(psci::SYSTEM_RESET2, 0x8000_0001, 0, 0);
        report.expect(
            "SYSTEM_RESET2 of a kind that nobody has",
            reset,
            psci::INVALID_PARAMETERS,
        );
    }
}

/// CPU_SUSPEND without loss of context, ended by the virtual timer although interrupts are masked.
fn standby(report: &mut Report) {
    gic::enable(27);
    let due = cpu::ticks() + cpu::micros(5_000);
    msr!("cntv_cval_el0", due);
    msr!("cntv_ctl_el0", 1);
    instruction!("isb");
    let answer = psci::call(psci::CPU_SUSPEND, 0, 0, 0);
    report.expect("standby succeeds", answer, 0);
    let woken = cpu::wait(2_000_000, || cpu::ticks() >= due);
    report.check("time has passed", woken);
    msr!("cntv_ctl_el0", 0);
    gic::disable(27);
}

/// Where [`reset_loop`] counts: far behind everything, in memory that a reset keeps.
const COUNTER: u64 = 0x4380_0000;
const MAGIC: u64 = 0x7265_7365_7400_0000;

/// Resets the machine `resets=` times (default 5), every second time by SYSTEM_RESET2 where there is one.
pub fn reset_loop(arguments: &Arguments, _: Option<Tree>, report: &mut Report) {
    let resets = arguments.number("resets=").unwrap_or(5);
    let stored = mem::read64(COUNTER);
    let boots = if stored & !0xff == MAGIC {
        stored & 0xff
    } else {
        0
    };
    console::line(format_args!("boot {boots}"));
    if boots < resets {
        mem::write64(COUNTER, MAGIC | (boots + 1));
        mem::clean_invalidate(COUNTER);
        mem::synchronise();
        let warm = boots % 2 == 1 && psci::call(psci::FEATURES, psci::SYSTEM_RESET2, 0, 0) == 0;
        let answer = match warm {
            true => psci::call(psci::SYSTEM_RESET2, 0, 0, 0),
            false => psci::call(psci::SYSTEM_RESET, 0, 0, 0),
        };
        report.expect("reset does not return", answer, i64::MIN);
    }
    mem::write64(COUNTER, 0);
    report.expect("boots", boots, resets);
}

/// Never gives the CPU back, interrupts masked: others must run all the same.
pub fn spin(_: &Arguments, _: &mut Report) {
    console::line(format_args!("spinning"));
    loop {
        instruction!("nop");
    }
}

/// The same with the MMU off.
pub fn spin_uncached(arguments: &Arguments, _: Option<Tree>, report: &mut Report) {
    spin(arguments, report);
}

/// Traps as fast as it can, for `seconds=` (default 2).
pub fn flood(arguments: &Arguments, report: &mut Report) {
    let end = cpu::ticks() + cpu::frequency() * arguments.number("seconds=").unwrap_or(2);
    let mut calls = 0u64;
    while cpu::ticks() < end {
        calls += u64::from(psci::call(0x8400_001d, 0, 0, 0) == psci::NOT_SUPPORTED);
    }
    console::line(format_args!("{calls} calls"));
    report.check("calls were answered", calls > 1000);
}
