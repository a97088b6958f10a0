//! Locking and unlocking slots.
//!
//! A locked slot has all its pages pinned and mapped, so that an access that cannot wait for a
//! fault (a profiling buffer, a device that shares the table) always finds them. The mappings
//! are made without cache maintenance: what the host writes between lock and first run must
//! reach the guest, so maintenance is pending until then. Where a device or an importer is in
//! already, it is done at once, too: that user does not wait for a run.
//!
//! Everything that can fail comes before the first store: pins, charge, bookkeeping. The map is
//! last; if it fails half-way, the slot's range is emptied, and only after the invalidation has
//! completed are pages unpinned and the charge taken back. Slot flags and pending bits have not
//! been touched by then.
//!
//! In steps, the first one does all of this for the slot's first pages, and the slot is locked from
//! then on, with [`Work::UNFINISHED`] pending: nobody enters the guest, and whatever else would have
//! to know how far the lock is refuses. Each further step is such a transaction for the next pages.
//! Unlocking goes the other way, from the last page that is mapped; so a lock that is not complete
//! can be continued or taken back at any time.

use alloc::vec::Vec;

use stage2::{Blocks, LeafAttrs, MapRequest, Perms};

use crate::account::{LockedMemory, Privilege};
use crate::addr::GfnRange;
use crate::error::Error;
use crate::frames::{FrameRun, FrameSource, PinIntent};
use crate::pending::Work;
use crate::policy::{LeafType, MemTypePolicy, TypeQuery};
use crate::slot::{LockFlags, LockGranule, Memslot, SlotFlags, SlotId, SlotLock};
use crate::steps::{Cost, Extent, FRAMES, Progress, repeat};
use crate::table::GuestTable;
use crate::unfinished::Change;
use crate::vm::{GuestMemory, Locked, Mmu, SlotTable, slot_bytes};

/// A decoded lock hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockCall {
    /// Lock a slot.
    Lock {
        /// Which.
        id: SlotId,
        /// Permissions; validated by the operation.
        perms: LockFlags,
    },
    /// Unlock a slot.
    Unlock(SlotId),
    /// Unlock every locked slot.
    UnlockAll,
}

impl LockCall {
    const LOCK: u64 = 0b01;
    const UNLOCK: u64 = 0b10;
    const UNLOCK_ALL: u64 = 0b01;

    /// Decodes the action word and its four arguments.
    ///
    /// # Errors
    /// [`Error::BadLockRequest`] with the offending word: not exactly one action, an unknown
    /// bit, a reserved argument; [`Error::SlotOutOfRange`]'s counterpart for a slot number that
    /// no VM has is the same error with that number.
    pub fn parse(action: u64, args: [u64; 4]) -> Result<Self, Error> {
        let [slot, flags, reserved @ ..] = args;
        if let Some(word) = reserved.into_iter().find(|w| *w != 0) {
            return Err(Error::BadLockRequest(word));
        }
        let id = || {
            u16::try_from(slot)
                .map(SlotId)
                .map_err(|_| Error::BadLockRequest(slot))
        };
        match (action, flags) {
            (Self::LOCK, _) => {
                let perms = LockFlags::from_bits(flags).ok_or(Error::BadLockRequest(flags))?;
                Ok(Self::Lock { id: id()?, perms })
            }
            (Self::UNLOCK, 0) => Ok(Self::Unlock(id()?)),
            (Self::UNLOCK, Self::UNLOCK_ALL) => Ok(Self::UnlockAll),
            (Self::UNLOCK, _) => Err(Error::BadLockRequest(flags)),
            _ => Err(Error::BadLockRequest(action)),
        }
    }
}

/// One lock.
#[derive(Clone, Copy, Debug)]
pub struct LockRequest {
    /// Which slot.
    pub id: SlotId,
    /// Initial permissions; READ is mandatory.
    pub perms: LockFlags,
    /// Largest leaves.
    pub granule: LockGranule,
    /// Whether the limit holds for the caller.
    pub privilege: Privilege,
}

