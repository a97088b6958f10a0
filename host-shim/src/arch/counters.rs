//! The host's own cycle counter (Arm ARM D13, PMUv3), and a guest that takes many cycles.

use core::arch::{asm, global_asm};
use core::slice;

use super::mrs;

/// PMCNTENSET_EL0.C: the cycle counter.
const CYCLES: u64 = 1 << 31;
/// PMCR_EL0.E and C: count, from zero.
const START: u64 = 1 | 1 << 2;

global_asm!(
    r#"
    .section .rodata.guest, "a"
    .balign 8
guest_spin:
    mov     x1, #0x2000000
1:  subs    x1, x1, #1
    b.ne    1b
    mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .
    .balign 8
guest_spin_end:
    .previous
"#
);

unsafe extern "C" {
    static guest_spin: u8;
    static guest_spin_end: u8;
}

/// It makes 64 million instructions and powers off.
pub(crate) fn spin() -> &'static [u8] {
    let (start, end) = (&raw const guest_spin, &raw const guest_spin_end);
    // SAFETY: the two symbols enclose the code, in read-only data.
    unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Whether the core has a PMUv3: ID_AA64DFR0_EL1.PMUVer.
pub(crate) fn exist() -> bool {
    !matches!(mrs!("id_aa64dfr0_el1") >> 8 & 0xf, 0 | 0xf)
}

/// Counts cycles from zero.
pub(crate) fn start() {
    // SAFETY: the host uses no counter for anything else.
    unsafe {
        asm!("msr pmccfiltr_el0, xzr", "msr pmcntenset_el0, {cycles}", "msr pmcr_el0, {start}", "isb",
            cycles = in(reg) CYCLES, start = in(reg) START, options(nomem, nostack, preserves_flags));
    }
}

/// Stops; gives the cycles, and whether it was still counting.
pub(crate) fn stop() -> (u64, bool) {
    let (cycles, control) = (mrs!("pmccntr_el0"), mrs!("pmcr_el0"));
    // SAFETY: as above.
    unsafe {
        asm!("msr pmcr_el0, xzr", "msr pmcntenclr_el0, {cycles}", "isb", cycles = in(reg) CYCLES,
            options(nomem, nostack, preserves_flags));
    }
    (cycles, control & 1 == 1)
}
