//! Everything of the host that names a register or a raw address.
//!
//! The host maps all of memory to itself, read, write and execute, and everything below 1 TiB
//! that is not RAM as device memory: it has nothing to protect, and its scenarios must be able to
//! try every access.

/// Functions that give a guest's code, each with the labels before and behind it, which are in read-only data.
macro_rules! guests {
    ($($(#[$doc:meta])+ $name:ident: $start:ident, $end:ident;)+) => {
        unsafe extern "C" {
            $(static $start: u8; static $end: u8;)+
        }
        $($(#[$doc])+
        pub(crate) fn $name() -> &'static [u8] {
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: the two symbols enclose the code, in read-only data.
            unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
        })+
    };
}

pub(crate) mod counters;
pub(crate) mod cpu;
pub(crate) mod disk;
pub(crate) mod fault;
pub(crate) mod fp;
pub(crate) mod gic;
pub(crate) mod guest;
pub(crate) mod heap;
pub(crate) mod hostile;
pub(crate) mod mem;
pub(crate) mod mmu;
pub(crate) mod pci;
pub(crate) mod walks;

use core::arch::asm;

use board::uart::UartRegs;

core::arch::global_asm!(
    include_str!("../../../el2/src/arch/common.S"),
    include_str!("entry.S"),
);

/// Reads a system register by name.
macro_rules! mrs {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading this register has no side effect.
        unsafe {
            core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value,
                options(nomem, nostack, preserves_flags));
        }
        value
    }};
}
pub(crate) use mrs;

/// A window of device registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mmio {
    base: u64,
}

impl Mmio {
    /// The registers at `base`, which the device tree names.
    pub(crate) const fn new(base: u64) -> Self {
        Self { base }
    }
}

impl Mmio {
    /// Loads a register of 64 bits.
    pub(crate) fn read_long(self, offset: u64) -> u64 {
        let value: u64;
        // SAFETY: a plain LDR of a device register, as below.
        unsafe {
            asm!("ldr {0}, [{1}]", out(reg) value, in(reg) self.base + offset,
                options(nostack, preserves_flags));
        }
        value
    }

    /// Stores a register of 64 bits.
    pub(crate) fn write_long(self, offset: u64, value: u64) {
        // SAFETY: as above, STR.
        unsafe {
            asm!("str {0}, [{1}]", in(reg) value, in(reg) self.base + offset,
                options(nostack, preserves_flags));
        }
    }
}

impl Mmio {
    /// Loads a register of 8 bits.
    pub(crate) fn read_byte(self, offset: u64) -> u8 {
        let value: u32;
        // SAFETY: a plain LDRB of a device register, as below.
        unsafe {
            asm!("ldrb {0:w}, [{1}]", out(reg) value, in(reg) self.base + offset,
                options(nostack, preserves_flags));
        }
        value.to_le_bytes()[0]
    }

    /// Stores a register of 8 bits.
    pub(crate) fn write_byte(self, offset: u64, value: u8) {
        // SAFETY: as above, STRB.
        unsafe {
            asm!("strb {0:w}, [{1}]", in(reg) u32::from(value), in(reg) self.base + offset,
                options(nostack, preserves_flags));
        }
    }
}

impl UartRegs for Mmio {
    fn read(&self, offset: usize) -> u32 {
        let value: u32;
        // SAFETY: a plain LDR of a device register that the device tree names: one that a
        // hypervisor can decode.
        unsafe {
            asm!("ldr {0:w}, [{1}]", out(reg) value, in(reg) self.base + offset as u64,
                options(nostack, preserves_flags));
        }
        value
    }

    fn write(&self, offset: usize, value: u32) {
        // SAFETY: as above, STR.
        unsafe {
            asm!("str {0:w}, [{1}]", in(reg) value, in(reg) self.base + offset as u64,
                options(nostack, preserves_flags));
        }
    }
}

/// Affinity fields of MPIDR_EL1.
pub(crate) fn mpidr() -> u64 {
    mrs!("mpidr_el1") & 0xff_00ff_ffff
}

/// Exception level.
pub(crate) fn current_el() -> u64 {
    mrs!("CurrentEL") >> 2 & 3
}

/// The counter, and its ticks per second.
pub(crate) fn ticks() -> u64 {
    mrs!("cntvct_el0")
}

/// Ticks per second of the counter.
pub(crate) fn ticks_per_second() -> u64 {
    mrs!("cntfrq_el0").max(1)
}

/// Waits for ever.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: masks everything and waits.
        unsafe { asm!("msr daifset, #0xf", "wfi", options(nostack)) };
    }
}

/// Entry from entry.S on the boot core.
#[unsafe(no_mangle)]
extern "C" fn shim_main(tree: u64) -> ! {
    crate::run::run(tree)
}

#[panic_handler]
fn on_panic(info: &core::panic::PanicInfo<'_>) -> ! {
    crate::console::line(format_args!("host: PANIC {}", info.message()));
    if let Some(location) = info.location() {
        crate::console::line(format_args!("host:   at {location}"));
    }
    crate::console::line(format_args!("0 passed, 1 failed"));
    crate::call::system_off()
}

/// SMC #0 with this `x0`.
pub(crate) fn smc(id: u64) -> u64 {
    let answer: u64;
    // SAFETY: EL2 traps it; the convention keeps x4 and up.
    unsafe {
        asm!("smc #0", inout("x0") id => answer, out("x1") _, out("x2") _, out("x3") _,
            options(nostack));
    }
    answer
}

/// A random number of the RNDR instruction (Arm ARM D24.2.143), if this core has it and it has one.
pub(crate) fn random() -> Option<u64> {
    if mrs!("id_aa64isar0_el1") >> 60 == 0 {
        return None;
    }
    let (value, failed): (u64, u64);
    // SAFETY: the core has the register; it sets the zero flag when it has no number.
    unsafe {
        asm!("mrs {}, s3_3_c2_c4_0", "cset {}, eq", out(reg) value, out(reg) failed,
            options(nomem, nostack));
    }
    (failed == 0).then_some(value)
}

/// The core can set access flags in its tables (ID_AA64MMFR1_EL1.HAFDBS).
pub(crate) fn sets_access_flags() -> bool {
    mrs!("id_aa64mmfr1_el1") & 0xf != 0
}

/// Size of a physical address in bits (ID_AA64MMFR0_EL1.PARange).
pub(crate) fn physical_bits() -> u32 {
    match mrs!("id_aa64mmfr0_el1") & 0xf {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        _ => 48,
    }
}
