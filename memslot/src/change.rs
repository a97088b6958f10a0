//! Creating, deleting, moving and flagging slots; host unmap; the dirty log.
//!
//! Each change prepares all that can fail, then takes the mmu lock exclusively, removes the old
//! leaves, declares the new generation, and swaps the collection. A locked slot refuses
//! everything but dirty logging under a read lock.
//!
//! In steps the first one does all of this for the slot's first pages, and each further one takes away
//! the next (see `unfinished`).

use stage2::{LeafAttrs, Perms};

use crate::addr::{Gfn, GfnRange};
use crate::dirty::DirtyBitmap;
use crate::error::Error;
use crate::frames::FrameSource;
use crate::policy::MemTypePolicy;
use crate::slot::{LockFlags, Memslot, SlotFlags, SlotId, SlotKind};
use crate::slots::Memslots;
use crate::steps::{Cost, Extent, Progress, repeat};
use crate::table::{GuestTable, rewrite};
use crate::unfinished::{Change, Unfinished};
use crate::vm::{GuestMemory, Mmu, SlotTable, VmKind, slot_bytes};

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Adds a slot.
    ///
    /// # Errors
    /// For a number, range, flag or overlap that is not allowed; nothing has changed then. A
    /// non-coherent slot is refused while a root is exported, if a vCPU has a say in its types.
    pub fn create_slot(&self, slot: Memslot) -> Result<(), Error> {
        self.create_part(slot, Extent::Whole).map(drop)
    }

    /// [`GuestMemory::create_slot`] in steps, for as long as `go_on` allows: a logged slot is there, and
    /// [`GuestMemory::set_flags_in_steps`] with its flags goes on to begin its log.
    ///
    /// # Errors
    /// As [`GuestMemory::create_slot`].
    pub fn create_in_steps(
        &self,
        slot: Memslot,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        let mut is_there = false;
        repeat(go_on, || {
            if core::mem::replace(&mut is_there, true) {
                return self.flags_part(slot.id, slot.flags, Extent::Step);
            }
            self.create_part(slot, Extent::Step)
        })
    }

    fn create_part(&self, slot: Memslot, extent: Extent) -> Result<Progress, Error> {
        self.check_id(slot.id)?;
        self.check_range(slot.range)?;
        self.check_flags(slot.flags)?;
        let mut slots = self.slots.write();
        slots.unchanged()?;
        let slot = Memslot { lock: None, ..slot };
        let next = slots.set.with(slot)?;
        let importers = self.mmu.read().importers;
        let flagged = slot.flags.contains(SlotFlags::NONCOHERENT_DMA);
        if flagged && importers > 0 && self.policy.asks_vcpu() {
            return Err(Error::InUse(importers));
        }
        self.commit_logging(&mut slots, slot, next, extent)
    }

    /// Removes a slot and its leaves. Gives the slot that it removed: by its number alone a caller
    /// can't tell, since that number may have been another slot's a moment ago.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`], [`Error::Locked`], [`Error::ChangeUnfinished`], or missing memory;
    /// nothing has changed then.
    pub fn delete_slot(&self, id: SlotId) -> Result<Memslot, Error> {
        self.leave_part(id, None, Extent::Whole)
            .map(|(slot, _)| slot)
    }

    /// [`GuestMemory::delete_slot`] in steps, for as long as `go_on` allows; the same call continues
    /// it, and it is the slot's end when this gives the slot. From the first step on it is none, but
    /// its number and its place stay taken.
    ///
    /// # Errors
    /// As [`GuestMemory::delete_slot`], and [`Error::NeedTables`] to cut a block of 1 GiB; what earlier
    /// calls have done stays then.
    pub fn delete_in_steps(
        &self,
        id: SlotId,
        go_on: impl FnMut() -> bool,
    ) -> Result<Option<Memslot>, Error> {
        let mut gone = None;
        let step = || {
            let part = self.leave_part(id, None, Extent::Step);
            part.map(|(slot, progress)| {
                gone = Some(slot);
                progress
            })
        };
        let progress = repeat(go_on, step)?;
        Ok(gone.filter(|_| progress == Progress::Done))
    }

    /// Moves a slot to another place in the guest's address space.
    ///
    /// # Errors
    /// As [`GuestMemory::create_slot`] and [`GuestMemory::delete_slot`].
    pub fn move_slot(&self, id: SlotId, base: Gfn) -> Result<(), Error> {
        self.leave_part(id, Some(base), Extent::Whole).map(drop)
    }

    /// [`GuestMemory::move_slot`] in steps, for as long as `go_on` allows; the same call continues it.
    /// Meanwhile the slot is nowhere, and no vCPU enters.
    ///
    /// # Errors
    /// As [`GuestMemory::move_slot`] and [`GuestMemory::delete_in_steps`].
    pub fn move_in_steps(
        &self,
        id: SlotId,
        base: Gfn,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        repeat(go_on, || {
            let part = self.leave_part(id, Some(base), Extent::Step);
            part.map(|(_, progress)| progress)
        })
    }

    /// A slot goes from its place, and to another one if `base` is there. Gives it as it was.
    fn leave_part(
        &self,
        id: SlotId,
        base: Option<Gfn>,
        extent: Extent,
    ) -> Result<(Memslot, Progress), Error> {
        self.check_id(id)?;
        let mut slots = self.slots.write();
        let is_it = |change: &Change| match change {
            Change::Leave { from, to } => from.id == id && to.map(|to| to.range.start()) == base,
            _ => false,
        };
        let resumed = slots.resumes(is_it)?;
        let (from, to) = match slots.unfinished.map(|u| u.change) {
            Some(Change::Leave { from, to }) => (from, to),
            _ => self.departure(&slots, id, base)?,
        };
        let end = from.range.end();
        let rest = GfnRange::new(resumed.unwrap_or(from.range.start().get()), end);
        let rest = rest.ok_or(Error::ChangeUnfinished)?;
        let mut mmu = self.mmu.write();
        let part = mmu.first(rest, mmu.table.owes_data(), extent);
        let is_last = part.end() == end;
        // All that can fail comes first; only cutting a block can behind this.
        let next = match (resumed.is_some(), is_last, to) {
            (false, true, Some(to)) => Some(slots.set.replacing(to)?),
            (false, ..) => Some(slots.set.without(id)?),
            (true, true, Some(to)) => Some(slots.set.with(to)?),
            (true, ..) => None,
        };
        mmu.unmap_first(part, extent)?;
        if is_last && extent == Extent::Step {
            // The tables above, and nothing else.
            mmu.unmap(from.range)?;
        }
        if to.is_none() {
            mmu.drop_bitmap(id);
            mmu.unshared.retain(|(of, _)| *of != id);
        }
        if let Some(next) = next {
            mmu.commit(&mut slots, next);
        }
        let change = Change::Leave { from, to };
        let at = part.end();
        slots.unfinished = (!is_last).then_some(Unfinished { change, at });
        self.pending.replace(slots.work());
        let progress = if is_last {
            Progress::Done
        } else {
            Progress::More
        };
        Ok((from, progress))
    }

    /// A slot that may leave, as it is and as it will be.
    fn departure(
        &self,
        slots: &SlotTable,
        id: SlotId,
        base: Option<Gfn>,
    ) -> Result<(Memslot, Option<Memslot>), Error> {
        let from = slots.unlocked(id)?;
        let Some(base) = base else {
            return Ok((from, None));
        };
        let npages = from.range.npages();
        let range = GfnRange::from_base(base, npages).ok_or(Error::BadRange {
            base: base.get(),
            npages,
        })?;
        self.check_range(range)?;
        let to = Memslot { range, ..from };
        if let Some(other) = slots.set.overlapping_but(range, id) {
            return Err(Error::Overlap(other.id));
        }
        if self.mmu.read().has_unshared(id) {
            return Err(Error::SomeUnshared(id));
        }
        Ok((from, Some(to)))
    }

    /// Changes a slot's flags; only dirty logging can change.
    ///
    /// # Errors
    /// [`Error::ImmutableFlags`] for others, [`Error::Locked`] for a slot locked for writing,
    /// [`Error::RefusedForProtected`], [`Error::ChangeUnfinished`], or missing memory; nothing has
    /// changed then.
    pub fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<(), Error> {
        self.flags_part(id, flags, Extent::Whole).map(drop)
    }

    /// [`GuestMemory::set_slot_flags`] in steps, for as long as `go_on` allows; the same call continues
    /// it, and the old flags take it back. The log is read when it is done.
    ///
    /// # Errors
    /// As [`GuestMemory::set_slot_flags`], and [`Error::NeedTables`] to cut a block of 1 GiB; what
    /// earlier calls have done stays then.
    pub fn set_flags_in_steps(
        &self,
        id: SlotId,
        flags: SlotFlags,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        repeat(go_on, || self.flags_part(id, flags, Extent::Step))
    }

    fn flags_part(&self, id: SlotId, flags: SlotFlags, extent: Extent) -> Result<Progress, Error> {
        self.check_id(id)?;
        let mut slots = self.slots.write();
        let resumed = slots.resumes(|change| *change == Change::Log(id))?;
        let old = *slots.set.get(id).ok_or(Error::NoSuchSlot(id))?;
        let changed = old.flags ^ flags;
        if changed.is_empty() {
            return match resumed {
                Some(at) => self.log_part(&mut slots, (&old, at), None, extent),
                None => Ok(Progress::Done),
            };
        }
        if !SlotFlags::MUTABLE.contains(changed) {
            // A locked slot refuses every flag change, whatever the flag.
            let fixed = changed - SlotFlags::MUTABLE;
            return Err(if old.lock.is_some() {
                Error::Locked(id)
            } else {
                Error::ImmutableFlags(fixed)
            });
        }
        if old.lock.is_some_and(|l| l.flags.contains(LockFlags::WRITE)) {
            return Err(Error::Locked(id));
        }
        self.check_flags(flags)?;
        if old.kind == SlotKind::Mmio {
            return Err(Error::BadBits(flags.bits().into()));
        }
        let new = Memslot { flags, ..old };
        let next = slots.set.replacing(new)?;
        self.commit_logging(&mut slots, new, next, extent)
    }

    /// Commits the slots with a new one that is logged, or is not; the first step if a log begins.
    fn commit_logging(
        &self,
        slots: &mut SlotTable,
        new: Memslot,
        next: Memslots,
        extent: Extent,
    ) -> Result<Progress, Error> {
        if new.flags.contains(SlotFlags::DIRTY_LOG) {
            let bitmap = DirtyBitmap::new(new.range.npages())?;
            let start = new.range.start().get();
            return self.log_part(slots, (&new, start), Some((next, bitmap)), extent);
        }
        let mut mmu = self.mmu.write();
        mmu.drop_bitmap(new.id);
        mmu.commit(slots, next);
        slots.unfinished = None;
        Ok(Progress::Done)
    }

    /// Logging on: no leaf stays writable. On demand the leaves go, so that blocks become pages;
    /// notes stay. A read-locked slot has pages already and keeps them. What is faulted in from the
    /// first step on is logged; what leaves allow that are still to go is not.
    fn log_part(
        &self,
        slots: &mut SlotTable,
        (slot, at): (&Memslot, u64),
        begins: Option<(Memslots, DirtyBitmap)>,
        extent: Extent,
    ) -> Result<Progress, Error> {
        let rest = GfnRange::new(at, slot.range.end()).ok_or(Error::ChangeUnfinished)?;
        let mut mmu = self.mmu.write();
        if begins.is_some() {
            mmu.dirty.try_reserve(1)?;
        }
        let part = match slot.lock {
            Some(_) => extent.first(rest, Cost::Maintenance),
            None => mmu.first(rest, mmu.table.owes_data(), extent),
        };
        match slot.lock {
            Some(_) => mmu.write_protect(part)?,
            None => mmu.zap_first(part)?,
        }
        if let Some((next, bitmap)) = begins {
            mmu.dirty.push((slot.id, bitmap));
            mmu.commit(slots, next);
        }
        let (change, at) = (Change::Log(slot.id), part.end());
        let mut logs = mmu.dirty.iter_mut();
        if let Some((_, log)) = logs.find(|(of, _)| *of == slot.id) {
            log.cover(at - slot.range.start().get());
        }
        let is_last = at == slot.range.end();
        slots.unfinished = (!is_last).then_some(Unfinished { change, at });
        Ok(if is_last {
            Progress::Done
        } else {
            Progress::More
        })
    }

    /// Hands out the dirty bits of a slot and starts over: its pages are read-only again when
    /// this returns. `words` gets one bit per page, the first page in bit 0 of the first word.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`], [`Error::NotLogging`], or [`Error::BadBuffer`] with the number of
    /// words that are needed; no bit is lost then.
    pub fn take_dirty_log(&self, id: SlotId, words: &mut [u64]) -> Result<(), Error> {
        let slots = self.slots.read();
        slots.unchanged()?;
        let slot = *slots.set.get(id).ok_or(Error::NoSuchSlot(id))?;
        let mut mmu = self.mmu.write();
        let bitmap = mmu.bitmap(id).ok_or(Error::NotLogging(id))?;
        if words.len() != bitmap.len() {
            return Err(Error::BadBuffer(bitmap.len()));
        }
        for (at, word) in (0u64..).zip(words) {
            *word = mmu.take_dirty(&slot, at)?;
        }
        Ok(())
    }

    /// [`GuestMemory::take_dirty_log`] for 64 pages: word `at` of the bitmap.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`], [`Error::NotLogging`], or [`Error::BadBuffer`] with the number of
    /// words for a word that the slot does not have.
    pub fn take_dirty_word(&self, id: SlotId, at: u64) -> Result<u64, Error> {
        let slots = self.slots.read();
        slots.unchanged()?;
        let slot = *slots.set.get(id).ok_or(Error::NoSuchSlot(id))?;
        let mut mmu = self.mmu.write();
        let words = mmu.bitmap(id).ok_or(Error::NotLogging(id))?.len();
        if at >= words as u64 {
            return Err(Error::BadBuffer(words));
        }
        mmu.take_dirty(&slot, at)
    }

    /// Removes the leaves of a range because the host wants the memory back.
    ///
    /// # Errors
    /// [`Error::Locked`] if any page of it is locked: the memory is not the host's to take.
    /// [`Error::SomeUnshared`] for a slot of which the host has taken single pages back: they would be
    /// the guest's again.
    pub fn host_unmap(&self, range: GfnRange) -> Result<(), Error> {
        self.check_range(range)?;
        let slots = self.slots.read();
        slots.unchanged()?;
        let touched = || {
            let all = slots.set.iter();
            all.filter(|s| s.range.intersection(range).is_some())
        };
        if let Some(slot) = touched().find(|s| s.lock.is_some()) {
            return Err(Error::Locked(slot.id));
        }
        let mut mmu = self.remove_pages();
        if let Some(slot) = touched().find(|s| mmu.has_unshared(s.id)) {
            return Err(Error::SomeUnshared(slot.id));
        }
        mmu.unmap(range)
    }

    pub(crate) fn check_range(&self, range: GfnRange) -> Result<(), Error> {
        let refused = Error::BadRange {
            base: range.start().get(),
            npages: range.npages(),
        };
        let cuts_a_page = range.whole_blocks(self.page_order) != Some(range);
        if range.end() > self.config.gfn_limit || cuts_a_page {
            Err(refused)
        } else {
            slot_bytes(range).map(|_| ())
        }
    }

    fn check_flags(&self, flags: SlotFlags) -> Result<(), Error> {
        // A write to a read-only slot leaves for the host, with what was written.
        let shown = SlotFlags::DIRTY_LOG | SlotFlags::NONCOHERENT_DMA | SlotFlags::READONLY;
        let private = flags & shown;
        if self.config.kind == VmKind::Protected && !private.is_empty() {
            return Err(Error::RefusedForProtected(private));
        }
        Ok(())
    }
}

