//! What a bare board shows that was given nothing to run: a guest that says what it sees, and answers.

use crate::arch::cpu::{self, psci};
use crate::arch::gic::{self, Quiet};
use crate::arch::{instruction, mrs, msr};
use crate::console;
use crate::machine::{self, Arguments};
use crate::tree::Tree;
use core::sync::atomic::{AtomicUsize, Ordering};

const TIMER: u32 = 27;
/// Ticks of the timer, and microseconds from one to the next.
const TICKS: u32 = 10;
const TICK: u64 = 10_000;
/// Microseconds that an answer may take.
const PATIENCE: u64 = 5_000_000;
/// Longest answer.
const LINE: usize = 60;

static UP: AtomicUsize = AtomicUsize::new(0);

/// Says all of it and powers off.
pub fn run(_: &Arguments, tree: Option<Tree>) -> ! {
    console::line(format_args!(
        "Hello. This is a guest of Ravelin, at EL{}; it does not know whose memory and time it uses.",
        mrs!("CurrentEL") >> 2
    ));
    memory(tree);
    cpus();
    ticks();
    conversation();
    console::line(format_args!("Good bye: the guest powers off."));
    machine::off()
}

fn memory(tree: Option<Tree>) {
    let size = tree.and_then(|tree| tree.number("memory@40000000", "reg", 1));
    match size {
        Some(bytes) => console::line(format_args!("  memory: {} MiB at 0x40000000", bytes >> 20)),
        None => console::line(format_args!("  memory: the device tree does not say")),
    }
    let version = psci::call(psci::VERSION, 0, 0, 0);
    console::line(format_args!(
        "  firmware: PSCI {}.{}; interrupts: GICv{}",
        version >> 16,
        version & 0xffff,
        if gic::is_v3() { 3 } else { 2 }
    ));
}

fn cpus() {
    let all = cpu::everywhere(|_| {
        UP.fetch_add(1, Ordering::SeqCst);
    });
    console::line(format_args!(
        "  CPUs: {} came up{}",
        UP.load(Ordering::SeqCst),
        if all { "" } else { ", and one did not" }
    ));
}

/// A tick that wakes from WFI, some times.
fn ticks() {
    gic::set_quiet(Quiet::VirtualTimer);
    gic::enable(TIMER);
    gic::forget();
    let start = cpu::ticks();
    for n in 1..=TICKS {
        msr!("cntv_tval_el0", cpu::micros(TICK));
        msr!("cntv_ctl_el0", 1);
        instruction!("isb");
        while gic::received(TIMER) < n {
            instruction!("wfi");
            cpu::unmask();
            cpu::mask();
        }
    }
    let taken = (cpu::ticks() - start) / cpu::micros(1).max(1);
    console::line(format_args!(
        "  timer: {TICKS} ticks of {TICK} us in {taken} us; the counter runs at {} kHz",
        cpu::frequency() / 1000
    ));
}

fn conversation() {
    console::text("  Who are you? ");
    let mut line = [0; LINE];
    let answer = console::read_line(&mut line, cpu::ticks() + cpu::micros(PATIENCE));
    match answer.map(str::trim) {
        Some("") => console::line(format_args!("  Nobody, then.")),
        Some(name) => console::line(format_args!("  Nice to meet you, {name}.")),
        None => console::line(format_args!("\n  Nobody is there.")),
    }
}
