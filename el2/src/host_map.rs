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

    /// Whether some of a range was hidden: it is nobody's.
    #[must_use]
    pub fn hides(&self, range: AddrRange) -> bool {
        self.hidden.as_slice().iter().any(|h| h.overlaps(range))
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
#[path = "host_map_tests.rs"]
mod tests;
