# Programs that run as guests. Each is copied to where its comment says and reaches data by address.
    .section .rodata.guests, "a"

# At 0x8000, 64-bit mode, first GiB mapped one to one: does what its owner tells it. RAX selects the operation,
# RBX and RCX are its arguments; then VMCALL with RAX = 0, or the vector of the exception it raised, and RDX = result.
    .balign 16
    .globl guest_driven, guest_driven_end
guest_driven:
    .code64
    lidt 0x600
    xorl %eax, %eax
next:
    movl $0x7000, %esp
    vmcall
    leaq operations(%rip), %r14
    movslq (%r14,%rax,4), %rax
    addq %r14, %rax
    jmp *%rax
done:
    xorl %eax, %eax
    jmp next

    .org guest_driven + 0x80            # exception 13
    movl $13, %eax
    jmp next
    .org guest_driven + 0x90            # exception 6
    movl $6, %eax
    jmp next
    .org guest_driven + 0xa0            # exception 14
    movl $14, %eax
    jmp next
    .org guest_driven + 0xb0            # interrupt 0x50
    pushq %rax
    pushq %rcx
    pushq %rdx
    incq 0x700
    movl $0x80b, %ecx                   # end of interrupt
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
    iretq

    .balign 4
operations:
    .long op_load - operations, op_store - operations, op_call - operations
    .long op_rdmsr - operations, op_wrmsr - operations
    .long op_cr0 - operations, op_cr4 - operations, op_cr8 - operations
    .long op_cpuid - operations, op_in - operations, op_out - operations
    .long op_vmxon - operations, op_wait - operations, op_halt - operations
    .long op_count - operations, op_nothing - operations, op_triple - operations
    .long op_touch - operations, op_wbinvd - operations, op_spin - operations
    .long op_rounds - operations, op_debug - operations, op_outs - operations
    .long op_lmsw - operations, op_clts - operations
op_load:
    movq (%rbx), %rdx
    jmp done
op_store:
    movq %rcx, (%rbx)
    jmp done
op_call:
    call *%rbx
    jmp done
op_rdmsr:
    rdmsr
    shlq $32, %rdx
    orq %rax, %rdx
    jmp done
op_wrmsr:
    movq %rbx, %rax
    movq %rbx, %rdx
    shrq $32, %rdx
    wrmsr
    jmp done
op_cr0:
    movq %rbx, %cr0
    movq %cr0, %rdx
    jmp done
op_cr4:
    movq %rbx, %cr4
    movq %cr4, %rdx
    jmp done
op_cr8:
    movq %rbx, %cr8
    movq %cr8, %rdx
    jmp done
op_cpuid:
    movq %rbx, %rax
    cpuid
    movl %ecx, %edx
    jmp done
op_in:
    movl %ebx, %edx
    xorl %eax, %eax
    inb %dx, %al
    movq %rax, %rdx
    jmp done
op_out:
    movl %ebx, %edx
    movl %ecx, %eax
    outb %al, %dx
    jmp done
op_vmxon:
    vmxoff
    jmp done
op_wait:                                # until the count at 0x700 has reached RBX
    sti
    hlt
    cli
    cmpq %rbx, 0x700
    jb op_wait
    movq 0x700, %rdx
    jmp done
op_halt:
    cli
    hlt
    jmp done
op_count:                               # for ever: adds to the word at RBX, interrupts as RCX says
    testq %rcx, %rcx
    jz 1f
    sti
1:  incq (%rbx)
    jmp 1b
op_nothing:
    jmp done
op_triple:
    lidt 0x610
    ud2
op_touch:                               # a byte of each of RCX pages from RBX on
1:  movb $1, (%rbx)
    addq $4096, %rbx
    decq %rcx
    jnz 1b
    jmp done
op_wbinvd:
    wbinvd
    jmp done
op_spin:
    jmp op_spin
op_debug:                               # DR0: what was there, then RBX
    movq %dr0, %rdx
    movq %rbx, %dr0
    jmp done
op_outs:                                # a byte of memory to port RBX
    movl %ebx, %edx
    movl $0x700, %esi
    outsb
    jmp done
op_lmsw:
    lmsw %bx
    movq %cr0, %rdx
    jmp done
op_clts:
    clts
    movq %cr0, %rdx
    jmp done
op_rounds:                              # CPUID, as often as RCX says
    movq %rcx, %rsi
1:  xorl %eax, %eax
    cpuid
    decq %rsi
    jnz 1b
    jmp done
guest_driven_end:

# At the reset vector's page, 0xfffff000: what a ROM does.
    .balign 16
    .globl guest_rom, guest_rom_end
guest_rom:
    .code16
    .org guest_rom + 0xff0
    .byte 0xea                          # jmp far 0x0000:0x1000
    .word 0x1000, 0
    .org guest_rom + 0x1000
guest_rom_end:

# At 0x1000, real mode: one exit of each kind; VMCALL reports AX = step.
    .globl guest_real, guest_real_end
guest_real:
    .code16
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7000, %sp
    movw $(real_fault - guest_real + 0x1000), 13 * 4
    movw $0, 13 * 4 + 2
    movl $0x40000000, %eax
    cpuid
    movl %ebx, 0x500
    movw $1, %ax
    vmcall
    movb $0x5a, %al
    outb %al, $0x10
    inb $0x10, %al
    movb %al, 0x504
    movw $2, %ax
    vmcall
    movl $0x277, %ecx                   # a bad PAT: interrupt 13 through the vector table
    movl $0x02020202, %eax
    movl %eax, %edx
    wrmsr
    movw $4, %ax                        # not reached
    vmcall
real_fault:
    movw $0x7000, %sp
    movw $3, %ax
    vmcall
    movl %cr0, %eax                     # caches on
    andl $0x9fffffff, %eax
    movl %eax, %cr0
    movl %cr0, %ebx
    movw $5, %ax
    vmcall
1:  hlt
    jmp 1b
guest_real_end:

# At 0x9000, real mode, by a start-up message: says that it is there, then answers a second vector.
    .balign 16
    .globl guest_other, guest_other_end
guest_other:
    .code16
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x6f00, %sp
    movw %cs, %ax
    movw %ax, 0x710
    movw $(other_interrupt - guest_other + 0x9000), 0x51 * 4
    movw $0, 0x51 * 4 + 2
    movl $0x80f, %ecx                   # controller on
    movl $0x1ff, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x802, %ecx                   # its number
    rdmsr
    movl %eax, 0x714
    movw $1, 0x712
1:  sti
    hlt
    jmp 1b
other_interrupt:
    incw 0x718
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    iretw
guest_other_end:
    .code64
