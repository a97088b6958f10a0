//! The host's stage 2 on this machine: the map of the library, over EL2's pool.

use abi::Counter;
use board::{AddrRange, MAX_DOORBELLS, MAX_MEMORY, RangeList};
use el2::features::Features;
use el2::host_map::{self, Answer, HostMap, HostMapError};
use el2::smmu::Walk;
use stage2::Importer;

use crate::arch::frames::FramePool;
use crate::arch::host_regs::{self, Stage2Regs};
use crate::arch::tables::Tables;
use crate::arch::tlb::Tagged;
use crate::console::say;
use crate::hypervisor::Hypervisor;

/// The host's address space and the register values that select it.
#[derive(Debug)]
pub(crate) struct HostMemory {
    map: HostMap<Tables>,
    registers: Stage2Regs,
    output_bits: u8,
}

impl HostMemory {
    /// Builds the map and makes it this core's current stage 2, not yet in force.
    pub(crate) fn new(
        features: &Features,
        pool: &'static FramePool,
        memory: &RangeList<MAX_MEMORY>,
        el2: AddrRange,
    ) -> Result<Self, HostMapError> {
        let format = host_map::format(features)?;
        let vtcr = host_map::vtcr(&format, features.vmid16);
        // Annotating invalidates by VMID: the host's must be the current one by then. VMID 0 with
        // no table yet is enough, as nothing translates through it.
        host_regs::select(Stage2Regs { vtcr, vttbr: 0 });
        let map = HostMap::new(
            format,
            Tables::new(pool, None, features, vtcr),
            Tagged,
            memory.clone(),
            el2,
        )?;
        let vttbr = map.root();
        map.platform(|tables| tables.set_root(vttbr));
        Ok(Self {
            map,
            registers: Stage2Regs { vtcr, vttbr },
            output_bits: features.pa_bits.min(48),
        })
    }

    /// The host's tables as an IOMMU walks them.
    pub(crate) fn walk(&self) -> Walk {
        Walk {
            vmid: 0,
            vtcr: self.registers.vtcr,
            root: self.registers.vttbr,
            output_bits: self.output_bits,
            fwb: false,
        }
    }

    /// Lends the map to an IOMMU, before the host runs.
    pub(crate) fn export(
        &mut self,
        importer: Importer,
        doorbells: &RangeList<MAX_DOORBELLS>,
    ) -> Result<(), HostMapError> {
        self.map.export(importer, doorbells)
    }

    /// VTCR_EL2 and VTTBR_EL2 for the host (VMID 0).
    pub(crate) fn registers(&self) -> Stage2Regs {
        self.registers
    }

    /// Answers a translation fault of the host; says whether it can go on.
    pub(crate) fn fault(&self, hypervisor: &Hypervisor, ipa: u64) -> bool {
        match self.map.fault(ipa) {
            Answer::Mapped => true,
            Answer::MappedAfterRecycling => {
                hypervisor.counters.count(Counter::TablesRecycled);
                say!(Debug, "host: device mappings recycled for IPA {ipa:#x}");
                true
            }
            Answer::Refused => false,
        }
    }

    /// Takes device registers, or firmware's memory, out of the host's reach, before it runs; says
    /// whether there is room.
    pub(crate) fn hide(&mut self, range: AddrRange) -> bool {
        self.map.hide(range)
    }

    /// The map, for changes of ownership.
    pub(crate) fn map(&self) -> &HostMap<Tables> {
        &self.map
    }

    /// Pages that are tables now.
    pub(crate) fn tables_in_use(&self) -> u64 {
        self.map.platform(Tables::in_use)
    }
}