impl<T: GuestTable> Mmu<T> {
    /// Makes the leaves of a range read-only.
    fn write_protect(&mut self, range: GfnRange) -> Result<(), Error> {
        let protect = |attrs: LeafAttrs| LeafAttrs {
            perms: attrs.perms - Perms::WRITE,
            ..attrs
        };
        Ok(rewrite(&mut self.table, slot_bytes(range)?, protect)?)
    }

    /// Takes word `at` of a slot's log and makes the pages in it read-only again. Faults are out,
    /// so no page becomes writable between the steps; a page without a bit is read-only already.
    fn take_dirty(&mut self, slot: &Memslot, at: u64) -> Result<u64, Error> {
        let Some(bits) = self.bitmap(slot.id).map(|log| log.word_at(at)) else {
            return Err(Error::NotLogging(slot.id));
        };
        let first = slot.range.start().get() + 64 * at;
        // From the first page with a bit to the last.
        let start = first + u64::from(bits.trailing_zeros());
        let end = first + 64 - u64::from(bits.leading_zeros());
        if let Some(pages) = GfnRange::new(start, end) {
            self.write_protect(pages)?;
        }
        Ok(self.bitmap(slot.id).map_or(0, |log| log.take_word(at)))
    }
}

impl<T> Mmu<T> {
    /// Makes `next` the slots that faults must agree with.
    pub(crate) fn commit(&mut self, slots: &mut SlotTable, next: Memslots) {
        self.generation = next.generation();
        slots.set = next;
    }

    fn drop_bitmap(&mut self, id: SlotId) {
        self.dirty.retain(|(of, _)| *of != id);
    }
}
