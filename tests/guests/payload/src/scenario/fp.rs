//! FP and SIMD registers survive traps, calls and other CPUs.

use crate::arch::{cpu, instruction, mrs, msr};
use crate::machine::{Arguments, Report};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

const ROUNDS: u64 = 200;
static ERRORS: AtomicU64 = AtomicU64::new(0);

/// On every CPU at once.
pub fn run(_: &Arguments, report: &mut Report) {
    report.check("CPUs start and end", cpu::everywhere(rounds));
    report.expect("registers lost", ERRORS.load(Ordering::SeqCst), 0);
}

fn rounds(cpu: usize) {
    msr!("cpacr_el1", mrs!("cpacr_el1") | 3 << 20);
    instruction!("isb");
    for round in 0..ROUNDS {
        let seed = (cpu as u64) << 32 | round << 8;
        if !keeps(seed) {
            ERRORS.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Fills v0, v7, v8, v15, v16 and v31, both halves, and FPCR; makes a call and an emulated read; compares.
fn keeps(seed: u64) -> bool {
    let different: u64;
    // SAFETY: this binary uses no FP register anywhere else; general registers that change are named.
    unsafe {
        asm!(
            ".arch armv8-a+fp+simd",
            ".irp n, 0,7,8,15,16,31",
            "add {t}, {seed}, #\\n",
            "fmov d\\n, {t}",
            "fmov v\\n\\().d[1], {t}",
            ".endr",
            "mov {t}, #0x400000", // FPCR.RMode = 1
            "msr fpcr, {t}",
            "mov x0, #0x84000000",
            "hvc #0",
            "ldr w0, [{uart}]",
            "mrs {d}, fpcr",
            "eor {d}, {d}, #0x400000",
            ".irp n, 0,7,8,15,16,31",
            "add {t}, {seed}, #\\n",
            "fmov x0, d\\n",
            "eor x0, x0, {t}",
            "orr {d}, {d}, x0",
            "fmov x0, v\\n\\().d[1]",
            "eor x0, x0, {t}",
            "orr {d}, {d}, x0",
            ".endr",
            seed = in(reg) seed, t = out(reg) _, d = out(reg) different, uart = in(reg) 0x0900_0018u64,
            out("x0") _, out("x1") _, out("x2") _, out("x3") _, options(nostack),
        );
    }
    different == 0
}
