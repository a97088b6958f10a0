//! What the host does to single pages of an unprotected VM: it takes them back and lends them again,
//! looks whether they were used, and gives leaves permissions before the guest asks.
//!
//! Invariant: a page that the host has taken back has a note and no leaf, so nothing but
//! [`GuestMemory::share_pages`], or the end of its slot, brings it back. It survives a reset, and the
//! beginning of a dirty log; a slot with such pages does not move, as that would lose the notes.
//!
//! Pages are counted from the slot's start, so that a slot that moves meanwhile confuses nobody. A
//! locked slot refuses: its leaves are there and young for whoever can't wait for a fault. So does a
//! protected VM, whose pages the host may not take, and whose accesses are none of its business.

use stage2::{Aging, Annotation, FaultOutcome, MapError, Perms};

use crate::addr::{Gfn, GfnRange};
use crate::error::Error;
use crate::frames::FrameSource;
use crate::policy::MemTypePolicy;
use crate::slot::{Memslot, SlotId, SlotKind};
use crate::table::{GuestTable, bytes};
use crate::vm::{GuestMemory, Mmu, SlotTable, VmKind, slot_bytes};

/// Most pages of one call: what is cleaned, or looked at, in one go.
pub const MAX_PAGES: u64 = 512;
/// Note of a page that the host has taken back. A protected VM's have others.
const UNSHARED: u64 = 3;

impl<T> Mmu<T> {
    /// Whether the host has taken pages of this slot back.
    pub(crate) fn has_unshared(&self, id: SlotId) -> bool {
        self.unshared.iter().any(|(of, _)| *of == id)
    }

    fn count_unshared(&mut self, id: SlotId, count: u64) {
        match self.unshared.iter_mut().find(|(of, _)| *of == id) {
            Some((_, pages)) => *pages += count,
            None => self.unshared.push((id, count)),
        }
    }

