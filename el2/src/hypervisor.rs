//! EL2's one object: everything that exists after boot.

use abi::Features as AbiFeatures;
use board::{AddrRange, MAX_CPUS, Power, PsciConduit};
use el2::counters::Counters;
use el2::features::Features;
use el2::guest::idregs::HardwareIds;
use el2::guest::smccc::Mitigations;
use el2::overwrite::Request;
use el2::ownership::Ownership;
use heapless::Vec;
use spin::Once;

use crate::arch::cpu::CpuData;
use crate::arch::gic::PhysicalGic;
use crate::entropy::Entropy;
use crate::host::HostMemory;
use crate::iommu;
use crate::vm::VmTable;

/// What remains of the device tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) psci: Option<PsciConduit>,
    /// A core that firmware turned off can be turned on again.
    pub(crate) psci_gives_back: bool,
    pub(crate) power: Option<Power>,
    /// When EL2 was entered, in ticks.
    pub(crate) entered: u64,
    /// The device tree's memory, if that is to be wiped when boot is over.
    pub(crate) wipe_at_end: Option<AddrRange>,
}

/// The hypervisor.
#[derive(Debug)]
pub(crate) struct Hypervisor {
    pub(crate) machine: Machine,
    pub(crate) features: Features,
    pub(crate) counters: Counters,
    /// Cores in the device tree's order; `index` of each is its place here.
    pub(crate) cpus: Vec<&'static CpuData, MAX_CPUS>,
    pub(crate) ownership: Ownership<'static>,
    /// Stands as long as there is a protected VM.
    pub(crate) overwrite: Request,
    pub(crate) host: HostMemory,
    pub(crate) gic: PhysicalGic,
    pub(crate) vms: &'static VmTable,
    /// What guests' identification registers are made of.
    pub(crate) ids: HardwareIds,
    pub(crate) mitigations: Mitigations,
    pub(crate) entropy: Option<Entropy>,
    /// Device registers that no guest gets.
    pub(crate) own_devices: Vec<AddrRange, 16>,
}

static HYPERVISOR: Once<Hypervisor> = Once::new();

/// Publishes it; the first call wins.
pub(crate) fn publish(hypervisor: Hypervisor) -> &'static Hypervisor {
    HYPERVISOR.call_once(|| hypervisor)
}

/// The hypervisor, once boot has published it.
pub(crate) fn get() -> Option<&'static Hypervisor> {
    HYPERVISOR.get()
}

impl Hypervisor {
    /// The core with this affinity.
    pub(crate) fn cpu(&self, mpidr: u64) -> Option<&'static CpuData> {
        self.cpus.iter().copied().find(|cpu| cpu.mpidr == mpidr)
    }

    /// Whether a range is neither RAM nor registers that EL2 uses, nor firmware's: that may lie outside of
    /// what the device tree calls RAM.
    pub(crate) fn is_free_device(&self, range: AddrRange) -> bool {
        let ram = self.ownership.pages().memory().as_slice();
        let mut taken = ram.iter().chain(&self.own_devices);
        !self.host.map().hides(range) && taken.all(|other| !other.overlaps(range))
    }

    /// Whether there is EL3 firmware that answers SMCs.
    pub(crate) fn has_firmware(&self) -> bool {
        self.machine.psci == Some(PsciConduit::Smc)
    }

    /// The board's random number generator, if EL2 has taken it from the host.
    pub(crate) fn generator(&self) -> Option<&Entropy> {
        let is_ours = |source: &&Entropy| source.registers().is_some();
        self.entropy.as_ref().filter(is_ours)
    }

    /// Whether a core that is off is firmware's; else it waits in EL2.
    pub(crate) fn parks_in_firmware(&self) -> bool {
        self.has_firmware() && self.machine.psci_gives_back
    }

    /// What the host is told that EL2 can do.
    pub(crate) fn abi_features(&self) -> AbiFeatures {
        let mut features = AbiFeatures::HOST_COUNTERS;
        if self.features.fwb {
            features = features.union(AbiFeatures::FORCE_WRITE_BACK);
        }
        if self.has_firmware() {
            features = features.union(AbiFeatures::FIRMWARE_CALLS);
        }
        if iommu::is_on() {
            features = features.union(AbiFeatures::DMA_ISOLATION);
        }
        match self.gic.version() {
            0 => {}
            2 => features = features.union(AbiFeatures::GUESTS),
            _ => {
                let guests = AbiFeatures::GUESTS.union(AbiFeatures::GUEST_GIC_V3);
                features = features.union(guests);
            }
        }
        features
    }
}
