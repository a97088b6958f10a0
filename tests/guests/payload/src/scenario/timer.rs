//! Counters and timers: the frequency, the registers' rules, interrupts, and waking from WFI.

use crate::arch::gic::{self, Quiet};
use crate::arch::{cpu, instruction, mrs, msr};
use crate::console;
use crate::machine::{Arguments, Report};
use core::sync::atomic::{AtomicU64, Ordering};

const VIRTUAL: u32 = 27;
const PHYSICAL: u32 = 30;
const LONG: u64 = 2_000_000;
/// A timer may be this late, in microseconds: emulators share their host's CPUs.
const LATE: u64 = 500_000;

/// One of the two timers of EL1.
struct Timer {
    name: &'static str,
    intid: u32,
    quiet: Quiet,
    set_tval: fn(u64),
    set_cval: fn(u64),
    set_ctl: fn(u64),
    ctl: fn() -> u64,
    tval: fn() -> u64,
    now: fn() -> u64,
}

const TIMERS: [Timer; 2] = [
    Timer {
        name: "virtual",
        intid: VIRTUAL,
        quiet: Quiet::VirtualTimer,
        set_tval: |value| msr!("cntv_tval_el0", value),
        set_cval: |value| msr!("cntv_cval_el0", value),
        set_ctl: |value| msr!("cntv_ctl_el0", value),
        ctl: || mrs!("cntv_ctl_el0"),
        tval: || mrs!("cntv_tval_el0"),
        now: cpu::ticks,
    },
    Timer {
        name: "physical",
        intid: PHYSICAL,
        quiet: Quiet::PhysicalTimer,
        set_tval: |value| msr!("cntp_tval_el0", value),
        set_cval: |value| msr!("cntp_cval_el0", value),
        set_ctl: |value| msr!("cntp_ctl_el0", value),
        ctl: || mrs!("cntp_ctl_el0"),
        tval: || mrs!("cntp_tval_el0"),
        now: || mrs!("cntpct_el0"),
    },
];

/// Both timers, and the counters of all CPUs.
pub fn run(arguments: &Arguments, report: &mut Report) {
    console::line(format_args!("counter at {} Hz", cpu::frequency()));
    if let Some(expected) = arguments.number("cntfrq=") {
        report.expect("frequency of the counter", cpu::frequency(), expected);
    }
    for timer in &TIMERS {
        gic::set_quiet(timer.quiet);
        gic::enable(timer.intid);
        registers(timer, report);
        fires(timer, report);
        wakes(timer, report);
        many(timer, report);
        gic::disable(timer.intid);
    }
    gic::set_quiet(Quiet::Nothing);
    report.check("CPUs start and end", cpu::everywhere(advance));
    report.expect(
        "counters that went back",
        BACKWARDS.load(Ordering::SeqCst),
        0,
    );
}

fn registers(timer: &Timer, report: &mut Report) {
    console::line(format_args!("the {} timer", timer.name));
    (timer.set_ctl)(0);
    (timer.set_tval)(1 << 20);
    let left = (timer.tval)() as u32;
    report.check("TVAL counts down", left > 0 && left <= 1 << 20);
    (timer.set_tval)(0xffff_ff00);
    report.check(
        "negative TVAL stays negative",
        ((timer.tval)() as u32).cast_signed() < 0,
    );
    (timer.set_ctl)(3);
    instruction!("isb");
    report.expect("masked, enabled and met", (timer.ctl)() & 7, 7);
    (timer.set_cval)(u64::MAX);
    instruction!("isb");
    report.expect("far compare value is not met", (timer.ctl)() & 7, 3);
    (timer.set_ctl)(0);
}

fn fires(timer: &Timer, report: &mut Report) {
    gic::forget();
    let start = (timer.now)();
    let due = start + cpu::micros(1_000);
    (timer.set_cval)(due);
    (timer.set_ctl)(1);
    cpu::unmask();
    let came = cpu::wait(LONG, || gic::received(timer.intid) > 0);
    let late = (timer.now)().wrapping_sub(due);
    cpu::mask();
    report.check("interrupt comes", came);
    report.check("not early, and not much too late", late < cpu::micros(LATE));
    report.expect("once", gic::received(timer.intid), 1);
}

/// WFI with interrupts masked ends when the timer's becomes pending, and the interrupt is then taken.
fn wakes(timer: &Timer, report: &mut Report) {
    gic::forget();
    let due = (timer.now)() + cpu::micros(5_000);
    (timer.set_cval)(due);
    (timer.set_ctl)(1);
    instruction!("isb");
    // WFI may end for no reason: what counts is that it ends at all, and not before its time in the end.
    while (timer.ctl)() & 4 == 0 {
        instruction!("wfi");
    }
    report.check(
        "WFI ends by the timer",
        (timer.now)() >= due && gic::received(timer.intid) == 0,
    );
    cpu::unmask();
    let came = cpu::wait(LONG, || gic::received(timer.intid) == 1);
    cpu::mask();
    report.check("and the interrupt is taken once unmasked", came);
}

/// A tick, a hundred times, sleeping in between with interrupts open.
fn many(timer: &Timer, report: &mut Report) {
    gic::forget();
    let end = (timer.now)() + cpu::micros(5 * LONG);
    for n in 1..=100 {
        (timer.set_tval)(cpu::micros(200));
        (timer.set_ctl)(1);
        instruction!("isb");
        while gic::received(timer.intid) < n && (timer.now)() < end {
            cpu::unmask();
            cpu::mask();
            if gic::received(timer.intid) < n {
                instruction!("wfi");
            }
        }
    }
    report.expect("a hundred ticks", gic::received(timer.intid), 100);
}

static LATEST: AtomicU64 = AtomicU64::new(0);
static BACKWARDS: AtomicU64 = AtomicU64::new(0);

/// The virtual counter never shows an earlier time than some CPU has seen before.
fn advance(_: usize) {
    for _ in 0..1000 {
        let seen = LATEST.load(Ordering::SeqCst);
        instruction!("dsb ish");
        let now = cpu::ticks();
        if now < seen {
            BACKWARDS.fetch_add(1, Ordering::SeqCst);
        }
        LATEST.fetch_max(now, Ordering::SeqCst);
    }
}