    fn count_shared(&mut self, id: SlotId, count: u64) {
        if let Some((_, pages)) = self.unshared.iter_mut().find(|(of, _)| *of == id) {
            *pages -= count;
        }
        self.unshared.retain(|(_, pages)| *pages != 0);
    }
}

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Takes pages back from the guest: when this returns no leaf, TLB entry or importer refers to
    /// them, and what the guest wrote is where the host finds it. The guest's next access finds no
    /// frame.
    ///
    /// # Errors
    /// [`Error::Unshared`] if one of them was taken back before, [`Error::NeedTables`], and those that
    /// all of this module have in common: [`Error::NotTheHosts`], [`Error::NoSuchSlot`],
    /// [`Error::ChangeUnfinished`], [`Error::BadRange`] for no pages, more than [`MAX_PAGES`] or some beyond the slot,
    /// [`Error::Locked`]. Nothing has changed then.
    pub fn unshare_pages(&self, id: SlotId, first: u64, count: u64) -> Result<(), Error> {
        let note = Annotation::try_new(UNSHARED).ok_or(Error::OutOfMemory)?;
        let slots = self.slots.read();
        let (slot, pages) = self.unlocked_pages(&slots, id, first, count)?;
        let range = slot_bytes(pages)?;
        let mut mmu = self.remove_pages();
        if let Some((at, _)) = mmu.table.first_note(range) {
            return Err(Error::Unshared(index(&slot, at.frame())));
        }
        let more = mmu.unshared.try_reserve(1);
        more.map_err(|_| Error::OutOfMemory)?;
        mmu.table.annotate(range, note)?;
        mmu.count_unshared(id, count);
        Ok(())
    }

    /// Lends them again: they are faulted in with what the host has put there meanwhile.
    ///
    /// # Errors
    /// [`Error::Shared`] if one of them was not taken back, and as [`Self::unshare_pages`].
    pub fn share_pages(&self, id: SlotId, first: u64, count: u64) -> Result<(), Error> {
        let slots = self.slots.read();
        let (slot, pages) = self.unlocked_pages(&slots, id, first, count)?;
        let mut mmu = self.remove_pages();
        let step = 1 << self.page_order;
        for at in (pages.start().get()..pages.end()).step_by(step) {
            let page = Gfn::try_new(at).and_then(|gfn| GfnRange::from_base(gfn, step as u64));
            let note = page.and_then(bytes).and_then(|p| mmu.table.first_note(p));
            if note.is_none_or(|(_, note)| note.get() != UNSHARED) {
                return Err(Error::Shared(at - slot.range.start().get()));
            }
        }
        mmu.unmap(pages)?;
        mmu.count_shared(id, count);
        Ok(())
    }

    /// How many pages lie in leaves that were used since they were last made old. A leaf may be a
    /// block: it counts with those of its pages that were asked for, and grows old as a whole.
    ///
    /// # Errors
    /// For [`Aging::Clear`] [`Error::InUse`] while there are importers: their accesses make no leaf
    /// young, so what they use would look unused; and one that does not ignore the access flag, as
    /// EL2's SMMU driver has it do, would fault. A locked slot may be asked. Else as
    /// [`Self::unshare_pages`].
    pub fn age_pages(
        &self,
        id: SlotId,
        first: u64,
        count: u64,
        aging: Aging,
    ) -> Result<u64, Error> {
        let slots = self.slots.read();
        let (slot, pages) = self.pages(&slots, id, first, count)?;
        let mmu = self.mmu.read();
        if aging == Aging::Clear {
            unlocked(&slot)?;
            if mmu.importers > 0 {
                return Err(Error::InUse(mmu.importers));
            }
        }
        let young = mmu.table.age(slot_bytes(pages)?, aging)?;
        Ok(young >> stage2::addr::FRAME_SHIFT)
    }

    /// Adds permissions to a page's leaf and makes it young, as the guest's own access would: a page
    /// that may be written counts as dirty.
    ///
    /// # Errors
    /// [`Error::PermsRefused`] for writing to a read-only slot and executing a device,
    /// [`Error::NoLeaf`], [`Error::BackingChanged`] while the leaf is being removed: repeat it. Else as
    /// [`Self::unshare_pages`].
    pub fn relax_page(&self, id: SlotId, page: u64, add: Perms) -> Result<(), Error> {
        let slots = self.slots.read();
        let (slot, pages) = self.unlocked_pages(&slots, id, page, 1 << self.page_order)?;
        let writes = add.contains(Perms::WRITE);
        let device = slot.kind == SlotKind::Mmio;
        if (writes && !slot.is_writable()) || (add.may_execute() && device) {
            return Err(Error::PermsRefused(id));
        }
        let mmu = self.mmu.read();
        let range = slot_bytes(pages)?;
        if mmu.table.next_run(range).is_none() {
            return Err(Error::NoLeaf(page));
        }
        if writes && let Some(bitmap) = mmu.bitmap(id) {
            // Before the leaf: a writable leaf has its bits set.
            (page..page + pages.npages()).for_each(|page| bitmap.mark(page));
        }
        match mmu.table.relax(range.start(), add) {
            Ok(FaultOutcome::Retry) => Err(Error::BackingChanged),
            Err(MapError::NotMapped(_)) => Err(Error::NoLeaf(page)),
            relaxed => Ok(relaxed.map(drop)?),
        }
    }

    fn unlocked_pages(
        &self,
        slots: &SlotTable,
        id: SlotId,
        first: u64,
        count: u64,
    ) -> Result<(Memslot, GfnRange), Error> {
        let (slot, pages) = self.pages(slots, id, first, count)?;
        unlocked(&slot)?;
        Ok((slot, pages))
    }

    /// Pages of a slot that the host may ask about.
    fn pages(
        &self,
        slots: &SlotTable,
        id: SlotId,
        first: u64,
        count: u64,
    ) -> Result<(Memslot, GfnRange), Error> {
        if self.config.kind == VmKind::Protected {
            return Err(Error::NotTheHosts);
        }
        slots.unchanged()?;
        let slot = *slots.set.get(id).ok_or(Error::NoSuchSlot(id))?;
        let refused = Error::BadRange {
            base: first,
            npages: count,
        };
        let start = slot.range.start().get().checked_add(first);
        let pages = start
            .and_then(Gfn::try_new)
            .and_then(|start| GfnRange::from_base(start, count))
            .filter(|pages| count <= MAX_PAGES && slot.range.covers(*pages));
        let pages = pages.ok_or(refused)?;
        if pages.whole_blocks(self.page_order) != Some(pages) {
            return Err(refused);
        }
        Ok((slot, pages))
    }
}

fn unlocked(slot: &Memslot) -> Result<(), Error> {
    match slot.lock {
        Some(_) => Err(Error::Locked(slot.id)),
        None => Ok(()),
    }
}

fn index(slot: &Memslot, gfn: Gfn) -> u64 {
    gfn.get() - slot.range.start().get()
}
