//! The host's console: polled, one core at a time.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use board::uart::Uart;
use board::{Console, UartKind};

use spin::Mutex;

use crate::arch::Mmio;

/// Address of the UART (0: none), its kind in bit 0.
static UART: AtomicU64 = AtomicU64::new(0);

/// Uses this console from now on.
pub(crate) fn set(console: Option<Console>) {
    let value = console.map_or(0, |c| c.base | u64::from(c.kind == UartKind::Mini));
    UART.store(value, Ordering::Relaxed);
}

fn uart() -> Option<Uart<Mmio>> {
    let value = UART.load(Ordering::Relaxed);
    let kind = if value & 1 == 0 {
        UartKind::Pl011
    } else {
        UartKind::Mini
    };
    let base = value & !1;
    (base != 0).then(|| Uart::new(Console { kind, base }, Mmio::new(base)))
}

/// Prints a line.
pub(crate) fn line(content: fmt::Arguments<'_>) {
    text(format_args!("{content}\n"));
}

/// Prints text, unmixed with that of other cores.
pub(crate) fn text(content: fmt::Arguments<'_>) {
    with_uart(|uart| {
        // A UART's `write_str` never fails.
        let _ = uart.write_fmt(content);
    });
}

/// Prints a line of bytes that need not be text, behind a label, unmixed with other lines.
pub(crate) fn labelled(label: fmt::Arguments<'_>, bytes: &[u8]) {
    with_uart(|uart| {
        let _ = uart.write_fmt(label);
        bytes.iter().for_each(|byte| uart.send(*byte));
        let _ = uart.write_str("\n");
    });
}

/// Lets one core at a time use the UART. With the MMU off there is only one.
fn with_uart(print: impl FnOnce(&mut Uart<Mmio>)) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = crate::arch::mmu::is_on().then(|| TURN.lock());
    if let Some(mut uart) = uart() {
        print(&mut uart);
    }
}

/// Sends one byte as it is.
pub(crate) fn write_byte(byte: u8) {
    if let Some(uart) = uart() {
        uart.send(byte);
    }
}

/// A key that was pressed.
pub(crate) fn read_byte() -> Option<u8> {
    uart()?.receive()
}
