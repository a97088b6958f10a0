//! Descriptor tables of each CPU: segments, a task state with a stack of its own for events that
//! may come at any moment, and the exception handlers of world.S.

use alloc::boxed::Box;
use core::arch::asm;

use super::power;

/// Selectors of the table below.
pub(super) const CODE: u64 = 0x08;
pub(super) const DATA: u64 = 0x10;
pub(super) const TASK: u64 = 0x18;

/// Bytes of the stack for non-maskable interrupts, double faults and machine checks.
const STACK: usize = 8192;
/// Exceptions that get that stack.
const ON_STACK: [usize; 3] = [2, 8, 18];
/// Present interrupt gate (SDM vol. 3A 7.14.1).
const GATE: u64 = 0x8e00 << 32;
/// Present, available 64-bit TSS (SDM vol. 3A 8.2.3).
const TSS: u64 = 0x89 << 40;

/// What LGDT and LIDT take.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

#[repr(C, align(16))]
struct Tables {
    gdt: [u64; 5],
    idt: [u64; 64],
    /// 104 bytes of task state as 32-bit words; word 9 is the low half of IST1.
    task: [u32; 26],
    stack: [u8; STACK],
}

/// Addresses that a VMCS's host state needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bases {
    pub(super) gdt: u64,
    pub(super) idt: u64,
    pub(super) task: u64,
}

unsafe extern "C" {
    static exception_handlers: u8;
}

/// Makes and loads the tables of this CPU; they stay for good.
pub(super) fn load() {
    let tables = Box::leak(Box::new(Tables {
        gdt: [0; 5],
        idt: [0; 64],
        task: [0; 26],
        stack: [0; STACK],
    }));
    let stack_top = (&raw const tables.stack).addr() as u64 + STACK as u64;
    tables.task[9] = stack_top as u32;
    tables.task[10] = (stack_top >> 32) as u32;
    // No I/O permission map.
    tables.task[25] = 104 << 16;
    tables.gdt = segments((&raw const tables.task).addr() as u64);
    for (n, gate) in tables.idt.chunks_exact_mut(2).enumerate() {
        gate.copy_from_slice(&exception_gate(n));
    }
    let gdt = Pointer {
        limit: 5 * 8 - 1,
        base: (&raw const tables.gdt).addr() as u64,
    };
    let idt = Pointer {
        limit: 64 * 8 - 1,
        base: (&raw const tables.idt).addr() as u64,
    };
    activate(&gdt, &idt);
}

/// Nothing, 64-bit code, data, and the task state at this address.
fn segments(task: u64) -> [u64; 5] {
    let base = (task & 0xff_ffff) << 16 | (task >> 24 & 0xff) << 56;
    let state = TSS | base | 103;
    [
        0,
        0x00af_9a00_0000_ffff,
        0x00cf_9200_0000_ffff,
        state,
        task >> 32,
    ]
}

/// The gate of exception `n`.
fn exception_gate(n: usize) -> [u64; 2] {
    let handler = (&raw const exception_handlers).addr() as u64 + 16 * n as u64;
    let stack = u64::from(ON_STACK.contains(&n)) << 32;
    let low = handler & 0xffff | (handler >> 16 & 0xffff) << 48;
    [low | CODE << 16 | stack | GATE, handler >> 32]
}

/// Loads both tables and the segments from the first.
fn activate(gdt: &Pointer, idt: &Pointer) {
    // SAFETY: both tables are complete and stay; the far return loads the code segment that the
    // new table has at the same privilege; data segments are flat as before.
    unsafe {
        asm!(
            "lgdt [{gdt}]",
            "lidt [{idt}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            "mov ss, {data:x}",
            "ltr {task:x}",
            gdt = in(reg) gdt,
            idt = in(reg) idt,
            code = const CODE,
            data = in(reg) DATA,
            task = in(reg) TASK,
            scratch = out(reg) _,
        );
    }
}

/// Where this CPU's tables are.
pub(super) fn bases() -> Bases {
    let mut gdt = Pointer { limit: 0, base: 0 };
    let mut idt = Pointer { limit: 0, base: 0 };
    // SAFETY: both instructions store ten bytes, the size of a `Pointer`.
    unsafe {
        asm!("sgdt [{}]", "sidt [{}]", in(reg) &raw mut gdt, in(reg) &raw mut idt);
    }
    let table = core::ptr::with_exposed_provenance::<u64>(gdt.base as usize);
    // SAFETY: `load` has made this CPU's table: five words.
    let gdt_words = unsafe { core::slice::from_raw_parts(table, 5) };
    let (low, high) = (gdt_words[3], gdt_words[4]);
    Bases {
        gdt: gdt.base,
        idt: idt.base,
        task: low >> 16 & 0xff_ffff | (low >> 56) << 24 | high << 32,
    }
}

/// An exception of the hypervisor itself: a defect. `frame` is what the CPU pushed.
#[unsafe(no_mangle)]
extern "C" fn host_exception(number: u64, frame: *const u64) -> ! {
    let mut words = [0; 4];
    for (n, word) in words.iter_mut().enumerate() {
        // SAFETY: the CPU has pushed at least five words there.
        *word = unsafe { frame.wrapping_add(n).read() };
    }
    let address: u64;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack, preserves_flags)) };
    super::serial::print_in_panic(format_args!(
        "ravelin: PANIC exception {number}, stack {words:x?}, cr2 {address:#x}\nravelin: halted\n"
    ));
    power::off(power::Status::Failure)
}
