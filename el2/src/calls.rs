//! The host's calls about VMs: which leads where, with what arguments, and what is refused.
//!
//! Everything that the host can say in registers is judged here. The machine behind ([`Machine`]) is the
//! board's or a test's: the image, the reference model and the fuzz target run the same code.

use abi::{Call, DonationKind, ErrorCode, SlotWord, VmConfig, VmCounter};
use board::{AddrRange, PAGE_SIZE};
use memslot::addr::Gfn;
use memslot::lock::{LockCall, LockRequest};
use memslot::slot::{LockGranule, SlotFlags, SlotId};
use spin::MutexGuard;
use stage2::{Aging, Platform};

use crate::call_args::{arguments, flag, pages, permissions, slot_id, snooping};
use crate::devices;
use crate::machine::{Machine, VirtualMachine};
use crate::protection::Stage;
use crate::psci::{PsciError, StartOrder};
use crate::slice::{Slice, done};
use crate::vm_error::Refusal;
use crate::vm_state::{VmState, described_slot};
use crate::vm_table::VmTable;

/// What a call gives: `x1` to `x4`.
type Answer = Result<[u64; 4], Refusal>;

/// SlotLock's bit that asks for blocks.
const LOCK_BLOCKS: u64 = 1 << 8;

/// Performs a call about VMs; `args` are `x1` to `x6`, the answer is `x1` to `x4`.
pub fn perform<'s, M: Machine<'s>, const N: usize>(
    machine: M,
    vms: &VmTable<M::Vm, N>,
    call: Call,
    args: [u64; 6],
) -> [u64; 4] {
    let answer = if args[arguments(call)..].iter().any(|arg| *arg != 0) {
        Err(ErrorCode::Invalid.into())
    } else {
        dispatch(machine, vms, call, args)
    };
    answer.unwrap_or_else(Refusal::to_registers)
}

/// Runs a vCPU: [`perform`] of [`Call::VcpuRun`], without a look at what the other calls are.
pub fn run_vcpu<'s, M: Machine<'s>, const N: usize>(
    machine: M,
    vms: &VmTable<M::Vm, N>,
    args: [u64; 6],
) -> [u64; 4] {
    let [handle, index, loaded, wait, rest @ ..] = args;
    if rest != [0; 2] {
        return Refusal::from(ErrorCode::Invalid).to_registers();
    }
    let exit = vms.with(handle, |vm| {
        if wait > 1 {
            return Err(ErrorCode::Invalid.into());
        }
        let vcpu = vm.vcpu(index)?;
        if !vm.state().may_run() {
            return Err(ErrorCode::NotPermitted.into());
        }
        machine.run(vm, vcpu, loaded, wait == 1)
    });
    match exit {
        Ok(exit) => exit.to_registers(),
        // There are no VMs where guests can't run: said as for the other calls.
        Err(_) if !machine.has_guests() => Refusal::from(ErrorCode::NotPermitted).to_registers(),
        Err(refusal) => refusal.to_registers(),
    }
}

const fn one(value: u64) -> [u64; 4] {
    [value, 0, 0, 0]
}

