//! A device of the guest's own that does DMA: QEMU's `edu`, whose registers the host has given it. It does what the
//! host orders, word by word, which changes the VM's memory meanwhile.
//!
//! An order has what to do in bits 3:0, the page in bits 31:12 (of the IPA), and a byte in bits 11:4 that tells
//! patterns apart. 0 ends it.

use crate::arch::mem;
use crate::machine::{Arguments, Report};

/// Where the host is asked what to do.
const MAILBOX: u64 = 0x0b00_0000;
/// The device's registers.
const EDU: u64 = 0x0c00_0000;
const SOURCE: u64 = EDU + 0x80;
const DESTINATION: u64 = EDU + 0x88;
const COUNT: u64 = EDU + 0x90;
const COMMAND: u64 = EDU + 0x98;
const RUN: u64 = 1 << 0;
const TO_MEMORY: u64 = 1 << 1;
/// Where the device's buffer is in its own addresses.
const BUFFER: u64 = 0x4_0000;
/// Bytes that it moves at a time.
const SIZE: u64 = 0x800;

/// Writes the pattern.
const FILL: u64 = 1;
/// Lets the device read the page.
const READ: u64 = 2;
/// Lets it write the page.
const WRITE: u64 = 3;
/// The device has done that.
const IDLE: u64 = 4;
/// The page has the pattern.
const PATTERN: u64 = 5;
/// Every byte of the page is that byte.
const UNIFORM: u64 = 6;

/// Does what the host orders.
pub fn run(_: &Arguments, report: &mut Report) {
    report.expect("edu says what it is", mem::read32(EDU) & 0xff, 0xed);
    loop {
        let order = mem::read32(MAILBOX);
        let (page, byte) = (order & 0xffff_f000, order >> 4 & 0xff);
        match order & 0xf {
            0 => return,
            FILL => fill(page, byte),
            READ => start(page, BUFFER, RUN),
            WRITE => start(BUFFER, page, RUN | TO_MEMORY),
            IDLE => report.expect("edu is idle", mem::read64(COMMAND) & RUN, 0),
            PATTERN => check(page, report, |at| pattern(at, byte)),
            UNIFORM => check(page, report, |_| byte * 0x0101_0101_0101_0101),
            _ => report.check("order is known", false),
        }
    }
}

/// The doubleword at this place.
fn pattern(at: u64, byte: u64) -> u64 {
    (at << 8 | byte).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(page: u64, byte: u64) {
    (0..SIZE / 8).for_each(|at| mem::write64(page + 8 * at, pattern(at, byte)));
    mem::synchronise();
}

fn start(source: u64, destination: u64, command: u64) {
    mem::write64(SOURCE, source);
    mem::write64(DESTINATION, destination);
    mem::write64(COUNT, SIZE);
    mem::write64(COMMAND, command);
}

fn check(page: u64, report: &mut Report, expected: impl Fn(u64) -> u64) {
    let wrong = (0..SIZE / 8).find(|at| mem::read64(page + 8 * at) != expected(*at));
    report.expect("first wrong doubleword", wrong, None);
}
