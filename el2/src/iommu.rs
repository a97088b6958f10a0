//! The machine's IOMMU: whose memory a PCI function reaches.
//!
//! Lock order: devices of a VM → the VM's memory, or the host's stage 2 → the SMMU's own locks. Only
//! the last are taken by what the tables call back.

use board::{Iommu, MAX_DOORBELLS, RangeList};
use el2::devices;
use el2::smmu::{Smmu, Unfit};
use spin::Once;
use stage2::{Importer, InvalidateListener, IpaRange, Level};

use crate::arch::frames::FramePool;
use crate::arch::smmu::Registers;
use crate::console::say;
use crate::host::HostMemory;
use crate::vm::Vm;

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
fn as_importer(vmid: u16, output_bits: u8) -> Importer {
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
    host.export(as_importer(walk.vmid, ids.output_bits), doorbells)?;
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

/// The machine's IOMMU, for the library.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Functions;

impl devices::Iommu<'static> for Functions {
    type Port = Registers;

    fn function(self, id: u16) -> Option<(&'static Smmu<Registers>, u32)> {
        let machine = MACHINE.get()?;
        Some((&machine.smmu, machine.tree.stream_of(id)?))
    }

    fn importer(self, vmid: u16, output_bits: u8) -> Importer {
        as_importer(vmid, output_bits)
    }

    fn poll(self) {
        poll();
    }
}

/// Lets no function of a VM that ends reach anything.
pub(crate) fn detach_all(vm: &Vm) {
    if let Some(machine) = MACHINE.get() {
        devices::detach_all(Functions, &machine.smmu, &vm.state);
    }
}
