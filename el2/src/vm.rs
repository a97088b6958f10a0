//! Virtual machines: their objects, their memory, and the library's table that holds them.
//!
//! Everything of a VM lies in pages that the host has donated to it: this object, its vCPUs, its
//! stage-2 tables. They go back, wiped, when the VM is destroyed.
//!
//! Lock order: entry of the VM table → the VM's memory (see `memslot::vm`) → ownership → the host's
//! stage 2. The entry's lock is held for reading as long as anyone uses the VM, a running vCPU
//! included, and is only ever tried for writing: who would end a VM in use gets BUSY.

use abi::{ErrorCode, MAX_VCPUS, VmConfig, VmCounter};
use board::{MAX_CPUS, PAGE_SIZE};
use core::sync::atomic::{AtomicU8, Ordering};
use el2::features::Features;
use el2::guest::idregs::{GuestIds, Model};
use el2::guest_memory::HOST_SLOTS;
use el2::host_map;
use el2::machine::VirtualMachine;
use el2::slice::Slice;
use el2::smmu::Walk;
use el2::sync::SpinLock;
use el2::vgic::{GicVersion, Vgic};
use el2::vm_counters::VmCounters;
use el2::vm_error::Refusal;
use el2::vm_state::VmState;
use el2::vm_table::{self, Teardown};
use memslot::addr::Gfn;
use memslot::flush::OwedFlush;
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::steps::Progress;
use spin::Once;
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Granule, Stage2, WideAddresses,
};

use crate::arch::frames::FramePool;
use crate::arch::host_regs::Stage2Regs;
use crate::arch::owned::{Owned, Place};
use crate::arch::regs;
use crate::arch::tables::{Tables, Upkeep};
use crate::arch::tlb::Tagged;
use crate::arch::world::VmWorld;
use crate::hypervisor::Hypervisor;
use crate::iommu;
use crate::protect::Pages;
use crate::vcpu::{Stopped, Vcpu};

/// Most VMs: VMIDs have 8 bits on some cores, and 0 is the host's.
pub(crate) const MAX_VMS: usize = 255;
/// EL2's own slot: the guest's CPU interface.
const GIC_SLOT: u16 = HOST_SLOTS;
/// The guest's GICC, as on QEMU's virt.
const GICC: u64 = 0x0801_0000;
/// Bits of a guest's addresses: 512 GiB, a walk of three levels from one page.
const IPA_BITS: u8 = 39;

/// What the tables of a VM refer to for as long as they live.
#[derive(Debug)]
pub(crate) struct VmShared {
    pub(crate) pool: FramePool,
    pub(crate) counters: VmCounters,
}

/// A VM. Fields are dropped in order: tables before the pool they came from.
#[derive(Debug)]
pub(crate) struct Vm {
    /// The machine's, less what this VM's tables do without.
    pub(crate) features: Features,
    pub(crate) world: VmWorld,
    pub(crate) state: VmState<'static, Tables>,
    /// What the guest's identification registers read as.
    pub(crate) ids: GuestIds,
    secrets: SpinLock<Option<Secrets>>,
    pub(crate) vgic: Owned<Vgic>,
    /// The vCPU that each core ran last, plus one.
    last_vcpu: [AtomicU8; MAX_CPUS],
    pub(crate) vcpus: [Once<Owned<Vcpu>>; MAX_VCPUS as usize],
    pub(crate) shared: Owned<VmShared>,
}

/// All VMs.
pub(crate) type VmTable = vm_table::VmTable<Owned<Vm>, MAX_VMS>;

/// The table.
pub(crate) static VMS: VmTable = VmTable::new();

