//! The machine's IOMMU: whose memory a PCI function reaches.
//!
//! Lock order: devices of a VM → the VM's memory, or the host's stage 2 → the SMMU's own locks. Only
//! the last are taken by what the tables call back.

use abi::{DmaFault, ErrorCode};
use board::{Iommu, MAX_DOORBELLS, RangeList};
use el2::smmu::{AttachError, Event, Faults, Owner, Smmu, Unfit, Uses, Walk};
use el2::sync::SpinLock;
use el2::vm_error::Refusal;
use heapless::Vec;
use memslot::edge::Dma;
use memslot::error::Error;
use memslot::slot::SlotKind;
use spin::Once;
use stage2::{ExportedRoot, Importer, InvalidateListener, IpaRange, Level};

use crate::arch::frames::FramePool;
use crate::arch::smmu::Registers;
use crate::calls;
use crate::console::say;
use crate::host::HostMemory;
use crate::slice::Slice;
use crate::vm::Vm;

/// Most functions of one VM.
const MAX_DEVICES: usize = 8;
/// VMIDs: 0 is the host's, VM n has n + 1.
const VMIDS: usize = 256;

struct Machine {
    smmu: Smmu<Registers>,
    tree: Iommu,
}

static MACHINE: Once<Machine> = Once::new();

/// Who tells the SMMU of changes of one stage 2.
struct Domain {
    vmid: u16,
}

static DOMAINS: [Domain; VMIDS] = {
    let mut domains = [const { Domain { vmid: 0 } }; VMIDS];
    let mut vmid = 0;
    while vmid < VMIDS {
        domains[vmid].vmid = vmid as u16;
        vmid += 1;
    }
    domains
};

impl InvalidateListener for Domain {
    fn invalidate(&self, range: IpaRange) {
        if let Some(machine) = MACHINE.get() {
            let (start, size) = (range.start().get(), range.len());
            machine.smmu.invalidate(self.vmid, start, size);
        }
    }
}

/// The SMMU as one that imports the tables of a VMID. It can walk what [`Smmu::can_walk`] says.
fn importer(vmid: u16, output_bits: u8) -> Importer {
    Importer {
        listener: &DOMAINS[usize::from(vmid) % VMIDS],
        must_be_zero: 0,
        output_bits: output_bits.into(),
        coarsest_leaf: Level::L0,
    }
}

/// Turns the SMMU on over the host's tables.
///
/// # Errors
///
/// Why DMA is not isolated, for the log.
pub(crate) fn start(
    tree: &Iommu,
    pool: &'static FramePool,
    host: &mut HostMemory,
    doorbells: &RangeList<MAX_DOORBELLS>,
) -> Result<(), StartError> {
    let registers = Registers::new(tree.registers.start(), pool);
    let walk = host.walk();
    let ids = Smmu::identify(&registers);
    host.export(importer(walk.vmid, ids.output_bits), doorbells)?;
    let smmu = Smmu::start(registers, tree.coherent, walk)?;
    let tree = tree.clone();
    let _: &Machine = MACHINE.call_once(|| Machine { smmu, tree });
    Ok(())
}

/// Why DMA is not isolated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The SMMU is of no use.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// The host's tables can't be lent.
    #[error("the host's tables can't be lent: {}", .0.reason())]
    Host(#[from] el2::host_map::HostMapError),
}

/// Whether the SMMU of this tree can be used for RAM up to `end`; if not, the log says why.
pub(crate) fn check(tree: &Iommu, pool: &'static FramePool, end: u64) -> bool {
    let ids = Smmu::identify(&Registers::new(tree.registers.start(), pool));
    let fits = ids.check(tree.coherent, end);
    if let Err(unfit) = fits {
        say!(
            Warn,
            "the SMMUv3 at {:#x} is not used: {unfit}",
            tree.registers.start()
        );
    }
    fits.is_ok()
}

/// Bits of an output address that it has: the tables are made for it, too.
pub(crate) fn output_bits(tree: &Iommu, pool: &'static FramePool) -> u8 {
    Smmu::identify(&Registers::new(tree.registers.start(), pool)).output_bits
}

/// Whether DMA is isolated.
pub(crate) fn is_on() -> bool {
    MACHINE.is_completed()
}

/// Whether tables for forced write-back may be lent, if devices are to walk them.
pub(crate) fn has_fwb() -> bool {
    MACHINE.get().is_none_or(|m| m.smmu.ids().fwb)
}

/// Counts and reports what devices were refused, if there is an IOMMU.
#[inline]
pub(crate) fn poll() {
    if let Some(machine) = MACHINE.get() {
        machine
            .smmu
            .poll(|stream, _| machine.tree.function_of(stream));
    }
}

