//! The host's stage 2: a lazy identity map of everything that is not somebody else's.
//!
//! Invariant: a page that has another owner has an annotation in the table and never a leaf; every
//! other address may be mapped at any time, to itself. Losing a leaf is harmless (it faults in
//! again), losing an annotation never happens.
//!
//! RAM is mapped read, write and execute, but for firmware's own, which is not mapped; everything else read and write, never execute. The
//! memory type is always "as stage 1 says": the host keeps the choice that it has on the bare
//! machine. A leaf is the largest block that neither leaves the RAM range (or the gap between two)
//! nor meets an annotation. See docs/host-stage2.md.
//!
//! Where an IOMMU stands before the host's devices, it walks the same tables: then the map is lazy no
//! more, as a device's access can't be repeated. All RAM of the host is mapped from the start, and
//! what comes back is mapped at once. See docs/smmu.md.

use board::{AddrRange, MAX_DOORBELLS, MAX_MEMORY, PAGE_SIZE, RangeList};
use spin::RwLock;
use stage2::{
    Annotation, ArmConfig, ArmFeatures, ArmStage2, ConfigError, Execute, ExportError, ExportedRoot,
    FaultOutcome, FaultRequest, ForceWriteBack, Granule, Importer, Ipa, IpaRange, LeafAttrs,
    MapError, MapRequest, Pa, Perms, Platform, Stage2, WideAddresses,
};
use thiserror::Error;

use crate::features::Features;
use crate::page_state::Owner;

/// Most separate ranges of device registers and of firmware's memory that EL2 hides.
const MAX_HIDDEN: usize = 32;

/// Why there is no host stage 2.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum HostMapError {
    /// The core's address sizes are impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The root or the first annotation failed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The root can't be lent, or not to that IOMMU.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// What is to be somebody's is not a range of pages, or that somebody is the host.
    #[error("{0:?} is not a range of pages for an owner")]
    Range(AddrRange),
}

impl HostMapError {
    /// The same in a few words, without what only formatting can say: boot ends with them.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Config(_) => "the core's address sizes contradict the architecture",
            Self::Map(MapError::NoMemory { .. }) => "no memory for its tables",
            Self::Map(_) => "EL2's memory can't be annotated",
            Self::Range(_) => "EL2's memory is not a range of pages",
            Self::Export(_) => "it can't be lent to the IOMMU",
        }
    }
}

/// What moving memory asks of the host's address space.
pub trait HostReach {
    /// Takes a range away from the host: its leaves go, and faults on it are refused from now on.
    ///
    /// # Errors
    ///
    /// [`MapError::NoMemory`] if tables are lacking; nothing has changed then.
    fn take_away(&self, range: AddrRange, owner: Owner) -> Result<(), HostMapError>;

    /// Lets the host reach a range again.
    ///
    /// # Errors
    ///
    /// As [`HostReach::take_away`].
    fn give_back(&self, range: AddrRange) -> Result<(), HostMapError>;
}

/// What became of a host's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Mapped, by us or by another core: the host goes on.
    Mapped,
    /// Mapped, after all device mappings were thrown away to get table pages back.
    MappedAfterRecycling,
    /// Somebody else's, or no address at all: the host gets an abort.
    Refused,
}

/// The host's address space.
pub struct HostMap<P: Platform> {
    space: RwLock<Stage2<ArmStage2, P>>,
    memory: RangeList<MAX_MEMORY>,
    /// Device registers that are EL2's, memory that is firmware's.
    hidden: RangeList<MAX_HIDDEN>,
    /// First address that the table can't map.
    end: u64,
    /// Where devices that walk the map, too, send their interrupts: mapped for good.
    doorbells: RangeList<MAX_DOORBELLS>,
    /// What an IOMMU walks it by. A device can't fault a page in: all of the host's RAM is mapped.
    exported: Option<ExportedRoot>,
}

impl<P: Platform> core::fmt::Debug for HostMap<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("HostMap")
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

