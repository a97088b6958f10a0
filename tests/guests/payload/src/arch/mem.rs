//! Memory and devices by address, one instruction per access.

use super::instruction;
use core::arch::asm;

unsafe extern "C" {
    static __free: u8;
}

/// First byte of RAM behind the payload that nothing uses; page-aligned.
pub fn free_memory() -> u64 {
    (&raw const __free).addr() as u64
}

macro_rules! access {
    ($read:ident, $write:ident, $load:literal, $store:literal, $doc:literal) => {
        #[doc = concat!("Reads ", $doc, ".")]
        #[inline(always)]
        pub fn $read(address: u64) -> u64 {
            let value: u64;
            // SAFETY: one load; if nothing is there, the exception is caught or ends the payload.
            unsafe { asm!($load, out(reg) value, in(reg) address, options(nostack)) };
            value
        }

        #[doc = concat!("Writes ", $doc, ".")]
        #[inline(always)]
        pub fn $write(address: u64, value: u64) {
            // SAFETY: one store to a device or to memory behind the image, which no object of Rust's is in.
            unsafe { asm!($store, in(reg) value, in(reg) address, options(nostack)) };
        }
    };
}

access!(
    read8,
    write8,
    "ldrb {0:w}, [{1}]",
    "strb {0:w}, [{1}]",
    "a byte"
);
access!(
    read16,
    write16,
    "ldrh {0:w}, [{1}]",
    "strh {0:w}, [{1}]",
    "two bytes"
);
access!(
    read32,
    write32,
    "ldr {0:w}, [{1}]",
    "str {0:w}, [{1}]",
    "four bytes"
);
access!(
    read64,
    write64,
    "ldr {0}, [{1}]",
    "str {0}, [{1}]",
    "eight bytes"
);

/// Declares a function that executes one instruction on an address in a register.
macro_rules! on_address {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        $($(#[$doc])*
        #[inline(always)]
        pub fn $name(address: u64) {
            // SAFETY: as for the accesses above; registers it may load are named as lost.
            unsafe {
                asm!($text, inout("x9") address => _, out("x10") _, out("x11") _, options(nostack));
            }
        })*
    };
}

on_address! {
    /// Load of a pair.
    load_pair = "ldp x10, x11, [x9]";
    /// Store of a pair of zeros.
    store_pair = "stp xzr, xzr, [x9]";
    /// Load with write-back.
    load_post_index = "ldr w10, [x9], #4";
    /// Store with write-back.
    store_post_index = "str wzr, [x9], #4";
    /// Exclusive load.
    load_exclusive = "ldaxr w10, [x9]";
    /// Zeroes a block.
    zero_block = "dc zva, x9";
    /// Cleans and invalidates a line to the point of coherency.
    clean_invalidate = "dc civac, x9";
    /// Cleans a line to the point of unification.
    clean_for_fetch = "dc cvau, x9";
    /// Drops an instruction line.
    invalidate_fetch = "ic ivau, x9";
    /// Cleans and invalidates by set and way.
    clean_set_way = "dc cisw, x9";
}

/// LDRSB into a 64-bit, and into a 32-bit register.
pub fn read_signed(address: u64) -> (u64, u64) {
    let (wide, narrow): (u64, u64);
    // SAFETY: as above.
    unsafe {
        asm!("ldrsb {0}, [{2}]", "ldrsb {1:w}, [{2}]", out(reg) wide, out(reg) narrow, in(reg) address,
            options(nostack));
    }
    (wide, narrow)
}

/// A load into, and a store from, the zero register.
pub fn touch_zero_register(address: u64) {
    // SAFETY: as above.
    unsafe { asm!("ldr wzr, [{0}]", "str wzr, [{0}]", in(reg) address, options(nostack)) };
}

/// Calls `address`, where either `mov w0, #n` and `ret` were written, or nothing is (see `exceptions::catch`).
pub fn execute(address: u64) -> u64 {
    let result: u64;
    // SAFETY: what was written there changes w0 only and returns.
    unsafe {
        asm!("blr {address}", address = in(reg) address, lateout("x0") result, out("x30") _, options(nostack));
    }
    result & 0xffff_ffff
}

/// Everything before is complete, and instructions are fetched anew.
pub fn synchronise() {
    instruction!("dsb sy");
    instruction!("isb");
}
