//! Devices and importers: who else accesses the VM's memory.
//!
//! What is pending is cleaned before any of them is admitted: a device may access memory before
//! the first vCPU runs, and maintenance that waits for that run would come too late. For the vCPU
//! it stays pending: the host may go on writing until it runs.
//!
//! The first device that does not snoop, and the last one that goes, change the memory type of
//! every unflagged page of RAM. The count and what follows from it are one section that excludes
//! faults:
//!
//! | page | what happens at an edge |
//! |---|---|
//! | on demand | its leaf is removed; the next fault computes the new type |
//! | locked | its leaf is rewritten in place, with all vCPUs out and no other device in |
//! | flagged slot, device memory | nothing: its type does not depend on the count |
//!
//! On arm64 the data of every such page is cleaned and invalidated after the invalidation of
//! its translation: with the count at zero the guest's non-cacheable accesses went to the cache.

use stage2::{Ipa, IpaRange, LeafAttrs, PaRange};

use crate::addr::GfnRange;
use crate::error::Error;
use crate::frames::FrameSource;
use crate::gate::ClosedGate;
use crate::noncoherent::{Edge, NoncoherentDma};
use crate::policy::{LeafType, MemTypePolicy};
use crate::slot::{Memslot, SlotFlags, SlotKind};
use crate::steps::{Cost, Extent, Progress, repeat};
use crate::table::{GuestTable, behind, rewrite};
use crate::unfinished::{Change, Unfinished};
use crate::vm::{GuestMemory, Mmu, SlotTable, slot_bytes};

/// Whether a device sees the CPUs' caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dma {
    /// Every access is snooped.
    Snooping,
    /// Accesses may go past the caches.
    NonSnooping,
}

