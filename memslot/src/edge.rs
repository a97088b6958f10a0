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

use crate::error::Error;
use crate::frames::FrameSource;
use crate::gate::ClosedGate;
use crate::noncoherent::{Edge, NoncoherentDma};
use crate::policy::MemTypePolicy;
use crate::slot::{Memslot, SlotFlags, SlotKind};
use crate::table::{GuestTable, behind, rewrite};
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
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
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
    /// type would depend on a vCPU. For any: [`Error::Unfinished`] while a slot is locked in part.
    /// The count has not changed then.
    pub fn register_device(&self, dma: Dma) -> Result<Edge, Error> {
        let mut slots = self.slots.write();
        slots.finished()?;
        self.clean_for_device(&slots);
        match dma {
            Dma::NonSnooping => self.change_count(&mut slots, Change::Register),
            Dma::Snooping => {
                let mut mmu = self.mmu.write();
                mmu.snooping = mmu.snooping.checked_add(1).ok_or(Error::CountUnbalanced)?;
                Ok(Edge::None)
            }
        }
    }

    /// Removes a device. It no longer accesses memory, and its accesses in flight have drained.
    ///
    /// # Errors
    /// [`Error::CountUnbalanced`] if there is none, and as [`GuestMemory::register_device`].
    pub fn unregister_device(&self, dma: Dma) -> Result<Edge, Error> {
        let mut slots = self.slots.write();
        slots.finished()?;
        match dma {
            Dma::NonSnooping => self.change_count(&mut slots, Change::Unregister),
            Dma::Snooping => {
                let mut mmu = self.mmu.write();
                mmu.snooping = mmu.snooping.checked_sub(1).ok_or(Error::CountUnbalanced)?;
                Ok(Edge::None)
            }
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
        slots.finished()?;
        self.clean_for_device(&slots);
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

    fn change_count(&self, slots: &mut SlotTable, change: Change) -> Result<Edge, Error> {
        let mut mmu = self.mmu.write();
        if change == Change::Register && mmu.importers > 0 && self.policy.asks_vcpu() {
            return Err(Error::InUse(mmu.importers));
        }
        let mut next = NoncoherentDma::with_count(mmu.noncoherent.count());
        let edge = match change {
            Change::Register => next.register()?,
            Change::Unregister => next.unregister()?,
        };
        if edge == Edge::None || !self.policy.depends_on_noncoherent_dma() {
            mmu.noncoherent = next;
            return Ok(edge);
        }
        if mmu.importers > 0 {
            return Err(Error::InUse(mmu.importers));
        }
        let _closed = self.prepare_edge(slots, &mmu, next.any())?;
        mmu.noncoherent = next;
        self.apply_edge(slots, &mut mmu)?;
        self.count(|c| c.edges += 1);
        Ok(edge)
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

    fn apply_edge(&self, slots: &mut SlotTable, mmu: &mut Mmu<T>) -> Result<(), Error> {
        let noncoherent = mmu.noncoherent.any();
        let SlotTable { set, locked } = slots;
        for slot in set.iter().filter(|s| follows_count(s)) {
            let range = slot_bytes(slot.range)?;
            if slot.lock.is_none() {
                self.zap_with_maintenance(mmu, range)?;
                continue;
            }
            let leaf = self.locked_type(slot, noncoherent)?;
            let (mem, combine) = self.policy.encode(leaf);
            rewrite(&mut mmu.table, range, |attrs| LeafAttrs {
                mem,
                combine,
                ..attrs
            })?;
            // The host may write between this and the next run, as between lock and first run.
            if let Some(entry) = locked.iter_mut().find(|l| l.id == slot.id) {
                entry.owe(self.flush_work(leaf));
            }
        }
        self.pending.publish(slots.work());
        Ok(())
    }

    /// Removes the leaves of a range, then cleans and invalidates what they mapped, except
    /// where the removal has done so.
    fn zap_with_maintenance(&self, mmu: &mut Mmu<T>, range: IpaRange) -> Result<(), Error> {
        if !self
            .policy
            .needs_maintenance(crate::policy::LeafType::HonourGuest)
        {
            return Ok(mmu.table.zap(range)?);
        }
        let mut rest = Some(range);
        while let Some(range) = rest {
            let mut memory: [Option<PaRange>; BATCH] = [None; BATCH];
            let end = gather(&mmu.table, range, &mut memory);
            rest = behind(range, end);
            let size = end.get() - range.start().get();
            let part = IpaRange::new(range.start(), size).map_err(stage2::MapError::from)?;
            mmu.table.zap(part)?;
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
