//! What EL2 says when it finds a defect in itself, and that it stops.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::arch::exceptions::{self, Regs};
use crate::arch::{cpu, mem, regs};
use crate::console::print_unlocked;

/// Set by the first report: a fault while reporting must not start another report.
static REPORTING: AtomicBool = AtomicBool::new(false);

const VECTORS: [&str; 16] = [
    "synchronous, EL2 with SP_EL0",
    "IRQ, EL2 with SP_EL0",
    "FIQ, EL2 with SP_EL0",
    "SError, EL2 with SP_EL0",
    "synchronous, EL2",
    "IRQ, EL2",
    "FIQ, EL2",
    "SError, EL2",
    "synchronous, lower AArch64",
    "IRQ, lower AArch64",
    "FIQ, lower AArch64",
    "SError, lower AArch64",
    "synchronous, lower AArch32",
    "IRQ, lower AArch32",
    "FIQ, lower AArch32",
    "SError, lower AArch32",
];

/// Name of a vector by its number.
pub(crate) fn vector_name(vector: u64) -> &'static str {
    VECTORS
        .get(vector as usize)
        .copied()
        .unwrap_or("unknown vector")
}

fn begin() {
    // A plain load and store: it must also work before the MMU is on.
    if REPORTING.load(Ordering::Relaxed) {
        print_unlocked(format_args!("second fault while reporting; halted"));
        cpu::halt();
    }
    REPORTING.store(true, Ordering::Relaxed);
}

/// Reports an exception that EL2 took from itself.
pub(crate) fn report_exception(regs: &Regs, vector: u64) -> ! {
    begin();
    let syndrome = regs::syndrome();
    let (elr, spsr) = regs::return_state();
    let number = cpu::this_cpu().map_or(0, |cpu| cpu.index);
    print_unlocked(format_args!(
        "PANIC on CPU {number}: exception at EL2: {}",
        vector_name(vector)
    ));
    if cpu::this_cpu().is_some_and(|cpu| cpu.is_guard(syndrome.far)) {
        print_unlocked(format_args!("  stack overflow: FAR is in the guard page"));
    }
    print_unlocked(format_args!(
        "  ESR {:#010x}  FAR {:#018x}  HPFAR {:#018x}",
        syndrome.esr, syndrome.far, syndrome.hpfar
    ));
    print_unlocked(format_args!(
        "  ELR {:#018x}  SPSR {:#010x}  SP {:#018x}",
        elr, spsr, regs.sp
    ));
    for (row, values) in regs.x.chunks(4).enumerate() {
        match *values {
            [a, b, c, d] => print_unlocked(format_args!(
                "  x{:<2} {a:#018x} {b:#018x} {c:#018x} {d:#018x}",
                row * 4
            )),
            [a, b, c] => print_unlocked(format_args!(
                "  x{:<2} {a:#018x} {b:#018x} {c:#018x}",
                row * 4
            )),
            _ => {}
        }
    }
    let mut number = 0;
    frame(&mut number, elr);
    frame(&mut number, regs.x[30]);
    exceptions::backtrace(regs.x[29], |pc| frame(&mut number, pc));
    print_unlocked(format_args!("halted"));
    cpu::halt()
}

/// One line of the backtrace, in the form that `scripts/symbolise.sh` understands.
fn frame(number: &mut u32, pc: u64) {
    let offset = pc.wrapping_sub(mem::Image::here().start);
    print_unlocked(format_args!("  #{number} {pc:#018x} (image+{offset:#x})"));
    *number += 1;
}

#[panic_handler]
fn on_panic(info: &PanicInfo<'_>) -> ! {
    begin();
    let number = cpu::this_cpu().map_or(0, |cpu| cpu.index);
    print_unlocked(format_args!("PANIC on CPU {number}: {}", info.message()));
    if let Some(location) = info.location() {
        print_unlocked(format_args!("  at {location}"));
    }
    let syndrome = regs::syndrome();
    let (elr, _) = regs::return_state();
    print_unlocked(format_args!(
        "  last exception: ESR {:#010x}  FAR {:#018x}  HPFAR {:#018x}  ELR {:#018x}",
        syndrome.esr, syndrome.far, syndrome.hpfar, elr
    ));
    let mut number = 0;
    exceptions::backtrace(exceptions::frame_pointer(), |pc| frame(&mut number, pc));
    print_unlocked(format_args!("halted"));
    cpu::halt()
}