fn dispatch<'s, M: Machine<'s>, const N: usize>(
    machine: M,
    vms: &VmTable<M::Vm, N>,
    call: Call,
    args: [u64; 6],
) -> Answer {
    let [handle, a, b, c, d, _] = args;
    if !machine.has_guests() {
        return Err(ErrorCode::NotPermitted.into());
    }
    match call {
        Call::DonateHeap => donate_heap(machine, pages(handle, a)?).map(one),
        Call::VmReserve => Ok(one(vms.reserve()?)),
        Call::VmCreate => {
            let config = VmConfig::from_bits(c).ok_or(ErrorCode::Invalid)?;
            create(machine, vms, handle, pages(a, b)?, config).map(one)
        }
        Call::VmTopUp => {
            let memory = pages(a, b)?;
            let add = |vm: &M::Vm| machine.add_to_vm(vm, memory);
            let added = vms.top_up(&machine.estate(), handle, memory, add);
            added.map(one)
        }
        Call::VmDestroy => vms.destroy(machine.estate().ownership, handle).map(one),
        Call::VmReclaim => {
            let range = vms.reclaim(&machine.estate(), handle)?;
            let back = |range: AddrRange| [range.start(), range.size() / PAGE_SIZE, 0, 0];
            Ok(range.map_or([0; 4], back))
        }
        Call::VcpuRun => Ok(run_vcpu(machine, vms, args)),
        Call::VmExpect => {
            let expect = |vm: &M::Vm| vm.state().protection()?.expect([a, b, c, d]);
            vms.with(handle, expect).map(one)
        }
        Call::VmMeasurement => vms.with(handle, |vm| measurement(vm.state(), a)),
        Call::MemoryDonate => {
            pages(a, b)?;
            let kind = DonationKind::from_number(c).ok_or(ErrorCode::Invalid)?;
            let give = |vm: &M::Vm| vm.state().donate(&machine.estate(), a, b, kind);
            vms.donate_memory(handle, give).map(one)
        }
        Call::MemoryReclaim => reclaim_page(machine, vms, pages(handle, 1)?).map(one),
        Call::DeviceTake => devices::take(machine.iommu(), handle).map(one),
        Call::DeviceGive => devices::give(machine.iommu(), handle).map(one),
        Call::DeviceFaults => devices::faults(machine.iommu(), handle),
        Call::VmMapping => vms.with(handle, |vm| vm.state().mapping(a)),
        Call::SlotDirty => vms.with(handle, |vm| dirty(vm.state(), a, b)),
        _ => vms
            .with(handle, |vm| in_vm(machine, vm, call, [a, b, c, d]))
            .map(one),
    }
}

fn donate_heap<'s>(machine: impl Machine<'s>, memory: AddrRange) -> Result<u64, Refusal> {
    machine.estate().donate(memory)?;
    machine.add_to_heap(memory);
    Ok(0)
}

fn create<'s, M: Machine<'s>, const N: usize>(
    machine: M,
    vms: &VmTable<M::Vm, N>,
    handle: u64,
    memory: AddrRange,
    config: VmConfig,
) -> Result<u64, Refusal> {
    let enough = (memory, M::VM_PAGES);
    vms.create(&machine.estate(), handle, enough, |index| {
        machine.build(index, config, memory)
    })
}

/// A half of a protected VM's measurement.
fn measurement<P: Platform>(vm: &VmState<'_, P>, half: u64) -> Answer {
    if half > 1 {
        return Err(ErrorCode::Invalid.into());
    }
    let [first, second] = vm.protection()?.measurement(half)?;
    Ok([0, first, second, 0])
}

/// Takes a page from the protected guest that owns it.
fn reclaim_page<'s, M: Machine<'s>, const N: usize>(
    machine: M,
    vms: &VmTable<M::Vm, N>,
    page: AddrRange,
) -> Result<u64, Refusal> {
    let estate = machine.estate();
    vms.with_owner(estate.ownership, page, |vm| {
        vm.state().protection()?;
        vm.state().pages(&estate).reclaim_page(page)
    })
}

