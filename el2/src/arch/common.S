// Macros that EL2 and the host shim share: both are position-independent flat images.

// The arm64 Image header (Linux arm64 boot protocol); `\entry` is the first instruction's target.
.macro image_header, entry
    b       \entry
    .long   0
    .quad   0                           // text_offset: anywhere 2 MiB aligned
    .quad   __image_size
    .quad   0xa                         // little endian, 4 KiB pages, anywhere in memory
    .quad   0, 0, 0
    .ascii  "ARM\x64"
    .long   0
.endm

// Applies the image's relocations for where it runs, and zeroes its bss. MMU off.
// Clobbers x0 to x5.
.macro relocate_and_clear
    adrp    x0, __image_start
    adrp    x1, __rela_start
    add     x1, x1, :lo12:__rela_start
    adrp    x2, __rela_end
    add     x2, x2, :lo12:__rela_end
12: cmp     x1, x2
    b.hs    13f
    ldp     x3, x4, [x1], #16           // offset, info
    ldr     x5, [x1], #8                // addend
    cmp     w4, #1027                   // R_AARCH64_RELATIVE is the only kind that a static PIE has
    b.ne    12b
    add     x5, x5, x0
    str     x5, [x0, x3]
    b       12b
13: adrp    x1, __bss_start
    add     x1, x1, :lo12:__bss_start
    adrp    x2, __bss_end
    add     x2, x2, :lo12:__bss_end
14: cmp     x1, x2
    b.hs    15f
    stp     xzr, xzr, [x1], #16
    b       14b
15:
.endm

.equ FRAME, 272                         // x0..x30, a stack pointer, padding

.macro save_x2_to_x27
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
.endm

.macro restore_x2_to_x29
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
.endm

// Saves x2 to x30 of a frame whose x0 and x1 are saved.
.macro save_x2_to_x30
    save_x2_to_x27
    stp     x28, x29, [sp, #224]
    str     x30, [sp, #240]
.endm

// Restores the whole frame, drops it, and returns from the exception.
.macro restore_and_return
    restore_x2_to_x29
    ldr     x30, [sp, #240]
    ldp     x0, x1, [sp]
    add     sp, sp, #FRAME
    eret
    dsb     nsh                         // no speculation past the exception return
    isb
.endm
