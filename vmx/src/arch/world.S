# The world switch. GuestRegisters (arch/world.rs) is the layout of what RDI points to.
#
# extern "C" fn vmx_enter(registers: *mut GuestRegisters, launched: u64) -> u64
#   0 after a VM exit, 1 when VMLAUNCH or VMRESUME failed. Interrupts are off throughout.
    .section .text.world, "ax"
    .globl vmx_enter
vmx_enter:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq %rdi
    movl $0x6c14, %eax              # HOST_RSP
    vmwrite %rsp, %rax
    movl $0x6c16, %eax              # HOST_RIP
    leaq 3f(%rip), %rcx
    vmwrite %rcx, %rax
    movq 0x78(%rdi), %rax
    movq %rax, %cr2
    testq %rsi, %rsi                # the moves below leave the flags alone
    movq 0x00(%rdi), %rax
    movq 0x08(%rdi), %rbx
    movq 0x10(%rdi), %rcx
    movq 0x18(%rdi), %rdx
    movq 0x20(%rdi), %rsi
    movq 0x30(%rdi), %rbp
    movq 0x38(%rdi), %r8
    movq 0x40(%rdi), %r9
    movq 0x48(%rdi), %r10
    movq 0x50(%rdi), %r11
    movq 0x58(%rdi), %r12
    movq 0x60(%rdi), %r13
    movq 0x68(%rdi), %r14
    movq 0x70(%rdi), %r15
    movq 0x28(%rdi), %rdi
    jnz 1f
    vmlaunch
    jmp 2f
1:  vmresume
2:  popq %rdi
    movl $1, %eax
    jmp 4f
3:  xchgq %rdi, (%rsp)              # RDI = registers, on the stack the guest's RDI
    movq %rax, 0x00(%rdi)
    movq %rbx, 0x08(%rdi)
    movq %rcx, 0x10(%rdi)
    movq %rdx, 0x18(%rdi)
    movq %rsi, 0x20(%rdi)
    movq %rbp, 0x30(%rdi)
    movq %r8,  0x38(%rdi)
    movq %r9,  0x40(%rdi)
    movq %r10, 0x48(%rdi)
    movq %r11, 0x50(%rdi)
    movq %r12, 0x58(%rdi)
    movq %r13, 0x60(%rdi)
    movq %r14, 0x68(%rdi)
    movq %r15, 0x70(%rdi)
    popq %rax
    movq %rax, 0x28(%rdi)
    movq %cr2, %rax
    movq %rax, 0x78(%rdi)
    xorl %eax, %eax
4:  popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

# Exceptions of the hypervisor itself go to `host_exception(number, frame)`, which does not come back; 16 bytes a
# handler, so that the return address tells the number. A non-maskable interrupt only ends what the CPU was doing
# in the guest; here there is nothing to do, and IRET lets the next one come.
    .globl exception_handlers
    .balign 16
exception_handlers:
    .rept 2
    .balign 16
    call exception
    .endr
    .balign 16
    iretq
    .rept 29
    .balign 16
    call exception
    .endr
    .balign 16
exception:
    popq %rdi
    leaq exception_handlers(%rip), %rax
    subq %rax, %rdi
    shrq $4, %rdi
    movq %rsp, %rsi
    andq $-16, %rsp
    call host_exception
    ud2
