//! Exceptions: those that a check expects are recorded, interrupts are counted, all others end the payload.

use super::{cpu, gic, mrs};
use crate::{console, machine};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// General registers and state of the interrupted code; entry.S knows the layout.
#[derive(Debug)]
#[repr(C)]
pub struct Frame {
    x: [u64; 31],
    elr: u64,
    spsr: u64,
    unused: u64,
}

const _: () = assert!(size_of::<Frame>() == 272);

/// An exception that a check expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caught {
    /// `ESR_EL1`.
    pub esr: u64,
    /// `FAR_EL1`.
    pub far: u64,
}

impl Caught {
    /// Exception class (Arm ARM D24.2.40).
    pub fn class(&self) -> u64 {
        self.esr >> 26 & 0x3f
    }

    /// Fault status code of an abort.
    pub fn status(&self) -> u64 {
        self.esr & 0x3f
    }

    /// An undefined-instruction exception.
    pub fn is_undefined(&self) -> bool {
        self.class() == 0
    }

    /// A synchronous external abort on data (class 0x25) or on an instruction (0x21), not on a table walk.
    pub fn is_external(&self) -> bool {
        matches!(self.class(), 0x21 | 0x25) && self.status() == 0x10
    }
}

struct Trap {
    armed: AtomicBool,
    hit: AtomicBool,
    esr: AtomicU64,
    far: AtomicU64,
}

static TRAPS: [Trap; cpu::MAX] = [const {
    Trap {
        armed: AtomicBool::new(false),
        hit: AtomicBool::new(false),
        esr: AtomicU64::new(0),
        far: AtomicU64::new(0),
    }
}; cpu::MAX];

/// Runs `body`, in which one instruction may cause an exception: it is skipped (a jump returns to its caller), and
/// what it caused is the result.
pub fn catch(body: impl FnOnce()) -> Option<Caught> {
    let trap = &TRAPS[cpu::index()];
    trap.hit.store(false, Ordering::SeqCst);
    trap.armed.store(true, Ordering::SeqCst);
    body();
    trap.armed.store(false, Ordering::SeqCst);
    trap.hit.load(Ordering::SeqCst).then(|| Caught {
        esr: trap.esr.load(Ordering::SeqCst),
        far: trap.far.load(Ordering::SeqCst),
    })
}

const SYNCHRONOUS: u64 = 4;
const IRQ: u64 = 5;
/// Class: instruction abort from the current level.
const INSTRUCTION_ABORT: u64 = 0x21;

#[unsafe(no_mangle)]
extern "C" fn guest_exception(frame: &mut Frame, vector: u64) {
    let trap = &TRAPS[cpu::index()];
    match vector {
        IRQ => gic::on_irq(),
        SYNCHRONOUS if trap.armed.load(Ordering::SeqCst) => {
            let esr = mrs!("esr_el1");
            trap.esr.store(esr, Ordering::SeqCst);
            trap.far.store(mrs!("far_el1"), Ordering::SeqCst);
            trap.hit.store(true, Ordering::SeqCst);
            let jumped = esr >> 26 & 0x3f == INSTRUCTION_ABORT;
            frame.elr = if jumped { frame.x[30] } else { frame.elr + 4 };
        }
        _ => unexpected(frame, vector),
    }
}

fn unexpected(frame: &Frame, vector: u64) -> ! {
    let (esr, far) = (mrs!("esr_el1"), mrs!("far_el1"));
    let cpu = cpu::index();
    console::line(format_args!(
        "exception FAILED vector {vector} on CPU {cpu}: esr {esr:#x} far {far:#x} elr {:#x} spsr {:#x}",
        frame.elr, frame.spsr
    ));
    machine::fail()
}
