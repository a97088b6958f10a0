//! The frames behind a VM's slots.
//!
//! `backing` of a slot is the first frame's number, the rest follow it. Frames of an unprotected VM
//! are leased as long as the slot exists; a protected VM reaches only what belongs to it. So pinning
//! has nothing to add.

use board::{AddrRange, PAGE_SIZE};
use memslot::account::LockedMemory;
use memslot::addr::{Gfn, GfnRange};
use memslot::fault::Access;
use memslot::frames::{FrameMissing, FrameRun, FrameSource, PinIntent};
use memslot::slot::{Memslot, SlotKind};
use stage2::Pfn;

use crate::page_state::{Owner, PageStates};

/// Pages of the largest block that a fault of a protected guest maps.
const BLOCK_PAGES: u64 = 512;

/// See above.
#[derive(Debug)]
pub struct GuestFrames<'a> {
    account: LockedMemory,
    owner: Option<(&'a PageStates<'a>, Owner)>,
}

impl<'a> GuestFrames<'a> {
    /// Frames of the host.
    #[must_use]
    pub fn leased(states: &'a PageStates<'a>) -> Self {
        Self {
            account: LockedMemory::new(states.memory().total() / PAGE_SIZE),
            owner: None,
        }
    }

    /// Frames of the protected VM with this index.
    #[must_use]
    pub fn owned(states: &'a PageStates<'a>, guest: u8) -> Self {
        Self {
            owner: Some((states, Owner::Guest(guest))),
            ..Self::leased(states)
        }
    }

    /// The memory behind a slot; `None` if it is no memory.
    #[must_use]
    pub fn backing(slot: &Memslot) -> Option<AddrRange> {
        let start = slot.backing.checked_mul(PAGE_SIZE)?;
        let size = slot.range.npages().checked_mul(PAGE_SIZE)?;
        AddrRange::with_size(start, size).filter(|_| slot.kind == SlotKind::Ram)
    }

    fn run(slot: &Memslot, range: GfnRange) -> Result<FrameRun, FrameMissing> {
        let first = range.start();
        let skip = first.get() - slot.range.start().get();
        let frame = slot.backing.checked_add(skip).and_then(Pfn::try_new);
        let pfn = frame.ok_or(FrameMissing(first))?;
        Ok(FrameRun { range, pfn })
    }

    /// The run around `gfn` that a protected guest may reach: its block, or the page alone.
    fn owned_run(&self, slot: &Memslot, gfn: Gfn) -> Result<FrameRun, FrameMissing> {
        let start = gfn.get() - gfn.get() % BLOCK_PAGES;
        let block = Gfn::try_new(start).and_then(|start| GfnRange::from_base(start, BLOCK_PAGES));
        let block = block.and_then(|block| block.intersection(slot.range));
        if let Some(run) = block.and_then(|block| self.checked_run(slot, block).ok()) {
            return Ok(run);
        }
        let page = GfnRange::from_base(gfn, 1).ok_or(FrameMissing(gfn))?;
        self.checked_run(slot, page)
    }

    /// The run of all of `range`, if the guest may reach it.
    fn checked_run(&self, slot: &Memslot, range: GfnRange) -> Result<FrameRun, FrameMissing> {
        let run = Self::run(slot, range)?;
        if self.is_current(slot, &run) {
            Ok(run)
        } else {
            Err(FrameMissing(range.start()))
        }
    }
}

impl FrameSource for GuestFrames<'_> {
    fn resolve(&self, slot: &Memslot, gfn: Gfn, _: Access) -> Result<FrameRun, FrameMissing> {
        if self.owner.is_some() {
            self.owned_run(slot, gfn)
        } else {
            Self::run(slot, slot.range)
        }
    }

    fn pin(&self, slot: &Memslot, want: GfnRange, _: PinIntent) -> Result<FrameRun, FrameMissing> {
        self.checked_run(slot, want)
    }

    fn unpin(&self, _: &Memslot, _: FrameRun, _: PinIntent) {}

    fn sequence(&self) -> u64 {
        0
    }

    fn is_current(&self, slot: &Memslot, run: &FrameRun) -> bool {
        let Some((states, owner)) = self.owner.filter(|_| slot.kind == SlotKind::Ram) else {
            return true;
        };
        let size = run.range.npages() * PAGE_SIZE;
        let memory = AddrRange::with_size(run.pfn.get() * PAGE_SIZE, size);
        memory.is_some_and(|memory| states.all_owned_by(memory, owner))
    }

    fn account(&self) -> &LockedMemory {
        &self.account
    }
}
