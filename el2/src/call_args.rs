//! What the arguments of the host's calls say, one by one.

use abi::{Call, ErrorCode};
use board::{AddrRange, PAGE_SIZE};
use memslot::edge::Dma;
use memslot::slot::SlotId;
use stage2::Perms;

use crate::guest_memory::HOST_SLOTS;
use crate::vm_error::Refusal;

/// How many arguments a call has.
pub(crate) const fn arguments(call: Call) -> usize {
    match call {
        Call::VmReserve => 0,
        Call::VmDestroy | Call::VmReclaim | Call::VmReset => 1,
        Call::DonateHeap
        | Call::VmCounter
        | Call::VmMapping
        | Call::SlotDelete
        | Call::SlotFlags
        | Call::SlotState
        | Call::VcpuCreate
        | Call::VcpuState
        | Call::VmMeasurement => 2,
        Call::MemoryReclaim | Call::DeviceTake | Call::DeviceGive | Call::DeviceFaults => 1,
        Call::DeviceDetach => 2,
        Call::DeviceAttach => 3,
        Call::VmSeal => 3,
        Call::MemoryDonate => 4,
        Call::VmExpect => 5,
        Call::VmTopUp | Call::SlotMove | Call::SlotDirty | Call::DmaDevice | Call::IrqLine => 3,
        Call::VcpuRun | Call::VmCreate | Call::SlotLock | Call::VcpuStart => 4,
        Call::SlotUnshare | Call::SlotShare | Call::SlotRelax => 4,
        Call::SlotCreate | Call::SlotYoung => 5,
        _ => 6,
    }
}

/// Pages at an address, as a range.
pub(crate) fn pages(address: u64, count: u64) -> Result<AddrRange, Refusal> {
    let size = count.checked_mul(PAGE_SIZE).ok_or(ErrorCode::Invalid)?;
    let range = AddrRange::with_size(address, size).ok_or(ErrorCode::Invalid)?;
    if address.is_multiple_of(PAGE_SIZE) {
        Ok(range)
    } else {
        Err(ErrorCode::Invalid.into())
    }
}

/// The number of a slot that the host may use.
pub(crate) fn slot_id(number: u64) -> Result<SlotId, Refusal> {
    let id = u16::try_from(number).map_err(|_| ErrorCode::Invalid)?;
    if id < HOST_SLOTS {
        Ok(SlotId(id))
    } else {
        Err(ErrorCode::Invalid.into())
    }
}

/// Bit 0 read, bit 1 write, bit 2 execute.
pub(crate) fn permissions(bits: u64) -> Perms {
    let all = [Perms::READ, Perms::WRITE, Perms::EXEC];
    let granted = all.into_iter().enumerate();
    let granted = granted.filter(|(bit, _)| bits >> bit & 1 != 0);
    granted.fold(Perms::empty(), |all, (_, perms)| all | perms)
}

/// 0 or 1.
pub(crate) fn flag(number: u64) -> Result<bool, ErrorCode> {
    match number {
        0 | 1 => Ok(number == 1),
        _ => Err(ErrorCode::Invalid),
    }
}

/// How a device reaches memory.
pub(crate) fn snooping(kind: u64) -> Result<Dma, ErrorCode> {
    Ok(match flag(kind)? {
        false => Dma::Snooping,
        true => Dma::NonSnooping,
    })
}
