//! A guest of a few instructions, for the scenarios.

use core::arch::global_asm;

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

// Uses FP, and suspends itself into a state that loses its registers.
    .balign 8
guest_suspend:
    mov     x1, #3 << 20
    msr     cpacr_el1, x1               // FP for EL1
    isb
    fmov    d8, #4.0
    adr     x2, guest_suspend
    mov     x1, #1 << 16                // power down
    mov     x0, #0x0001                 // CPU_SUSPEND
    movk    x0, #0xc400, lsl #16
    hvc     #0
    b       .
    .balign 8
guest_suspend_end:
    .arch_extension nofp

// What its device at 0x0900_0000 says, forever: a command (0 off, 1 HVC, 2 load, 3 store), then x0 to
// x3, read by 8 bytes each. A load or store is at x1, of x0 or x2. Writes back x0, x1 (ESR_EL1 of an
// abort that a load or store took, or 0) and x2.
    .balign 2048
guest_remote:
    mov     x20, #0x09000000
    adr     x9, 9f
    msr     vbar_el1, x9
    isb
1:  ldr     x9, [x20]
    cbz     x9, 8f
    ldr     x0, [x20]
    ldr     x1, [x20]
    ldr     x2, [x20]
    ldr     x3, [x20]
    cmp     x9, #2
    b.eq    2f
    cmp     x9, #3
    b.eq    3f
    hvc     #0
    b       4f
2:  ldr     x0, [x1]
    mov     x1, xzr
    b       4f
3:  str     x2, [x1]
    mov     x1, xzr