/// The format of the host's tables: 4 KiB pages, addresses as the core has them but at most 48
/// bits, no forced write-back (the host's own types count).
///
/// # Errors
///
/// [`ConfigError`] if the core's sizes contradict the architecture.
pub fn format(features: &Features) -> Result<ArmStage2, ConfigError> {
    let bits = features.pa_bits.min(48);
    ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: bits,
        output_bits: bits,
        features: ArmFeatures {
            fwb: ForceWriteBack::Off,
            execute: if features.xnx {
                Execute::Split
            } else {
                Execute::Joint
            },
            wide: WideAddresses::Off,
        },
        start: None,
    })
}

/// VTCR_EL2 for a format: walks inner and outer write-back, inner shareable; bit 31 is RES1
/// (Arm ARM D24.2, VTCR_EL2). `vmid16` selects 16-bit VMIDs.
#[must_use]
pub fn vtcr(format: &ArmStage2, vmid16: bool) -> u64 {
    let field = |value: u8, shift: u32| u64::from(value) << shift;
    1 << 31
        | field(u8::from(vmid16), 19)
        | field(format.ps(), 16)
        | field(format.tg0(), 14)
        | 3 << 12
        | 1 << 10
        | 1 << 8
        | field(format.sl0(), 6)
        | field(format.t0sz(), 0)
}

impl<P: Platform> HostMap<P> {
    /// An empty map in which `el2` belongs to EL2.
    ///
    /// # Errors
    ///
    /// [`HostMapError`].
    pub fn new(
        format: ArmStage2,
        platform: P,
        context: P::Context,
        memory: RangeList<MAX_MEMORY>,
        el2: AddrRange,
    ) -> Result<Self, HostMapError> {
        let mut space = Stage2::new(format, platform, context)?;
        let range = ipa_range(el2).ok_or(HostMapError::Range(el2))?;
        let note = note(Owner::Hypervisor).ok_or(HostMapError::Range(el2))?;
        space.annotate(range, note)?;
        let end = space.geometry().input_end();
        Ok(Self {
            space: RwLock::new(space),
            memory,
            hidden: RangeList::new(),
            end,
            doorbells: RangeList::new(),
            exported: None,
        })
    }

    /// Takes device registers, or memory of firmware, out of the host's reach for good, before it
    /// runs. Unlike memory that may come back they need no annotation: no fault maps them. Says
    /// whether there was room to remember them.
    #[must_use]
    pub fn hide(&mut self, range: AddrRange) -> bool {
        self.hidden
            .insert(range.grow_to_pages(), "hidden ranges")
            .is_ok()
    }

    /// Lends the map to an IOMMU: maps all that devices of the host may reach, and tells `importer`
    /// of every change from now on.
    ///
    /// # Errors
    ///
    /// [`HostMapError`]; what was mapped until then stays, and nobody walks it.
    pub fn export(
        &mut self,
        importer: Importer,
        doorbells: &RangeList<MAX_DOORBELLS>,
    ) -> Result<(), HostMapError> {
        for doorbell in doorbells.as_slice() {
            let pages = ipa_range(*doorbell).ok_or(HostMapError::Range(*doorbell))?;
            let (start, attrs) = (pages.start(), LeafAttrs::normal(Perms::RW));
            self.fill(&FaultRequest::new(
                start,
                pages,
                Pa::new(start.get()),
                attrs,
            ))?;
        }
        self.doorbells = doorbells.clone();
        for ram in self.memory.clone().as_slice() {
            self.populate(*ram)?;
        }
        let space = self.space.get_mut();
        let root = space.export(0)?;
        if let Err(error) = space.register(&root, importer) {
            // Nobody has walked it.
            let back = space.unexport(root);
            debug_assert!(back.is_ok(), "it has no importer");
            return Err(error.into());
        }
        self.exported = Some(root);
        Ok(())
    }

    fn fill(&self, request: &FaultRequest) -> Result<FaultOutcome, HostMapError> {
        Ok(self.space.read().fault(request)?)
    }