impl LockRequest {
    /// A lock with base pages by an ordinary caller.
    #[must_use]
    pub const fn new(id: SlotId, perms: LockFlags) -> Self {
        Self {
            id,
            perms,
            granule: LockGranule::BasePages,
            privilege: Privilege::Ordinary,
        }
    }

    const fn lock(&self) -> SlotLock {
        SlotLock {
            flags: self.perms,
            granule: self.granule,
        }
    }
}

/// The state of a slot, as the host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    /// Mapped on demand.
    Unlocked,
    /// Mapped and pinned; data maintenance is pending.
    LockedDirty,
    /// Mapped and pinned; nothing is pending.
    LockedClean,
    /// Mapped and pinned, kept across a reset; maintenance is pending.
    LockedReset,
    /// A call has locked, unlocked, deleted, moved or begun to log part of it.
    Unfinished,
}

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Locks a slot: pins and maps all of it, readable or writable, never executable.
    ///
    /// # Errors
    /// In this order: number out of range, no READ, a vCPU inside, no such slot, a write lock on
    /// a read-only or logged slot, locked already, over the limit, out of memory, a page that
    /// cannot be pinned, a backing that changed meanwhile, no table memory. After every one of
    /// them pins, charge, flags and pending work are what they were, and no leaf is there that
    /// was not before.
    pub fn lock_slot(&self, request: &LockRequest) -> Result<(), Error> {
        self.lock_part(request, Extent::Whole).map(|_| ())
    }

    /// [`GuestMemory::lock_slot`] in steps, for as long as `go_on` allows; the same call continues
    /// it, [`GuestMemory::unlock_in_steps`] takes it back. Until one of them is done, no vCPU enters.
    ///
    /// # Errors
    /// As [`GuestMemory::lock_slot`]; what earlier calls have done stays then.
    pub fn lock_in_steps(
        &self,
        request: &LockRequest,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        repeat(go_on, || self.lock_part(request, Extent::Step))
    }

    fn lock_part(&self, request: &LockRequest, extent: Extent) -> Result<Progress, Error> {
        self.check_id(request.id)?;
        if !request.perms.contains(LockFlags::READ) {
            return Err(Error::LockNeedsRead);
        }
        let _closed = self.gate.close()?;
        let mut slots = self.slots.write();
        slots.unchanged()?;
        let (slot, rest) = lockable(&slots, request)?;
        let begins = slot.lock.is_none();
        let npages = slot.range.npages();
        if begins {
            self.frames.account().check(npages, request.privilege)?;
            slots.locked.try_reserve(1)?;
        }
        let part = self.next_part(&slot, request, rest, extent)?;
        let before = (self.frames.sequence(), self.removals());
        let pins = Pins::take(&self.frames, &slot, part, intent(request.perms))?;
        if let Some(locked) = slots.locked_mut(slot.id) {
            locked.pins.try_reserve(pins.runs.len())?;
        }
        let charged = if begins { npages } else { 0 };
        let charge = Charge::take(self.frames.account(), charged, request.privilege)?;
        let mut mmu = self.mmu.write();
        let is_current = |run| self.frames.is_current(&slot, run);
        let moved = (self.frames.sequence(), self.removals()) != before;
        if moved || !pins.runs.iter().all(is_current) {
            return Err(Error::BackingChanged);
        }
        if let Some((withheld, _)) = mmu.table.first_note(slot_bytes(part)?) {
            let page = withheld.frame().get() - slot.range.start().get();
            return Err(Error::PinFailed(page));
        }
        let (attrs, work) = self.locked_leaf(&slot, &mmu, request.perms)?;
        map_runs(
            &mut mmu,
            &with_lock(&slot, request),
            &pins.runs,
            attrs,
            part,
        )?;
        // Nothing fails from here on.
        let pins = pins.keep();
        charge.keep();
        if begins {
            mmu.generation = slots.set.relock(slot.id, Some(request.lock()));
        }
        slots.mapped(&slot, pins, part.end(), work);
        self.pending.replace(slots.work());
        Ok(if part.end() == slot.range.end() {
            Progress::Done
        } else {
            Progress::More
        })
    }

    /// What is mapped in one go.
    fn next_part(
        &self,
        slot: &Memslot,
        request: &LockRequest,
        rest: GfnRange,
        extent: Extent,
    ) -> Result<GfnRange, Error> {
        let mmu = self.mmu.read();
        let (_, work) = self.locked_leaf(slot, &mmu, request.perms)?;
        if extent == Extent::Whole {
            return Ok(rest);
        }
        let many = if with_lock(slot, request).needs_base_pages() {
            Cost::Pages
        } else {
            Cost::Blocks
        };
        // Blocks that owe cleaning are as small as a step; memory that is not aligned has none.
        let skew = slot.backing.abs_diff(slot.range.start().get());
        let cost = match many {
            _ if mmu.has_other_users() && !work.is_empty() => Cost::Maintenance,
            Cost::Blocks if !skew.is_multiple_of(FRAMES) => Cost::Pages,
            other => other,
        };
        let part = extent.first(rest, cost);
        let fresh = mmu.empty_to(part);
        if fresh == part.end() {
            return Ok(part);
        }
        // Up to the block in which something is mapped; there leaves are replaced.
        let fresh = GfnRange::new(part.start().get(), fresh - fresh % FRAMES);
        Ok(fresh.unwrap_or(extent.first(rest, Cost::Maintenance)))
    }

    /// Unlocks a slot: unpins and un-charges its pages. Leaves stay, unless they never got
    /// their maintenance; then they go, and a fault will do it.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`], [`Error::NotLocked`] or [`Error::SlotOutOfRange`].
    pub fn unlock_slot(&self, id: SlotId) -> Result<(), Error> {
        self.unlock_part(id, Extent::Whole).map(|_| ())
    }

    /// [`GuestMemory::unlock_slot`] in steps, for as long as `go_on` allows; the same call continues
    /// it, and locking turns it round.
    ///
    /// # Errors
    /// As [`GuestMemory::unlock_slot`], and [`Error::NeedTables`] to cut a block of 1 GiB.
    pub fn unlock_in_steps(
        &self,
        id: SlotId,
        go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        repeat(go_on, || self.unlock_part(id, Extent::Step))
    }

    fn unlock_part(&self, id: SlotId, extent: Extent) -> Result<Progress, Error> {
        self.check_id(id)?;
        self.unlock_one(&mut self.slots.write(), id, extent)
    }

    /// Unlocks every locked slot; success if there is none.
    ///
    /// # Errors
    /// Those of the page table, which unmapping whole slots does not meet.
    pub fn unlock_all(&self) -> Result<(), Error> {
        self.unlock_all_in_steps(|| true).map(|_| ())
    }

    /// [`GuestMemory::unlock_all`] in steps, for as long as `go_on` allows.
    ///
    /// # Errors
    /// As [`GuestMemory::unlock_all`].
    pub fn unlock_all_in_steps(&self, go_on: impl FnMut() -> bool) -> Result<Progress, Error> {
        repeat(go_on, || {
            let mut slots = self.slots.write();
            let Some(id) = slots.locked.last().map(|l| l.id) else {
                return Ok(Progress::Done);
            };
            let _: Progress = self.unlock_one(&mut slots, id, Extent::Step)?;
            Ok(if slots.locked.is_empty() {
                Progress::Done
            } else {
                Progress::More
            })
        })
    }

    /// The state of a slot; `None` if there is no such slot.
    #[must_use]
    pub fn lock_state(&self, id: SlotId) -> Option<LockState> {
        let slots = self.slots.read();
        let changes = match slots.unfinished.map(|u| u.change) {
            Some(Change::Leave { from, .. }) => from.id == id,
            Some(Change::Log(log)) => log == id,
            _ => false,
        };
        if changes {
            return Some(LockState::Unfinished);
        }
        slots.set.get(id)?;
        let locked = slots.locked(id);
        if locked.is_some_and(|l| l.unmapped().is_some()) {
            return Some(LockState::Unfinished);
        }
        Some(match locked.map(|l| l.work) {
            None => LockState::Unlocked,
            Some(work) if work.contains(Work::INVAL_ICACHE) => LockState::LockedReset,
            Some(work) if work.contains(Work::FLUSH_DCACHE) => LockState::LockedDirty,
            Some(_) => LockState::LockedClean,
        })
    }

    /// Gives up the VM's memory: first no leaf is left, then nothing is pinned or charged.
    ///
    /// # Errors
    /// [`Error::VcpuRunning`], because a vCPU inside would fault its leaves in again; those of
    /// the page table, and then the VM stays as it is, as far as it was not emptied.
    pub fn empty(&self) -> Result<(), Error> {
        let _closed = self.gate.close()?;
        let mut slots = self.slots.write();
        let mut mmu = self.mmu.write();
        for slot in slots.set.iter().chain(slots.leaving()) {
            mmu.unmap(slot.range)?;
        }
        drop(mmu);
        slots.unfinished = None;
        while let Some(id) = slots.locked.last().map(|l| l.id) {
            let _: Progress = self.unlock_one(&mut slots, id, Extent::Whole)?;
        }
        Ok(())
    }

    fn unlock_one(
        &self,
        slots: &mut SlotTable,
        id: SlotId,
        extent: Extent,
    ) -> Result<Progress, Error> {
        slots.unchanged()?;
        let slot = *slots.set.get(id).ok_or(Error::NoSuchSlot(id))?;
        let lock = slot.lock.ok_or(Error::NotLocked(id))?;
        let mut mmu = self.mmu.write();
        if let Some(locked) = slots.locked_mut(id).filter(|l| !l.work.is_empty()) {
            if let Some(mapped) = GfnRange::new(slot.range.start().get(), locked.mapped_to) {
                let part = extent.last(mapped);
                mmu.zap_part(part)?;
                locked.mapped_to = part.start().get();
                // What is mapped again later owes its maintenance again.
                locked.done_to = locked.done_to.min(locked.mapped_to);
            }
            if locked.mapped_to != slot.range.start().get() {
                self.pending.replace(slots.work());
                return Ok(Progress::More);
            }
        }
        mmu.generation = slots.set.relock(id, None);
        drop(mmu);
        if let Some(at) = slots.locked.iter().position(|l| l.id == id) {
            let locked = slots.locked.swap_remove(at);
            for run in locked.pins {
                self.frames.unpin(&slot, run, intent(lock.flags));
            }
        }
        self.frames.account().uncharge(slot.range.npages());
        self.pending.replace(slots.work());
        Ok(Progress::Done)
    }

    /// What the leaves of a lock say, and what they will need.
    #[inline]
    fn locked_leaf(
        &self,
        slot: &Memslot,
        mmu: &Mmu<T>,
        perms: LockFlags,
    ) -> Result<(LeafAttrs, Work), Error> {
        let leaf = self.locked_type(slot, mmu.noncoherent.any())?;
        let perms = match intent(perms) {
            PinIntent::Read => Perms::READ,
            PinIntent::Write => Perms::RW,
        };
        let (mem, combine) = self.policy.encode(leaf);
        Ok((LeafAttrs::new(perms, mem, combine), self.flush_work(leaf)))
    }

    /// The type of all of a locked slot. It must not depend on a vCPU, because a vCPU's write to
    /// a register would remove leaves that must not go.
    pub(crate) fn locked_type(&self, slot: &Memslot, noncoherent: bool) -> Result<LeafType, Error> {
        let query = TypeQuery::of(slot, slot.range.start(), noncoherent);
        self.policy.slot_type(&query).ok_or(Error::NonCoherent)
    }

    /// FLUSH only where a leaf needs it.
    pub(crate) fn flush_work(&self, leaf: LeafType) -> Work {
        if self.policy.needs_maintenance(leaf) {
            Work::FLUSH_DCACHE
        } else {
            Work::empty()
        }
    }
}

