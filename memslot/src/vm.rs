//! A VM's memory: slots, page table, policy, and the order in which they are locked.
//!
//! ```text
//! run gate  →  slots  →  page table (mmu)  →  frame pool
//! ```
//!
//! The gate never waits: it is closed or refused. `slots` is held for reading only as long as a
//! look-up takes, and for writing while slots change, lock, unlock, or pending work is done.
//! `mmu` is shared by faults and zaps and exclusive for everything that frees tables or changes
//! an input of the memory type. A fault reads the slots, lets go, finds its frame, and then
//! compares the generation under `mmu`: if the slots have changed, it starts over.
//!
//! A writer that waits keeps new readers out, of `slots` and of `mmu`. Nobody takes one of them
//! twice, and what the page table calls back (an importer's listener) takes neither.

use alloc::vec::Vec;

use stage2::{IpaRange, Level, MapError};

use crate::addr::{Gfn, GfnRange};
use crate::dirty::DirtyBitmap;
use crate::error::Error;
use crate::frames::{FrameRun, FrameSource};
use crate::gate::RunGate;
use crate::noncoherent::NoncoherentDma;
use crate::pending::{PendingOps, Work};
use crate::policy::MemTypePolicy;
use crate::slot::{Memslot, SlotId};
use crate::slots::Memslots;
use crate::steps::{Cost, Extent};
use crate::sync::{AtomicU64, Mutex, Ordering, RwLock, RwLockWriteGuard};
use crate::table::{GuestTable, LeafRun, bytes};
use crate::unfinished::Unfinished;
#[cfg(feature = "x86")]
use crate::zap::ZapList;

/// Whether the host may see the VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmKind {
    /// The host sees everything; dirty logging and non-coherent slots are possible.
    Unprotected,
    /// The host sees only what the guest shares.
    Protected,
}

/// Fixed properties of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Slot numbers are below this.
    pub max_slots: u16,
    /// Guest frames are below this.
    pub gfn_limit: u64,
    /// Whether the host may see the VM's memory.
    pub kind: VmKind,
}

/// What the mmu lock guards.
#[derive(Debug)]
pub(crate) struct Mmu<T> {
    pub(crate) table: T,
    /// Devices that do not snoop: an input of the memory type.
    pub(crate) noncoherent: NoncoherentDma,
    /// Devices that snoop: they make locked leaves immovable.
    pub(crate) snooping: u32,
    /// Importers of the exported root.
    pub(crate) importers: u32,
    /// Generation of the slots that the table agrees with.
    pub(crate) generation: u64,
    /// Bitmaps of logged slots; here because a bit and a leaf change together.
    pub(crate) dirty: Vec<(SlotId, DirtyBitmap)>,
    /// How many pages the host has taken back, of slots of which it has any: their notes are in the table.
    pub(crate) unshared: Vec<(SlotId, u64)>,
}

/// What belongs to a locked slot.
#[derive(Debug)]
pub(crate) struct Locked {
    pub(crate) id: SlotId,
    pub(crate) range: GfnRange,
    pub(crate) pins: Vec<FrameRun>,
    /// One past the last frame that is mapped: the slot's end, but while the lock is made or taken
    /// back in steps.
    pub(crate) mapped_to: u64,
    /// What must be done for this slot before the next run.
    pub(crate) work: Work,
    /// The first frame for which it has not been done.
    pub(crate) done_to: u64,
}

impl Locked {
    /// Adds work for the whole slot.
    pub(crate) fn owe(&mut self, work: Work) {
        if !work.is_empty() {
            self.work |= work;
            self.done_to = self.range.start().get();
        }
    }

    /// The frames that are still to be mapped.
    pub(crate) fn unmapped(&self) -> Option<GfnRange> {
        GfnRange::new(self.mapped_to, self.range.end())
    }

    /// The work of this slot, as a VM's pending word has it.
    fn pending(&self) -> Work {
        if self.unmapped().is_some() {
            self.work | Work::UNFINISHED
        } else {
            self.work
        }
    }
}

/// What the slots lock guards.
#[derive(Debug)]
pub(crate) struct SlotTable {
    pub(crate) set: Memslots,
    pub(crate) locked: Vec<Locked>,
    pub(crate) unfinished: Option<Unfinished>,
}

