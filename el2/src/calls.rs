//! The host's calls about VMs: arguments checked here, work done by [`crate::vm`].

use abi::{Call, DonationKind, ErrorCode, LeafInfo, SlotWord, VmConfig, VmCounter};
use board::{AddrRange, PAGE_SIZE};
use el2::guest_memory::HOST_SLOTS;
use el2::protection::Stage;
use el2::psci::{PsciError, StartOrder};
use el2::vm_error::Refusal;
use memslot::addr::Gfn;
use memslot::edge::Dma;
use memslot::lock::{LockCall, LockRequest};
use memslot::slot::{LockGranule, SlotFlags, SlotId};
use memslot::steps::Progress;
use spin::MutexGuard;
use stage2::{Aging, Ipa, IpaRange, Perms, RunKind, TableFormat};

use crate::arch::frames;
use crate::hypervisor::Hypervisor;
use crate::iommu;
use crate::slice::Slice;
use crate::vm::{self, Vm};

/// What a call gives: `x1` to `x4`.
type Answer = Result<[u64; 4], Refusal>;

/// Entries of a VM's tables that one call looks at.
const LOOKED_AT: usize = 16_384;
/// SlotLock's bit that asks for blocks.
const LOCK_BLOCKS: u64 = 1 << 8;

/// Performs a call about VMs; `args` are `x1` to `x6`.
pub(crate) fn perform(hypervisor: &'static Hypervisor, call: Call, args: [u64; 6]) -> [u64; 4] {
    let answer = if args[arguments(call)..].iter().any(|arg| *arg != 0) {
        Err(ErrorCode::Invalid.into())
    } else {
        dispatch(hypervisor, call, args)
    };
    answer.unwrap_or_else(Refusal::to_registers)
}

/// Runs a vCPU: [`perform`] of [`Call::VcpuRun`], without a look at what the other calls are.
pub(crate) fn run_vcpu(hypervisor: &'static Hypervisor, args: [u64; 6]) -> [u64; 4] {
    let [handle, index, loaded, wait, rest @ ..] = args;
    if rest != [0; 2] {
        return Refusal::from(ErrorCode::Invalid).to_registers();
    }
    let exit = hypervisor.vms.with(handle, |vm| {
        if wait > 1 {
            return Err(ErrorCode::Invalid.into());
        }
        vm.vcpu(index)?.run(hypervisor, vm, loaded, wait == 1)
    });
    match exit {
        Ok(exit) => exit.to_registers(),
        // There are no VMs where guests can't run: said as for the other calls.
        Err(_) if hypervisor.gic.version() == 0 => {
            Refusal::from(ErrorCode::NotPermitted).to_registers()
        }
        Err(refusal) => refusal.to_registers(),
    }
}