/// The SMMU, and a function's stream.
fn find(function: u64) -> Result<(&'static Smmu<Registers>, u32), Refusal> {
    let function = u16::try_from(function).map_err(|_| ErrorCode::Invalid)?;
    let machine = MACHINE.get().ok_or(ErrorCode::NotFound)?;
    let stream = machine.tree.stream_of(function);
    Ok((&machine.smmu, stream.ok_or(ErrorCode::NotFound)?))
}

/// Takes a function from the host.
pub(crate) fn take(function: u64) -> Result<u64, Refusal> {
    let (smmu, stream) = find(function)?;
    smmu.take(stream)?;
    Ok(0)
}

/// Gives it back.
pub(crate) fn give(function: u64) -> Result<u64, Refusal> {
    let (smmu, stream) = find(function)?;
    smmu.give(stream)?;
    Ok(0)
}

/// What a function was refused.
pub(crate) fn faults(function: u64) -> Result<[u64; 4], Refusal> {
    // The whole queue, as long as it is when nothing comes behind.
    for _ in 0..16 {
        poll();
    }
    let (smmu, stream) = find(function)?;
    let Faults { count, last, vmid } = smmu.faults(stream);
    let Event {
        number,
        read,
        address,
        ..
    } = last;
    let fault = DmaFault {
        write: count != 0 && !read,
        event: number,
        vmid,
    };
    Ok([0, count, address, fault.bits()])
}

/// The devices of a VM.
#[derive(Debug)]
pub(crate) struct Devices(SpinLock<Attached>);

#[derive(Debug)]
struct Attached {
    /// While there are any.
    root: Option<ExportedRoot>,
    devices: Vec<(u32, Dma), MAX_DEVICES>,
    /// Devices that the host has only named ([`count`]): those that snoop, and the others.
    named: [u32; 2],
    /// Devices that do not snoop and are gone, but still counted: types change in steps, and not while
    /// others walk the root.
    owed: usize,
    /// The stream for which this is to be gone on with.
    leaving: Option<u32>,
}

impl Devices {
    /// None.
    pub(crate) const fn new() -> Self {
        Self(SpinLock::new(Attached {
            root: None,
            devices: Vec::new(),
            named: [0; 2],
            owed: 0,
            leaving: None,
        }))
    }
}

/// Lets a function that was taken reach a VM's memory, and only that.
pub(crate) fn attach(vm: &Vm, function: u64, dma: Dma) -> Result<u64, Refusal> {
    let (smmu, stream) = find(function)?;
    let walk = vm.walk();
    let mut attached = vm.devices.0.try_lock().ok_or(ErrorCode::Busy)?;
    if !has_locked_memory(vm) || smmu.owner(stream) != Owner::Nobody {
        return Err(ErrorCode::NotPermitted.into());
    }
    if !smmu.can_walk(&walk) {
        return Err(ErrorCode::Mismatch.into());
    }
    if attached.devices.is_full() {
        return Err(ErrorCode::NoSpace.into());
    }
    // What is pending is cleaned by that: the device sees what the host has written.
    let mut slice = Slice::new();
    calls::done(vm.memory.register_in_steps(dma, || slice.go_on())?)?;
    let result = attached.export(vm, &walk, smmu.ids().output_bits);
    let result = result.and_then(|()| Ok(smmu.attach(stream, &walk)?));
    if let Err(refusal) = result {
        attached.unexport_if_unused(vm, walk.vmid);
        attached.forget(vm, dma);
        if attached.owed > 0 {
            // DeviceDetach of it takes it out of the counts.
            attached.leaving = Some(stream);
        }
        return Err(refusal);
    }
    // There is room. Where it was going before, the counts settle later.
    let _ = attached.devices.push((stream, dma)).is_ok();
    attached.leaving.take_if(|leaving| *leaving == stream);
    Ok(0)
}

/// Counts a device of which EL2 knows only how it reaches memory, or counts it no longer: no other than
/// one that was named so, for those that EL2 has attached count until they are detached.
pub(crate) fn count(vm: &Vm, dma: Dma, comes: bool) -> Result<u64, Refusal> {
    let mut attached = vm.devices.0.try_lock().ok_or(ErrorCode::Busy)?;
    let other = attached.owed > 0 || attached.devices.iter().any(|(_, kind)| *kind == dma);
    let named = &mut attached.named[usize::from(dma == Dma::NonSnooping)];
    if !comes && *named == 0 && other {
        return Err(Error::CountUnbalanced.into());
    }
    let mut slice = Slice::new();
    let go_on = || slice.go_on();
    let progress = match comes {
        true => vm.memory.register_in_steps(dma, go_on)?,
        false => vm.memory.unregister_in_steps(dma, go_on)?,
    };
    calls::done(progress)?;
    let after = if comes {
        named.checked_add(1)
    } else {
        named.checked_sub(1)
    };
    // Memory's own count is neither less nor larger than this one can be.
    *named = after.unwrap_or(*named);
    Ok(0)
}

