//! Where vectors.S enters Rust, the report of a fault at EL2, and the probe of an address.

use core::sync::atomic::{AtomicBool, Ordering};

use super::cpu::this_cpu;
use super::{mem, regs, windows};
use crate::{panic, trap};

/// General registers as vectors.S saves them.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Regs {
    /// x0 to x30.
    pub(crate) x: [u64; 31],
    /// SP at EL2; only for exceptions from EL2.
    pub(crate) sp: u64,
}

const _: () = assert!(core::mem::offset_of!(Regs, sp) == 248);

/// Exception from a lower level.
#[unsafe(no_mangle)]
extern "C" fn exception_from_lower(regs: &mut Regs, vector: u64) {
    trap::from_lower(regs, vector);
}

/// A probe is running, or has failed.
static PROBING: AtomicBool = AtomicBool::new(false);
static PROBE_FAILED: AtomicBool = AtomicBool::new(false);

/// Vectors of a synchronous exception and of an SError from EL2 on its own stack.
const SYNC_EL2: u64 = 4;
const SERROR_EL2: u64 = 7;

/// Exception from EL2 itself: reported, unless a probe, a translation for a guest, or the end of a
/// guest's run expects it.
#[unsafe(no_mangle)]
extern "C" fn exception_from_el2(regs: &Regs, vector: u64) {
    if PROBING.load(Ordering::Relaxed) {
        PROBE_FAILED.store(true, Ordering::Relaxed);
        regs::skip_instruction();
        return;
    }
    let (at, _) = regs::return_state();
    if vector == SYNC_EL2 && windows::failed_translation(at) {
        regs::skip_instruction();
        return;
    }
    if vector == SERROR_EL2 && windows::expected_serror(at) {
        return;
    }
    panic::report_exception(regs, vector)
}

/// Reads a 32-bit register that may not exist. Only at boot, with one core and the MMU off, since
/// the exception path uses registers of the host.
pub(crate) fn probe(address: u64) -> Option<u32> {
    PROBE_FAILED.store(false, Ordering::Relaxed);
    PROBING.store(true, Ordering::Relaxed);
    let value: u32;
    // SAFETY: if nothing is there, the abort is taken synchronously on the LDR, and skipped.
    unsafe {
        core::arch::asm!("mov {0:x}, xzr", "ldr {0:w}, [{1}]", "dsb sy", "isb", out(reg) value,
            in(reg) address, options(nostack, preserves_flags));
    }
    PROBING.store(false, Ordering::Relaxed);
    (!PROBE_FAILED.load(Ordering::Relaxed)).then_some(value)
}

/// The frame pointer of the caller.
#[inline(always)]
pub(crate) fn frame_pointer() -> u64 {
    let value: u64;
    // SAFETY: reads a general register.
    unsafe { core::arch::asm!("mov {}, x29", out(reg) value, options(nomem, nostack)) };
    value
}

/// Calls `visit` with the return addresses of the frames from `frame` up, at most 32.
pub(crate) fn backtrace(mut frame: u64, mut visit: impl FnMut(u64)) {
    let image = mem::Image::here();
    let known = |address: u64| {
        address.is_multiple_of(8)
            && (this_cpu().is_some_and(|cpu| cpu.on_a_stack(address))
                || (image.boot_rodata_end..image.boot_end).contains(&address)
                || (image.rodata_end..image.end).contains(&address))
    };
    for _ in 0..32 {
        if frame == 0 || !known(frame) || !known(frame.saturating_add(8)) {
            return;
        }
        let pointer = core::ptr::with_exposed_provenance::<[u64; 2]>(frame as usize);
        // SAFETY: aligned and on a mapped stack, the boot stack, or in the image's data; where boot is
        // over its stack is memory of the host, which may hold any number.
        let [next, pc] = unsafe { pointer.read_volatile() };
        if pc != 0 {
            visit(pc);
        }
        frame = next;
    }
}