    /// Maps what is the host's of a range of RAM.
    fn populate(&self, ram: AddrRange) -> Result<(), HostMapError> {
        let mut at = ram.start();
        while at < ram.end().min(self.end) {
            let Some((window, attrs)) = self.window(at) else {
                at += PAGE_SIZE;
                continue;
            };
            let request =
                FaultRequest::new(Ipa::new(at), window, Pa::new(window.start().get()), attrs);
            at = match self.fill(&request)? {
                FaultOutcome::Mapped(level) => {
                    let size = self.space.read().geometry().slot_size(level);
                    (at / size + 1) * size
                }
                _ => at + PAGE_SIZE,
            };
        }
        Ok(())
    }

    /// The root table's address, for VTTBR_EL2.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.space.read().root().get()
    }

    /// Asks the machine underneath.
    pub fn platform<R>(&self, ask: impl FnOnce(&P) -> R) -> R {
        ask(self.space.read().platform())
    }

    /// Answers a translation fault at `address`.
    #[must_use]
    pub fn fault(&self, address: u64) -> Answer {
        let Some((window, attrs)) = self.window(address) else {
            return Answer::Refused;
        };
        let request = FaultRequest::new(
            Ipa::new(address),
            window,
            Pa::new(window.start().get()),
            attrs,
        );
        match self.try_fault(&request) {
            Ok(answer) => answer,
            Err(MapError::NoMemory { .. }) => self.recycle_and_fault(&request),
            Err(_) => Answer::Refused,
        }
    }

    fn try_fault(&self, request: &FaultRequest) -> Result<Answer, MapError> {
        Ok(match self.space.read().fault(request)? {
            FaultOutcome::Mapped(_)
            | FaultOutcome::AlreadyMapped
            | FaultOutcome::Relaxed
            | FaultOutcome::Retry => Answer::Mapped,
            FaultOutcome::Annotated(_) | FaultOutcome::Conflict(_) => Answer::Refused,
        })
    }

    /// Throws away every device mapping, which gives their tables back, and tries again.
    fn recycle_and_fault(&self, request: &FaultRequest) -> Answer {
        self.drop_devices(&mut self.space.write());
        match self.try_fault(request) {
            Ok(Answer::Mapped) => Answer::MappedAfterRecycling,
            Ok(answer) => answer,
            Err(_) => Answer::Refused,
        }
    }

    /// Throws away every device mapping; faults bring them back.
    fn drop_devices(&self, space: &mut Stage2<ArmStage2, P>) {
        let kept = self.doorbells.as_slice();
        for gap in self
            .gaps()
            .flat_map(|gap| gap.without_all(kept))
            .filter_map(ipa_range)
        {
            // Unmapping whole leaves takes no table, so this does not fail; if it did, the caller
            // would find no more tables than before.
            let result = space.unmap(gap);
            debug_assert_eq!(result, Ok(()));
        }
    }

    /// The addresses between the ranges of RAM.
    fn gaps(&self) -> impl Iterator<Item = AddrRange> {
        let ram = self.memory.as_slice();
        let starts = core::iter::once(0).chain(ram.iter().map(|r| r.end()));
        let ends = ram.iter().map(|r| r.start()).chain([self.end]);
        starts
            .zip(ends)
            .filter_map(|(start, end)| AddrRange::new(start, end))
    }

    /// The range around `address` that is all RAM or all not, and what a leaf there says.
    fn window(&self, address: u64) -> Option<(IpaRange, LeafAttrs)> {
        if address >= self.end {
            return None;
        }
        let (around, perms) = match self.memory.find(address) {
            Some(ram) => (ram, Perms::RWX),
            None => (self.memory.gap_around(address)?, Perms::RW),
        };
        let free = self.hidden.gap_around(address)?;
        let start = around.start().max(free.start());
        let inside = AddrRange::new(start, around.end().min(free.end()).min(self.end))?;
        Some((ipa_range(inside)?, LeafAttrs::normal(perms)))
    }
}

