//! The console: COM1, a 16550 at 115200 baud.

use core::fmt;

use super::cpu::{in8, out8};

const COM1: u16 = 0x3f8;
/// Line status: a byte has come; room for a byte; everything has left the wire.
const DATA_READY: u8 = 1 << 0;
const HOLDING_EMPTY: u8 = 1 << 5;
const IDLE: u8 = 1 << 6;
/// Looks at the line status before a missing or stuck UART is given up on.
const PATIENCE: u32 = 1_000_000;

/// The lock keeps lines of several CPUs apart.
static LOCK: spin::Mutex<()> = spin::Mutex::new(());

fn read(register: u16) -> u8 {
    // SAFETY: COM1 is the hypervisor's; its registers have no effect on memory.
    unsafe { in8(COM1 + register) }
}

fn write(register: u16, value: u8) {
    // SAFETY: as in `read`.
    unsafe { out8(COM1 + register, value) };
}

/// 115200 baud, 8 bits, no parity, one stop bit, FIFOs on, no interrupts.
pub(crate) fn init() {
    for (register, value) in [
        (1, 0),    // no interrupts
        (3, 0x80), // divisor latch
        (0, 1),
        (1, 0),
        (3, 0x03), // 8n1
        (2, 0xc7), // FIFOs on and empty
        (4, 0x0b), // DTR, RTS, OUT2
    ] {
        write(register, value);
    }
}

/// A byte that has come, if any.
pub(crate) fn receive() -> Option<u8> {
    (read(5) & DATA_READY != 0).then(|| read(0))
}

/// Waits until the last bit has left.
pub(crate) fn drain() {
    let _ = (0..PATIENCE).find(|_| read(5) & IDLE != 0);
}

/// Sends bytes as they are.
pub(crate) fn send(bytes: &[u8]) {
    let _lock = LOCK.lock();
    bytes.iter().for_each(|byte| send_one(*byte));
}

fn send_one(byte: u8) {
    let _ = (0..PATIENCE).find(|_| read(5) & HOLDING_EMPTY != 0);
    write(0, byte);
}

struct Sender;

impl fmt::Write for Sender {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                send_one(b'\r');
            }
            send_one(byte);
        }
        Ok(())
    }
}

/// Prints; what one call prints stays together.
pub(crate) fn print(arguments: fmt::Arguments<'_>) {
    let _lock = LOCK.lock();
    let _ = fmt::Write::write_fmt(&mut Sender, arguments);
}

/// Prints even if this CPU was printing when it failed.
pub(crate) fn print_in_panic(arguments: fmt::Arguments<'_>) {
    let _lock = LOCK.try_lock();
    let _ = fmt::Write::write_fmt(&mut Sender, arguments);
}

/// Prints a line on the console.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::arch::serial::print(format_args!("{}\n", format_args!($($argument)*)))
    };
}
pub(crate) use say;