/// Direction of a change of the count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Register,
    Unregister,
}

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Admits a device that may access the VM's memory from now on. What is pending is cleaned
    /// first, and stays pending for the first run.
    ///
    /// # Errors
    /// For a device that does not snoop: [`Error::InUse`] while a root is exported whose types
    /// would change, or while other devices keep locked slots from being rewritten; [`Error::VcpuRunning`] if locked
    /// slots must be rewritten and a vCPU is inside; [`Error::NonCoherent`] if a locked slot's
    /// type would depend on a vCPU. For any: [`Error::Unfinished`] while a slot is locked in part,
    /// [`Error::ChangeUnfinished`] during another change. The count has not changed then.
    pub fn register_device(&self, dma: Dma) -> Result<Edge, Error> {
        self.device_part(dma, Direction::Register, Extent::Whole)
            .map(|(edge, _)| edge)
    }

    /// [`GuestMemory::register_device`] in steps, for as long as `go_on` allows; the same call
    /// continues it. The device is admitted when it is done; while types change no vCPU enters.
    ///
    /// # Errors
    /// As [`GuestMemory::register_device`], and [`Error::NeedTables`] to cut a block of 1 GiB; what
    /// earlier calls have done stays then.
    pub fn register_in_steps(
        &self,
        dma: Dma,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        self.device_in_steps(dma, Direction::Register, go_on)
    }

    /// Removes a device. It no longer accesses memory, and its accesses in flight have drained.
    ///
    /// # Errors
    /// [`Error::CountUnbalanced`] if there is none, and as [`GuestMemory::register_device`].
    pub fn unregister_device(&self, dma: Dma) -> Result<Edge, Error> {
        self.device_part(dma, Direction::Unregister, Extent::Whole)
            .map(|(edge, _)| edge)
    }

    /// [`GuestMemory::unregister_device`] in steps, as [`GuestMemory::register_in_steps`].
    ///
    /// # Errors
    /// As both.
    pub fn unregister_in_steps(
        &self,
        dma: Dma,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        self.device_in_steps(dma, Direction::Unregister, go_on)
    }

    fn device_in_steps(
        &self,
        dma: Dma,
        way: Direction,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        let mut refused = None;
        let progress = repeat(go_on, || {
            let part = self.device_part(dma, way, Extent::Step);
            part.map(|(_, progress)| progress)
                .inspect_err(|error| refused = Some(*error))
        })?;
        // Behind the cleaning nothing is left to go on with: repeated, it would clean all again, and
        // never say why.
        match refused {
            Some(error) if self.slots.read().unfinished.is_none() => Err(error),
            _ => Ok(progress),
        }
    }

    /// Admits an importer of the VM's page table: what is pending is cleaned first, and stays
    /// pending for the first run; then `export` makes the table's root known to it.
    ///
    /// # Errors
    /// [`Error::NonCoherent`] while a device or a slot is not coherent and a vCPU would have to be
    /// asked for the type: an importer's access has none. Whatever `export` returns; nothing is counted then.
    pub fn attach_importer<R>(
        &self,
        export: impl FnOnce(&mut T) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let slots = self.slots.write();
        slots.unchanged()?;
        slots.finished()?;
        self.clean_for_device(&slots);
        self.import(&slots, export)
    }

    /// The same for an importer that is a device which has just been registered: what was pending has
    /// been cleaned for it.
    ///
    /// # Errors
    /// As [`GuestMemory::attach_importer`].
    pub fn attach_registered<R>(
        &self,
        export: impl FnOnce(&mut T) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let slots = self.slots.write();
        slots.unchanged()?;
        slots.finished()?;
        self.import(&slots, export)
    }

    fn import<R>(
        &self,
        slots: &SlotTable,
        export: impl FnOnce(&mut T) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut mmu = self.mmu.write();
        let flagged = slots
            .set
            .iter()
            .any(|s| s.flags.contains(SlotFlags::NONCOHERENT_DMA));
        if self.policy.asks_vcpu() && (mmu.noncoherent.any() || flagged) {
            return Err(Error::NonCoherent);
        }
        let importers = mmu.importers.checked_add(1).ok_or(Error::CountUnbalanced)?;
        let exported = export(&mut mmu.table)?;
        mmu.importers = importers;
        Ok(exported)
    }

    /// Removes an importer, after it has let go of the root.
    ///
    /// # Errors
    /// [`Error::CountUnbalanced`] if there is none.
    pub fn detach_importer(&self) -> Result<(), Error> {
        self.detach_importer_with(|_| Ok(()))
    }

    /// Removes an importer and lets `release` take its root back from the table, in one section.
    ///
    /// # Errors
    /// [`Error::CountUnbalanced`] if there is none, and `release` is not called then. Whatever
    /// `release` returns; the importer still counts then.
    pub fn detach_importer_with<R>(
        &self,
        release: impl FnOnce(&mut T) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut mmu = self.mmu.write();
        let importers = mmu.importers.checked_sub(1).ok_or(Error::CountUnbalanced)?;
        let released = release(&mut mmu.table)?;
        mmu.importers = importers;
        Ok(released)
    }

    /// The next part of a device's coming or going: first what is pending is cleaned, for one that
    /// comes; then it counts; then the types follow.
    fn device_part(
        &self,
        dma: Dma,
        way: Direction,
        extent: Extent,
    ) -> Result<(Edge, Progress), Error> {
        if (dma, way) == (Dma::Snooping, Direction::Unregister) {
            // Nothing follows from it: it may come at any time.
            let mut mmu = self.mmu.write();
            mmu.snooping = mmu.snooping.checked_sub(1).ok_or(Error::CountUnbalanced)?;
            return Ok((Edge::None, Progress::Done));
        }
        let mut slots = self.slots.write();
        let is_it = |change: &Change| match *change {
            Change::Clean(of, what) | Change::Types(of, what, _) => (of, what) == (dma, way),
            _ => false,
        };
        let mut at = match slots.resumes(is_it)? {
            Some(at) => at,
            None => slots.finished().map(|()| 0)?,
        };
        if let Some(Change::Types(_, _, edge)) = slots.unfinished.map(|u| u.change) {
            // Where locked leaves change nobody is inside: the first step has closed the gate, and said
            // that a change keeps everybody out, before it opened it again.
            let mut mmu = self.mmu.write();
            return self.apply_edge(&mut slots, &mut mmu, (dma, way, edge), at, extent);
        }
        while let Some(next) = (way == Direction::Register)
            .then(|| self.clean_part(&slots, at, extent))
            .flatten()
        {
            at = next;
            if extent == Extent::Step {
                let change = Change::Clean(dma, way);
                slots.unfinished = Some(Unfinished { change, at });
                return Ok((Edge::None, Progress::More));
            }
        }
        // It counts now, or nothing of it is left.
        slots.unfinished = None;
        match dma {
            Dma::NonSnooping => self.change_count(&mut slots, way, extent),
            Dma::Snooping => {
                let mut mmu = self.mmu.write();
                mmu.snooping = mmu.snooping.checked_add(1).ok_or(Error::CountUnbalanced)?;
                Ok((Edge::None, Progress::Done))
            }
        }
    }

    fn change_count(
        &self,
        slots: &mut SlotTable,
        way: Direction,
        extent: Extent,
    ) -> Result<(Edge, Progress), Error> {
        let mut mmu = self.mmu.write();
        if way == Direction::Register && mmu.importers > 0 && self.policy.asks_vcpu() {
            return Err(Error::InUse(mmu.importers));
        }
        let before = mmu.noncoherent.count();
        let mut next = NoncoherentDma::with_count(before);
        let edge = match way {
            Direction::Register => next.register()?,
            Direction::Unregister => next.unregister()?,
        };
        if edge == Edge::None || !self.policy.depends_on_noncoherent_dma() {
            mmu.noncoherent = next;
            return Ok((edge, Progress::Done));
        }
        if mmu.importers > 0 {
            return Err(Error::InUse(mmu.importers));
        }
        let _closed = self.prepare_edge(slots, &mmu, next.any())?;
        mmu.noncoherent = next;
        let what = (Dma::NonSnooping, way, edge);
        let followed = self.apply_edge(slots, &mut mmu, what, 0, extent);
        if followed.is_err() {
            // The first step lacked tables, and has changed nothing.
            mmu.noncoherent = NoncoherentDma::with_count(before);
        }
        followed
    }

    /// Everything that can refuse an edge. Rewriting locked slots needs the vCPUs out: they
    /// would see the leaves missing.
    fn prepare_edge(
        &self,
        slots: &SlotTable,
        mmu: &Mmu<T>,
        noncoherent: bool,
    ) -> Result<Option<ClosedGate<'_>>, Error> {
        let mut rewritten = slots
            .set
            .iter()
            .filter(|s| follows_count(s) && s.lock.is_some());
        let Some(first) = rewritten.next() else {
            return Ok(None);
        };
        self.locked_type(first, noncoherent)?;
        if mmu.snooping > 0 {
            return Err(Error::InUse(mmu.snooping));
        }
        self.gate.close().map(Some)
    }

    /// The types of slots from frame `at` on follow the count: in one go, or those of the next part.
    fn apply_edge(
        &self,
        slots: &mut SlotTable,
        mmu: &mut Mmu<T>,
        (dma, way, edge): (Dma, Direction, Edge),
        mut at: u64,
        extent: Extent,
    ) -> Result<(Edge, Progress), Error> {
        while let Some((slot, rest)) = slots.next_of(at, follows_count) {
            let part = match slot.lock {
                None => {
                    let cleans = self.policy.needs_maintenance(LeafType::HonourGuest);
                    let part = mmu.first(rest, cleans, extent);
                    self.zap_with_maintenance(mmu, part)?;
                    part
                }
                Some(_) => self.rewrite_locked(slots, mmu, &slot, rest, extent)?,
            };
            at = part.end();
            if extent == Extent::Step {
                let change = Change::Types(dma, way, edge);
                slots.unfinished = Some(Unfinished { change, at });
                self.pending.replace(slots.work());
                return Ok((edge, Progress::More));
            }
        }
        slots.unfinished = None;
        self.pending.replace(slots.work());
        self.count(|c| c.edges += 1);
        Ok((edge, Progress::Done))
    }

    /// A locked slot's leaves change in place, the first part of `rest`. A block of 1 GiB that owes
    /// cleaning is cut: by 2 MiB it is cleaned, and nobody is in who could meet a leaf that is missing.
    fn rewrite_locked(
        &self,
        slots: &mut SlotTable,
        mmu: &mut Mmu<T>,
        slot: &Memslot,
        rest: GfnRange,
        extent: Extent,
    ) -> Result<GfnRange, Error> {
        let mut part = extent.first(rest, Cost::Maintenance);
        if !self.policy.needs_maintenance(LeafType::HonourGuest) && mmu.would_cut(part)? {
            part = extent.first(rest, Cost::Blocks);
        }
        let leaf = self.locked_type(slot, mmu.noncoherent.any())?;
        let (mem, combine) = self.policy.encode(leaf);
        rewrite(&mut mmu.table, slot_bytes(part)?, |attrs| LeafAttrs {
            mem,
            combine,
            ..attrs
        })?;
        // The host may write between this and the next run, as between lock and first run.
        if let Some(entry) = slots.locked_mut(slot.id) {
            entry.owe(self.flush_work(leaf));
        }
        Ok(part)
    }

    /// Removes the leaves of a range, then cleans and invalidates what they mapped, except
    /// where the removal has done so.
    fn zap_with_maintenance(&self, mmu: &mut Mmu<T>, part: GfnRange) -> Result<(), Error> {
        if !self.policy.needs_maintenance(LeafType::HonourGuest) {
            return mmu.zap_part(part);
        }
        let cuts = mmu.would_cut(part)?;
        let mut rest = Some(slot_bytes(part)?);
        while let Some(range) = rest {
            let mut memory: [Option<PaRange>; BATCH] = [None; BATCH];
            let end = gather(&mmu.table, range, &mut memory);
            rest = behind(range, end);
            let size = end.get() - range.start().get();
            let gone = IpaRange::new(range.start(), size).map_err(stage2::MapError::from)?;
            if cuts {
                mmu.table.unmap(gone)?;
            } else {
                mmu.table.zap(gone)?;
            }
            memory
                .into_iter()
                .flatten()
                .for_each(|m| mmu.table.clean_invalidate_data(m));
        }
        Ok(())
    }
}

/// Runs of memory that one invalidation is followed by.
const BATCH: usize = 64;

/// Lists the memory whose removal brings no maintenance, until `memory` is full or the range
/// ends; returns how far it got.
fn gather<T: GuestTable>(table: &T, range: IpaRange, memory: &mut [Option<PaRange>; BATCH]) -> Ipa {
    let mut rest = Some(range);
    for place in memory {
        let Some(run) = rest.and_then(|r| table.next_run(r)) else {
            return range.end();
        };
        rest = behind(range, run.range.end());
        *place = run.memory().filter(|_| !run.attrs.maintenance().data);
    }
    rest.map_or(range.end(), |r| r.start())
}

/// Whether the type of a slot's pages follows the VM's count.
fn follows_count(slot: &Memslot) -> bool {
    slot.kind == SlotKind::Ram && !slot.flags.contains(SlotFlags::NONCOHERENT_DMA)
}