/// How many arguments a call has.
const fn arguments(call: Call) -> usize {
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

const fn one(value: u64) -> [u64; 4] {
    [value, 0, 0, 0]
}

/// Pages at an address, as a range.
fn pages(address: u64, count: u64) -> Result<AddrRange, Refusal> {
    let size = count.checked_mul(PAGE_SIZE).ok_or(ErrorCode::Invalid)?;
    let range = AddrRange::with_size(address, size).ok_or(ErrorCode::Invalid)?;
    if address.is_multiple_of(PAGE_SIZE) {
        Ok(range)
    } else {
        Err(ErrorCode::Invalid.into())
    }
}

fn slot_id(number: u64) -> Result<u16, Refusal> {
    let id = u16::try_from(number).map_err(|_| ErrorCode::Invalid)?;
    if id < HOST_SLOTS {
        Ok(id)
    } else {
        Err(ErrorCode::Invalid.into())
    }
}

fn dispatch(hypervisor: &'static Hypervisor, call: Call, args: [u64; 6]) -> Answer {
    let [handle, a, b, c, d, _] = args;
    let vms = &hypervisor.vms;
    if hypervisor.gic.version() == 0 {
        return Err(ErrorCode::NotPermitted.into());
    }
    match call {
        Call::DonateHeap => donate_heap(hypervisor, handle, a).map(one),
        Call::VmReserve => Ok(one(vms.reserve()?)),
        Call::VmCreate => {
            let config = VmConfig::from_bits(c).ok_or(ErrorCode::Invalid)?;
            vms.create(hypervisor, handle, pages(a, b)?, config)
                .map(one)
        }
        Call::VmTopUp => vms.top_up(hypervisor, handle, pages(a, b)?).map(one),
        Call::VmDestroy => vms.destroy(hypervisor, handle).map(one),
        Call::VmReclaim => {
            let (address, count) = vms.reclaim(hypervisor, handle)?;
            Ok([address, count, 0, 0])
        }
        Call::VcpuRun => Ok(run_vcpu(hypervisor, args)),
        Call::VmExpect => {
            let expect = |vm: &Vm| vm.protection()?.expect([a, b, c, d]);
            vms.with(handle, expect).map(one)
        }
        Call::VmMeasurement => vms.with(handle, |vm| {
            if a > 1 {
                return Err(ErrorCode::Invalid.into());
            }
            let [first, second] = vm.protection()?.measurement(a)?;
            Ok([0, first, second, 0])
        }),
        Call::MemoryDonate => {
            pages(a, b)?;
            let kind = DonationKind::from_number(c).ok_or(ErrorCode::Invalid)?;
            vms.donate_memory(hypervisor, handle, a, b, kind).map(one)
        }
        Call::MemoryReclaim => vms.reclaim_page(hypervisor, pages(handle, 1)?).map(one),
        Call::DeviceTake => iommu::take(handle).map(one),
        Call::DeviceGive => iommu::give(handle).map(one),
        Call::DeviceFaults => iommu::faults(handle),
        Call::VmMapping => vms.with(handle, |vm| mapping(vm, a)),
        Call::SlotDirty => vms.with(handle, |vm| dirty(vm, a, b)),
        _ => vms
            .with(handle, |vm| in_vm(hypervisor, vm, call, [a, b, c, d]))
            .map(one),
    }
}

/// Calls about one VM that give one value.
fn in_vm(
    hypervisor: &'static Hypervisor,
    vm: &Vm,
    call: Call,
    [a, b, c, d]: [u64; 4],
) -> Result<u64, Refusal> {
    let _building = hold_still(vm, call)?;
    match call {
        Call::VmSeal => vm.seal(a, b),
        Call::VmReset => vm.reset(hypervisor),
        Call::VmCounter => {
            let counter = VmCounter::from_number(a).ok_or(ErrorCode::Invalid)?;
            Ok(vm.counter(counter))
        }
        Call::SlotCreate => {
            let word = SlotWord::from_bits(a).ok_or(ErrorCode::Invalid)?;
            slot_id(word.id.into())?;
            pages(b, c)?;
            vm.create_slot(hypervisor, word, b, pages(d, c)?)
        }
        Call::SlotDelete => vm.delete_slot(hypervisor, slot_id(a)?),
        Call::SlotMove => {
            pages(b, 1)?;
            let base = Gfn::try_new(b / PAGE_SIZE).ok_or(ErrorCode::Invalid)?;
            let (id, mut slice) = (SlotId(slot_id(a)?), Slice::new());
            done(vm.memory.move_in_steps(id, base, || slice.go_on())?)
        }
        Call::SlotFlags => {
            let word = SlotWord::from_bits(a).ok_or(ErrorCode::Invalid)?;
            let id = SlotId(slot_id(word.id.into())?);
            let (flags, mut slice) = (SlotFlags::from_word(word.flags)?, Slice::new());
            done(vm.memory.set_flags_in_steps(id, flags, || slice.go_on())?)
        }
        Call::SlotLock => lock(vm, a, b, c),
        Call::SlotState => Ok(vm.slot_state(slot_id(a)?)?),
        Call::SlotUnshare | Call::SlotShare | Call::SlotYoung | Call::SlotRelax => {
            on_pages(vm, call, SlotId(slot_id(a)?), [b, c, d])
        }
        Call::DmaDevice => dma(vm, a, b),
        Call::DeviceAttach => iommu::attach(vm, a, snooping(b)?),
        Call::DeviceDetach => iommu::detach(vm, a),
        Call::VcpuCreate => vm.create_vcpu(hypervisor, a),
        Call::VcpuStart => {
            let order = StartOrder {
                entry: b,
                context: c,
            };
            let vcpu = vm.vcpu(a)?;
            match vm.power.order(vcpu.index, order) {
                Ok(()) => Ok(0),
                Err(PsciError::AlreadyOn | PsciError::OnPending) => Err(ErrorCode::Exists.into()),
                Err(_) => Err(ErrorCode::Invalid.into()),
            }
        }
        Call::VcpuState => {
            let vcpu = vm.vcpu(a)?;
            let pending = vm.vgic.has_pending(usize::from(vcpu.index));
            let on = vm.power.is_runnable(vcpu.index);
            Ok(u64::from(on) | u64::from(pending) << 1)
        }
        Call::IrqLine => {
            let intid = u32::try_from(a).map_err(|_| ErrorCode::Invalid)?;
            let kicks = match b {
                0 | 1 => vm.vgic.set_spi(intid, b == 1),
                2 => vm.vgic.set_spi_until_end(intid),
                _ => return Err(ErrorCode::Invalid.into()),
            };
            for index in kicks.map_err(|_| ErrorCode::Invalid)?.iter() {
                if let Ok(vcpu) = vm.vcpu(index as u64) {
                    vcpu.kick(hypervisor);
                }
            }
            Ok(0)
        }
        _ => Err(ErrorCode::Invalid.into()),
    }
}

/// Refuses what nobody may do to a protected VM, and keeps it from being sealed during what its
/// builder may do.
fn hold_still(vm: &Vm, call: Call) -> Result<Option<MutexGuard<'_, Stage>>, ErrorCode> {
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
fn on_pages(vm: &Vm, call: Call, id: SlotId, [page, a, b]: [u64; 3]) -> Result<u64, Refusal> {
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

/// Bit 0 read, bit 1 write, bit 2 execute.
fn permissions(bits: u64) -> Perms {
    let all = [Perms::READ, Perms::WRITE, Perms::EXEC];
    let granted = all.into_iter().enumerate();
    let granted = granted.filter(|(bit, _)| bits >> bit & 1 != 0);
    granted.fold(Perms::empty(), |all, (_, perms)| all | perms)
}

fn donate_heap(hypervisor: &Hypervisor, address: u64, count: u64) -> Result<u64, Refusal> {
    let range = pages(address, count)?;
    vm::donate(hypervisor, range)?;
    frames::add_to_el2_pool(range);
    Ok(0)
}

fn lock(vm: &Vm, action: u64, slot: u64, flags: u64) -> Result<u64, Refusal> {
    let blocks = action == 1 && flags & LOCK_BLOCKS != 0;
    let flags = if blocks { flags & !LOCK_BLOCKS } else { flags };
    let mut slice = Slice::new();
    let go_on = || slice.go_on();
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

/// What the host is told: to call again if something is left.
pub(crate) fn done(progress: Progress) -> Result<u64, Refusal> {
    match progress {
        Progress::Done => Ok(0),
        Progress::More => Err(ErrorCode::Again.into()),
    }
}

fn snooping(kind: u64) -> Result<Dma, ErrorCode> {
    match kind {
        0 => Ok(Dma::Snooping),
        1 => Ok(Dma::NonSnooping),
        _ => Err(ErrorCode::Invalid),
    }
}

fn dma(vm: &Vm, kind: u64, register: u64) -> Result<u64, Refusal> {
    let kind = snooping(kind)?;
    match register {
        0 | 1 => iommu::count(vm, kind, register == 1),
        _ => Err(ErrorCode::Invalid.into()),
    }
}

/// The first run of equal leaves that ends behind an address, as far as one call looks: a part of it, or
/// a run of no pages where all that is known is that nothing is mapped before it.
fn mapping(vm: &Vm, ipa: u64) -> Answer {
    if vm.config.protected {
        // Permissions would tell where its guest has fetched from.
        return Err(ErrorCode::NotPermitted.into());
    }
    vm.memory.with_table(|table| {
        let end = table.geometry().input_end();
        let size = end.checked_sub(ipa).ok_or(ErrorCode::Invalid)?;
        let start = Ipa::new(ipa - ipa % PAGE_SIZE);
        let size = size + ipa % PAGE_SIZE;
        let range = IpaRange::new(start, size).map_err(|_| ErrorCode::Invalid)?;
        let runs = table.runs(range).map_err(|_| ErrorCode::Invalid)?;
        let mut runs = runs.limited(LOOKED_AT);
        for run in runs.by_ref() {
            let RunKind::Mapped { pa, attrs } = run.kind else {
                continue;
            };
            // MemAttr is bits 5:2 of a descriptor, encoded again by the table's own format.
            let raw = table.format().encode_attrs(&attrs).unwrap_or(0);
            let mem_attr = (raw >> 2).to_le_bytes()[0] & 0xf;
            let info = LeafInfo {
                pages: run.range.len() / PAGE_SIZE,
                level: 3 - run.level.height().to_le_bytes()[0],
                permissions: attrs.perms.bits() & 0xf,
                mem_attr,
            };
            return Ok([run.range.start().get(), pa.get(), info.bits(), 0]);
        }
        match runs.position().get() {
            behind if behind < end => Ok([behind, 0, 0, 0]),
            _ => Err(ErrorCode::NotFound.into()),
        }
    })
}

/// One word of a slot's dirty bitmap.
fn dirty(vm: &Vm, slot: u64, word: u64) -> Answer {
    let bits = vm.memory.take_dirty_word(SlotId(slot_id(slot)?), word)?;
    Ok([0, bits, 0, 0])
}
