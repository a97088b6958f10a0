//! Guests with translation tables where a walk meets trouble, for the scenarios.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .rodata.guest, "a"
    .balign 2048
guest_lost_tables:
    mov     x19, #0x09000000
    mov     x1, #0x40000000
    add     x1, x1, #0x10, lsl #12      // a table: the first GiB as a device, the second as memory
    mov     x2, #0x405
    str     x2, [x1]
    mov     x2, #0x0701
    movk    x2, #0x4000, lsl #16
    str     x2, [x1, #8]
    dsb     sy
    msr     ttbr0_el1, x1
    msr     ttbr1_el1, x0               // and one where x0 of the start says
    mov     x2, #25                     // 39 bits each, 4 KiB granules, 40-bit addresses
    movk    x2, #0x8019, lsl #16
    movk    x2, #2, lsl #32
    msr     tcr_el1, x2
    mov     x2, #0xff
    msr     mair_el1, x2
    isb
    mrs     x2, sctlr_el1
    orr     x2, x2, #1
    msr     sctlr_el1, x2
    isb
    adr     x2, 1f
    msr     vbar_el1, x2
    isb
    ldr     xzr, [x0]                   // its stage 2 comes with the first access, which aborts
    mov     x2, #0x77
    msr     tpidr_el0, x2
    msr     tpidrro_el0, x2
    mov     x0, #0x0180                 // the attributes of an address that the lost table is for
    movk    x0, #0xc600, lsl #16
    mov     x1, #0xffffff8000000000
    hvc     #0
    str     x0, [x19]
    mrs     x2, tpidr_el0
    mrs     x3, tpidrro_el0
    add     x2, x2, x3
    str     x2, [x19, #8]
    mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .
    .balign 2048
1:  .space  0x200                       // vectors: an abort of EL1 is stepped over
    mrs     x2, elr_el1
    add     x2, x2, #4
    msr     elr_el1, x2
    eret
    .balign 8
guest_lost_tables_end:

guest_access_flag:
    mov     x19, #0x09000000
    mov     x1, #0x40000000
    add     x1, x1, #0x10, lsl #12      // a table, as above
    mov     x2, #0x405
    str     x2, [x1]
    mov     x2, #0x0701
    movk    x2, #0x4000, lsl #16
    str     x2, [x1, #8]
    bic     x2, x2, #0x400
    str     x2, [x1, #16]               // the memory once more, its access flag clear
    dsb     sy
    msr     ttbr0_el1, x1
    mov     x2, #0x3519                 // 39 bits, write-back walks; no TTBR1; 40 bits; HA
    movk    x2, #0x0080, lsl #16
    movk    x2, #0x0082, lsl #32
    msr     tcr_el1, x2
    mov     x2, #0xff
    msr     mair_el1, x2
    isb
    mrs     x2, sctlr_el1
    orr     x2, x2, #1
    msr     sctlr_el1, x2
    isb
    str     xzr, [x19]                  // the table becomes read-only to the core meanwhile
    mov     x2, #0x80000000
    ldr     xzr, [x2]
    dsb     sy
    ldr     x2, [x1, #16]
    and     x2, x2, #0x400
    str     x2, [x19, #8]
    mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .
    .balign 8
guest_access_flag_end:
    .previous
"#
);

guests! {
    /// It has translation tables at the address in `x0`, asks EL2 to translate by them, writes the answer
    /// and its thread registers to the device, powers off.
    lost_tables: guest_lost_tables, guest_lost_tables_end;

    /// It lets the core set an access flag in its table, between two writes to the device; the second is
    /// the flag.
    access_flag: guest_access_flag, guest_access_flag_end;
}
