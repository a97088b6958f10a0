//! How pages come to a protected guest, are shared, and go back.
//!
//! Invariant: what a protected VM finds in its memory when it starts is measured or zero; after that
//! nothing enters it but zeros at addresses that it has never had, or has given away itself. What
//! leaves it is zero.
//!
//! Lock order: stage of the protection → the VM's memory → ownership → the host's stage 2. In every
//! operation what can fail comes first; an operation that lacks tables behind that leaves pages that
//! nobody reaches, and is completed by repeating it.

use abi::{DonationKind, ErrorCode, Exit};
use alloc::vec::Vec;
use board::{AddrRange, PAGE_SIZE};
use memslot::addr::{Gfn, GfnRange};
use memslot::policy::ArmPolicy;
use memslot::slot::SlotId;
use memslot::table::GuestTable;
use memslot::vm::GuestMemory;
use stage2::{Annotation, ArmStage2, Ipa, IpaRange, Stage2};

use crate::guest::protected::{MAX_PAGES, MemoryCall};
use crate::guest_frames::GuestFrames;
use crate::host_map::HostReach;
use crate::ownership::{Ownership, OwnershipError};
use crate::page_state::Owner;
use crate::protection::Stage;
use crate::vm_error::Refusal;

/// Slots that the host may use are below this.
pub const HOST_SLOTS: u16 = 63;
/// Donations that are looked at in one go when they come back.
const LOOKED_AT: usize = 512;
/// Note of a page that the host took: forever.
const POISONED: u64 = 1;
/// Note of a page that the guest gave away: until a new one is donated.
const RELINQUISHED: u64 = 2;

/// What EL2 does to pages that nobody else reaches.
pub trait Contents {
    /// Fills them with zeros, to the point of coherency.
    fn wipe(&self, pages: AddrRange);

    /// Cleans and invalidates what caches hold of them, to the point of coherency.
    fn settle(&self, pages: AddrRange);

    /// Shows what is in them at the point of coherency.
    fn show(&self, pages: AddrRange, to: &mut dyn FnMut(&[u8]));
}

/// The memory of one VM.
pub type VmMemory<'s, G> = GuestMemory<Stage2<ArmStage2, G>, ArmPolicy, GuestFrames<'s>>;

/// A protected VM's memory and everything that has to agree about it.
pub struct GuestPages<'a, 's, T, H, C> {
    /// The VM's.
    pub memory: &'a GuestMemory<T, ArmPolicy, GuestFrames<'s>>,
    /// The board's.
    pub ownership: &'a Ownership<'s>,
    /// The host's.
    pub host: &'a H,
    /// The machine's.
    pub contents: &'a C,
    /// The VM's index.
    pub index: u8,
}

impl<T, H, C> core::fmt::Debug for GuestPages<'_, '_, T, H, C> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("GuestPages")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

/// What became of a guest's call about its memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Moved {
    /// So many pages were moved.
    Pages(u64),
    /// The guest may not do that.
    Refused,
    /// The guest repeats it after the host has done something.
    After(Exit),
}

impl From<Refusal> for Moved {
    fn from(refusal: Refusal) -> Self {
        let pages = refusal.pages;
        match refusal.code {
            ErrorCode::NoHeap => Self::After(Exit::NeedHeap {
                pages: pages.max(1),
            }),
            ErrorCode::NoMemory => Self::After(Exit::NeedPages { pages }),
            _ => Self::Refused,
        }
    }
}

impl<T: GuestTable, H: HostReach, C: Contents> GuestPages<'_, '_, T, H, C> {
    /// The slot that holds all of a range, and the memory behind that.
    #[inline]
    fn behind(&self, ipa: u64, pages: u64) -> Option<(GfnRange, AddrRange)> {
        let first = Gfn::try_new(ipa / PAGE_SIZE)?;
        let range = GfnRange::from_base(first, pages)?;
        let (slot, _) = self.memory.find_slot(first)?;
        let memory = GuestFrames::backing(&slot)?;
        let start = memory.start() + (first.get() - slot.range.start().get()) * PAGE_SIZE;
        let part = AddrRange::with_size(start, pages.checked_mul(PAGE_SIZE)?)?;
        memory.contains_range(part).then_some((range, part))
    }

    /// Whether a slot of this memory may be created: no frame is behind two addresses.
    #[must_use]
    pub fn is_new_backing(&self, memory: AddrRange) -> bool {
        self.backings().all(|(_, other)| !other.overlaps(memory))
    }

    fn backings(&self) -> impl Iterator<Item = (GfnRange, AddrRange)> {
        let slots = (0..HOST_SLOTS).filter_map(|id| self.memory.slot(SlotId(id)));
        slots.filter_map(|slot| Some((slot.range, GuestFrames::backing(&slot)?)))
    }

