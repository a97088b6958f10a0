// Entry of the host at EL1, MMU off: the boot core and the cores that it turns on.

.section .text.head, "ax"
.global _start
_start:
    image_header primary

// In: x0 = device tree.
primary:
    mov     x19, x0
    relocate_and_clear
    bl      set_vectors
    adrp    x1, boot_stack_top
    add     x1, x1, :lo12:boot_stack_top
    mov     sp, x1
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    bl      shim_main                   // does not return
    brk     #1

set_vectors:
    adrp    x9, vectors
    add     x9, x9, :lo12:vectors
    msr     vbar_el1, x9
    msr     spsel, #1
    isb
    ret

// A core that CPU_ON started. In: x0 = its CpuStart: stack_top, ttbr0, tcr, mair, sctlr, number.
.global secondary_start
secondary_start:
    mov     x19, x0
    bl      set_vectors
    ldr     x1, [x19]
    mov     sp, x1
    ldp     x0, x1, [x19, #8]
    ldp     x2, x3, [x19, #24]
    bl      enable_mmu
    ldr     x0, [x19, #40]
    mov     x29, xzr
    mov     x30, xzr
    bl      shim_secondary              // does not return
    brk     #1

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

// Turns the MMU and caches off and enters a kernel as the arm64 boot protocol says.
// In: x0 = kernel, x1 = device tree. What is needed is clean to the point of coherency.
.global enter_kernel
enter_kernel:
    msr     daifset, #0xf
    mrs     x2, sctlr_el1
    mov     x3, #0x1005                 // M, C, I
    bic     x2, x2, x3
    msr     sctlr_el1, x2
    isb
    ic      iallu
    tlbi    vmalle1
    dsb     nsh
    isb
    mov     x4, x0
    mov     x0, x1
    mov     x1, xzr
    mov     x2, xzr
    mov     x3, xzr
    br      x4

.section .text.vectors, "ax"
.balign 2048
.global vectors
vectors:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    .balign 128
    sub     sp, sp, #FRAME
    stp     x0, x1, [sp]
    mov     x1, #\n
    b       exception_common
    .endr
    .balign 128

exception_common:
    save_x2_to_x30
    mov     x0, sp
    bl      shim_exception
    restore_and_return

.section .bss.stacks, "aw", @nobits
.balign 4096
    .space  65536
boot_stack_top:
