//! Virtual machines: their objects, their memory, and the library's table that holds them.
//!
//! Everything of a VM lies in pages that the host has donated to it: this object, its vCPUs, its
//! stage-2 tables. They go back, wiped, when the VM is destroyed.
//!
//! Lock order: entry of the VM table → the VM's memory (see `memslot::vm`) → ownership → the host's
//! stage 2. The entry's lock is held for reading as long as anyone uses the VM, a running vCPU
//! included, and is only ever tried for writing: who would end a VM in use gets BUSY.

use abi::{DonationKind, ErrorCode, MAX_VCPUS, SlotState, SlotWord, VmConfig, VmCounter};
use board::{AddrRange, MAX_CPUS, PAGE_SIZE};
use core::sync::atomic::{AtomicU8, Ordering};
use el2::features::Features;
use el2::guest::idregs::{GuestIds, Model};
use el2::guest::psci::Power;
use el2::guest_frames::GuestFrames;
use el2::guest_memory::{HOST_SLOTS, VmMemory};
use el2::host_map::{self, HostMap};
use el2::ownership::OwnershipError;
use el2::protection::Protection;
use el2::smmu::Walk;
use el2::sync::SpinLock;
use el2::vgic::{GicVersion, Vgic};
use el2::vm_counters::VmCounters;
use el2::vm_error::Refusal;
use el2::vm_table::{self, Estate, Teardown};
use memslot::addr::Gfn;
use memslot::flush::OwedFlush;
use memslot::lock::LockState;
use memslot::policy::{ArmCaches, ArmPolicy};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::steps::Progress;
use memslot::toggle::Flush;
use memslot::vm::{GuestMemory, VmConfig as MemoryConfig, VmKind};
use spin::Once;
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Granule, Stage2, WideAddresses,
};

use crate::arch::frames::FramePool;
use crate::arch::host_regs::Stage2Regs;
use crate::arch::owned::{Owned, Place};
use crate::arch::tables::{Tables, Upkeep};
use crate::arch::tlb::Tagged;
use crate::arch::world::VmWorld;
use crate::calls;
use crate::hypervisor::Hypervisor;
use crate::iommu::{self, Devices};
use crate::protect::Pages;
use crate::slice::Slice;
use crate::vcpu::{Stopped, Vcpu};

/// Most VMs: VMIDs have 8 bits on some cores, and 0 is the host's.
pub(crate) const MAX_VMS: usize = 255;
/// EL2's own slot: the guest's CPU interface.
const GIC_SLOT: u16 = HOST_SLOTS;
/// Most slots of a VM.
const MAX_SLOTS: u16 = HOST_SLOTS + 1;
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
    pub(crate) index: u8,
    pub(crate) config: VmConfig,
    /// The machine's, less what this VM's tables do without.
    pub(crate) features: Features,
    pub(crate) devices: Devices,
    pub(crate) world: VmWorld,
    pub(crate) memory: VmMemory<'static, Tables>,
    /// What the guest's identification registers read as.
    pub(crate) ids: GuestIds,
    pub(crate) power: Power,
    /// Of a protected VM.
    pub(crate) protection: Option<Protection>,
    secrets: SpinLock<Option<Secrets>>,
    pub(crate) vgic: Owned<Vgic>,
    /// The vCPU that each core ran last, plus one.
    last_vcpu: [AtomicU8; MAX_CPUS],
    pub(crate) vcpus: [Once<Owned<Vcpu>>; MAX_VCPUS as usize],
    pub(crate) shared: Owned<VmShared>,
}

/// All VMs.
#[derive(Debug)]
pub(crate) struct VmTable(vm_table::VmTable<Owned<Vm>, MAX_VMS>);

/// The table.
pub(crate) static VMS: VmTable = VmTable(vm_table::VmTable::new());

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
            owed: self.flush_at_end(),
            _secrets: self.secrets.lock().take(),
        }
    }

    fn go_on(&self, rest: &mut Rest) -> Progress {
        let mut slice = Slice::new();
        if self.memory.flush_in_steps(&mut rest.owed, || slice.go_on()) == Progress::More {
            return Progress::More;
        }
        // Every table is unreachable and every TLB entry of the VMID invalidated behind this line.
        self.memory.retire();
        Progress::Done
    }
}

/// This machine's memory, for the library's table.
fn estate(hypervisor: &Hypervisor) -> Estate<'_, 'static, HostMap<Tables>, Pages> {
    Estate {
        ownership: &hypervisor.ownership,
        host: hypervisor.host.map(),
        contents: &Pages,
    }
}

impl VmTable {
    /// Lends the VM with this handle.
    pub(crate) fn with<R>(
        &self,
        handle: u64,
        use_vm: impl FnOnce(&Vm) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        self.0.with(handle, |vm| use_vm(vm))
    }

    /// Reserves a handle.
    pub(crate) fn reserve(&self) -> Result<u64, ErrorCode> {
        self.0.reserve()
    }

    /// Creates the VM of a reserved handle out of donated memory; gives the pages used at once.
    pub(crate) fn create(
        &self,
        hypervisor: &'static Hypervisor,
        handle: u64,
        memory: AddrRange,
        config: VmConfig,
    ) -> Result<u64, Refusal> {
        let enough = (memory, Vm::PAGES);
        self.0.create(&estate(hypervisor), handle, enough, |index| {
            let pool = FramePool::over_donated(memory);
            let vm = Vm::build(hypervisor, index, config, pool)?;
            let used = memory.size() - vm.shared.pool.free_bytes();
            Some((vm, used / PAGE_SIZE))
        })
    }

    /// Donates more memory to a VM.
    pub(crate) fn top_up(
        &self,
        hypervisor: &Hypervisor,
        handle: u64,
        memory: AddrRange,
    ) -> Result<u64, Refusal> {
        let add = |vm: &Owned<Vm>| vm.shared.pool.add_donated(memory);
        self.0.top_up(&estate(hypervisor), handle, memory, add)
    }

    /// Donates memory to the guest of a protected VM.
    pub(crate) fn donate_memory(
        &self,
        hypervisor: &Hypervisor,
        handle: u64,
        ipa: u64,
        pages: u64,
        kind: DonationKind,
    ) -> Result<u64, Refusal> {
        self.0
            .donate_memory(handle, |vm| vm.donate_memory(hypervisor, ipa, pages, kind))
    }

    /// Takes a page from the protected guest that owns it.
    pub(crate) fn reclaim_page(
        &self,
        hypervisor: &Hypervisor,
        page: AddrRange,
    ) -> Result<u64, Refusal> {
        self.0.with_owner(&hypervisor.ownership, page, |vm| {
            vm.protection()?;
            vm.pages(hypervisor).reclaim_page(page)
        })
    }

    /// Ends a VM, in steps.
    pub(crate) fn destroy(&self, hypervisor: &Hypervisor, handle: u64) -> Result<u64, Refusal> {
        self.0.destroy(&hypervisor.ownership, handle)
    }

    /// Gives one donated range back to the host, wiped: its address and its pages.
    pub(crate) fn reclaim(
        &self,
        hypervisor: &Hypervisor,
        handle: u64,
    ) -> Result<(u64, u64), Refusal> {
        let range = self.0.reclaim(&estate(hypervisor), handle)?;
        Ok(range.map_or((0, 0), |range| (range.start(), range.size() / PAGE_SIZE)))
    }
}

/// Takes memory from the host, out of its caches, too.
pub(crate) fn donate(hypervisor: &Hypervisor, range: AddrRange) -> Result<(), OwnershipError> {
    estate(hypervisor).donate(range)
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
    fn build(
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
        let policy = ArmPolicy {
            caches: if features.fwb {
                ArmCaches::ForcedWriteBack
            } else {
                ArmCaches::Maintenance
            },
        };
        let memory_config = MemoryConfig {
            max_slots: MAX_SLOTS,
            gfn_limit: table.geometry().input_end() >> 12,
            kind: if config.protected {
                VmKind::Protected
            } else {
                VmKind::Unprotected
            },
        };
        let states = hypervisor.ownership.pages();
        let frames = if config.protected {
            GuestFrames::owned(states, index)
        } else {
            GuestFrames::leased(states)
        };
        let version = match hypervisor.gic.version() {
            2 => GicVersion::V2,
            _ => GicVersion::V3,
        };
        let model = Model {
            ipa_bits: IPA_BITS.min(features.pa_bits),
            gic_v3: version == GicVersion::V3,
        };
        let mut vm = Self {
            index,
            config,
            features: *features,
            devices: Devices::new(),
            ids: GuestIds::new(&hypervisor.ids, &model),
            power: Power::new(config.vcpus),
            protection: config.protected.then(Protection::new),
            secrets: SpinLock::new(config.protected.then(|| Secrets::of(hypervisor))),
            world: VmWorld::new(Stage2Regs { vtcr, vttbr }, config.protected),
            memory: GuestMemory::new(memory_config, policy, frames, table),
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
        self.memory.create_slot(slot)
    }

    /// Its tables as an IOMMU walks them.
    pub(crate) fn walk(&self) -> Walk {
        let Stage2Regs { vtcr, vttbr } = self.world.stage2;
        Walk {
            vmid: u16::from(self.index) + 1,
            vtcr,
            root: vttbr & ((1 << 48) - 1),
            output_bits: self.features.pa_bits.min(48),
            fwb: self.features.fwb,
        }
    }

    /// The slots that the host has created.
    pub(crate) fn host_slots(&self) -> impl Iterator<Item = Memslot> {
        (0..HOST_SLOTS).filter_map(|id| self.memory.slot(SlotId(id)))
    }

    /// What is to be cleaned before the VM goes: the host's memory that it has used. A protected
    /// guest's is wiped, to the point of coherency, when it goes back.
    fn flush_at_end(&self) -> OwedFlush {
        let mut owed = OwedFlush::default();
        if !self.config.protected {
            owed.owe(Flush::All);
        }
        owed
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
        index: u64,
    ) -> Result<u64, Refusal> {
        let number = u8::try_from(index).ok().filter(|n| *n < self.config.vcpus);
        let number = number.ok_or(ErrorCode::Invalid)?;
        let slot = self.vcpus.get(usize::from(number));
        let slot = slot.ok_or(ErrorCode::Invalid)?;
        if slot.is_completed() {
            return Err(ErrorCode::Exists.into());
        }
        let place = Place::take(&self.shared.pool).ok_or(Refusal {
            code: ErrorCode::NoMemory,
            pages: Place::<Vcpu>::SIZE / PAGE_SIZE,
        })?;
        // Two callers at once: the second place stays unused until the VM goes.
        let vcpu = place.fill(Vcpu::new(hypervisor, &self.features, number));
        slot.call_once(|| vcpu);
        Ok(0)
    }

    /// Creates a slot of the host's memory, or of a device that is not EL2's.
    pub(crate) fn create_slot(
        &self,
        hypervisor: &Hypervisor,
        word: SlotWord,
        ipa: u64,
        memory: AddrRange,
    ) -> Result<u64, Refusal> {
        let flags = SlotFlags::from_word(word.flags)?;
        let kind = if word.device {
            SlotKind::Mmio
        } else {
            SlotKind::Ram
        };
        let pages = memory.size() / PAGE_SIZE;
        let id = SlotId(word.id);
        let slot = Memslot::new(
            id,
            Gfn::try_new(ipa / PAGE_SIZE).ok_or(ErrorCode::Invalid)?,
            pages,
            memory.start() / PAGE_SIZE,
            flags,
            kind,
        )?;
        let mut slice = Slice::new();
        if self.memory.slot(id) == Some(slot)
            && self.memory.lock_state(id) == Some(LockState::Unfinished)
        {
            // It was created by this call, and its log begins.
            let log = self.memory.set_flags_in_steps(id, flags, || slice.go_on());
            return calls::done(log?);
        }
        let lease = kind == SlotKind::Ram && !self.config.protected;
        if self.config.protected {
            let is_memory = hypervisor.ownership.pages().is_memory(memory);
            if kind != SlotKind::Ram || !is_memory || !self.pages(hypervisor).is_new_backing(memory)
            {
                return Err(ErrorCode::NotPermitted.into());
            }
        }
        match kind {
            SlotKind::Ram if lease => {
                while hypervisor.ownership.lease(memory, self.index)? == Progress::More {
                    if !slice.go_on() {
                        return Err(ErrorCode::Again.into());
                    }
                }
            }
            SlotKind::Ram => {}
            SlotKind::Mmio if hypervisor.is_free_device(memory) => {}
            SlotKind::Mmio => return Err(ErrorCode::NotPermitted.into()),
        }
        let created = self.memory.create_in_steps(slot, || slice.go_on());
        if created.is_err() && lease {
            hypervisor.ownership.end_lease(memory, self.index)?;
        }
        calls::done(created?)
    }

    /// Deletes a slot, in steps; its memory is only the host's again when this returns a value.
    pub(crate) fn delete_slot(&self, hypervisor: &Hypervisor, id: u16) -> Result<u64, Refusal> {
        // The lease that ends must be that of the slot that went, whatever other CPUs do meanwhile
        // with this number: a slot without a lease would reach memory that the host can give away.
        let mut slice = Slice::new();
        let gone = self.memory.delete_in_steps(SlotId(id), || slice.go_on())?;
        let slot = gone.ok_or(ErrorCode::Again)?;
        let memory =
            AddrRange::with_size(slot.backing * PAGE_SIZE, slot.range.npages() * PAGE_SIZE);
        if let Some(memory) = memory.filter(|_| slot.kind == SlotKind::Ram) {
            hypervisor.ownership.end_lease(memory, self.index)?;
        }
        Ok(0)
    }

    /// State of a slot.
    pub(crate) fn slot_state(&self, id: u16) -> Result<u64, ErrorCode> {
        let state = match self.memory.lock_state(SlotId(id)) {
            None => return Err(ErrorCode::NotFound),
            Some(LockState::Unlocked) => SlotState::Unlocked,
            Some(LockState::LockedDirty) => SlotState::LockedDirty,
            Some(LockState::LockedClean) => SlotState::LockedClean,
            Some(LockState::LockedReset) => SlotState::LockedReset,
            Some(LockState::Unfinished) => SlotState::Unfinished,
        };
        Ok(state as u64)
    }

    /// Resets the VM, its memory in steps; no vCPU runs.
    pub(crate) fn reset(&self, hypervisor: &Hypervisor) -> Result<u64, Refusal> {
        // All of them first, and until all is done: else one could run on registers that are empty
        // while its power state still says that it is on.
        let mut stopped = heapless::Vec::<Stopped<'_>, { MAX_VCPUS as usize }>::new();
        for vcpu in self.vcpus.iter().filter_map(Once::get) {
            stopped.push(vcpu.stop()?).map_err(|_| ErrorCode::Busy)?;
        }
        let mut slice = Slice::new();
        calls::done(self.memory.reset_in_steps(|| slice.go_on())?)?;
        for vcpu in &mut stopped {
            vcpu.empty(hypervisor, &self.features);
        }
        self.power.reset();
        self.vgic.reset();
        Ok(0)
    }

    /// The value of a counter.
    pub(crate) fn counter(&self, counter: VmCounter) -> u64 {
        match counter {
            VmCounter::Tables => self.memory.with_table(|table| table.platform().in_use()),
            VmCounter::PendingRuns => self.memory.counters().pending_runs,
            other => {
                let vcpus = self.vcpus.iter().filter_map(Once::get);
                let theirs: u64 = vcpus.map(|vcpu| vcpu.counts.get(other)).sum();
                theirs + self.counters().get(other)
            }
        }
    }
}