/// Calls about one VM that give one value.
fn in_vm<'s, M: Machine<'s>>(
    machine: M,
    vm: &M::Vm,
    call: Call,
    [a, b, c, d]: [u64; 4],
) -> Result<u64, Refusal> {
    let state = vm.state();
    let _building = hold_still(state, call)?;
    let mut slice = Slice::new(|| machine.is_interrupted());
    let go_on = || slice.go_on();
    match call {
        Call::VmSeal => {
            state.protection()?;
            vm.vcpu(0)?;
            state.seal(a, b)
        }
        Call::VmReset => {
            let reset_rest = || {
                done(state.memory.reset_in_steps(go_on)?)?;
                state.power.reset();
                vm.vgic().reset();
                Ok(())
            };
            machine.reset_vcpus(vm, reset_rest)?;
            Ok(0)
        }
        Call::VmCounter => {
            let counter = VmCounter::from_number(a).ok_or(ErrorCode::Invalid)?;
            Ok(vm.counter(counter))
        }
        Call::SlotCreate => {
            let word = SlotWord::from_bits(a).ok_or(ErrorCode::Invalid)?;
            slot_id(word.id.into())?;
            pages(b, c)?;
            let slot = described_slot(word, b, pages(d, c)?)?;
            let is_free = |registers| machine.is_free_device(registers);
            state.create_slot(&machine.estate(), slot, is_free, go_on)
        }
        Call::SlotDelete => state.delete_slot(&machine.estate(), slot_id(a)?, go_on),
        Call::SlotMove => {
            pages(b, 1)?;
            let base = Gfn::try_new(b / PAGE_SIZE).ok_or(ErrorCode::Invalid)?;
            done(state.memory.move_in_steps(slot_id(a)?, base, go_on)?)
        }
        Call::SlotFlags => {
            let word = SlotWord::from_bits(a).ok_or(ErrorCode::Invalid)?;
            let id = slot_id(word.id.into())?;
            let flags = SlotFlags::from_word(word.flags)?;
            done(state.memory.set_flags_in_steps(id, flags, go_on)?)
        }
        Call::SlotLock => lock(state, [a, b, c], go_on),
        Call::SlotState => Ok(state.slot_state(slot_id(a)?)? as u64),
        Call::SlotUnshare | Call::SlotShare | Call::SlotYoung | Call::SlotRelax => {
            on_pages(state, call, slot_id(a)?, [b, c, d])
        }
        Call::DmaDevice => {
            let (kind, comes) = (snooping(a)?, flag(b)?);
            devices::count(state, kind, comes, go_on)
        }
        Call::DeviceAttach => {
            let kind = snooping(b)?;
            devices::attach(machine.iommu(), state, a, kind, go_on)
        }
        Call::DeviceDetach => devices::detach(machine.iommu(), state, a, go_on),
        Call::VcpuCreate => create_vcpu(machine, vm, a),
        Call::VcpuStart => start(vm, a, b, c),
        Call::VcpuState => vcpu_state(vm, a),
        Call::IrqLine => set_line(machine, vm, a, b),
        _ => Err(ErrorCode::Invalid.into()),
    }
}

fn create_vcpu<'s, M: Machine<'s>>(machine: M, vm: &M::Vm, index: u64) -> Result<u64, Refusal> {
    let vcpus = vm.state().config.vcpus;
    let number = u8::try_from(index).ok().filter(|n| *n < vcpus);
    let number = number.ok_or(ErrorCode::Invalid)?;
    if vm.vcpu(index).is_ok() {
        return Err(ErrorCode::Exists.into());
    }
    machine.create_vcpu(vm, number)?;
    Ok(0)
}

/// The number of a vCPU that has been created.
fn created<'s>(vm: &impl VirtualMachine<'s>, index: u64) -> Result<u8, ErrorCode> {
    vm.vcpu(index)?;
    u8::try_from(index).map_err(|_| ErrorCode::NotFound)
}

/// Turns a vCPU on.
fn start<'s>(
    vm: &impl VirtualMachine<'s>,
    index: u64,
    entry: u64,
    context: u64,
) -> Result<u64, Refusal> {
    let index = created(vm, index)?;
    let order = StartOrder { entry, context };
    match vm.state().power.order(index, order) {
        Ok(()) => Ok(0),
        Err(PsciError::AlreadyOn | PsciError::OnPending) => Err(ErrorCode::Exists.into()),
        Err(_) => Err(ErrorCode::Invalid.into()),
    }
}

fn vcpu_state<'s>(vm: &impl VirtualMachine<'s>, index: u64) -> Result<u64, Refusal> {
    let index = created(vm, index)?;
    let pending = vm.vgic().has_pending(usize::from(index));
    let on = vm.state().power.is_runnable(index);
    Ok(u64::from(on) | u64::from(pending) << 1)
}

