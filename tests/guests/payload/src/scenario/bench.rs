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
/// Where our host answers questions, in the VMs of its own scenarios.
const MAILBOX: u64 = 0x0b00_0000;
/// What one table of level 3 maps.
const BLOCK: u64 = 2 << 20;

/// What the command line asks for.
struct Bench<'a> {
    report: &'a mut Report,
    /// `rounds=`: few of them, for a look at each instruction.
    rounds: u64,
    /// `only=`: the one operation to measure.
    only: Option<&'a str>,
}

/// All of them.
pub fn run(arguments: &Arguments, report: &mut Report) {
    let mut bench = Bench {
        report,
        rounds: arguments.number("rounds=").unwrap_or(ROUNDS).max(1),
        only: arguments.value("only="),
    };
    bench.measure("empty", || instruction!("nop"));
    bench.measure("hypercall", || {
        cpu::hvc([psci::VERSION, 0, 0, 0]);
    });
    let iidr = gic::distributor(GICD_IIDR);
    bench.measure("mmio-el2", || {
        mem::read32(iidr);
    });
    bench.measure("mmio-host", || {
        mem::read32(UART_FLAGS);
    });
    bench.measure("sysreg", || {
        mrs!("actlr_el1");
    });
    bench.end_of_interrupt();
    bench.ipi();
    bench.timer();
    let first = mem::free_memory() + 0x40_0000;
    let mut page = first;
    bench.measure("first-touch", || {
        mem::write64(page, 1);
        page += PAGE;
    });
    page = first;
    bench.measure("second-touch", || {
        mem::write64(page, 1);
        page += PAGE;
    });
    bench.page_fault();
    bench.report.check("figures were taken", true);
}

/// Asks the host at its mailbox, again and again, until the answer is 0.
pub fn ask(_: &Arguments, report: &mut Report) {
    while mem::read32(MAILBOX) != 0 {}
    report.check("the host ends it", true);
}

static IPIS: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicU32 = AtomicU32::new(0);

impl Bench<'_> {
    fn is_wanted(&self, name: &str) -> bool {
        self.only.is_none_or(|only| only == name)
    }

    fn measure(&mut self, name: &str, mut operation: impl FnMut()) {
        if !self.is_wanted(name) {
            return;
        }
        let start = cpu::ticks();
        for _ in 0..self.rounds {
            operation();
        }
        self.show(name, cpu::ticks() - start, self.rounds);
    }

    /// The figure is rounded to the nearest.
    fn show(&mut self, name: &str, ticks: u64, rounds: u64) {
        let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(cpu::frequency());
        let rounds = u128::from(rounds);
        self.report
            .bench(name, ((nanoseconds + rounds / 2) / rounds) as u64);
    }

    /// Touches every second page of memory that the host only maps page by page, after a page that shares its table.
    /// Only where it is asked for by name: elsewhere a fault maps whole blocks.
    fn page_fault(&mut self) {
        if self.only != Some("page-fault") {
            return;
        }
        let first = (mem::free_memory() + 0x40_0000).next_multiple_of(BLOCK);
        let end = first + 2 * self.rounds * PAGE;
        (first..end)
            .step_by(BLOCK as usize)
            .for_each(|page| mem::write64(page, 1));
        let mut page = first + PAGE;
        self.measure("page-fault", || {
            mem::write64(page, 1);
            page += 2 * PAGE;
        });
    }

    /// Only the EOI is timed, of an SGI that has been sent and acknowledged before.
    fn end_of_interrupt(&mut self) {
        if !self.is_wanted("eoi") {
            return;
        }
        let mut ticks = 0;
        for round in 0..self.rounds {
            gic::send(1, 1);
            let mut taken = gic::acknowledge();
            while taken.0 >= gic::SPECIAL {
                taken = gic::acknowledge();
            }
            // A tick may be several instructions: begin at each of them in turn.
            for _ in 0..round % 16 {
                instruction!("nop");
            }
            let start = cpu::ticks();
            gic::end(taken.1);
            ticks += cpu::ticks() - start;
        }
        self.show("eoi", ticks, self.rounds);
    }

    /// From sending until the other CPU has taken it and has said so.
    fn ipi(&mut self) {
        if !self.is_wanted("ipi") || cpu::count() < 2 {
            return;
        }
        if cpu::start(1, answer_ipis) != 0
            || !cpu::wait(1_000_000, || IPIS.load(Ordering::SeqCst) == 1)
        {
            return self.report.check("the other CPU is ready", false);
        }
        let start = cpu::ticks();
        for round in 0..self.rounds as u32 {
            gic::send(2, 2);
            while IPIS.load(Ordering::Acquire) != round + 2 {
                instruction!("yield");
            }
        }
        self.show("ipi", cpu::ticks() - start, self.rounds);
        STOP.store(1, Ordering::SeqCst);
        gic::send(2, 2);
        self.report.check("the other CPU turns off", cpu::join(1));
    }

    /// From the moment at which the virtual timer is due until its handler has run, the CPU awake.
    fn timer(&mut self) {
        if !self.is_wanted("timer") {
            return;
        }
        gic::set_quiet(Quiet::VirtualTimer);
        gic::enable(TIMER);
        gic::forget();
        let (mut late, rounds) = (0, self.rounds.min(256));
        for round in 1..=rounds as u32 {
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
        self.show("timer", late, rounds);
        gic::disable(TIMER);
        gic::set_quiet(Quiet::Nothing);
    }
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
