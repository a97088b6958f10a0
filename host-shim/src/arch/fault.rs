//! Accesses that are expected to fault.
//!
//! Only one core tries at a time. The handler notes the exception and steps over the load, store
//! or maintenance instruction; after a fetch it returns to the caller (x30).

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::mrs;
use crate::console::line;

static EXPECTING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);
static ESR: AtomicU64 = AtomicU64::new(0);
static FAR: AtomicU64 = AtomicU64::new(0);

// Accesses to memory that may stop being ours at any time: a protected guest's. `x0`: address, `x1`:
// what is stored. Give in `x0` what was loaded, in `x1` 0, or not 0 if the access was refused.
global_asm!(
    ".pushsection .text.attempts, \"ax\"",
    ".macro attempt name, instruction:vararg",
    ".global \\name",
    "\\name:",
    "mov x2, xzr",
    ".global \\name\\()_access",
    "\\name\\()_access:",
    "\\instruction",
    "mov x1, x2",
    "ret",
    ".endm",
    "attempt load_word, ldr x0, [x0]",
    "attempt load_byte, ldrb w0, [x0]",
    "attempt store_word, str x1, [x0]",
    "attempt store_byte, strb w1, [x0]",
    ".purgem attempt",
    // Calls what is at `x0`, which must be refused.
    ".global call_there",
    "call_there:",
    "stp x29, x30, [sp, #-16]!",
    "mov x2, xzr",
    "blr x0",
    ".global call_there_return",
    "call_there_return:",
    "mov x1, x2",
    "ldp x29, x30, [sp], #16",
    "ret",
    ".popsection",
);

/// What an attempt gives: a value, and whether it was refused.
#[repr(C)]
struct Attempt {
    value: u64,
    refused: u64,
}

unsafe extern "C" {
    fn load_word(address: u64) -> Attempt;
    fn load_byte(address: u64) -> Attempt;
    fn store_word(address: u64, value: u64) -> Attempt;
    fn store_byte(address: u64, value: u64) -> Attempt;
    fn call_there(address: u64) -> Attempt;
    static load_word_access: u8;
    static load_byte_access: u8;
    static store_word_access: u8;
    static store_byte_access: u8;
    static call_there_return: u8;
}

/// The memory is not ours (any more).
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotOurs;

impl Attempt {
    const fn result(self) -> Result<u64, NotOurs> {
        match self.refused {
            0 => Ok(self.value),
            _ => Err(NotOurs),
        }
    }
}

macro_rules! attempt {
    ($(#[$doc:meta])* $name:ident, $routine:ident $(, $value:ident)?) => {
        $(#[$doc])*
        pub(crate) fn $name(address: u64 $(, $value: u64)?) -> Result<u64, NotOurs> {
            // SAFETY: RAM outside the shim that only volatile accesses touch; if EL2 refuses it, the
            // handler steps over the access and says so.
            unsafe { $routine(address $(, $value)?) }.result()
        }
    };
}

attempt!(
    /// Loads an aligned doubleword of a guest.
    try_load, load_word
);
attempt!(
    /// Loads a byte of a guest.
    try_load_byte, load_byte
);
attempt!(
    /// Stores an aligned doubleword.
    try_store, store_word, value
);
attempt!(
    /// Stores the lowest byte of `value`.
    try_store_byte, store_byte, value
);

attempt!(
    /// Executes what is there, which is not expected to be possible.
    try_fetch, call_there
);

/// Whether an exception is an attempt's fetch that was refused, which goes on at `x30`.
fn is_fetch(x30: u64, esr: u64) -> bool {
    esr >> 26 & 0x3f == 0x21 && x30 == (&raw const call_there_return).addr() as u64
}

/// Whether an exception is an attempt's access that was refused.
fn is_attempt(elr: u64, esr: u64) -> bool {
    let accesses = [
        &raw const load_word_access,
        &raw const load_byte_access,
        &raw const store_word_access,
        &raw const store_byte_access,
    ];
    esr >> 26 & 0x3f == 0x25 && accesses.iter().any(|at| at.addr() as u64 == elr)
}

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
extern "C" fn shim_exception(regs: &mut Regs, vector: u64) {
    let esr = mrs!("esr_el1");
    let elr = mrs!("elr_el1");
    let attempt = match vector {
        4 if is_attempt(elr, esr) => Some(elr + 4),
        4 if is_fetch(regs.x[30], esr) => Some(regs.x[30]),
        _ => None,
    };
    if let Some(next) = attempt {
        regs.x[2] = 1;
        // SAFETY: continues behind the access, which tells its caller.
        unsafe { asm!("msr elr_el1, {}", in(reg) next, options(nostack, preserves_flags)) };
        return;
    }
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
    /// Loads a word, as a device's register.
    load_register, "ldr w10, [x9]"
);
access!(
    /// Stores a word, as a device's register.
    store_register, "mov w10, #-1", "str w10, [x9]"
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

/// Reads L2CTLR_EL1, which only some of Arm's cores have.
pub(crate) fn read_l2ctlr() {
    // SAFETY: expected to fault; reads else.
    unsafe { asm!("mrs x9, s3_1_c11_c0_2", out("x9") _, options(nostack)) };
}

/// RAMINDEX of a Cortex-A57 or A72: a doubleword of the L1 data cache, whoever's, to DL1DATA`n`_EL1.
pub(crate) fn ram_index() {
    // SAFETY: expected to fault; writes no memory else.
    unsafe { asm!("sys #0, c15, c4, #0, x9", in("x9") 0x0900_0000u64, options(nostack)) };
}

/// Reads DL1DATA0_EL1.
pub(crate) fn read_dl1data() {
    // SAFETY: expected to fault; reads else.
    unsafe { asm!("mrs x9, s3_0_c15_c1_0", out("x9") _, options(nostack)) };
}
