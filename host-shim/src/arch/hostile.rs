//! Guests that look whether the host's attacks on a run reach them.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .rodata.guest, "a"
// Every register but x1, which is the device, is filled with its number below these bits.
    .set    PATTERN, 0x5ec2
    .macro  fill
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    mov     x\n, #PATTERN << 48
    add     x\n, x\n, #\n
    .endr
    mov     x1, #0x09000000
    .endm
// Writes to the device what is not as it was, of all registers; sp is in the guest's memory.
    .macro  differences
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    str     x\n, [sp, #8 * \n]
    .endr
    mov     x5, #0x09000000
    eor     x2, x1, x5
    .irp n, 0,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    ldr     x3, [sp, #8 * \n]
    mov     x4, #PATTERN << 48
    add     x4, x4, #\n
    eor     x3, x3, x4
    orr     x2, x2, x3
    .endr
    mov     x1, x5
    str     x2, [x1]
    .endm
    .macro  loaded instruction, register
    \instruction \register, [x1]
    str     x2, [x1, #8]
    .endm

// Leaves for a store, for WFI, for loads of every width; tells what a load gave, and which registers
// changed that should not. Its last load is never completed if the host resets it then.
    .balign 8
guest_resume:
    nop                                 // what a load that is completed here would step over
    .irp n, 2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    orr     x1, x1, x\n
    .endr
    mov     x2, #0x09000000
    str     x1, [x2]                    // all but x0 are zeros at the start
    mov     x3, #0x40000000
    add     x3, x3, #0x4000
    mov     sp, x3
    fill
    str     xzr, [x1]
    wfi
    differences
    loaded  ldrb, w2
    loaded  ldrsb, w2
    loaded  ldrsb, x2
    loaded  ldrh, w2
    loaded  ldrsh, w2
    loaded  ldrsh, x2
    loaded  ldr, w2
    loaded  ldrsw, x2
    loaded  ldr, x2
    fill
    ldrh    w5, [x1]
    mov     x5, #PATTERN << 48
    add     x5, x5, #5
    differences
    fill
    ldr     xzr, [x1]
    differences
    ldr     x2, [x1]
    str     x2, [x1, #8]
    b       .
    .balign 8
guest_resume_end:

// Says in its memory that it runs, and waits there to be let go; then counts: each exit is one more.
    .balign 8
guest_counter:
    mov     x1, #0x09000000
    mov     x2, #0x40000000
    add     x2, x2, #0x4000
    mov     x3, #1
    str     x3, [x2]
    dsb     sy
1:  ldr     x4, [x2, #64]
    cbz     x4, 1b
    mov     x0, xzr
2:  mov     x5, #4000
3:  subs    x5, x5, #1
    b.ne    3b
    add     x0, x0, #1
    str     x0, [x1]
    b       2b
    .balign 8
guest_counter_end:
    .purgem fill
    .purgem differences
    .purgem loaded
    .previous
"#
);

guests! {
    /// It tells what its loads gave, and whether registers changed that no load names.
    resume: guest_resume, guest_resume_end;

    /// It counts its exits.
    counter: guest_counter, guest_counter_end;
}
