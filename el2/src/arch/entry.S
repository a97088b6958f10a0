// Entry into EL2: the arm64 Image header, the boot core twice (where the boot loader put us, then
// where we put ourselves), the secondary cores, and the way down to the host.
//
// Until enable_mmu the MMU and the data cache are off. The code is position independent:
// it is linked at 0 and applies its own relocations.
//
// What stands in .boot.* runs once and is the host's memory later (docs/boot.md); .text stays.

.equ SCTLR_EL2_OFF, 0x30c50830          // RES1 bits of Armv8.0; MMU, caches, alignment checks off
.equ HCR_EL2_BOOT, 1 << 31              // RW: EL1 is AArch64; E2H and TGE clear: nVHE

.section .boot.head, "ax"
.global _start
_start:
    image_header primary

// In: x0 = device tree.
primary:
    mrs     x1, cntpct_el0              // when we were entered
    mov     x2, xzr
// In: x0 = device tree, x1 = entry ticks, x2 = 0; or, once placed: x0 = what the first entry left
// for the second, x2 = size of EL2's memory.
.global placed
placed:
    msr     daifset, #0xf
    mov     x19, x0
    mov     x20, x1
    mov     x21, x2
    mrs     x22, CurrentEL
    cmp     x22, #(2 << 2)
    b.ne    1f
    bl      init_el2_core
1:  relocate_and_clear
    adrp    x1, __boot_stack_top
    add     x1, x1, :lo12:__boot_stack_top
    mov     sp, x1
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    mov     x1, x20
    mov     x2, x21
    mov     x3, x22
    bl      boot_primary                // does not return
    brk     #1

// In: x0 = new stack top, x1 = argument of boot_main, which does not return.
.global switch_stack
switch_stack:
    mov     sp, x0
    mov     x0, x1
    mov     x29, xzr
    mov     x30, xzr
    b       boot_main

// In: x0 = entry, x1 to x3 = what `placed` takes in x0 to x2.
.global jump_placed
jump_placed:
    mov     x4, x0
    mov     x0, x1
    mov     x1, x2
    mov     x2, x3
    br      x4

.section .text.entry, "ax"
// Puts this core's EL2 into a known state: MMU off, no traps, our vectors. Clobbers x9.
init_el2_core:
    ldr     x9, =SCTLR_EL2_OFF
    msr     sctlr_el2, x9
    // What newer cores add to EL2's own regime is off. Firmware may have left it on, or at its reset
    // value, which is unknown: it changes what tables, stacks and errors mean (Arm ARM D24.2).
    mrs     x9, s3_0_c0_c7_3            // ID_AA64MMFR3_EL1; reads as zero where it is not defined
    tst     x9, #0xf                    // TCRX
    b.eq    1f
    msr     s3_4_c2_c0_3, xzr           // TCR2_EL2: no permission indirection or overlays, no 128-bit tables
1:  tst     x9, #0xf0                   // SCTLRX
    b.eq    2f
    msr     s3_4_c1_c0_3, xzr           // SCTLR2_EL2
2:  mrs     x9, id_aa64pfr1_el1
    tst     x9, #(0xf << 44)            // GCS
    b.eq    3f
    msr     s3_4_c2_c5_0, xzr           // GCSCR_EL2: returns are not checked against a stack that nobody has set up
3:
    mov     x9, #HCR_EL2_BOOT
    msr     hcr_el2, x9
    mov     x9, #0x33ff                 // CPTR_EL2: RES1 bits, nothing of EL2's own trapped but SVE
    msr     cptr_el2, x9
    msr     tpidr_el2, xzr
    adrp    x9, vectors
    add     x9, x9, :lo12:vectors
    msr     vbar_el2, x9
    msr     spsel, #1
    isb
    ret

// A secondary core, from PSCI CPU_ON or from its spin table. Its registers mean nothing.
.global secondary_entry
secondary_entry:
    msr     daifset, #0xf
    mrs     x0, CurrentEL
    cmp     x0, #(2 << 2)
    b.ne    9f
    bl      init_el2_core
    mrs     x0, mpidr_el1
    ldr     x1, =0xff00ffffff           // Aff3..Aff0
    and     x0, x0, x1
    adrp    x1, SECONDARY_BOOT
    add     x1, x1, :lo12:SECONDARY_BOOT
    ldp     x2, x3, [x1, #32]           // table of CPUs, its length
1:  cbz     x3, 9f
    ldp     x4, x5, [x2], #16           // affinity, CPU data
    sub     x3, x3, #1
    cmp     x4, x0
    b.ne    1b
    ldp     x0, x6, [x1]                // ttbr0, tcr
    ldp     x2, x3, [x1, #16]           // mair, sctlr
    mov     x1, x6
    bl      enable_mmu
    msr     tpidr_el2, x5
    ldr     x9, [x5, #0]                // CpuData.stack_top
    mov     sp, x9
    mov     x29, xzr
    mov     x30, xzr
    bl      boot_secondary              // does not return
9:  wfe
    b       9b

// In: x0 = TTBR0_EL2, x1 = TCR_EL2, x2 = MAIR_EL2, x3 = SCTLR_EL2. Everything that runs and the
// stack are identity mapped. Arm ARM D8.2.1: invalidate before enabling.
.global enable_mmu
enable_mmu:
    msr     ttbr0_el2, x0
    msr     tcr_el2, x1
    msr     mair_el2, x2
    isb
    tlbi    alle2
    dsb     nsh
    ic      iallu
    dsb     nsh
    isb
    msr     sctlr_el2, x3
    isb
    ret

// Ends boot, on an empty stack: nothing of boot's is needed any more, not even a return address.
// In: x0 = this CPU's stack top, x1 and x2 = the host's entry and its x0.
.global leave_boot
leave_boot:
    mov     sp, x0
    mov     x0, x1
    mov     x1, x2
    mov     x29, xzr
    mov     x30, xzr
    b       boot_is_over                // does not return

// Enters EL1. In: x0 = this CPU's stack top, x1 = the host's x0. ELR_EL2 and SPSR_EL2 are set.
// No register of EL2's leaks to the host.
.global enter_el1
enter_el1:
    mov     sp, x0
    mov     x0, x1
    mov     x1, xzr
    .irp n, 2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    mov     x\n, xzr
    .endr
    eret
    dsb     nsh                         // no speculation past the exception return
    isb

// Boot's stack is el2.ld's. A fault before this core has its data is reported on this one.
.section .bss.early_emergency, "aw", @nobits
.balign 4096
    .space  8192
.global early_emergency_top
early_emergency_top:
