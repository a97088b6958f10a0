//! The host's console: polled, one core at a time.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use board::uart::Uart;
use board::{Console, UartKind};

use crate::arch::Mmio;

/// Address of the UART (0: none), its kind in bit 0.
static UART: AtomicU64 = AtomicU64::new(0);

/// Uses this console from now on.
pub(crate) fn set(console: Option<Console>) {
    let value = console.map_or(0, |c| c.base | u64::from(c.kind == UartKind::Mini));
    UART.store(value, Ordering::Relaxed);
}

/// Prints a line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let value = UART.load(Ordering::Relaxed);
    let kind = if value & 1 == 0 {
        UartKind::Pl011
    } else {
        UartKind::Mini
    };
    let base = value & !1;
    if base != 0 {
        let mut uart = Uart::new(Console { kind, base }, Mmio::new(base));
        // A UART's `write_str` never fails.
        let _ = writeln!(uart, "{text}");
    }
}
