//! Device registers.

use core::arch::asm;

use board::uart::UartRegs;

/// A window of 32-bit device registers that EL2 has mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mmio {
    base: u64,
}

impl Mmio {
    /// The registers at `base`.
    ///
    /// # Safety
    ///
    /// `base` is the CPU address of a device whose registers EL2 may use for as long as it runs,
    /// mapped as device memory once the MMU is on.
    pub(crate) const unsafe fn new(base: u64) -> Self {
        Self { base }
    }

    fn address(self, offset: usize) -> u64 {
        self.base + offset as u64
    }
}

impl UartRegs for Mmio {
    fn read(&self, offset: usize) -> u32 {
        let value: u32;
        // SAFETY: `new`'s promise. A plain LDR of one register, never merged or split.
        unsafe {
            asm!("ldr {0:w}, [{1}]", out(reg) value, in(reg) self.address(offset),
                options(nostack, preserves_flags));
        }
        value
    }

    fn write(&self, offset: usize, value: u32) {
        // SAFETY: `new`'s promise.
        unsafe {
            asm!("str {0:w}, [{1}]", in(reg) value, in(reg) self.address(offset),
                options(nostack, preserves_flags));
        }
    }
}

impl Mmio {
    /// The console's registers, which the device tree names (or a probe found) and EL2 maps.
    pub(crate) const fn console(base: u64) -> Self {
        // SAFETY: only called with the address that `console::set` got from those sources; the
        // UART is shared with the host, which any order of single register accesses survives.
        unsafe { Self::new(base) }
    }

    /// The interrupt controller, which the device tree names and EL2 maps.
    pub(crate) const fn gic(base: u64) -> Self {
        // SAFETY: EL2 only touches what `arch::gic` says is its own, by registers that set or clear
        // single interrupts.
        unsafe { Self::new(base) }
    }

    /// An SMMU or a random number generator, which the device tree names and EL2 maps.
    pub(crate) const fn owned(base: u64) -> Self {
        // SAFETY: hidden from the host, so it is EL2's alone; an SMMU's driver lets it at no memory
        // but tables and queues from EL2's pool, and a generator accesses none.
        unsafe { Self::new(base) }
    }

    /// Where the registers are.
    pub(crate) const fn base(self) -> u64 {
        self.base
    }

    /// The board's power management block, which the device tree names and EL2 maps.
    pub(crate) const fn power(base: u64) -> Self {
        // SAFETY: as for the console.
        unsafe { Self::new(base) }
    }
}
