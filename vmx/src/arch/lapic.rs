//! The machine's local interrupt controller: only to start CPUs and to drive them out of guests.

use super::cpu::{rdmsr, wrmsr};

const APIC_BASE: u32 = 0x1b;
const X2APIC_ON: u64 = 1 << 10;
/// Register offsets in memory; the x2APIC's MSR is 0x800 + offset / 16.
const ID: u32 = 0x20;
const END: u32 = 0xb0;
const SPURIOUS: u32 = 0xf0;
const COMMAND: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
/// Spurious vector 0xff, controller on.
const ENABLE: u32 = 0x1ff;
/// Delivery modes with level assert (SDM vol. 3A 11.6.1).
const NMI: u32 = 0x4400;
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600;
const ALL_OTHERS: u32 = 0xc_0000;
const PENDING: u32 = 1 << 12;

/// How the registers are reached.
enum Access {
    Memory(u64),
    Msr,
}

fn access() -> Access {
    // SAFETY: every 64-bit CPU with a local APIC has this register.
    let base = unsafe { rdmsr(APIC_BASE) };
    if base & X2APIC_ON == 0 {
        Access::Memory(base & 0xf_ffff_f000)
    } else {
        Access::Msr
    }
}

fn read(register: u32) -> u32 {
    match access() {
        Access::Memory(base) => {
            let at =
                core::ptr::with_exposed_provenance::<u32>((base + u64::from(register)) as usize);
            // SAFETY: the controller's page, below 4 GiB and mapped one to one; reads of the
            // registers used here have no effect.
            unsafe { at.read_volatile() }
        }
        // SAFETY: the controller is in x2APIC mode, and the register exists there.
        Access::Msr => unsafe { rdmsr(0x800 + register / 16) as u32 },
    }
}

fn write(register: u32, value: u32) {
    match access() {
        Access::Memory(base) => {
            let at = core::ptr::with_exposed_provenance_mut::<u32>(
                (base + u64::from(register)) as usize,
            );
            // SAFETY: as in `read`; what is written touches no memory of Rust's.
            unsafe { at.write_volatile(value) };
        }
        // SAFETY: as in `read`.
        Access::Msr => unsafe { wrmsr(0x800 + register / 16, value.into()) },
    }
}

/// Turns this CPU's controller on; its identifier.
pub(super) fn enable() -> u32 {
    write(SPURIOUS, ENABLE);
    match access() {
        Access::Memory(_) => read(ID) >> 24,
        Access::Msr => read(ID),
    }
}

/// Ends the interrupt in service.
pub(super) fn end_of_interrupt() {
    write(END, 0);
}

fn command(word: u32, target: u32) {
    if let Access::Msr = access() {
        let word = u64::from(target) << 32 | u64::from(word);
        // SAFETY: x2APIC mode; the command register takes both halves at once.
        unsafe { wrmsr(0x800 + COMMAND / 16, word) };
        return;
    }
    write(COMMAND_HIGH, target << 24);
    write(COMMAND, word);
    while read(COMMAND) & PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Sends a non-maskable interrupt.
pub(super) fn kick(target: u32) {
    command(NMI, target);
}

/// Resets all other CPUs.
pub(super) fn init_others() {
    command(ALL_OTHERS | INIT, 0);
}

/// Starts all other CPUs at a page below 1 MiB.
pub(super) fn start_others(page: u8) {
    command(ALL_OTHERS | START_UP | u32::from(page), 0);
}
