//! EL2's one object: everything that exists after boot.

use abi::Features as AbiFeatures;
use board::{MAX_CPUS, Power, PsciConduit};
use el2::counters::Counters;
use el2::features::Features;
use el2::page_state::PageStates;
use heapless::Vec;
use spin::Once;

use crate::arch::cpu::CpuData;
use crate::host::HostMemory;

/// What remains of the device tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) psci: Option<PsciConduit>,
    pub(crate) power: Option<Power>,
    /// When EL2 was entered, in ticks.
    pub(crate) entered: u64,
}

/// The hypervisor.
#[derive(Debug)]
pub(crate) struct Hypervisor {
    pub(crate) machine: Machine,
    pub(crate) features: Features,
    pub(crate) counters: Counters,
    /// Cores in the device tree's order; `index` of each is its place here.
    pub(crate) cpus: Vec<&'static CpuData, MAX_CPUS>,
    pub(crate) pages: PageStates<'static>,
    pub(crate) host: HostMemory,
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

    /// Whether there is EL3 firmware that answers SMCs.
    pub(crate) fn has_firmware(&self) -> bool {
        self.machine.psci == Some(PsciConduit::Smc)
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
        features
    }
}
