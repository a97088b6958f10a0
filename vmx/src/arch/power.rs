//! How a run ends: emulators are told a status; a real machine halts.

use super::cpu::{halt, out8, out16, out32};
use super::serial;

/// What the machine reports to whoever started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// All is well.
    Success,
    /// Something failed; the console says what.
    Failure,
}

/// QEMU's isa-debug-exit device; nothing on Bochs.
const QEMU_EXIT: u16 = 0xf4;
/// Bochs's iodebug device: the first value enables it, the second returns to the debugger,
/// whose script then quits with status 0.
const BOCHS_DEBUG: u16 = 0x8a00;
const BOCHS_ENABLE: u16 = 0x8a00;
const BOCHS_RETURN: u16 = 0x8ae0;
/// Bochs's shut-down port takes this word byte by byte, and quits with status 1.
const BOCHS_SHUTDOWN: u16 = 0x8900;

/// Ends the run.
pub(crate) fn off(status: Status) -> ! {
    serial::drain();
    // SAFETY: the ports belong to emulators' debug devices; where those are missing, nobody
    // listens.
    unsafe { out32(QEMU_EXIT, u32::from(status != Status::Success)) };
    if status == Status::Success {
        for word in [BOCHS_ENABLE, BOCHS_RETURN] {
            // SAFETY: as above.
            unsafe { out16(BOCHS_DEBUG, word) };
        }
    } else {
        for byte in *b"Shutdown" {
            // SAFETY: as above.
            unsafe { out8(BOCHS_SHUTDOWN, byte) };
        }
    }
    if status == Status::Success {
        serial::say!("ravelin: halted");
    }
    halt()
}

/// Says why the machine cannot go on, and halts.
pub(crate) fn fatal(reason: core::fmt::Arguments<'_>) -> ! {
    serial::say!("ravelin: fatal: {reason}");
    serial::say!("ravelin: halted");
    off(Status::Failure)
}
