//! Everything that names a register or turns an address into a pointer.

pub mod cpu;
pub mod exceptions;
pub mod gic;
pub mod mem;
pub mod mmu;

core::arch::global_asm!(include_str!("entry.S"));

/// Reads a system register by name.
macro_rules! mrs {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading this register has no effect that the compiler must know of.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack)) };
        value
    }};
}

/// Writes a system register by name.
macro_rules! msr {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the register governs interrupts, timers or counters, none of which the compiler assumes about.
        unsafe { core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) value, options(nostack)) };
    }};
}
pub(crate) use {mrs, msr};

/// An instruction without operands, or a barrier.
macro_rules! instruction {
    ($text:literal) => {
        // SAFETY: it changes no register and no memory that the compiler relies on.
        unsafe { core::arch::asm!($text, options(nostack)) }
    };
}
pub(crate) use instruction;