impl<P: Platform> HostReach for HostMap<P> {
    /// Tables are lacking only where the range lies inside a block, even after the device mappings
    /// have been thrown away.
    fn take_away(&self, range: AddrRange, owner: Owner) -> Result<(), HostMapError> {
        let (Some(pages), Some(note)) = (ipa_range(range), note(owner)) else {
            return Err(HostMapError::Range(range));
        };
        let mut space = self.space.write();
        match space.annotate(pages, note) {
            Err(MapError::NoMemory { .. }) => {
                self.drop_devices(&mut space);
                Ok(space.annotate(pages, note)?)
            }
            result => Ok(result?),
        }
    }

    /// The host may fault it in again. A range that was taken as a whole needs no tables.
    fn give_back(&self, range: AddrRange) -> Result<(), HostMapError> {
        let pages = ipa_range(range).ok_or(HostMapError::Range(range))?;
        let mut space = self.space.write();
        if self.exported.is_none() {
            return Ok(space.unmap(pages)?);
        }
        // Devices can't fault it in.
        let (start, attrs) = (pages.start(), LeafAttrs::normal(Perms::RWX));
        let request = MapRequest::new(start, pages.len(), Pa::new(start.get()), attrs);
        space.map(&request)?;
        Ok(())
    }
}

/// What stands in the entries of pages that are not the host's: their owner.
fn note(owner: Owner) -> Option<Annotation> {
    let code = match owner {
        Owner::Host | Owner::Firmware => return None,
        Owner::Hypervisor => 1,
        Owner::Guest(index) => 2 + u64::from(index),
    };
    Annotation::try_new(code)
}

