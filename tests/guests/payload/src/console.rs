//! The PL011, polled. One line is one call, and one CPU prints at a time by the scenarios' own order.

use crate::arch::mem;
use core::fmt::{self, Write};

const DATA: u64 = 0x0900_0000;
const FLAGS: u64 = 0x0900_0018;
/// Flag: the transmit queue is full.
const FULL: u64 = 1 << 5;

struct Uart;

impl Write for Uart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while mem::read32(FLAGS) & FULL != 0 {}
            mem::write32(DATA, u64::from(byte));
        }
        Ok(())
    }
}

/// Prints a line.
pub fn line(text: fmt::Arguments<'_>) {
    // Writing to the UART never fails.
    let _ = writeln!(Uart, "{text}");
}
