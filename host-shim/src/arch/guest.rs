//! A guest of a few instructions, for the scenarios.

use core::arch::global_asm;
use core::slice;

global_asm!(
    r#"
    .section .rodata.guest, "a"
    .arch_extension fp
    .balign 8
guest_hello:
    mov     x19, #0x09000000
    str     w0, [x19]                   // x0 of the start
    ldr     w1, [x19, #0x18]
    add     w1, w1, #1
    strb    w1, [x19, #4]
    mov     x0, #0x84000000             // PSCI_VERSION
    hvc     #0
    str     x0, [x19, #8]
    mov     x1, #3 << 20
    msr     cpacr_el1, x1               // FP for EL1
    isb
    fmov    d0, #4.0
    fmov    x1, d0
    str     x1, [x19, #16]
    mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .
    .balign 8
guest_hello_end:
    .arch_extension nofp
    .previous
"#
);

unsafe extern "C" {
    static guest_hello: u8;
    static guest_hello_end: u8;
}

/// It writes and reads a device at 0x0900_0000, asks for PSCI's version, uses FP, powers off.
pub(crate) fn hello() -> &'static [u8] {
    let (start, end) = (&raw const guest_hello, &raw const guest_hello_end);
    // SAFETY: the two symbols enclose the code, in read-only data.
    unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }
}
