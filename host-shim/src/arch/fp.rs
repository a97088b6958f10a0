//! The host's own FP and SIMD registers, which it uses for nothing: to see whether a guest's run changes them.

use core::arch::{asm, global_asm};

use super::mrs;

global_asm!(
    r#"
    .pushsection .text.fp, "ax"
    .arch_extension fp
    .arch_extension simd

// Fills all of them with x0 and their number.
.global fp_fill
fp_fill:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    add     x1, x0, #\n
    fmov    d\n, x1
    fmov    v\n\().d[1], x1
    .endr
    mov     x1, #0x400000               // FPCR.RMode
    msr     fpcr, x1
    mov     x1, #2                      // FPSR.DZC
    msr     fpsr, x1
    ret

// Gives what is not as `fp_fill` has left it, ored.
.global fp_difference
fp_difference:
    mrs     x2, fpcr
    eor     x2, x2, #0x400000
    mrs     x1, fpsr
    eor     x1, x1, #2
    orr     x2, x2, x1
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    add     x3, x0, #\n
    fmov    x1, d\n
    eor     x1, x1, x3
    orr     x2, x2, x1
    fmov    x1, v\n\().d[1]
    eor     x1, x1, x3
    orr     x2, x2, x1
    .endr
    mov     x0, x2
    ret
    .arch_extension nosimd
    .arch_extension nofp
    .popsection
"#
);

unsafe extern "C" {
    fn fp_fill(seed: u64);
    fn fp_difference(seed: u64) -> u64;
}

/// Lets this core use the registers.
fn open() {
    let enabled = mrs!("cpacr_el1") | 3 << 20;
    // SAFETY: nothing of the host traps on its use of FP, since it has none.
    unsafe { asm!("msr cpacr_el1, {}", "isb", in(reg) enabled, options(nostack)) };
}

/// Fills all registers.
pub(crate) fn fill(seed: u64) {
    open();
    // SAFETY: the host is built without FP: nobody has anything in these registers.
    unsafe { fp_fill(seed) };
}

/// Whether they are as they were filled.
pub(crate) fn is_kept(seed: u64) -> bool {
    open();
    // SAFETY: as above; they are only read.
    unsafe { fp_difference(seed) == 0 }
}