4:  str     x0, [x20, #8]
    str     x1, [x20, #16]
    str     x2, [x20, #24]
    b       1b
8:  mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .
    .balign 2048
9:  .space  0x200
    mrs     x1, esr_el1                 // behind the access and the mov that follows it
    mrs     x10, elr_el1
    add     x10, x10, #8
    msr     elr_el1, x10
    eret
    .balign 8
guest_remote_end:

// Does one thing for each word that its device at 0x0900_0000 says, forever: bits 1:0 are 0 to store the
// word, 1 MEM_SHARE, 2 MEM_UNSHARE, 3 MEM_RELINQUISH; bits 13:8 the page, bits 17:16 the pages. Writes
// back what the call answered. Steps over an access that is aborted.
    .balign 2048
guest_storm:
    mov     x20, #0x09000000
    adr     x9, 9f
    msr     vbar_el1, x9
    isb
1:  ldr     x9, [x20]
    ubfx    x10, x9, #8, #6
    mov     x1, #0x40000000
    add     x1, x1, x10, lsl #12
    ubfx    x2, x9, #16, #2
    ands    x11, x9, #3
    b.eq    3f
    mov     w0, #9                      // MEM_RELINQUISH
    cmp     x11, #3
    b.eq    2f
    add     w0, w11, #2                 // MEM_SHARE, MEM_UNSHARE
2:  movk    w0, #0xc600, lsl #16
    mov     x3, xzr
    hvc     #0
    str     x0, [x20, #8]
    b       1b
3:  str     x9, [x1]
    b       1b
    .balign 2048
9:  .space  0x200
    mrs     x10, elr_el1
    add     x10, x10, #4
    msr     elr_el1, x10
    eret
    .balign 8
guest_storm_end:

// Tells its device what it finds in FP and SIMD registers that it has never used, all of it ored; fills
// them; tells what is not as it was behind that exit; powers off.
    .arch_extension fp
    .arch_extension simd
    .balign 8
guest_fp:
    mov     x19, #0x09000000
    mov     x1, #3 << 20
    msr     cpacr_el1, x1
    isb
    mrs     x0, fpcr
    mrs     x2, fpsr
    orr     x0, x0, x2
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    fmov    x2, d\n
    orr     x0, x0, x2
    fmov    x2, v\n\().d[1]
    orr     x0, x0, x2
    .endr
    mov     x3, #0x5ec2000000000000
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    add     x2, x3, #\n
    fmov    d\n, x2
    fmov    v\n\().d[1], x2
    .endr
    mov     x2, #0x800000               // FPCR.RMode
    msr     fpcr, x2
    mov     x2, #1                      // FPSR.IOC
    msr     fpsr, x2
    str     x0, [x19]
    mrs     x0, fpcr
    eor     x0, x0, #0x800000
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    add     x4, x3, #\n
    fmov    x2, d\n
    eor     x2, x2, x4
    orr     x0, x0, x2
    fmov    x2, v\n\().d[1]
    eor     x2, x2, x4
    orr     x0, x0, x2
    .endr
    str     x0, [x19, #8]
    mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .
    .balign 8
guest_fp_end:
    .arch_extension nosimd
    .arch_extension nofp

// Turns its MMU and caches on, by the table that x0 names, and powers off.
    .balign 8
guest_caches:
    mov     x1, #0xff                   // MAIR: write-back
    msr     mair_el1, x1
    mov     x1, #0x3519                 // TCR: 39 bits from TTBR0, walks write-back; TTBR1 is off
    movk    x1, #0x0080, lsl #16
    msr     tcr_el1, x1
    msr     ttbr0_el1, x0
    isb
    mrs     x1, sctlr_el1
    mov     x2, #0x1005                 // I, C, M
    orr     x1, x1, x2
    msr     sctlr_el1, x1
    isb
    mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .
    .balign 8
guest_caches_end:

// Waits for interrupts on a GIC of version x0, all masked in PSTATE: ISR_EL1 shows them. Tells its device at
// 0x0900_0000: whether its timer's interrupt came (8), whether shared interrupt 40 came (16), how many
// ticks a WFI took that a timer set 1/64 s ahead ends (24), and how many 1/64 s are.
    .balign 8
guest_interrupts:
    mov     x19, x0
    mov     x20, #0x09000000
    mov     x21, #0x08000000            // GICD: both groups on, interrupt 40 on, of group 1 and for vCPU 0
    mov     w1, #3
    str     w1, [x21]
    mov     w2, #0x100
    str     w2, [x21, #0x104]
    mov     w3, #1 << 27                // PPI 27, the virtual timer's
    cmp     x19, #3
    b.eq    1f
    mov     w1, #1
    strb    w1, [x21, #0x828]
    str     w3, [x21, #0x100]
    mov     x22, #0x08010000            // GICC
    mov     w1, #1
    str     w1, [x22]
    mov     w1, #0xff
    str     w1, [x22, #4]
    b       2f
1:  str     w2, [x21, #0x84]
    mov     x22, #0x080b0000            // GICR, second frame
    str     w3, [x22, #0x80]
    str     w3, [x22, #0x100]
    mov     x1, #0xff
    msr     s3_0_c4_c6_0, x1            // ICC_PMR_EL1
    mov     x1, #1
    msr     s3_0_c12_c12_7, x1          // ICC_IGRPEN1_EL1
    isb
2:  mrs     x23, cntfrq_el0
    lsr     x24, x23, #6
    isb
    mrs     x1, cntvct_el0
    add     x1, x1, x24
    msr     cntv_cval_el0, x1
    mov     x1, #1
    msr     cntv_ctl_el0, x1
    bl      7f
    msr     cntv_ctl_el0, xzr
    isb
    str     x0, [x20, #8]               // And EL2 sees that the timer is quiet
    bl      7f
    str     x0, [x20, #16]
    cmp     x19, #3                     // Nothing may interrupt: the timer's is asserted, and stays in
    b.eq    3f                          // its list register
    str     wzr, [x22, #4]
    b       4f
3:  msr     s3_0_c4_c6_0, xzr
4:  isb
    mrs     x2, cntvct_el0
    msr     cntv_cval_el0, x2
    mov     x1, #1
    msr     cntv_ctl_el0, x1
    add     x2, x2, x24
5:  isb
    mrs     x1, cntvct_el0
    cmp     x1, x2
    b.lo    5b
    add     x2, x1, x24                 // And is asserted anew when this has passed
    msr     cntv_cval_el0, x2
6:  isb
    wfi
    isb
    mrs     x3, cntvct_el0              // It may wake for nothing
    cmp     x3, x2
    b.lo    6b
    sub     x2, x3, x1
    str     x2, [x20, #24]
    str     x24, [x20, #32]
    mov     x0, #0x0008                 // SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    hvc     #0
    b       .

// x0: whether an interrupt is pending within eight seconds.
7:  mrs     x5, cntvct_el0
    add     x5, x5, x23, lsl #3
8:  mrs     x4, cntvct_el0
    mrs     x0, isr_el1
    ubfx    x0, x0, #7, #1
    cbnz    x0, 9f
    cmp     x4, x5
    b.lo    8b
9:  ret
    .balign 8
guest_interrupts_end:
    .previous
"#
);

guests! {
    /// It waits for interrupts, and tells its device which ones came; `x0` is the version of its GIC.
    interrupts: guest_interrupts, guest_interrupts_end;

    /// It does what its device tells it to, until that says off.
    remote: guest_remote, guest_remote_end;

    /// It does a thing with its memory for each word that its device says.
    storm: guest_storm, guest_storm_end;

    /// It tells what it finds in its FP registers, and whether they survive.
    fp: guest_fp, guest_fp_end;

    /// It turns its caches on, by the table of one level that `x0` names, and powers off.
    caches: guest_caches, guest_caches_end;

    /// It uses FP and suspends itself.
    suspend: guest_suspend, guest_suspend_end;

    /// It writes and reads a device at 0x0900_0000, asks for PSCI's version, uses FP, powers off.
    hello: guest_hello, guest_hello_end;
}