/// A VM's memory.
#[derive(Debug)]
pub struct GuestMemory<T, P, S> {
    pub(crate) config: VmConfig,
    pub(crate) policy: P,
    pub(crate) frames: S,
    /// Pages of 4 KiB in a leaf of the table, as a power of two.
    pub(crate) page_order: u32,
    pub(crate) gate: RunGate,
    pub(crate) slots: RwLock<SlotTable>,
    pub(crate) mmu: RwLock<Mmu<T>>,
    /// How often pages were taken away while their slot stayed. Changes under `mmu` only.
    pub(crate) removals: AtomicU64,
    pub(crate) pending: PendingOps,
    #[cfg(feature = "x86")]
    pub(crate) zaps: ZapList,
    pub(crate) counters: Mutex<Counters>,
}

/// What has happened, for the console and the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Times that pending work was done.
    pub pending_runs: u64,
    /// Slots whose data was cleaned and invalidated by them.
    pub slots_flushed: u64,
    /// Faults on locked slots that should not have happened.
    pub unexpected_faults: u64,
    /// Edges of the non-coherent count that removed or rewrote leaves.
    pub edges: u64,
    /// Passes over ranges after register writes.
    pub zap_passes: u64,
}

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// A VM without slots, over an empty page table.
    #[must_use]
    pub fn new(config: VmConfig, policy: P, frames: S, table: T) -> Self {
        let page_order = table.page_order();
        let mmu = Mmu {
            table,
            noncoherent: NoncoherentDma::new(),
            snooping: 0,
            importers: 0,
            generation: 0,
            dirty: Vec::new(),
            unshared: Vec::new(),
        };
        Self {
            config,
            policy,
            frames,
            page_order,
            gate: RunGate::new(),
            slots: RwLock::new(SlotTable {
                set: Memslots::new(),
                locked: Vec::new(),
                unfinished: None,
            }),
            mmu: RwLock::new(mmu),
            removals: AtomicU64::new(0),
            pending: PendingOps::new(),
            #[cfg(feature = "x86")]
            zaps: ZapList::new(),
            counters: Mutex::new(Counters::default()),
        }
    }

    /// The frame source.
    pub fn frames(&self) -> &S {
        &self.frames
    }

    /// The policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        *self.counters.lock()
    }

    /// Work to be done before the next run.
    pub fn pending(&self) -> Work {
        self.pending.load()
    }

    /// The slot that holds `gfn`, and the generation of the slots.
    pub fn find_slot(&self, gfn: Gfn) -> Option<(Memslot, u64)> {
        let slots = self.slots.read();
        slots
            .set
            .find(gfn)
            .map(|slot| (*slot, slots.set.generation()))
    }

    /// The slot with number `id`.
    pub fn slot(&self, id: SlotId) -> Option<Memslot> {
        self.slots.read().set.get(id).copied()
    }

    /// Lends the page table for reading, beside faults.
    pub fn with_table<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        f(&self.mmu.read().table)
    }

    /// Excludes faults in order to take pages away. A frame that was looked up before, by a fault
    /// or for a lock, is not mapped afterwards: whoever looks one up compares
    /// [`GuestMemory::removals`] before it maps the frame.
    pub(crate) fn remove_pages(&self) -> RwLockWriteGuard<'_, Mmu<T>> {
        let mmu = self.mmu.write();
        self.removals.fetch_add(1, Ordering::Release);
        mmu
    }

    /// How often pages were taken away; read before a look-up, and again under `mmu`.
    pub(crate) fn removals(&self) -> u64 {
        self.removals.load(Ordering::Acquire)
    }

    pub(crate) fn count(&self, f: impl FnOnce(&mut Counters)) {
        f(&mut self.counters.lock());
    }

    /// Refuses slot numbers that this VM does not have.
    pub(crate) fn check_id(&self, id: SlotId) -> Result<(), Error> {
        if id.0 < self.config.max_slots {
            Ok(())
        } else {
            Err(Error::SlotOutOfRange(id))
        }
    }
}

impl SlotTable {
    /// Union of what the locked slots need, and of what keeps everybody out.
    pub(crate) fn work(&self) -> Work {
        let out = self
            .unfinished
            .is_some_and(|u| u.change.keeps_vcpus_out())
            .then_some(Work::UNFINISHED);
        self.locked
            .iter()
            .fold(out.unwrap_or_default(), |all, l| all | l.pending())
    }

    /// Refuses what needs every lock to be complete.
    pub(crate) fn finished(&self) -> Result<(), Error> {
        let unfinished = self.locked.iter().find(|l| l.unmapped().is_some());
        unfinished.map_or(Ok(()), |l| Err(Error::Unfinished(l.id)))
    }

    /// Refuses a vCPU that would meet half of something.
    pub(crate) fn may_enter(&self) -> Result<(), Error> {
        match self.unfinished {
            Some(unfinished) if unfinished.change.keeps_vcpus_out() => Err(Error::ChangeUnfinished),
            _ => self.finished(),
        }
    }