/// Sets the line of a device's interrupt.
fn set_line<'s, M: Machine<'s>>(
    machine: M,
    vm: &M::Vm,
    intid: u64,
    level: u64,
) -> Result<u64, Refusal> {
    let intid = u32::try_from(intid).map_err(|_| ErrorCode::Invalid)?;
    let kicks = match level {
        0 | 1 => vm.vgic().set_spi(intid, level == 1),
        2 => vm.vgic().set_spi_until_end(intid),
        _ => return Err(ErrorCode::Invalid.into()),
    };
    for index in kicks.map_err(|_| ErrorCode::Invalid)?.iter() {
        if let Ok(vcpu) = vm.vcpu(index as u64) {
            machine.kick(vcpu);
        }
    }
    Ok(0)
}

/// Refuses what nobody may do to a protected VM, and keeps it from being sealed during what its
/// builder may do.
fn hold_still<'a, P: Platform>(
    vm: &'a VmState<'_, P>,
    call: Call,
) -> Result<Option<MutexGuard<'a, Stage>>, ErrorCode> {
    let Some(protection) = &vm.protection else {
        return Ok(None);
    };
    match call {
        Call::VmReset
        | Call::SlotDelete
        | Call::SlotMove
        | Call::SlotFlags
        | Call::SlotUnshare
        | Call::SlotShare
        | Call::SlotYoung
        | Call::SlotRelax
        | Call::DmaDevice
        | Call::DeviceAttach
        | Call::DeviceDetach
        | Call::VcpuStart => Err(ErrorCode::NotPermitted),
        Call::SlotCreate | Call::SlotLock => protection.building().map(Some),
        _ => Ok(None),
    }
}

/// Calls about single pages of a slot.
fn on_pages<P: Platform>(
    vm: &VmState<'_, P>,
    call: Call,
    id: SlotId,
    [page, a, b]: [u64; 3],
) -> Result<u64, Refusal> {
    let memory = &vm.memory;
    match (call, a, b) {
        (Call::SlotUnshare, count, _) => memory.unshare_pages(id, page, count)?,
        (Call::SlotShare, count, _) => memory.share_pages(id, page, count)?,
        (Call::SlotYoung, count, 0) => {
            return Ok(memory.age_pages(id, page, count, Aging::Test)?);
        }
        (Call::SlotYoung, count, 1) => {
            return Ok(memory.age_pages(id, page, count, Aging::Clear)?);
        }
        (Call::SlotRelax, 0..8, _) => memory.relax_page(id, page, permissions(a))?,
        _ => return Err(ErrorCode::Invalid.into()),
    }
    Ok(0)
}

fn lock<P: Platform>(
    vm: &VmState<'_, P>,
    [action, slot, flags]: [u64; 3],
    go_on: impl FnMut() -> bool,
) -> Result<u64, Refusal> {
    let blocks = action == 1 && flags & LOCK_BLOCKS != 0;
    let flags = if blocks { flags & !LOCK_BLOCKS } else { flags };
    let progress = match LockCall::parse(action, [slot, flags, 0, 0])? {
        LockCall::Lock { id, perms } => {
            slot_id(id.0.into())?;
            let granule = if blocks {
                LockGranule::Blocks
            } else {
                LockGranule::BasePages
            };
            let request = LockRequest {
                granule,
                ..LockRequest::new(id, perms)
            };
            vm.memory.lock_in_steps(&request, go_on)?
        }
        LockCall::Unlock(id) => {
            slot_id(id.0.into())?;
            vm.memory.unlock_in_steps(id, go_on)?
        }
        LockCall::UnlockAll => vm.memory.unlock_all_in_steps(go_on)?,
    };
    done(progress)
}

/// One word of a slot's dirty bitmap.
fn dirty<P: Platform>(vm: &VmState<'_, P>, slot: u64, word: u64) -> Answer {
    let bits = vm.memory.take_dirty_word(slot_id(slot)?, word)?;
    Ok([0, bits, 0, 0])
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "calls_tests.rs"]
mod tests;
