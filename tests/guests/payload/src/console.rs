//! The PL011, polled. One line is one call, and one CPU prints at a time by the scenarios' own order.

use crate::arch::{cpu, mem};
use core::fmt::{self, Write};

const DATA: u64 = 0x0900_0000;
const FLAGS: u64 = 0x0900_0018;
/// Flag: nothing was received.
const EMPTY: u64 = 1 << 4;
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

/// Prints text.
pub fn text(text: &str) {
    // Writing to the UART never fails.
    let _ = Uart.write_str(text);
}

/// Reads a line and shows what is typed; `None` if there is none before the counter reaches `deadline`.
pub fn read_line(buffer: &mut [u8], deadline: u64) -> Option<&str> {
    let mut length = 0;
    while cpu::ticks() < deadline {
        if mem::read32(FLAGS) & EMPTY != 0 {
            continue;
        }
        match mem::read32(DATA) as u8 {
            b'\r' | b'\n' => {
                text("\n");
                return core::str::from_utf8(&buffer[..length]).ok();
            }
            byte @ b' '..=b'~' if length < buffer.len() => {
                buffer[length] = byte;
                length += 1;
                mem::write32(DATA, u64::from(byte));
            }
            _ => {}
        }
    }
    None
}