/// Checks 6 to 9: what the slot itself refuses; and the frames that are still to be mapped.
fn lockable(slots: &SlotTable, request: &LockRequest) -> Result<(Memslot, GfnRange), Error> {
    let id = request.id;
    let slot = *slots.set.get(id).ok_or(Error::NoSuchSlot(id))?;
    let logs = slot.flags.contains(SlotFlags::DIRTY_LOG);
    let refuses_writes = !slot.is_writable() || logs;
    if request.perms.contains(LockFlags::WRITE) && refuses_writes {
        return Err(Error::WriteLockRefused(id));
    }
    let rest = match slot.lock {
        None => Some(slot.range),
        Some(lock) if lock == request.lock() => slots.locked(id).and_then(Locked::unmapped),
        Some(_) => None,
    };
    rest.map(|rest| (slot, rest)).ok_or(Error::Locked(id))
}

/// The slot as it is under the lock.
fn with_lock(slot: &Memslot, request: &LockRequest) -> Memslot {
    Memslot {
        lock: Some(request.lock()),
        ..*slot
    }
}

fn intent(perms: LockFlags) -> PinIntent {
    if perms.contains(LockFlags::WRITE) {
        PinIntent::Write
    } else {
        PinIntent::Read
    }
}

/// Maps all runs, or none; without cache maintenance unless somebody can use them at once.
fn map_runs<T: GuestTable>(
    mmu: &mut Mmu<T>,
    locked: &Memslot,
    runs: &[FrameRun],
    attrs: LeafAttrs,
    part: GfnRange,
) -> Result<(), Error> {
    let blocks = if locked.needs_base_pages() {
        Blocks::Never
    } else {
        Blocks::Largest
    };
    for run in runs {
        let range = slot_bytes(run.range)?;
        let request = MapRequest::new(range.start(), range.len(), run.pfn.start(), attrs);
        let mut request = request.with_blocks(blocks);
        if !mmu.has_other_users() {
            request = request.deferred();
        }
        if let Err(error) = mmu.table.map(&request) {
            // Whole slots cut no block, so this takes no memory and does not fail.
            if part == locked.range {
                mmu.unmap(part)?;
            } else {
                mmu.zap(part)?;
            }
            return Err(error.into());
        }
    }
    Ok(())
}

