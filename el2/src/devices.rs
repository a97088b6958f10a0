//! The devices of a VM: functions that walk its tables, and those that the host only names.
//!
//! Lock order: devices of a VM → the VM's memory → the SMMU's own locks. Only the last are taken by
//! what the tables call back.

use abi::{DmaFault, ErrorCode};
use heapless::Vec;
use memslot::edge::Dma;
use memslot::error::Error;
use memslot::slot::SlotKind;
use stage2::{ExportedRoot, Importer, Platform};

use crate::slice::done;
use crate::smmu::{AttachError, Event, Faults, Owner, Port, Smmu, Uses, Walk};
use crate::sync::SpinLock;
use crate::vm_error::Refusal;
use crate::vm_state::VmState;

/// Most functions of one VM.
const MAX_DEVICES: usize = 8;

/// The machine's IOMMU, if it has one that EL2 drives.
pub trait Iommu<'m>: Copy {
    /// How it is reached.
    type Port: Port + 'm;

    /// It, and the stream of a PCI function behind it.
    fn function(self, id: u16) -> Option<(&'m Smmu<Self::Port>, u32)>;

    /// It as one that imports the tables of a VMID, for output addresses of so many bits.
    fn importer(self, vmid: u16, output_bits: u8) -> Importer;

    /// Counts and reports what devices were refused.
    fn poll(self);
}

/// The SMMU, and a function's stream.
fn find<'m, I: Iommu<'m>>(iommu: I, function: u64) -> Result<(&'m Smmu<I::Port>, u32), Refusal> {
    let function = u16::try_from(function).map_err(|_| ErrorCode::Invalid)?;
    Ok(iommu.function(function).ok_or(ErrorCode::NotFound)?)
}

/// Takes a function from the host.
///
/// # Errors
///
/// As [`abi::Call::DeviceTake`].
pub fn take<'m>(iommu: impl Iommu<'m>, function: u64) -> Result<u64, Refusal> {
    let (smmu, stream) = find(iommu, function)?;
    smmu.take(stream)?;
    Ok(0)
}

/// Gives it back.
///
/// # Errors
///
/// As [`abi::Call::DeviceGive`].
pub fn give<'m>(iommu: impl Iommu<'m>, function: u64) -> Result<u64, Refusal> {
    let (smmu, stream) = find(iommu, function)?;
    smmu.give(stream)?;
    Ok(0)
}

