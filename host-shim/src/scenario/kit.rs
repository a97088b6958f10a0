//! What the scenarios share.

use abi::{ErrorCode, Exit, SlotWord, VmConfig};
use board::AddrRange;
use vmm::platform::UART;

use crate::arch::mem;
use crate::vm::{Refused, Vm};

/// The slot of a guest's RAM.
pub(super) const RAM_SLOT: SlotWord = slot(0);

/// A slot of memory, with this number, in which writes are not logged.
pub(super) const fn slot(id: u16) -> SlotWord {
    SlotWord {
        id,
        device: false,
        flags: 0,
    }
}

/// A VM of one vCPU that no device can be attached to.
pub(super) const fn config(protected: bool) -> VmConfig {
    VmConfig {
        vcpus: 1,
        protected,
        devices: false,
    }
}

/// Puts code at the start of a guest's memory. Without forced write-back it is EL2 that cleans it out of the caches.
pub(super) fn load(memory: AddrRange, code: &[u8]) -> Result<(), &'static str> {
    let place = mem::bytes_mut(memory).get_mut(..code.len());
    place.ok_or("the code does not fit")?.copy_from_slice(code);
    Ok(())
}

/// A guest's store of a doubleword to its UART, this far behind its start.
pub(super) const fn wrote(at: u64, value: u64) -> Exit {
    Exit::MmioWrite {
        ipa: UART + at,
        size: 8,
        value,
    }
}

/// Passes if it is so; else says what is wrong.
pub(super) fn expect(good: bool, otherwise: &'static str) -> Result<(), &'static str> {
    if good { Ok(()) } else { Err(otherwise) }
}

/// The error code of a call that must be refused; `None` if it was not.
pub(super) fn code<T>(result: Result<T, Refused>) -> Option<ErrorCode> {
    result.err().map(|refused| refused.code)
}

/// In words, why a call was refused that must not be.
pub(super) fn words<T>(result: Result<T, Refused>) -> Result<T, &'static str> {
    result.map_err(|refused| match refused.code {
        ErrorCode::NotPermitted => "a call was refused: not permitted",
        ErrorCode::NotFound => "a call was refused: not found",
        ErrorCode::Again => "a call was refused: again",
        ErrorCode::NoMemory => "a call was refused: no memory",
        ErrorCode::Busy => "a call was refused: busy",
        ErrorCode::Exists => "a call was refused: exists",
        ErrorCode::Invalid => "a call was refused: invalid",
        ErrorCode::NoSpace => "a call was refused: no space",
        ErrorCode::NoHeap => "a call was refused: no heap",
        ErrorCode::Mismatch => "a call was refused: mismatch",
        _ => "a call was refused",
    })
}

/// Destroys a VM and takes everything back.
pub(super) fn end(vm: Vm) -> Result<(), &'static str> {
    words(vm.destroy())?;
    while words(vm.reclaim())?.is_some() {}
    match vm.reclaim() {
        Err(refused) if refused.code == ErrorCode::Invalid => Ok(()),
        _ => Err("a handle that was given back is still one"),
    }
}