    pub(crate) fn locked(&self, id: SlotId) -> Option<&Locked> {
        self.locked.iter().find(|l| l.id == id)
    }

    pub(crate) fn locked_mut(&mut self, id: SlotId) -> Option<&mut Locked> {
        self.locked.iter_mut().find(|l| l.id == id)
    }

    /// A lock has got so far; there is room for its pins.
    pub(crate) fn mapped(&mut self, slot: &Memslot, pins: Vec<FrameRun>, to: u64, work: Work) {
        match self.locked_mut(slot.id) {
            Some(locked) => {
                locked.pins.extend(pins);
                locked.mapped_to = to;
                locked.work |= work;
            }
            None => self.locked.push(Locked {
                id: slot.id,
                range: slot.range,
                pins,
                mapped_to: to,
                work,
                done_to: slot.range.start().get(),
            }),
        }
    }

    /// The slot, if it may be changed.
    pub(crate) fn unlocked(&self, id: SlotId) -> Result<Memslot, Error> {
        let slot = self.set.get(id).ok_or(Error::NoSuchSlot(id))?;
        if slot.lock.is_some() {
            Err(Error::Locked(id))
        } else {
            Ok(*slot)
        }
    }
}

impl<T: GuestTable> Mmu<T> {
    /// Removes all leaves, notes and tables of a slot's range.
    pub(crate) fn unmap(&mut self, range: GfnRange) -> Result<(), Error> {
        self.table.unmap(slot_bytes(range)?).map_err(Error::from)
    }

    /// Removes all leaves of a slot's range. Notes stay: what was withheld stays withheld.
    pub(crate) fn zap(&self, range: GfnRange) -> Result<(), Error> {
        self.table.zap(slot_bytes(range)?).map_err(Error::from)
    }

    /// The same for a part of a slot, whose blocks of 1 GiB keep their rest: they are not cleaned in
    /// one go, and there is no note below them.
    pub(crate) fn zap_part(&mut self, part: GfnRange) -> Result<(), Error> {
        if self.would_cut(part)? {
            self.unmap(part)
        } else {
            self.zap(part)
        }
    }

    /// Whether a part lies in a block of 1 GiB.
    pub(crate) fn would_cut(&self, part: GfnRange) -> Result<bool, Error> {
        let range = slot_bytes(part)?;
        let run = self.table.next_run(range);
        let cuts = |run: &LeafRun| run.level.height() > Level::L2.height() && run.range == range;
        Ok(run.as_ref().is_some_and(cuts))
    }

    /// What is taken away in one go: less where something is mapped that `cleans` says to be cleaned.
    pub(crate) fn first(&self, rest: GfnRange, cleans: bool, extent: Extent) -> GfnRange {
        let part = extent.first(rest, Cost::Pages);
        if !cleans || self.empty_to(part) == part.end() {
            part
        } else {
            extent.first(rest, Cost::Maintenance)
        }
    }

    /// The frame up to which nothing is mapped in a part.
    pub(crate) fn empty_to(&self, part: GfnRange) -> u64 {
        let end = bytes(part).map(|range| self.table.empty_to(range));
        end.map_or(part.start(), |end| end.frame()).get()
    }

    /// Takes the leaves of a part away that [`Self::first`] has chosen; notes stay.
    pub(crate) fn zap_first(&mut self, part: GfnRange) -> Result<(), Error> {
        if self.table.owes_data() {
            self.zap_part(part)
        } else {
            // A block goes at once, with nothing to clean.
            self.zap(part)
        }
    }

    /// The same with its notes and tables.
    pub(crate) fn unmap_first(&mut self, part: GfnRange, extent: Extent) -> Result<(), Error> {
        if extent == Extent::Step && !self.table.owes_data() {
            self.zap(part)?;
        }
        self.unmap(part)
    }

    /// Whether anybody but a vCPU may access the memory.
    pub(crate) fn has_other_users(&self) -> bool {
        self.noncoherent.any() || self.snooping > 0 || self.importers > 0
    }

    pub(crate) fn bitmap(&self, id: SlotId) -> Option<&DirtyBitmap> {
        self.dirty
            .iter()
            .find(|(of, _)| *of == id)
            .map(|(_, bitmap)| bitmap)
    }
}

/// The bytes of a slot. Creation has refused ranges that do not fit.
pub(crate) fn slot_bytes(range: GfnRange) -> Result<IpaRange, Error> {
    bytes(range).ok_or(Error::BadRange {
        base: range.start().get(),
        npages: range.npages(),
    })
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        match error {
            MapError::NoMemory { needed } => Self::NeedTables(needed),
            other => Self::Table(other),
        }
    }
}