/// As long as this is there, a reset of the machine has to wipe memory.
#[derive(Debug)]
struct Secrets(&'static Hypervisor);

impl Secrets {
    fn of(hypervisor: &'static Hypervisor) -> Self {
        hypervisor.overwrite.raise(&Pages);
        Self(hypervisor)
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.0.overwrite.withdraw(&Pages);
    }
}

/// What is left of a VM that ends.
#[derive(Debug)]
pub(crate) struct Rest {
    owed: OwedFlush,
    _secrets: Option<Secrets>,
}

impl Teardown for Owned<Vm> {
    type Left = Rest;

    fn begin(&self) -> Rest {
        iommu::detach_all(self);
        Rest {
            owed: self.state.flush_at_end(),
            _secrets: self.secrets.lock().take(),
        }
    }

    fn go_on(&self, rest: &mut Rest) -> Progress {
        let mut slice = Slice::new(regs::interrupt_pending);
        let memory = &self.state.memory;
        if memory.flush_in_steps(&mut rest.owed, || slice.go_on()) == Progress::More {
            return Progress::More;
        }
        // Every table is unreachable and every TLB entry of the VMID invalidated behind this line.
        memory.retire();
        Progress::Done
    }
}

impl VirtualMachine<'static> for Owned<Vm> {
    type Tables = Tables;
    type Vcpu = Vcpu;

    fn state(&self) -> &VmState<'static, Tables> {
        &self.state
    }

    fn vgic(&self) -> &Vgic {
        &self.vgic
    }

    fn vcpu(&self, index: u64) -> Result<&Vcpu, ErrorCode> {
        Vm::vcpu(self, index)
    }

    fn counter(&self, counter: VmCounter) -> u64 {
        match counter {
            VmCounter::Tables => self.state.memory.with_table(|t| t.platform().in_use()),
            VmCounter::PendingRuns => self.state.memory.counters().pending_runs,
            other => {
                let vcpus = self.vcpus.iter().filter_map(Once::get);
                let theirs: u64 = vcpus.map(|vcpu| vcpu.counts.get(other)).sum();
                theirs + self.counters().get(other)
            }
        }
    }
}

fn format(features: &Features) -> Option<ArmStage2> {
    let output_bits = features.pa_bits.min(48);
    ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: IPA_BITS.min(output_bits),
        output_bits,
        features: ArmFeatures {
            fwb: if features.fwb {
                ForceWriteBack::On
            } else {
                ForceWriteBack::Off
            },
            execute: if features.xnx {
                Execute::Split
            } else {
                Execute::Joint
            },
            wide: WideAddresses::Off,
        },
        start: None,
    })
    .ok()
}

impl Vm {
    /// Pages that a VM needs at once, without vCPUs and tables below the root.
    pub(crate) const PAGES: u64 =
        (Place::<Self>::SIZE + Place::<VmShared>::SIZE + Place::<Vgic>::SIZE) / PAGE_SIZE + 4;

    /// Builds a VM in `pool`; `None` if the pool is too fragmented or the sizes contradict.
    pub(crate) fn build(
        hypervisor: &'static Hypervisor,
        index: u8,
        config: VmConfig,
        pool: FramePool,
    ) -> Option<Owned<Self>> {
        let features = &Features {
            // Devices read the tables as the IOMMU can.
            fwb: hypervisor.features.fwb && (!config.devices || iommu::has_fwb()),
            ..hypervisor.features
        };
        let (shared, vgic) = (Place::<VmShared>::take(&pool)?, Place::take(&pool)?);
        let place = Place::<Self>::take(&pool)?;
        let shared = shared.fill(VmShared {
            pool,
            counters: VmCounters::new(),
        });
        let borrowed = shared.for_tables();
        let format = format(features)?;
        let vtcr = host_map::vtcr(&format, features.vmid16);
        let vmid = u16::from(index) + 1;
        let tables = Tables::new(
            &borrowed.pool,
            Some(Upkeep {
                ram: hypervisor.ownership.pages().memory(),
                features: &hypervisor.features,
                counters: &borrowed.counters,
            }),
            &hypervisor.features,
            vtcr,
        );
        let table = Stage2::new(format, tables, Tagged).ok()?;
        let vttbr = u64::from(vmid) << 48 | table.root().get();
        table.platform().set_root(vttbr);
        let walk = Walk {
            vmid,
            vtcr,
            root: table.root().get(),
            output_bits: features.pa_bits.min(48),
            fwb: features.fwb,
        };
        let states = hypervisor.ownership.pages();
        let version = match hypervisor.gic.version() {
            2 => GicVersion::V2,
            _ => GicVersion::V3,
        };
        let model = Model {
            ipa_bits: IPA_BITS.min(features.pa_bits),
            gic_v3: version == GicVersion::V3,
        };
        let mut vm = Self {
            features: *features,
            ids: GuestIds::new(&hypervisor.ids, &model),
            secrets: SpinLock::new(config.protected.then(|| Secrets::of(hypervisor))),
            world: VmWorld::new(Stage2Regs { vtcr, vttbr }, config.protected),
            state: VmState::new((index, config), states, table, walk),
            vgic: vgic.fill_with_vgic(version, config.vcpus),
            last_vcpu: [const { AtomicU8::new(0) }; MAX_CPUS],
            vcpus: [const { Once::new() }; MAX_VCPUS as usize],
            shared,
        };
        vm.map_gic(hypervisor).ok()?;
        Some(place.fill(vm))
    }

