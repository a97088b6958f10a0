//! The interrupt controller: software-generated, by software pending, by a device, and between CPUs.

use crate::arch::gic::{self, Quiet};
use crate::arch::{cpu, instruction, mem};
use crate::console;
use crate::machine::{Arguments, Report};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// SPIs 40 to 59 have no device behind them on this platform.
const FREE_SPIS: core::ops::Range<u32> = 40..60;
const UART_SPI: u32 = 33;
const UART_DATA: u64 = 0x0900_0000;
const UART_IMSC: u64 = 0x0900_0038;
const UART_CLEAR: u64 = 0x0900_0044;
/// PL011: transmit interrupt.
const TRANSMIT: u64 = 1 << 5;
const LONG: u64 = 2_000_000;
const SHORT: u64 = 20_000;

/// One CPU.
pub fn run(arguments: &Arguments, report: &mut Report) {
    console::line(format_args!(
        "GICv{}, {} INTIDs",
        if gic::is_v3() { 3 } else { 2 },
        gic::lines()
    ));
    if let Some(version) = arguments.number("gic=") {
        report.expect("version of the GIC", u64::from(gic::is_v3()) + 2, version);
    }
    own_sgis(report);
    more_than_list_registers(report);
    high_intid(report);
    thresholds(report);
    disabled(report);
    split_end(report);
    by_device(report);
}

/// Takes what is pending, until nothing has come for a while.
fn drain() {
    cpu::unmask();
    let mut seen = total();
    while cpu::wait(SHORT, || total() != seen) {
        seen = total();
    }
    cpu::mask();
}

fn total() -> u32 {
    (0..cpu::MAX).map(gic::received_by).sum()
}

fn own_sgis(report: &mut Report) {
    gic::forget();
    (0..16).for_each(|sgi| gic::send(sgi, 1));
    drain();
    let each_once = (0..16).all(|sgi| gic::received(sgi) == 1);
    report.check(
        "sixteen SGIs to itself, each once",
        each_once && total() == 16,
    );
    gic::forget();
    gic::send(3, 1);
    gic::send(3, 1);
    drain();
    report.check("pending SGI is sent again as one", gic::received(3) == 1);
}

/// Twenty shared interrupts and sixteen SGIs pending at once, in order of their priorities.
fn more_than_list_registers(report: &mut Report) {
    gic::forget();
    for intid in FREE_SPIS {
        gic::set_edge(intid);
        gic::enable(intid);
        // The later the number, the more urgent; steps that five bits of priority can hold.
        gic::set_priority(intid, 0xe8 - ((intid - FREE_SPIS.start) * 8) as u8);
        gic::set_pending(intid);
    }
    (0..16).for_each(|sgi| {
        gic::set_priority(sgi, 0xf0);
        gic::send(sgi, 1);
    });
    gic::start_log();
    drain();
    let (log, count) = gic::stop_log();
    report.expect("all pending interrupts come", count, 36);
    let expected = |place: usize| FREE_SPIS.end - 1 - place as u32;
    let wrong = (0..20).find(|&place| log(place) != expected(place));
    report.expect("first out of its priority's order", wrong, None);
    report.check(
        "each once",
        FREE_SPIS
            .chain(0..16)
            .all(|intid| gic::received(intid) == 1),
    );
    (0..16).for_each(gic::enable);
}

fn high_intid(report: &mut Report) {
    let last = gic::lines() - 1;
    report.check("there are INTIDs above 255", last > 255);
    for intid in [255, 256.min(last), last] {
        gic::forget();
        gic::set_edge(intid);
        gic::enable(intid);
        gic::set_pending(intid);
        drain();
        report.expect(
            "INTID around and above 255",
            (gic::received(intid), total()),
            (1, 1),
        );
        gic::disable(intid);
    }
}

fn thresholds(report: &mut Report) {
    let intid = FREE_SPIS.start;
    gic::forget();
    gic::set_priority(intid, 0xa0);
    gic::set_threshold(0x80);
    gic::set_pending(intid);
    drain();
    report.check(
        "less urgent than the threshold waits",
        total() == 0 && gic::is_pending(intid),
    );
    gic::set_threshold(0xff);
    drain();
    report.check(
        "and comes when that is raised",
        gic::received(intid) == 1 && !gic::is_pending(intid),
    );
}

fn disabled(report: &mut Report) {
    let intid = FREE_SPIS.start + 1;
    gic::forget();
    gic::disable(intid);
    gic::set_pending(intid);
    drain();
    report.check(
        "disabled interrupt waits",
        total() == 0 && gic::is_pending(intid),
    );
    gic::clear_pending(intid);
    gic::enable(intid);
    drain();
    report.check(
        "cleared interrupt is gone",
        total() == 0 && !gic::is_pending(intid),
    );
    let (none, _) = gic::acknowledge();
    report.expect("nothing to acknowledge", none, 1023);
}

