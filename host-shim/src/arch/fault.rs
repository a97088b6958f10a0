//! Accesses that are expected to fault.
//!
//! Only one core tries at a time. The handler notes the exception and steps over the load, store
//! or maintenance instruction; after a fetch it returns to the caller (x30).

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::mrs;
use crate::console::line;

static EXPECTING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);
static ESR: AtomicU64 = AtomicU64::new(0);
static FAR: AtomicU64 = AtomicU64::new(0);

/// General registers as entry.S saves them.
#[repr(C)]
struct Regs {
    x: [u64; 31],
}

/// A fault that was taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Fault {
    /// Exception class (ESR_EL1 bits 31:26).
    pub(crate) class: u64,
    /// Fault status (bits 5:0).
    pub(crate) status: u64,
    /// FAR_EL1.
    pub(crate) address: u64,
}

/// Runs `access` and gives the fault it took, if it took exactly one.
pub(crate) fn expect(access: impl FnOnce()) -> Option<Fault> {
    COUNT.store(0, Ordering::SeqCst);
    EXPECTING.store(true, Ordering::SeqCst);
    access();
    EXPECTING.store(false, Ordering::SeqCst);
    let esr = ESR.load(Ordering::SeqCst);
    (COUNT.load(Ordering::SeqCst) == 1).then(|| Fault {
        class: esr >> 26 & 0x3f,
        status: esr & 0x3f,
        address: FAR.load(Ordering::SeqCst),
    })
}

#[unsafe(no_mangle)]
extern "C" fn shim_exception(regs: &Regs, vector: u64) {
    let esr = mrs!("esr_el1");
    let elr = mrs!("elr_el1");
    if !EXPECTING.load(Ordering::SeqCst) || vector != 4 {
        line(format_args!(
            "host: unexpected exception {vector}: ESR {esr:#x} FAR {:#x} ELR {elr:#x}",
            mrs!("far_el1")
        ));
        line(format_args!("0 passed, 1 failed"));
        crate::call::system_off()
    }
    COUNT.fetch_add(1, Ordering::SeqCst);
    ESR.store(esr, Ordering::SeqCst);
    FAR.store(mrs!("far_el1"), Ordering::SeqCst);
    let is_fetch = esr >> 26 & 0x3f == 0x21;
    let next = if is_fetch { regs.x[30] } else { elr + 4 };
    // The MMU may have been off while an address was tried; SPSR_EL1 is as the exception set it.
    // SAFETY: continues behind the access that was meant to fault.
    unsafe { asm!("msr elr_el1, {}", in(reg) next, options(nostack, preserves_flags)) };
}

macro_rules! access {
    ($(#[$doc:meta])* $name:ident, $($instruction:literal),+) => {
        $(#[$doc])*
        pub(crate) fn $name(address: u64) {
            // SAFETY: for addresses whose access is expected to fault, or memory that the
            // scenario owns.
            unsafe {
                asm!($($instruction),+, in("x9") address, out("x10") _, out("x11") _,
                    options(nostack));
            }
        }
    };
}

access!(
    /// Loads a doubleword.
    load, "ldr x10, [x9]"
);
access!(
    /// Stores a doubleword.
    store, "mov x10, #-1", "str x10, [x9]"
);
access!(
    /// Loads two doublewords: no syndrome that a hypervisor could decode.
    load_pair, "ldp x10, x11, [x9]"
);
access!(
    /// Loads exclusively.
    load_exclusive, "ldxr x10, [x9]", "clrex"
);
access!(
    /// Zeroes a block of the cache.
    zero_block, "dc zva, x9"
);
access!(
    /// Cleans and invalidates a data cache line.
    clean_line, "dc civac, x9", "dsb sy"
);
access!(
    /// Invalidates an instruction cache line.
    invalidate_instruction_line, "ic ivau, x9", "dsb sy"
);

/// Jumps to `address`.
pub(crate) fn fetch(address: u64) {
    // SAFETY: the fetch is expected to fault; the handler then returns to x30.
    unsafe { asm!("blr {}", in(reg) address, clobber_abi("C")) };
}