/// Lets a function of a VM reach nothing.
pub(crate) fn detach(vm: &Vm, function: u64) -> Result<u64, Refusal> {
    let (smmu, stream) = find(function)?;
    let mut attached = vm.devices.0.try_lock().ok_or(ErrorCode::Busy)?;
    if attached.leaving != Some(stream) {
        let dma = attached.remove(vm, smmu, stream)?;
        attached.forget(vm, dma);
    }
    let settled = attached.settle(vm);
    attached.leaving = settled.is_err().then_some(stream);
    settled
}

/// The same for all of a VM that ends. What it has counts no more: memory types don't change, and what its
/// devices wrote past the caches is cleaned with the rest of its memory, by steps.
pub(crate) fn detach_all(vm: &Vm) {
    let Some(machine) = MACHINE.get() else {
        return;
    };
    let mut attached = vm.devices.0.lock();
    while let Some((stream, _)) = attached.devices.last().copied() {
        let gone = attached.remove(vm, &machine.smmu, stream);
        debug_assert!(gone.is_ok(), "it is in the list, and the list is locked");
        if gone.is_err() {
            return;
        }
    }
}

/// A device's accesses can't fault pages in: some memory must be there for good.
fn has_locked_memory(vm: &Vm) -> bool {
    let mut slots = vm.host_slots();
    slots.any(|slot| slot.kind == SlotKind::Ram && slot.lock.is_some())
}

impl Attached {
    fn export(&mut self, vm: &Vm, walk: &Walk, output_bits: u8) -> Result<(), Refusal> {
        if self.root.is_some() {
            return Ok(());
        }
        let importer = importer(walk.vmid, output_bits);
        let root = vm.memory.attach_registered(|table| {
            let root = table.export(0)?;
            match table.register(&root, importer) {
                Ok(()) => Ok(root),
                Err(error) => {
                    let back = table.unexport(root);
                    debug_assert!(back.is_ok(), "it has no importer");
                    Err(error.into())
                }
            }
        })?;
        self.root = Some(root);
        Ok(())
    }

    /// In the order of spec/memory-types.md 3.3: the device is off the tables and its accesses have
    /// drained; the importer leaves the list, told of everything once more; the root is private.
    fn remove(&mut self, vm: &Vm, smmu: &Smmu<Registers>, stream: u32) -> Result<Dma, AttachError> {
        let vmid = vm.walk().vmid;
        let at = self.devices.iter().position(|(s, _)| *s == stream);
        let at = at.ok_or(AttachError::NotOwned)?;
        let _: Uses = smmu.detach(stream, vmid)?;
        let (_, dma) = self.devices.swap_remove(at);
        self.unexport_if_unused(vm, vmid);
        Ok(dma)
    }

    fn unexport_if_unused(&mut self, vm: &Vm, vmid: u16) {
        if !self.devices.is_empty() {
            return;
        }
        let Some(root) = self.root.take() else {
            return;
        };
        let listener = &DOMAINS[usize::from(vmid) % VMIDS];
        let done = vm.memory.detach_importer_with(|table| {
            table.unregister(listener)?;
            table.unexport(root).map_err(|(_, error)| error.into())
        });
        debug_assert!(done.is_ok(), "the only importer of this root");
    }

    /// Takes a device out of the counts; one that does not snoop when [`Self::settle`] can.
    fn forget(&mut self, vm: &Vm, dma: Dma) {
        match dma {
            Dma::Snooping => {
                let done = vm.memory.unregister_in_steps(dma, || false);
                debug_assert!(done.is_ok(), "it was counted");
            }
            Dma::NonSnooping => self.owed += 1,
        }
    }

    /// Takes what is owed out of the counts, in steps; what refuses that now is left for later.
    fn settle(&mut self, vm: &Vm) -> Result<u64, Refusal> {
        let mut slice = Slice::new();
        while self.owed > 0 {
            let gone = vm
                .memory
                .unregister_in_steps(Dma::NonSnooping, || slice.go_on());
            match gone {
                Ok(progress) => calls::done(progress)?,
                Err(lacks @ Error::NeedTables(_)) => return Err(lacks.into()),
                Err(_) => break,
            };
            self.owed -= 1;
            if self.owed > 0 && !slice.go_on() {
                return Err(ErrorCode::Again.into());
            }
        }
        Ok(0)
    }
}
