//! What operations cost, in nanoseconds of the counter. Where the emulator's clock counts instructions (QEMU's
//! `-icount shift=0`), these are instructions.
//!
//! The loops are those that peers were measured with: 4,096 times the operation, with the loop's own cost in it.

use crate::arch::cpu::{self, psci};
use crate::arch::gic::{self, Quiet};
use crate::arch::{instruction, mem, mrs, msr};
use crate::machine::{Arguments, Report};
use core::sync::atomic::{AtomicU32, Ordering};

const ROUNDS: u64 = 4096;
const PAGE: u64 = 4096;
/// Distributor: GICD_IIDR, which nothing depends on.
const GICD_IIDR: u64 = 8;
/// The PL011's flags, which the host emulates.
const UART_FLAGS: u64 = 0x0900_0018;
const TIMER: u32 = 27;

/// All of them.
pub fn run(arguments: &Arguments, report: &mut Report) {
    measure(report, "empty", ROUNDS, || instruction!("nop"));
    measure(report, "hypercall", ROUNDS, || {
        cpu::hvc([psci::VERSION, 0, 0, 0]);
    });
    let iidr = gic::distributor(GICD_IIDR);
    measure(report, "mmio-el2", ROUNDS, || {
        mem::read32(iidr);
    });
    measure(report, "mmio-host", ROUNDS, || {
        mem::read32(UART_FLAGS);
    });
    measure(report, "sysreg", ROUNDS, || {
        mrs!("actlr_el1");
    });
    end_of_interrupt(report);
    if cpu::count() > 1 {
        ipi(report);
    }
    timer(report);
    let rounds = arguments.number("pages=").unwrap_or(ROUNDS);
    let mut page = mem::free_memory() + 0x40_0000;
    let first = page;
    measure(report, "first-touch", rounds, || {
        mem::write64(page, 1);
        page += PAGE;
    });
    page = first;
    measure(report, "second-touch", rounds, || {
        mem::write64(page, 1);
        page += PAGE;
    });
    report.check("figures were taken", true);
}

/// Hundredths are not shown: the figure is rounded to the nearest.
fn measure(report: &mut Report, name: &str, rounds: u64, mut operation: impl FnMut()) {
    let start = cpu::ticks();
    for _ in 0..rounds {
        operation();
    }
    show(report, name, cpu::ticks() - start, rounds);
}

fn show(report: &mut Report, name: &str, ticks: u64, rounds: u64) {
    let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(cpu::frequency());
    let rounds = u128::from(rounds);
    report.bench(name, ((nanoseconds + rounds / 2) / rounds) as u64);
}

/// Only the EOI is timed, of an SGI that has been sent and acknowledged before.
fn end_of_interrupt(report: &mut Report) {
    let mut ticks = 0;
    for _ in 0..ROUNDS {
        gic::send(1, 1);
        let mut taken = gic::acknowledge();
        while taken.0 >= gic::SPECIAL {
            taken = gic::acknowledge();
        }
        let start = cpu::ticks();
        gic::end(taken.1);
        ticks += cpu::ticks() - start;
    }
    show(report, "eoi", ticks, ROUNDS);
}

static IPIS: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicU32 = AtomicU32::new(0);

/// From sending until the other CPU's handler has said that it is there.
fn ipi(report: &mut Report) {
    if cpu::start(1, answer_ipis) != 0 || !cpu::wait(1_000_000, || IPIS.load(Ordering::SeqCst) == 1)
    {
        return report.check("the other CPU is ready", false);
    }
    let start = cpu::ticks();
    for round in 0..ROUNDS as u32 {
        gic::send(2, 2);
        while IPIS.load(Ordering::Acquire) != round + 2 {
            instruction!("yield");
        }
    }
    show(report, "ipi", cpu::ticks() - start, ROUNDS);
    STOP.store(1, Ordering::SeqCst);
    gic::send(2, 2);
    report.check("the other CPU turns off", cpu::join(1));
}

/// Runs with interrupts masked and polls the interface: what is measured is the way, not a handler.
fn answer_ipis(_: usize) {
    gic::enable_cpu();
    IPIS.store(1, Ordering::SeqCst);
    while STOP.load(Ordering::Relaxed) == 0 {
        let (intid, value) = gic::acknowledge();
        if intid < gic::SPECIAL {
            IPIS.fetch_add(1, Ordering::Release);
            gic::end(value);
        } else {
            instruction!("yield");
        }
    }
}

/// From the moment at which the virtual timer is due until its handler has run, the CPU awake.
fn timer(report: &mut Report) {
    gic::set_quiet(Quiet::VirtualTimer);
    gic::enable(TIMER);
    gic::forget();
    let mut late = 0;
    for round in 1..=256 {
        let due = cpu::ticks() + cpu::micros(20).max(1);
        msr!("cntv_cval_el0", due);
        msr!("cntv_ctl_el0", 1);
        cpu::unmask();
        while gic::received(TIMER) < round {
            instruction!("nop");
        }
        late += cpu::ticks() - due;
        cpu::mask();
    }
    show(report, "timer", late, 256);
    gic::disable(TIMER);
    gic::set_quiet(Quiet::Nothing);
}