    /// GICv2: the guest's CPU interface is the hardware's virtual one.
    fn map_gic(&mut self, hypervisor: &Hypervisor) -> Result<(), memslot::error::Error> {
        let Some(interface) = hypervisor.gic.guest_interface() else {
            return Ok(());
        };
        let slot = Memslot::new(
            SlotId(GIC_SLOT),
            Gfn::try_new(GICC / PAGE_SIZE).ok_or(memslot::error::Error::OutOfMemory)?,
            interface.size() / PAGE_SIZE,
            interface.start() / PAGE_SIZE,
            SlotFlags::empty(),
            SlotKind::Mmio,
        )?;
        self.state.memory.create_slot(slot)
    }

    pub(crate) fn counters(&self) -> &VmCounters {
        &self.shared.counters
    }

    /// Notes that `core` runs a vCPU; says whether it ran another one of this VM before.
    pub(crate) fn changes_vcpu(&self, core: u64, vcpu: u8) -> bool {
        let Some(last) = self.last_vcpu.get(core as usize) else {
            return true;
        };
        // Only that core reads and writes it.
        let before = last.load(Ordering::Relaxed);
        last.store(vcpu + 1, Ordering::Relaxed);
        before != 0 && before != vcpu + 1
    }

    /// The vCPU with this index.
    pub(crate) fn vcpu(&self, index: u64) -> Result<&Vcpu, ErrorCode> {
        let slot = usize::try_from(index).ok().and_then(|i| self.vcpus.get(i));
        slot.and_then(Once::get)
            .map(|vcpu| &**vcpu)
            .ok_or(ErrorCode::NotFound)
    }

    /// Creates a vCPU.
    pub(crate) fn create_vcpu(
        &self,
        hypervisor: &'static Hypervisor,
        number: u8,
    ) -> Result<(), Refusal> {
        let slot = self.vcpus.get(usize::from(number));
        let slot = slot.ok_or(ErrorCode::Invalid)?;
        let place = Place::take(&self.shared.pool).ok_or(Refusal {
            code: ErrorCode::NoMemory,
            pages: Place::<Vcpu>::SIZE / PAGE_SIZE,
        })?;
        // Two callers at once: the second place stays unused until the VM goes.
        let vcpu = place.fill(Vcpu::new(hypervisor, &self.features, number));
        slot.call_once(|| vcpu);
        Ok(())
    }

    /// Resets the vCPUs; none runs while `reset_rest` does its part.
    pub(crate) fn reset_vcpus(
        &self,
        hypervisor: &'static Hypervisor,
        reset_rest: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        // All of them first, and until all is done: else one could run on registers that are empty
        // while its power state still says that it is on.
        let mut stopped = heapless::Vec::<Stopped<'_>, { MAX_VCPUS as usize }>::new();
        for vcpu in self.vcpus.iter().filter_map(Once::get) {
            stopped.push(vcpu.stop()?).map_err(|_| ErrorCode::Busy)?;
        }
        reset_rest()?;
        for vcpu in &mut stopped {
            vcpu.empty(hypervisor, &self.features);
        }
        Ok(())
    }
}
