//! Creating, deleting, moving and flagging slots; host unmap; the dirty log.
//!
//! Each change prepares all that can fail, then takes the mmu lock exclusively, removes the old
//! leaves, declares the new generation, and swaps the collection. A locked slot refuses
//! everything but dirty logging under a read lock.

use stage2::{LeafAttrs, Perms};

use crate::addr::{Gfn, GfnRange};
use crate::dirty::DirtyBitmap;
use crate::error::Error;
use crate::frames::FrameSource;
use crate::policy::MemTypePolicy;
use crate::slot::{LockFlags, Memslot, SlotFlags, SlotId, SlotKind};
use crate::slots::Memslots;
use crate::table::{GuestTable, rewrite};
use crate::vm::{GuestMemory, Mmu, SlotTable, VmKind, slot_bytes};

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Adds a slot.
    ///
    /// # Errors
    /// For a number, range, flag or overlap that is not allowed; nothing has changed then. A
    /// non-coherent slot is refused while a root is exported, if a vCPU has a say in its types.
    pub fn create_slot(&self, slot: Memslot) -> Result<(), Error> {
        self.check_id(slot.id)?;
        self.check_range(slot.range)?;
        self.check_flags(slot.flags)?;
        let mut slots = self.slots.write();
        let next = slots.set.with(Memslot { lock: None, ..slot })?;
        let bitmap = Self::bitmap_for(&slot)?;
        let mut mmu = self.mmu.write();
        let flagged = slot.flags.contains(SlotFlags::NONCOHERENT_DMA);
        if flagged && mmu.importers > 0 && self.policy.asks_vcpu() {
            return Err(Error::InUse(mmu.importers));
        }
        mmu.set_bitmap(slot.id, bitmap)?;
        mmu.commit(&mut slots, next);
        Ok(())
    }

    /// Removes a slot and its leaves. Gives the slot that it removed: by its number alone a caller
    /// can't tell, since that number may have been another slot's a moment ago.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`], [`Error::Locked`], or missing memory; nothing has changed then.
    pub fn delete_slot(&self, id: SlotId) -> Result<Memslot, Error> {
        self.check_id(id)?;
        let mut slots = self.slots.write();
        let slot = slots.unlocked(id)?;
        let next = slots.set.without(id)?;
        let mut mmu = self.mmu.write();
        mmu.unmap(slot.range)?;
        mmu.drop_bitmap(id);
        mmu.commit(&mut slots, next);
        Ok(slot)
    }

    /// Moves a slot to another place in the guest's address space.
    ///
    /// # Errors
    /// As [`GuestMemory::create_slot`] and [`GuestMemory::delete_slot`].
    pub fn move_slot(&self, id: SlotId, base: Gfn) -> Result<(), Error> {
        self.check_id(id)?;
        let mut slots = self.slots.write();
        let slot = slots.unlocked(id)?;
        let npages = slot.range.npages();
        let range = GfnRange::from_base(base, npages).ok_or(Error::BadRange {
            base: base.get(),
            npages,
        })?;
        self.check_range(range)?;
        let next = slots.set.replacing(Memslot { range, ..slot })?;
        let mut mmu = self.mmu.write();
        mmu.unmap(slot.range)?;
        mmu.commit(&mut slots, next);
        Ok(())
    }

    /// Changes a slot's flags; only dirty logging can change.
    ///
    /// # Errors
    /// [`Error::ImmutableFlags`] for others, [`Error::Locked`] for a slot locked for writing,
    /// [`Error::RefusedForProtected`], or missing memory; nothing has changed then.
    pub fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<(), Error> {
        self.check_id(id)?;
        let mut slots = self.slots.write();
        let old = *slots.set.get(id).ok_or(Error::NoSuchSlot(id))?;
        let changed = old.flags ^ flags;
        if changed.is_empty() {
            return Ok(());
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
        self.switch_logging(&mut slots, Memslot { flags, ..old })
    }

    /// Logging on: no leaf stays writable. On demand the leaves go, so that blocks become pages;
    /// notes stay. A read-locked slot has pages already and keeps them.
    fn switch_logging(&self, slots: &mut SlotTable, new: Memslot) -> Result<(), Error> {
        let next = slots.set.replacing(new)?;
        let bitmap = Self::bitmap_for(&new)?;
        let starts = bitmap.is_some();
        let mut mmu = self.mmu.write();
        if starts {
            mmu.reserve_bitmap()?;
            match new.lock {
                Some(_) => mmu.write_protect(new.range)?,
                None => mmu.zap(new.range)?,
            }
        }
        mmu.drop_bitmap(new.id);
        mmu.set_bitmap(new.id, bitmap)?;
        mmu.commit(slots, next);
        Ok(())
    }

    /// Hands out the dirty bits of a slot and starts over: its pages are read-only again when
    /// this returns. `words` gets one bit per page, the first page in bit 0 of the first word.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`], [`Error::NotLogging`], or [`Error::BadBuffer`] with the number of
    /// words that are needed; no bit is lost then.
    pub fn take_dirty_log(&self, id: SlotId, words: &mut [u64]) -> Result<(), Error> {
        let slots = self.slots.read();
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
    pub fn host_unmap(&self, range: GfnRange) -> Result<(), Error> {
        self.check_range(range)?;
        let slots = self.slots.read();
        let mut touched = slots
            .set
            .iter()
            .filter(|s| s.range.intersection(range).is_some());
        if let Some(slot) = touched.find(|s| s.lock.is_some()) {
            return Err(Error::Locked(slot.id));
        }
        self.remove_pages().unmap(range)
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
        let private = flags & (SlotFlags::DIRTY_LOG | SlotFlags::NONCOHERENT_DMA);
        if self.config.kind == VmKind::Protected && !private.is_empty() {
            return Err(Error::RefusedForProtected(private));
        }
        Ok(())
    }

    fn bitmap_for(slot: &Memslot) -> Result<Option<DirtyBitmap>, Error> {
        let logs = slot.flags.contains(SlotFlags::DIRTY_LOG);
        logs.then(|| DirtyBitmap::new(slot.range.npages()))
            .transpose()
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

    fn reserve_bitmap(&mut self) -> Result<(), Error> {
        Ok(self.dirty.try_reserve(1)?)
    }

    fn set_bitmap(&mut self, id: SlotId, bitmap: Option<DirtyBitmap>) -> Result<(), Error> {
        if let Some(bitmap) = bitmap {
            self.reserve_bitmap()?;
            self.dirty.push((id, bitmap));
        }
        Ok(())
    }

    fn drop_bitmap(&mut self, id: SlotId) {
        self.dirty.retain(|(of, _)| *of != id);
    }
}
