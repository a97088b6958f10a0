// Entering a guest and coming back: a call that returns at the guest's next exception.
//
// While a guest is loaded VBAR_EL2 points to guest_vectors, or to forgetful_guest_vectors. While it runs SP_EL2 points to its
// registers, GuestRegs of world.rs, where EL2's own stack pointer is kept: nothing but this file runs
// in between. PC and PSTATE of the guest stay in ELR_EL2 and SPSR_EL2. Of the registers that a call
// must preserve only those are kept here that inline assembly can't name as lost.

.equ GUEST_EL2_SP, 264
.equ GUEST_FRAME, 32                    // x29, x30, x19, padding

.section .text.guest, "ax"

// u64 guest_enter(GuestRegs *registers): the vector's number. Loses x20 to x28, too.
.global guest_enter
guest_enter:
    stp     x29, x30, [sp, #-GUEST_FRAME]!
    str     x19, [sp, #16]
    mov     x1, sp
    str     x1, [x0, #GUEST_EL2_SP]
    mov     sp, x0
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x19, [sp, #144]
    ldp     x20, x21, [sp, #160]
    ldp     x22, x23, [sp, #176]
    ldp     x24, x25, [sp, #192]
    ldp     x26, x27, [sp, #208]
    ldp     x28, x29, [sp, #224]
    ldr     x30, [sp, #240]
    ldp     x0, x1, [sp]
    eret
    dsb     nsh                         // no speculation past the exception return
    isb

.macro from_guest, vector, forgets=0
    .balign 128                         // 32 instructions
    stp     x0, x1, [sp]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    str     x30, [sp, #240]
    .if \forgets
    forget_history x1
    .endif
    mov     x0, #\vector
    ldr     x1, [sp, #GUEST_EL2_SP]
    mov     sp, x1
    ldr     x19, [sp, #16]
    ldp     x29, x30, [sp], #GUEST_FRAME
    ret
.endm

.macro guest_vector_table, name, forgets
.balign 2048
.global \name
\name:
    eight_from_el2
    from_guest  8, \forgets
    from_guest  9, \forgets
    from_guest  10, \forgets
    from_guest  11, \forgets
    from_guest  12, \forgets
    from_guest  13, \forgets
    from_guest  14, \forgets
    from_guest  15, \forgets
    .balign 128
.endm

.section .text.vectors, "ax"
    guest_vector_table guest_vectors, 0
    guest_vector_table forgetful_guest_vectors, 1

.section .text.guest, "ax"

// Address translations for a guest: in x0 the address, out x0 PAR_EL1. Where a walk reads memory
// that answers with an error, AT takes an exception, which comes back behind it.
.global translations
translations:
// u64 translate_both(u64 address): both stages
.global translate_both
translate_both:
    at      s12e1r, x0
    b       1f
// u64 translate_first(u64 address): stage 1
.global translate_first
translate_first:
    at      s1e1r, x0
1:  isb
.global translations_end
translations_end:
    mrs     x0, par_el1
    ret

// u64 take_serror(void): completes the guest's accesses and takes the SError that they have caused,
// if one is pending, here, as the guest's HCR_EL2 routes it; not 0 if there was one.
.global take_serror
take_serror:
    dsb     sy
    isb
    mrs     x0, isr_el1
    ands    x0, x0, #1 << 8             // A: a physical SError is pending
    b.eq    1f
    msr     daifclr, #4
.global serror_window
serror_window:                          // taken behind the unmasking, at the latest behind the ISB
    isb
    msr     daifset, #4
.global serror_window_end
serror_window_end:
1:  ret

// FP and SIMD: 32 registers of 128 bits, then FPSR and FPCR. Writing a vector register clears what
// SVE has above it.
.arch_extension fp
.arch_extension simd

// void fp_save(FpState *)
.global fp_save
fp_save:
    stp     q0, q1, [x0, #0]
    stp     q2, q3, [x0, #32]
    stp     q4, q5, [x0, #64]
    stp     q6, q7, [x0, #96]
    stp     q8, q9, [x0, #128]
    stp     q10, q11, [x0, #160]
    stp     q12, q13, [x0, #192]
    stp     q14, q15, [x0, #224]
    stp     q16, q17, [x0, #256]
    stp     q18, q19, [x0, #288]
    stp     q20, q21, [x0, #320]
    stp     q22, q23, [x0, #352]
    stp     q24, q25, [x0, #384]
    stp     q26, q27, [x0, #416]
    stp     q28, q29, [x0, #448]
    stp     q30, q31, [x0, #480]
    mrs     x1, fpsr
    mrs     x2, fpcr
    str     x1, [x0, #512]
    str     x2, [x0, #520]
    ret

// void fp_load(const FpState *)
.global fp_load
fp_load:
    ldp     q0, q1, [x0, #0]
    ldp     q2, q3, [x0, #32]
    ldp     q4, q5, [x0, #64]
    ldp     q6, q7, [x0, #96]
    ldp     q8, q9, [x0, #128]
    ldp     q10, q11, [x0, #160]
    ldp     q12, q13, [x0, #192]
    ldp     q14, q15, [x0, #224]
    ldp     q16, q17, [x0, #256]
    ldp     q18, q19, [x0, #288]
    ldp     q20, q21, [x0, #320]
    ldp     q22, q23, [x0, #352]
    ldp     q24, q25, [x0, #384]
    ldp     q26, q27, [x0, #416]
    ldp     q28, q29, [x0, #448]
    ldp     q30, q31, [x0, #480]
    ldr     x1, [x0, #512]
    ldr     x2, [x0, #520]
    msr     fpsr, x1
    msr     fpcr, x2
    ret
.arch_extension nosimd
.arch_extension nofp