/// EOI mode 1: priority drop and deactivation apart.
fn split_end(report: &mut Report) {
    let intid = FREE_SPIS.start + 2;
    gic::set_split_eoi(true);
    gic::set_pending(intid);
    let (first, value) = take();
    report.expect("acknowledged by hand", first, intid);
    report.check("active until deactivated", gic::is_active(intid));
    gic::end(value);
    report.check(
        "still active after its priority has dropped",
        gic::is_active(intid),
    );
    gic::set_pending(intid);
    let (again, _) = gic::acknowledge();
    report.expect("active interrupt does not come again", again, 1023);
    gic::deactivate(value);
    report.check("not active any more", !gic::is_active(intid));
    let (second, value) = take();
    report.expect("then what was pending comes", second, intid);
    gic::end(value);
    gic::deactivate(value);
    gic::set_split_eoi(false);
}

/// Acknowledges what comes next, polling.
fn take() -> (u32, u64) {
    let end = cpu::ticks() + cpu::micros(SHORT);
    loop {
        let taken = gic::acknowledge();
        if taken.0 < gic::SPECIAL || cpu::ticks() > end {
            return taken;
        }
    }
}

/// The PL011's transmit interrupt, level-triggered.
fn by_device(report: &mut Report) {
    gic::forget();
    gic::set_quiet(Quiet::Uart);
    gic::enable(UART_SPI);
    cpu::unmask();
    mem::write32(UART_CLEAR, 0x7ff);
    mem::write32(UART_IMSC, TRANSMIT);
    mem::write32(UART_DATA, u64::from(b'\n'));
    let came = cpu::wait(LONG, || gic::received(UART_SPI) > 0);
    cpu::mask();
    report.check("device's interrupt comes", came);
    drain();
    report.expect(
        "and stays away when masked at the device",
        gic::received(UART_SPI),
        1,
    );
    mem::write32(UART_CLEAR, 0x7ff);
    gic::disable(UART_SPI);
    gic::set_quiet(Quiet::Nothing);
}

const ROUNDS: u64 = 10_000;
static SUM: AtomicU64 = AtomicU64::new(0);
static READY: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicU32 = AtomicU32::new(0);

/// Several CPUs: shared memory, SGIs to one, to others, from all to all.
pub fn several_cpus(arguments: &Arguments, report: &mut Report) {
    let cpus = cpu::count();
    console::line(format_args!("{cpus} CPUs"));
    if let Some(expected) = arguments.number("cpus=") {
        report.expect("number of CPUs", cpus as u64, expected);
    }
    report.check("CPUs start and end", cpu::everywhere(add));
    report.expect(
        "atomic additions",
        SUM.load(Ordering::SeqCst),
        ROUNDS * cpus as u64,
    );
    gic::forget();
    let others = 1..cpus;
    let started = others.clone().all(|other| cpu::start(other, serve) == 0);
    let ready = cpu::wait(LONG, || READY.load(Ordering::SeqCst) as usize == cpus - 1);
    report.check("others wait for interrupts", started && ready);
    for other in others.clone() {
        gic::send(5, 1 << other);
        report.check(
            "SGI to one",
            cpu::wait(LONG, || gic::received_by(other) == 1),
        );
    }
    report.expect("nobody else got one", total() as usize, cpus - 1);
    gic::send_to_others(6);
    let got = cpu::wait(LONG, || gic::received(6) as usize == cpus - 1);
    report.check("SGI to all others", got && gic::received_by(0) == 0);
    ping_pong(report, cpus);
    STOP.store(1, Ordering::SeqCst);
    gic::send_to_others(8);
    report.check("others turn off", others.clone().all(cpu::join));
}

/// Shared interrupts routed to each CPU in turn.
fn ping_pong(report: &mut Report, cpus: usize) {
    let intid = FREE_SPIS.start;
    gic::set_edge(intid);
    gic::enable(intid);
    for target in 1..cpus {
        let before = gic::received_by(target);
        gic::route(intid, target);
        gic::set_pending(intid);
        let came = cpu::wait(LONG, || gic::received_by(target) == before + 1);
        report.check("shared interrupt follows its route", came);
    }
    gic::disable(intid);
}

fn add(_: usize) {
    (0..ROUNDS).for_each(|_| {
        SUM.fetch_add(1, Ordering::SeqCst);
    });
}

/// Sleeps and takes interrupts until told to stop.
fn serve(_: usize) {
    gic::enable_cpu();
    READY.fetch_add(1, Ordering::SeqCst);
    while STOP.load(Ordering::SeqCst) == 0 {
        // Masked around the check: what comes in between still wakes WFI.
        cpu::unmask();
        cpu::mask();
        if STOP.load(Ordering::SeqCst) == 0 {
            instruction!("wfi");
        }
    }
    cpu::unmask();
    cpu::mask();
}
