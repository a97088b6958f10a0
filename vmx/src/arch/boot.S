# From the BIOS to 64-bit mode, on the boot CPU and on the others.
#
#   0x01000  memory map of the BIOS: count (u32), entries of 24 bytes from 0x01010 on
#   0x07c00  sector 0 (loaded by the BIOS), then seven more (loaded by sector 0); 0x08000 other CPUs
#   0x20000  bounce buffer of the BIOS's disk reads
#   1 MiB    the hypervisor            32 MiB   the payload

    .set SECTORS_BOOT, 8
    .set SECTORS_CHUNK, 64
    .set MEMORY_MAP, 0x1000
    .set BOUNCE, 0x20000
    .set HYPERVISOR, 0x100000
    .set PAYLOAD, 0x2000000

    .section .boot, "awx"
    .code16
    .globl boot_start
boot_start:
    cli
    cld
    ljmp $0, $1f
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
    movb %dl, boot_drive
    movw $(SECTORS_BOOT - 1), packet_count
    movw $0x7e00, packet_offset
    movl $1, packet_lba
    call read_packet
    jmp second_stage

# Reads what `packet` describes; on an error says so and stops.
read_packet:
    movb boot_drive, %dl
    movw $packet, %si
    movb $0x42, %ah                 # extended read
    int $0x13
    jc 1f
    ret
1:  movw $message_disk, %si
    # falls through

# Prints the text at SI on COM1 and on the screen, and stops.
say_and_stop:
1:  lodsb
    testb %al, %al
    jz 2f
    movw $0x3f8, %dx
    outb %al, %dx
    movb $0x0e, %ah
    movw $7, %bx
    int $0x10
    jmp 1b
2:  hlt
    jmp 2b

message_disk: .asciz "ravelin: fatal: cannot read the disk\r\nravelin: halted\r\n"

    .balign 4
packet:         .byte 16, 0
packet_count:   .word 0
packet_offset:  .word 0
packet_segment: .word 0
packet_lba:     .long 0, 0
boot_drive:     .byte 0

# What the image tool fills in.
    .org 0x190
    .ascii "RAVELIN1"
hypervisor_sectors: .long 0
payload_sectors:    .long 0
    .globl boot_payload_bytes
boot_payload_bytes: .long 0

    .org 510
    .word 0xaa55

second_stage:
    movw $0x2401, %ax               # A20 on
    int $0x15
    call read_memory_map
    movl $SECTORS_BOOT, packet_lba
    movl hypervisor_sectors, %ebp
    movl $HYPERVISOR, %edi
    call read_high
    movl payload_sectors, %ebp
    movl $PAYLOAD, %edi
    call read_high
    cli
    lgdt gdt_pointer
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x08, $protected_boot

# BIOS INT 15h E820 into MEMORY_MAP.
read_memory_map:
    movl $0, MEMORY_MAP
    xorl %ebx, %ebx
    movw $(MEMORY_MAP + 0x10), %di
1:  movl $0xe820, %eax
    movl $0x534d4150, %edx          # "SMAP"
    movl $24, %ecx
    int $0x15
    jc 2f
    cmpl $0x534d4150, %eax
    jne 2f
    incl MEMORY_MAP
    addw $24, %di
    cmpl $128, MEMORY_MAP
    jae 2f
    testl %ebx, %ebx
    jnz 1b
2:  ret

# Reads EBP sectors from `packet_lba` on to the physical address EDI, above 1 MiB.
read_high:
1:  testl %ebp, %ebp
    jz 3f
    movl $SECTORS_CHUNK, %ecx
    cmpl %ecx, %ebp
    jae 2f
    movl %ebp, %ecx
2:  movw %cx, packet_count
    movw $0, packet_offset
    movw $(BOUNCE >> 4), packet_segment
    pushl %ecx
    pushl %edi
    call read_packet
    popl %edi
    popl %ecx
    subl %ecx, %ebp
    addl %ecx, packet_lba
    shll $7, %ecx                   # sectors to 32-bit words
    call copy_high
    jmp 1b
3:  ret

# Copies ECX words from BOUNCE to EDI and moves EDI on. Segment limits beyond 64 KiB come from a short visit
# to protected mode; the BIOS may have undone them in between.
copy_high:
    cli
    pushw %ds
    pushw %es
    lgdt gdt_pointer
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    movw $0x10, %bx
    movw %bx, %ds
    movw %bx, %es
    andb $0xfe, %al
    movl %eax, %cr0
    xorw %bx, %bx
    movw %bx, %ds
    movw %bx, %es
    movl $BOUNCE, %esi
    .byte 0x67                      # 32-bit addresses
    rep movsl
    popw %es
    popw %ds
    sti
    ret

# Where the other CPUs start, by a start-up IPI with vector 8.
    .org 0x400
    .globl boot_other
boot_other:
    cli
    ljmp $0, $1f
1:  xorw %ax, %ax
    movw %ax, %ds
    lgdt gdt_pointer
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x08, $protected_other

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff        # 0x08 32-bit code
    .quad 0x00cf92000000ffff        # 0x10 data
    .quad 0x00af9a000000ffff        # 0x18 64-bit code
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

# There is no stack yet on the other CPUs, hence macros.
.macro FLAT_SEGMENTS
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs
.endm

# Long mode with caches on: CR0.CD and CR0.NW are clear whatever the firmware left.
.macro ENABLE_PAGING
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx          # EFER
    rdmsr
    orl $0x900, %eax                # LME, NXE
    wrmsr
    movl %cr0, %eax
    andl $0x9ffffff3, %eax          # not CD, NW, TS, EM
    orl $0x80010023, %eax           # PG, WP, NE, MP, PE
    movl %eax, %cr0
.endm

    .section .text.entry, "ax"
    .code32
protected_boot:
    FLAT_SEGMENTS
    movl $__bss_start, %edi
    movl $__image_end, %ecx
    subl %edi, %ecx
    shrl $2, %ecx
    xorl %eax, %eax
    rep stosl
    # The first 4 GiB one to one, in 2 MiB pages.
    movl $(boot_pdpt + 3), boot_pml4
    movl $(boot_pd + 3), %eax
    movl $boot_pdpt, %edi
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    loop 1b
    movl $0x83, %eax
    movl $boot_pd, %edi
    movl $2048, %ecx
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 2b
    ENABLE_PAGING
    ljmp $0x18, $3f
    .code64
3:  leaq boot_stack_top(%rip), %rsp
    xorl %ebp, %ebp
    call boot_main
    ud2

    .code32
protected_other:
    FLAT_SEGMENTS
    ENABLE_PAGING
    ljmp $0x18, $1f
    .code64
1:  movl $1, %edi
    lock xaddl %edi, other_cpus(%rip)
    cmpl $other_stacks_count, %edi
    jae 2f
    leal 1(%rdi), %eax
    shlq $15, %rax                  # 32 KiB each
    leaq other_stacks(%rip), %rsp
    addq %rax, %rsp
    incl %edi                       # the boot CPU is number 0
    xorl %ebp, %ebp
    call other_main
    ud2
2:  hlt                             # one CPU too many
    jmp 2b

    .section .bss
    .balign 4096
boot_pml4:  .skip 4096
boot_pdpt:  .skip 4096
boot_pd:    .skip 4 * 4096
boot_stack: .skip 65536
boot_stack_top:
    .set other_stacks_count, 7
other_stacks: .skip other_stacks_count * 32768
    .globl other_cpus
other_cpus: .skip 4