    /// The first note in a range.
    #[inline]
    fn note(&self, ipa: u64, pages: u64) -> Option<u64> {
        let range = IpaRange::new(Ipa::new(ipa), pages * PAGE_SIZE).ok()?;
        let first = self.memory.with_table(|table| table.first_note(range));
        first.map(|(_, note)| note.get())
    }

    /// Whether the host took the page at `ipa`.
    #[must_use]
    pub fn is_poisoned(&self, ipa: u64) -> bool {
        self.note(ipa & !(PAGE_SIZE - 1), 1) == Some(POISONED)
    }

    /// Gives the guest the pages behind a range of its addresses; the memory that has moved.
    ///
    /// # Errors
    ///
    /// For a range outside its slots, pages that are not the host's, that the guest has lost, or
    /// contents for a sealed VM; nothing has changed then.
    pub fn donate(
        &self,
        stage: &mut Stage,
        ipa: u64,
        pages: u64,
        kind: DonationKind,
    ) -> Result<AddrRange, Refusal> {
        if pages == 0 || pages > kind.max_pages() {
            return Err(ErrorCode::Invalid.into());
        }
        let (gfns, memory) = self.behind(ipa, pages).ok_or(ErrorCode::NotFound)?;
        match (&*stage, kind) {
            (Stage::Building { .. }, _) | (Stage::Sealed(_), DonationKind::Zeros) => {}
            _ => return Err(ErrorCode::NotPermitted.into()),
        }
        let ownership = self.ownership;
        ownership.may_donate(memory)?;
        let relinquished = match self.note(ipa, pages) {
            None => false,
            Some(RELINQUISHED) if pages == 1 => true,
            Some(_) => return Err(ErrorCode::NotPermitted.into()),
        };
        ownership.donate(self.host, memory, Owner::Hypervisor)?;
        if relinquished && let Err(error) = self.memory.release(gfns) {
            // Nothing has been written: they are what they were.
            ownership.give_back(self.host, memory, Owner::Hypervisor)?;
            return Err(error.into());
        }
        match (kind, stage.measurer()) {
            (DonationKind::Contents, Some(measurer)) => {
                let mut measure = |bytes: &[u8]| measurer.contents(ipa, bytes);
                self.contents.show(memory, &mut measure);
            }
            (_, measurer) => {
                self.contents.wipe(memory);
                if let Some(measurer) = measurer {
                    measurer.zeros(ipa, memory.size());
                }
            }
        }
        ownership.hand_over(memory, self.index)?;
        Ok(memory)
    }

    /// Gives a page back to the host that this VM owns; the guest never finds anything there again.
    ///
    /// A page that the guest shares is first its own again, and then EL2's. So at every step that can fail its
    /// state and both tables agree, and it is in nobody's reach while it is wiped.
    ///
    /// # Errors
    ///
    /// Missing tables, of the VM or of the host; [`ErrorCode::Again`] if the guest shares the page
    /// meanwhile. The host repeats the call.
    pub fn reclaim_page(&self, page: AddrRange) -> Result<u64, Refusal> {
        if self.shares(page) {
            self.ownership.unshare(self.host, page, self.index)?;
        }
        let holder = self
            .backings()
            .find(|(_, memory)| memory.contains_range(page));
        let gfns = holder.map(|(range, memory)| {
            let skip = (page.start() - memory.start()) / PAGE_SIZE;
            let gfn = Gfn::try_new(range.start().get() + skip);
            let gfns = gfn.and_then(|gfn| GfnRange::from_base(gfn, 1));
            gfns.ok_or(ErrorCode::Invalid)
        });
        let gfns = gfns.transpose()?;
        match self.ownership.take_from(page, self.index) {
            Err(_) if self.shares(page) => return Err(ErrorCode::Again.into()),
            taken => taken?,
        }
        self.give_to_host(page, gfns, POISONED)?;
        Ok(0)
    }

    /// Whether the guest shares these pages with the host.
    fn shares(&self, pages: AddrRange) -> bool {
        let owner = Owner::Guest(self.index);
        self.ownership.pages().all_shared(pages, owner, true)
    }

    fn withhold(&self, gfns: GfnRange, note: u64) -> Result<(), Refusal> {
        let note = Annotation::try_new(note).ok_or(ErrorCode::Invalid)?;
        Ok(self.memory.withhold(gfns, note)?)
    }