/// What a function was refused: `x1` to `x4` of the answer.
///
/// # Errors
///
/// As [`abi::Call::DeviceFaults`].
pub fn faults<'m>(iommu: impl Iommu<'m>, function: u64) -> Result<[u64; 4], Refusal> {
    // The whole queue, as long as it is when nothing comes behind.
    for _ in 0..16 {
        iommu.poll();
    }
    let (smmu, stream) = find(iommu, function)?;
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
pub struct Devices(SpinLock<Attached>);

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

impl Default for Devices {
    fn default() -> Self {
        Self::new()
    }
}

impl Devices {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
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
///
/// # Errors
///
/// As [`abi::Call::DeviceAttach`].
pub fn attach<'m, P: Platform>(
    iommu: impl Iommu<'m>,
    vm: &VmState<'_, P>,
    function: u64,
    dma: Dma,
    go_on: impl FnMut() -> bool,
) -> Result<u64, Refusal> {
    let (smmu, stream) = find(iommu, function)?;
    let walk = &vm.walk;
    let mut attached = vm.devices.0.try_lock().ok_or(ErrorCode::Busy)?;
    if !has_locked_memory(vm) || smmu.owner(stream) != Owner::Nobody {
        return Err(ErrorCode::NotPermitted.into());
    }
    if !smmu.can_walk(walk) {
        return Err(ErrorCode::Mismatch.into());
    }
    if attached.devices.is_full() {
        return Err(ErrorCode::NoSpace.into());
    }
    // What is pending is cleaned by that: the device sees what the host has written.
    done(vm.memory.register_in_steps(dma, go_on)?)?;
    let importer = iommu.importer(walk.vmid, smmu.ids().output_bits);
    let result = attached.export(vm, importer);
    let result = result.and_then(|()| Ok(smmu.attach(stream, walk)?));
    if let Err(refusal) = result {
        attached.unexport_if_unused(iommu, vm);
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
///
/// # Errors
///
/// As [`abi::Call::DmaDevice`].
pub fn count<P: Platform>(
    vm: &VmState<'_, P>,
    dma: Dma,
    comes: bool,
    go_on: impl FnMut() -> bool,
) -> Result<u64, Refusal> {
    let mut attached = vm.devices.0.try_lock().ok_or(ErrorCode::Busy)?;
    let other = attached.owed > 0 || attached.devices.iter().any(|(_, kind)| *kind == dma);
    let named = &mut attached.named[usize::from(dma == Dma::NonSnooping)];
    if !comes && *named == 0 && other {
        return Err(Error::CountUnbalanced.into());
    }
    let progress = match comes {
        true => vm.memory.register_in_steps(dma, go_on)?,
        false => vm.memory.unregister_in_steps(dma, go_on)?,
    };
    done(progress)?;
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
///
/// # Errors
///
/// As [`abi::Call::DeviceDetach`].
pub fn detach<'m, P: Platform>(
    iommu: impl Iommu<'m>,
    vm: &VmState<'_, P>,
    function: u64,
    go_on: impl FnMut() -> bool,
) -> Result<u64, Refusal> {
    let (smmu, stream) = find(iommu, function)?;
    let mut attached = vm.devices.0.try_lock().ok_or(ErrorCode::Busy)?;
    if attached.leaving != Some(stream) {
        let dma = attached.remove(iommu, vm, smmu, stream)?;
        attached.forget(vm, dma);
    }
    let settled = attached.settle(vm, go_on);
    attached.leaving = settled.is_err().then_some(stream);
    settled
}

/// The same for all of a VM that ends. What it has counts no more: memory types don't change, and what its
/// devices wrote past the caches is cleaned with the rest of its memory, by steps.
pub fn detach_all<'m, I: Iommu<'m>, P: Platform>(
    iommu: I,
    smmu: &Smmu<I::Port>,
    vm: &VmState<'_, P>,
) {
    let mut attached = vm.devices.0.lock();
    while let Some((stream, _)) = attached.devices.last().copied() {
        let gone = attached.remove(iommu, vm, smmu, stream);
        debug_assert!(gone.is_ok(), "it is in the list, and the list is locked");
        if gone.is_err() {
            return;
        }
    }
}

/// A device's accesses can't fault pages in: some memory must be there for good.
fn has_locked_memory<P: Platform>(vm: &VmState<'_, P>) -> bool {
    let mut slots = vm.host_slots();
    slots.any(|slot| slot.kind == SlotKind::Ram && slot.lock.is_some())
}

impl Attached {
    fn export<P: Platform>(
        &mut self,
        vm: &VmState<'_, P>,
        importer: Importer,
    ) -> Result<(), Refusal> {
        if self.root.is_some() {
            return Ok(());
        }
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
    fn remove<'m, I: Iommu<'m>, P: Platform>(
        &mut self,
        iommu: I,
        vm: &VmState<'_, P>,
        smmu: &Smmu<I::Port>,
        stream: u32,
    ) -> Result<Dma, AttachError> {
        let Walk { vmid, .. } = vm.walk;
        let at = self.devices.iter().position(|(s, _)| *s == stream);
        let at = at.ok_or(AttachError::NotOwned)?;
        let _: Uses = smmu.detach(stream, vmid)?;
        let (_, dma) = self.devices.swap_remove(at);
        self.unexport_if_unused(iommu, vm);
        Ok(dma)
    }

    fn unexport_if_unused<'m, P: Platform>(&mut self, iommu: impl Iommu<'m>, vm: &VmState<'_, P>) {
        if !self.devices.is_empty() {
            return;
        }
        let Some(root) = self.root.take() else {
            return;
        };
        let Importer { listener, .. } = iommu.importer(vm.walk.vmid, vm.walk.output_bits);
        let done = vm.memory.detach_importer_with(|table| {
            table.unregister(listener)?;
            table.unexport(root).map_err(|(_, error)| error.into())
        });
        debug_assert!(done.is_ok(), "the only importer of this root");
    }

    /// Takes a device out of the counts; one that does not snoop when [`Self::settle`] can.
    fn forget<P: Platform>(&mut self, vm: &VmState<'_, P>, dma: Dma) {
        match dma {
            Dma::Snooping => {
                let done = vm.memory.unregister_in_steps(dma, || false);
                debug_assert!(done.is_ok(), "it was counted");
            }
            Dma::NonSnooping => self.owed += 1,
        }
    }

    /// Takes what is owed out of the counts, in steps; what refuses that now is left for later.
    fn settle<P: Platform>(
        &mut self,
        vm: &VmState<'_, P>,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<u64, Refusal> {
        while self.owed > 0 {
            let gone = vm.memory.unregister_in_steps(Dma::NonSnooping, &mut go_on);
            match gone {
                Ok(progress) => done(progress)?,
                Err(lacks @ Error::NeedTables(_)) => return Err(lacks.into()),
                Err(_) => break,
            };
            self.owed -= 1;
            if self.owed > 0 && !go_on() {
                return Err(ErrorCode::Again.into());
            }
        }
        Ok(0)
    }
}
