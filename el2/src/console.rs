//! EL2's console and log.
//!
//! Two phases: before the MMU is on there is one core and locks must not be used (exclusive
//! accesses need cacheable memory), so the UART is written directly; after that, under a lock.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use board::uart::Uart;
use board::{Console, UartKind};
use el2::sync::SpinLock;
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::arch::mmio::Mmio;
use crate::arch::{exceptions, regs};

/// Address of the UART's registers (0: none), its kind in bit 0 (registers are word aligned).
static UART: AtomicU64 = AtomicU64::new(0);
static LOCK: SpinLock<()> = SpinLock::new(());

/// UARTs of boards that we know, for the one case in which no device tree names one: a boot
/// without a device tree must end in a line on the console, not in silence.
const LAST_RESORT: [u64; 3] = [
    0xfe20_1000,    // Raspberry Pi 4, UART0
    0x900_0000,     // QEMU virt
    0x10_7d00_1000, // Raspberry Pi 5, UART10
];

/// Uses this console from now on.
pub(crate) fn set(console: Option<Console>) {
    let value = console.map_or(0, |c| c.base | u64::from(c.kind == UartKind::Mini));
    UART.store(value, Ordering::Relaxed);
}

/// Looks for a PL011 where boards have one (PrimeCell identification, Arm DDI 0183G 3.3.15).
/// Only at boot with the MMU off.
pub(crate) fn probe_last_resort() {
    for base in LAST_RESORT {
        let id = |offset| exceptions::probe(base + offset).map(|value| value & 0xff);
        if (id(0xfe0), id(0xfe4), id(0xff0), id(0xff4))
            == (Some(0x11), Some(0x10), Some(0x0d), Some(0xf0))
        {
            let kind = UartKind::Pl011;
            set(Some(Console { kind, base }));
            return;
        }
    }
}

fn uart() -> Option<Uart<Mmio>> {
    let value = UART.load(Ordering::Relaxed);
    let kind = if value & 1 == 0 {
        UartKind::Pl011
    } else {
        UartKind::Mini
    };
    let base = value & !1;
    (base != 0).then(|| Uart::new(Console { kind, base }, Mmio::console(base)))
}

/// Prints a line.
pub(crate) fn print(line: fmt::Arguments<'_>) {
    if regs::mmu_is_on() {
        let _guard = LOCK.lock();
        print_unlocked(line);
    } else {
        print_unlocked(line);
    }
}

/// Prints a line although another core may be printing: for panics.
pub(crate) fn print_unlocked(line: fmt::Arguments<'_>) {
    if let Some(mut uart) = uart() {
        // A UART's `write_str` never fails.
        let _ = writeln!(uart, "ravelin: {line}");
    }
}

/// Ends a boot that can't go on.
pub(crate) fn fatal(reason: fmt::Arguments<'_>) -> ! {
    print(format_args!("fatal: {reason}"));
    print(format_args!("halted"));
    crate::arch::cpu::halt()
}

/// Prints a line if its level is let through. One call wherever it stands, since every place that
/// says something is in the image.
macro_rules! say {
    ($level:ident, $($line:tt)+) => {
        $crate::console::log(log::Level::$level, format_args!($($line)+))
    };
}
pub(crate) use say;

/// What [`say`] calls.
#[inline(never)]
pub(crate) fn log(level: Level, line: fmt::Arguments<'_>) {
    if level > log::max_level() {
        return;
    }
    match level {
        Level::Info => print(line),
        level => print(format_args!("{level}: {line}")),
    }
}

/// For what the library says.
struct ConsoleLog;

impl Log for ConsoleLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        log(record.level(), *record.args());
    }

    fn flush(&self) {}
}

/// Starts logging at the level that `/chosen/ravelin,log-level` names, `info` by default.
pub(crate) fn start_log(level: Option<&str>) {
    let parsed = level.map(str::parse::<LevelFilter>);
    let filter = match parsed {
        Some(Ok(filter)) => filter,
        _ => LevelFilter::Info,
    };
    // Fails only if called twice.
    if log::set_logger(&ConsoleLog).is_ok() {
        log::set_max_level(filter);
    }
    if let (Some(Err(_)), Some(name)) = (parsed, level) {
        say!(
            Warn,
            "unknown ravelin,log-level {name:?}: use off, error, warn, info, debug or trace"
        );
    }
}
