// The sixteen exception vectors of EL2 (Arm ARM D1.3.1).
//
// From a lower level: the general registers go onto this CPU's stack, which is empty then.
// From EL2 itself: always a defect (or an expected fault of a probe at boot), reported from the
// CPU's emergency stack, since the stack itself may be what overflowed.

.equ CPU_EMERGENCY_TOP, 8               // CpuData.emergency_top
.equ CPU_HISTORY, 16                    // CpuData.history, at least 1 where this is used

// Replaces what branches of a lower level have left in the branch history, before EL2's first indirect
// branch: by CLRBHB, which is a hint that other cores ignore, and by as many taken branches as the
// core's history holds. Loses the register and the flags.
.macro forget_history, count
    mrs     \count, tpidr_el2
    ldr     \count, [\count, #CPU_HISTORY]
    hint    #22                         // CLRBHB
1:  b       2f
2:  subs    \count, \count, #1
    b.ne    1b
    dsb     nsh                         // no speculation past the loop
    isb
.endm

.macro from_lower, vector, forgets=0
    .balign 128
    sub     sp, sp, #FRAME
    stp     x0, x1, [sp]
    .if \forgets
    forget_history x1
    .endif
    mov     x1, #\vector
    b       lower_common
.endm

.macro from_el2, vector
    .balign 128
    // Both registers are EL0's, which never runs again unless this was a probe at boot, or is what
    // windows.rs expects, which puts them back.
    msr     tpidrro_el0, x30
    msr     tpidr_el0, x29
    mov     x30, #\vector
    b       el2_common
.endm

.macro eight_from_el2
    from_el2    0
    from_el2    1
    from_el2    2
    from_el2    3
    from_el2    4
    from_el2    5
    from_el2    6
    from_el2    7
.endm

.macro vector_table, name, forgets
.balign 2048
.global \name
\name:
    eight_from_el2
    from_lower  8, \forgets
    from_lower  9, \forgets
    from_lower  10, \forgets
    from_lower  11, \forgets
    from_lower  12, \forgets
    from_lower  13, \forgets
    from_lower  14, \forgets
    from_lower  15, \forgets
    .balign 128
.endm

.section .text.vectors, "ax"
    vector_table vectors, 0
    vector_table forgetful_vectors, 1

// The tables of this file and guest.S are together, at el2.ld's first address: no gap for their alignment.
.section .text.lower, "ax"

lower_common:
    save_x2_to_x30
    mov     x29, xzr                    // a backtrace ends here
    mov     x30, xzr
    mov     x0, sp
    bl      exception_from_lower
    restore_and_return

el2_common:
    mrs     x29, tpidr_el2
    cbz     x29, 1f
    ldr     x29, [x29, #CPU_EMERGENCY_TOP]
    b       2f
1:  adrp    x29, early_emergency_top
    add     x29, x29, :lo12:early_emergency_top
2:  sub     x29, x29, #FRAME
    stp     x0, x1, [x29]
    mov     x0, sp
    str     x0, [x29, #248]
    mov     sp, x29
    save_x2_to_x27
    mov     x1, x30                     // vector
    mrs     x29, tpidr_el0
    mrs     x30, tpidrro_el0
    stp     x28, x29, [sp, #224]
    str     x30, [sp, #240]
    mov     x0, sp
    bl      exception_from_el2          // returns only after an expected fault
    restore_x2_to_x29
    ldr     x30, [sp, #248]
    msr     tpidr_el0, x30              // the interrupted SP, on its way
    ldr     x30, [sp, #240]
    ldp     x0, x1, [sp]
    msr     tpidrro_el0, x0
    mrs     x0, tpidr_el0
    mov     sp, x0
    mrs     x0, tpidrro_el0
    eret
    dsb     nsh
    isb
