// Entry at EL1 with the MMU off, on the boot CPU and on those that CPU_ON starts; the vectors.

.equ STACK, 16384
.equ FRAME, 272                         // x0 to x30, ELR_EL1, SPSR_EL1, and 8 bytes unused

.section .text.head, "ax"
.global _start
_start:                                 // x0 = device tree
    msr     daifset, #0xf
    ldr     x1, =__bss_start
    ldr     x2, =__bss_end
1:  cmp     x1, x2
    b.hs    2f
    stp     xzr, xzr, [x1], #16
    b       1b
2:  mov     x20, x0
    mov     x0, xzr
    bl      set_up
    mov     x0, x20
    bl      guest_main                  // does not return
    brk     #1

.global secondary_entry
secondary_entry:                        // x0 = index of the CPU
    msr     daifset, #0xf
    mov     x20, x0
    bl      set_up
    mov     x0, x20
    bl      guest_secondary             // does not return
    brk     #1

set_up:                                 // x0 = index: its stack, and the vectors
    ldr     x1, =stacks
    add     x0, x0, #1
    mov     x2, #STACK
    madd    x1, x0, x2, x1
    msr     spsel, #1
    mov     sp, x1
    ldr     x1, =vectors
    msr     vbar_el1, x1
    isb
    mov     x29, xzr
    ret

.balign 2048
vectors:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    .balign 128
    sub     sp, sp, #FRAME
    stp     x0, x1, [sp]
    mov     x1, #\n
    b       exception
    .endr
    .balign 128

exception:
    .irp n, 2,4,6,8,10,12,14,16,18,20,22,24,26,28
    str     x\n, [sp, #8 * \n]
    .endr
    .irp n, 3,5,7,9,11,13,15,17,19,21,23,25,27,29
    str     x\n, [sp, #8 * \n]
    .endr
    mrs     x2, elr_el1
    mrs     x3, spsr_el1
    str     x30, [sp, #240]
    stp     x2, x3, [sp, #248]
    mov     x0, sp
    bl      guest_exception
    ldp     x2, x3, [sp, #248]
    msr     elr_el1, x2
    msr     spsr_el1, x3
    .irp n, 2,4,6,8,10,12,14,16,18,20,22,24,26,28,30
    ldr     x\n, [sp, #8 * \n]
    .endr
    .irp n, 3,5,7,9,11,13,15,17,19,21,23,25,27,29
    ldr     x\n, [sp, #8 * \n]
    .endr
    ldp     x0, x1, [sp]
    add     sp, sp, #FRAME
    eret

// In: x0 = TTBR0_EL1, x1 = TCR_EL1, x2 = MAIR_EL1, x3 = SCTLR_EL1.
.global enable_mmu
enable_mmu:
    msr     ttbr0_el1, x0
    msr     tcr_el1, x1
    msr     mair_el1, x2
    isb
    tlbi    vmalle1
    dsb     nsh
    ic      iallu
    dsb     nsh
    isb
    msr     sctlr_el1, x3
    isb
    ret

.section .bss.stacks, "aw", @nobits
.balign 4096
.global stacks
stacks:
    .space  8 * STACK