/// Pins that are let go of unless kept.
struct Pins<'a, S: FrameSource> {
    frames: &'a S,
    slot: &'a Memslot,
    runs: Vec<FrameRun>,
}

impl<'a, S: FrameSource> Pins<'a, S> {
    fn take(
        frames: &'a S,
        slot: &'a Memslot,
        part: GfnRange,
        intent: PinIntent,
    ) -> Result<Self, Error> {
        let mut pins = Self {
            frames,
            slot,
            runs: Vec::new(),
        };
        let mut rest = Some(part);
        while let Some(want) = rest {
            // Room first: a pin without a place in the list would leak.
            pins.runs.try_reserve(1)?;
            let run = frames.pin(slot, want, intent).map_err(|missing| {
                Error::PinFailed(missing.0.get().saturating_sub(slot.range.start().get()))
            })?;
            pins.runs.push(run);
            rest = GfnRange::new(run.range.end(), want.end());
        }
        Ok(pins)
    }

    fn keep(mut self) -> Vec<FrameRun> {
        core::mem::take(&mut self.runs)
    }
}

impl<S: FrameSource> Drop for Pins<'_, S> {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            // Nobody has written through a lock that failed.
            self.frames.unpin(self.slot, run, PinIntent::Read);
        }
    }
}

/// A charge that is taken back unless kept.
struct Charge<'a> {
    account: &'a LockedMemory,
    npages: u64,
}

impl<'a> Charge<'a> {
    fn take(account: &'a LockedMemory, npages: u64, privilege: Privilege) -> Result<Self, Error> {
        account.charge(npages, privilege)?;
        Ok(Self { account, npages })
    }

    fn keep(mut self) {
        self.npages = 0;
    }
}

impl Drop for Charge<'_> {
    fn drop(&mut self) {
        self.account.uncharge(self.npages);
    }
}