fn ipa_range(range: AddrRange) -> Option<IpaRange> {
    IpaRange::new(Ipa::new(range.start()), range.size()).ok()
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;
    use stage2::testing::{Arch, FakeMachine};
    use std::boxed::Box;
    use std::vec::Vec;

    use super::*;
    use crate::features::IdRegisters;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> AddrRange {
        AddrRange::new(start, end).unwrap()
    }

    /// A core with a 40-bit physical address space and FEAT_XNX.
    fn features() -> Features {
        Features::decode(&IdRegisters {
            mmfr0: 0x10_1122,
            mmfr1: 0x1021_2122,
            ..IdRegisters::default()
        })
    }

    /// RAM from 1 GiB to 3 GiB and from 4 GiB to 4.5 GiB; EL2 in the last 1.8 MiB of the former.
    fn el2() -> AddrRange {
        range(3 * GIB - 0x1d_0000, 3 * GIB)
    }

    fn map(machine: &FakeMachine) -> HostMap<&FakeMachine> {
        let mut memory = RangeList::new();
        memory.insert(range(GIB, 3 * GIB), "ram").unwrap();
        memory
            .insert(range(4 * GIB, 4 * GIB + GIB / 2), "ram")
            .unwrap();
        let format = format(&features()).unwrap();
        let map = HostMap::new(format, machine, Default::default(), memory, el2()).unwrap();
        machine.attach(Pa::new(map.root()));
        map
    }

    fn machine(tables: usize) -> FakeMachine {
        FakeMachine::new(Arch::arm_4k(1, 40, false), tables)
    }

    /// Start and size of the leaf at `address`, read back by the independent walker.
    fn leaf(machine: &FakeMachine, address: u64) -> Option<(u64, u64, stage2::testing::RawLeaf)> {
        let arch = Arch::arm_4k(1, 40, false);
        machine
            .leaves()
            .into_iter()
            .find_map(|(start, level, leaf)| {
                let size = 1u64 << arch.shift(level);
                (start..start + size)
                    .contains(&address)
                    .then_some((start, size, leaf))
            })
    }

    #[test]
    fn ram_without_el2_in_its_gib_is_mapped_by_one_block() {
        let machine = machine(32);
        let map = map(&machine);
        assert_eq!(map.fault(GIB + 0x1234_5678), Answer::Mapped);
        let (start, size, raw) = leaf(&machine, GIB).unwrap();
        assert_eq!((start, size), (GIB, GIB));
        assert!(raw.pa == GIB && raw.read && raw.write && raw.exec_kernel && raw.exec_user);
    }

    #[test]
    fn next_to_el2_the_largest_block_that_avoids_it_is_taken() {
        let machine = machine(32);
        let map = map(&machine);
        assert_eq!(map.fault(2 * GIB + 5), Answer::Mapped);
        assert_eq!(leaf(&machine, 2 * GIB).unwrap().1, 2 * MIB);
        assert_eq!(map.fault(el2().start() - 1), Answer::Mapped);
        let (start, size, _) = leaf(&machine, el2().start() - 1).unwrap();
        assert_eq!((start, size), (el2().start() - 4096, 4096));
    }

    #[test]
    fn el2_is_refused_on_every_page_and_stays_unmapped() {
        let machine = machine(32);
        let map = map(&machine);
        for page in (el2().start()..el2().end()).step_by(4096) {
            assert_eq!(map.fault(page), Answer::Refused);
            assert_eq!(map.fault(page + 4095), Answer::Refused);
            assert!(leaf(&machine, page).is_none());
        }
    }

    #[test]
    fn devices_are_never_executable_and_never_reach_into_ram() {
        let machine = machine(32);
        let map = map(&machine);
        assert_eq!(map.fault(0x900_0000), Answer::Mapped);
        let (start, size, raw) = leaf(&machine, 0x900_0000).unwrap();
        assert_eq!((start, size), (0, GIB));
        assert!(raw.read && raw.write && !raw.exec_kernel && !raw.exec_user);
        assert_eq!(map.fault(4 * GIB + GIB / 2), Answer::Mapped);
        assert_eq!(leaf(&machine, 4 * GIB + GIB / 2).unwrap().1, 2 * MIB);
    }

    #[test]
    fn hidden_registers_are_refused_and_their_neighbours_are_not() {
        let machine = machine(32);
        let mut map = map(&machine);
        assert!(map.hide(range(0x803_0000, 0x803_1000)));
        assert_eq!(map.fault(0x803_0fff), Answer::Refused);
        assert_eq!(map.fault(0x802_f000), Answer::Mapped);
        assert_eq!(map.fault(0x803_1000), Answer::Mapped);
        assert!(leaf(&machine, 0x803_0000).is_none());
        assert_eq!(leaf(&machine, 0x802_f000).unwrap().1, 4096);
        assert_eq!(map.fault(0x803_0000), Answer::Refused);
    }

    #[test]
    fn memory_of_firmware_is_refused_and_its_neighbours_are_not() {
        let machine = machine(32);
        let mut map = map(&machine);
        let firmware = range(GIB, GIB + 0x8_0000);
        assert!(map.hide(firmware));
        assert_eq!(map.fault(GIB + 0x8_0000), Answer::Mapped);
        assert_eq!(map.fault(GIB + 2 * MIB), Answer::Mapped);
        for page in (firmware.start()..firmware.end()).step_by(4096) {
            assert_eq!(map.fault(page), Answer::Refused);
            assert!(leaf(&machine, page).is_none());
        }
        let (start, _, raw) = leaf(&machine, GIB + 0x8_0000).unwrap();
        assert!(raw.pa == start && raw.exec_kernel);
    }

    #[test]
    fn addresses_beyond_the_tables_are_refused() {
        let machine = machine(32);
        let map = map(&machine);
        assert_eq!(map.fault((1 << 40) - 1), Answer::Mapped);
        assert_eq!(map.fault(1 << 40), Answer::Refused);
        assert_eq!(map.fault(u64::MAX), Answer::Refused);
    }

    /// A 48-bit space: every 512 GiB needs a table of its own. One is spare.
    fn scarce() -> FakeMachine {
        FakeMachine::new(Arch::arm_4k(0, 48, false), 5)
    }

    fn map_48(machine: &FakeMachine) -> HostMap<&FakeMachine> {
        let features = Features::decode(&IdRegisters {
            mmfr0: 0x10_1125,
            mmfr1: 0x1021_2122,
            ..IdRegisters::default()
        });
        let mut memory = RangeList::new();
        memory.insert(range(GIB, 3 * GIB), "ram").unwrap();
        let format = format(&features).unwrap();
        let map = HostMap::new(format, machine, Default::default(), memory, el2()).unwrap();
        machine.attach(Pa::new(map.root()));
        map
    }

    #[test]
    fn without_table_pages_device_mappings_are_recycled() {
        let machine = scarce();
        let map = map_48(&machine);
        assert_eq!(map.fault(GIB), Answer::Mapped);
        assert_eq!(map.fault(1 << 39), Answer::Mapped);
        assert_eq!(map.fault(2 << 39), Answer::MappedAfterRecycling);
        assert_eq!(map.fault(1 << 39), Answer::MappedAfterRecycling);
        assert_eq!(machine.finish(), Vec::<std::string::String>::new());
    }

    #[test]
    fn recycling_keeps_ram_mapped_and_el2_refused() {
        let machine = scarce();
        let map = map_48(&machine);
        assert_eq!(map.fault(GIB), Answer::Mapped);
        for window in 1..511u64 {
            assert_ne!(map.fault(window << 39), Answer::Refused);
        }
        for page in (el2().start()..el2().end()).step_by(4096) {
            assert_eq!(map.fault(page), Answer::Refused);
        }
        let arch = Arch::arm_4k(0, 48, false);
        let ram = machine
            .leaves()
            .into_iter()
            .find(|(start, ..)| *start == GIB);
        assert_eq!(
            ram.map(|(_, level, _)| 1u64 << arch.shift(level)),
            Some(GIB)
        );
    }

    #[test]
    fn without_any_table_page_a_fault_is_refused_and_changes_nothing() {
        let machine = FakeMachine::new(Arch::arm_4k(0, 48, false), 4);
        let map = map_48(&machine);
        let before = machine.snapshot();
        assert_eq!(map.fault(1 << 39), Answer::Refused);
        assert_eq!(machine.snapshot(), before);
    }

    #[test]
    fn vtcr_for_40_bits_starts_at_level_1() {
        // RES1 31, PS 2, SH0 3, ORGN0 1, IRGN0 1, SL0 1, T0SZ 24 (Arm ARM D24.2, VTCR_EL2).
        let format = format(&features()).unwrap();
        assert_eq!(vtcr(&format, false), 0x8002_3558);
        assert_eq!(vtcr(&format, true), 0x800a_3558);
    }

    /// An IOMMU that walks the host's tables.
    struct Walker(&'static FakeMachine);

    impl stage2::InvalidateListener for Walker {
        fn invalidate(&self, range: IpaRange) {
            self.0.told(range);
        }
    }

    const DOORBELL: u64 = 0x809_0000;

    /// A map that is lent to an IOMMU; the machine caches for it what it walks.
    fn exported(tables: usize) -> (&'static FakeMachine, HostMap<&'static FakeMachine>) {
        let machine: &'static FakeMachine = Box::leak(Box::new(machine(tables)));
        let mut map = map(machine);
        let mut doorbells = RangeList::new();
        let page = range(DOORBELL, DOORBELL + 4096);
        doorbells.insert(page, "doorbells").unwrap();
        let importer = Importer {
            listener: Box::leak(Box::new(Walker(machine))),
            must_be_zero: 0,
            output_bits: 40,
            coarsest_leaf: stage2::Level::L1,
        };
        map.export(importer, &doorbells).unwrap();
        machine.import();
        (machine, map)
    }

    #[test]
    fn an_exported_map_holds_all_ram_of_the_host_and_the_doorbells() {
        let (machine, _map) = exported(64);
        let mapped: u64 = machine
            .leaves()
            .into_iter()
            .map(|(_, level, _)| 1u64 << Arch::arm_4k(1, 40, false).shift(level))
            .sum();
        let ram = 2 * GIB + GIB / 2 - el2().size();
        assert_eq!(mapped, ram + 4096);
        assert!(leaf(machine, el2().start()).is_none());
        let (start, size, raw) = leaf(machine, DOORBELL).unwrap();
        assert_eq!((start, size), (DOORBELL, 4096));
        assert!(raw.write && !raw.exec_kernel);
    }

    #[test]
    fn what_an_exported_map_loses_the_iommu_forgets_and_gets_back_at_once() {
        let (machine, map) = exported(64);
        let page = range(GIB + 5 * MIB, GIB + 5 * MIB + 4096);
        map.take_away(page, Owner::Guest(0)).unwrap();
        assert!(leaf(machine, page.start()).is_none());
        assert!(machine.take_events().iter().any(|event| matches!(
            event,
            stage2::testing::Event::Notify(range) if range.contains(Ipa::new(page.start()))
        )));
        map.give_back(page).unwrap();
        let (start, _, raw) = leaf(machine, page.start()).unwrap();
        assert!(start <= page.start() && raw.write && raw.exec_kernel);
        assert_eq!(machine.finish(), Vec::<std::string::String>::new());
    }

    #[test]
    fn recycling_leaves_the_doorbells_of_an_exported_map_alone() {
        let (machine, map) = exported(64);
        for window in 5..500u64 {
            let answer = map.fault(window * GIB + 0x1000 * window);
            assert_ne!(answer, Answer::Refused);
        }
        map.drop_devices(&mut map.space.write());
        assert!(leaf(machine, 100 * GIB).is_none());
        assert_eq!(leaf(machine, DOORBELL).unwrap().1, 4096);
        assert_eq!(leaf(machine, GIB).unwrap().0, GIB);
        assert_eq!(machine.finish(), Vec::<std::string::String>::new());
    }

    #[test]
    fn an_iommu_that_cannot_walk_the_map_is_refused_and_nobody_walks_it() {
        let machine: &'static FakeMachine = Box::leak(Box::new(machine(64)));
        let mut map = map(machine);
        let importer = |output_bits| Importer {
            listener: Box::leak(Box::new(Walker(machine))),
            must_be_zero: 0,
            output_bits,
            coarsest_leaf: stage2::Level::L1,
        };
        let refused = map.export(importer(36), &RangeList::new());
        let wide = HostMapError::Export(ExportError::TooWide(40));
        assert_eq!(refused, Err(wide));
        assert_eq!(map.export(importer(40), &RangeList::new()), Ok(()));
    }

    proptest! {
        /// After any faults, every leaf is the identity, none touches EL2, only RAM executes.
        #[test]
        fn any_faults_keep_the_invariant(addresses in prop::collection::vec(0u64..6 * GIB, 1..40)) {
            let machine = machine(40);
            let map = map(&machine);
            for address in addresses {
                let refused = map.fault(address) == Answer::Refused;
                prop_assert_eq!(refused, el2().contains(address));
            }
            let arch = Arch::arm_4k(1, 40, false);
            for (start, level, raw) in machine.leaves() {
                let size = 1u64 << arch.shift(level);
                let leaf = range(start, start + size);
                prop_assert!(raw.pa == start && !leaf.overlaps(el2()));
                let ram = [range(GIB, 3 * GIB), range(4 * GIB, 4 * GIB + GIB / 2)];
                let inside = ram.iter().any(|r| r.contains_range(leaf));
                let outside = ram.iter().all(|r| !r.overlaps(leaf));
                prop_assert!(inside || outside);
                prop_assert_eq!(raw.exec_kernel, inside);
            }
            prop_assert_eq!(machine.finish(), Vec::<std::string::String>::new());
        }
    }
}