    /// A guest's call about pages of its memory.
    #[must_use]
    pub fn call(&self, call: MemoryCall, ipa: u64, pages: u64) -> Moved {
        let Some((_, page)) = self.behind(ipa, 1) else {
            return Moved::Refused;
        };
        let states = self.ownership.pages();
        if !states.all_owned_by(page, Owner::Guest(self.index)) {
            return if self.is_poisoned(ipa) || call != MemoryCall::Share {
                Moved::Refused
            } else {
                Moved::After(Exit::MemoryMissing { ipa })
            };
        }
        let result = match self.move_pages(call, ipa, pages.min(MAX_PAGES)) {
            Err(refusal) if pages > 1 && refusal.code == ErrorCode::NotPermitted => {
                self.move_pages(call, ipa, 1)
            }
            other => other,
        };
        result.map_or_else(Moved::from, Moved::Pages)
    }

    fn move_pages(&self, call: MemoryCall, ipa: u64, pages: u64) -> Result<u64, Refusal> {
        let refused = ErrorCode::NotPermitted;
        let (gfns, memory) = self.behind(ipa, pages).ok_or(refused)?;
        match call {
            MemoryCall::Share => self.ownership.share(self.host, memory, self.index)?,
            MemoryCall::Unshare => {
                self.ownership.unshare(self.host, memory, self.index)?;
                // What the host wrote past the caches, or left in them, is settled now.
                self.contents.settle(memory);
            }
            MemoryCall::Relinquish => {
                // Of all vCPUs that share them or give them away, too, one gets them, before anything of
                // it is to be seen in the guest's table.
                self.ownership.take_from(memory, self.index)?;
                self.give_to_host(memory, Some(gfns), RELINQUISHED)?;
            }
        }
        Ok(pages)
    }

    /// Puts a note in the place of pages that were just taken from the guest, wipes them, and gives them to
    /// the host. While it wipes them they are EL2's: what others wiped then would be somebody else's already.
    ///
    /// Where a table is lacking they are the guest's again, for whoever repeats it. What the guest was giving
    /// away is then zeros without a note; what was being taken from it has lost its contents, and the note stays.
    fn give_to_host(
        &self,
        pages: AddrRange,
        gfns: Option<GfnRange>,
        note: u64,
    ) -> Result<(), Refusal> {
        let noted = gfns.map_or(Ok(()), |gfns| self.withhold(gfns, note));
        let given = noted.and_then(|()| {
            self.contents.wipe(pages);
            let given = self
                .ownership
                .give_back(self.host, pages, Owner::Hypervisor);
            if let (Err(_), Some(gfns), RELINQUISHED) = (&given, gfns, note) {
                let released = self.memory.release(gfns);
                debug_assert!(released.is_ok(), "the note goes by the entries it came in");
            }
            Ok(given?)
        });
        if given.is_err() {
            self.ownership.hand_over(pages, self.index)?;
        }
        given
    }
}

/// Pages that the host has donated to a VM.
#[derive(Clone, Copy, Debug)]
struct Donation {
    range: AddrRange,
    /// EL2's, for the VM's state and tables; or the guest's, as far as it has not lost them.
    owner: Owner,
}

/// All that the host has donated to a VM.
#[derive(Debug, Default)]
pub struct Donations(Vec<Donation>);

impl Donations {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Makes room for one more.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NoHeap`].
    pub fn prepare(&mut self) -> Result<(), ErrorCode> {
        self.0.try_reserve(1).map_err(|_| ErrorCode::NoHeap)
    }

    /// Remembers pages for the VM's state and tables; there is room.
    pub fn add_state(&mut self, range: AddrRange) {
        let owner = Owner::Hypervisor;
        self.0.push(Donation { range, owner });
    }

    /// Remembers pages of the guest; there is room.
    pub fn add_memory(&mut self, range: AddrRange, guest: u8) {
        let owner = Owner::Guest(guest);
        self.0.push(Donation { range, owner });
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Wipes some pages of a VM that is gone and gives them back; `None` when nothing is left, or if
    /// those that it has looked at in one go have gone back before. Such pages are not touched: they may
    /// be another VM's already.
    ///
    /// # Errors
    ///
    /// Missing tables of the host: to be repeated.
    pub fn take_back(
        &mut self,
        ownership: &Ownership<'_>,
        host: &impl HostReach,
        contents: &impl Contents,
    ) -> Result<Option<AddrRange>, OwnershipError> {
        for _ in 0..LOOKED_AT {
            let Some(donation) = self.0.last_mut() else {
                break;
            };
            let run = ownership.pages().first_run(donation.range, donation.owner);
            if let Some(run) = run {
                contents.wipe(run);
                ownership.give_back(host, run, donation.owner)?;
                match AddrRange::new(run.end(), donation.range.end()) {
                    Some(rest) => donation.range = rest,
                    None => drop(self.0.pop()),
                }
                return Ok(Some(run));
            }
            self.0.pop();
        }
        Ok(None)
    }
}

#[cfg(all(test, loom))]
#[path = "guest_memory_models.rs"]
mod models;
#[cfg(test)]
#[cfg(not(loom))]
#[path = "guest_memory_tests.rs"]
mod tests;
