//! A guest's stage-2 fault.
//!
//! | what the guest did | outcome |
//! |---|---|
//! | touched a frame of no slot | [`FaultOutcome::Mmio`] |
//! | wrote to a read-only slot | [`FaultOutcome::Mmio`] |
//! | fetched from a device | [`FaultOutcome::Abort`] |
//! | touched memory that the host has not supplied | [`FaultOutcome::NoFrame`] |
//! | anything else in a slot | a leaf, or more permissions for the one that is there |
//!
//! The memory type is computed, and the dirty bit set, inside the section that installs the
//! leaf: whoever changes an input of the type excludes that section while it changes the input
//! and removes the leaves.

use stage2::{Blocks, FaultRequest, Ipa, LeafAttrs, Perms, Pfn};

use crate::addr::{Gfn, GfnRange};
use crate::error::Error;
use crate::frames::{FrameRun, FrameSource};
use crate::policy::{LeafType, MemTypePolicy, TypeQuery};
use crate::slot::{LockFlags, Memslot, SlotFlags, SlotKind};
use crate::table::{GuestTable, bytes};
use crate::vm::{GuestMemory, Mmu};

/// What the guest tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Why the hardware refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// There is no leaf.
    Translation,
    /// The leaf does not allow the access.
    Permission,
    /// The leaf is marked unused.
    AccessFlag,
}

/// A decoded stage-2 fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage2Fault {
    /// The address.
    pub ipa: Ipa,
    /// What the guest tried.
    pub access: Access,
    /// Why it was refused.
    pub kind: FaultKind,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum FaultOutcome {
    /// The access can succeed now: resume the guest.
    Resolved,
    /// Something changed meanwhile: resume the guest, it will fault again if it must.
    Retry,
    /// Emulate a device, or inject an abort if there is none.
    Mmio,
    /// Inject an abort.
    Abort,
    /// The host must supply the frame.
    NoFrame(Gfn),
}

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Handles a fault of a vCPU with the given memory-type state.
    ///
    /// # Errors
    /// [`Error::NeedTables`]: supply them and repeat. [`Error::BackingChanged`] if a locked slot
    /// maps other frames than its source says. Nothing has changed after an error.
    pub fn handle_fault(&self, fault: &Stage2Fault, vcpu: &P::Vcpu) -> Result<FaultOutcome, Error> {
        let gfn = fault.ipa.frame();
        let (slot, generation) = match self.look_up(gfn) {
            Ok(found) => found,
            Err(outcome) => return Ok(outcome),
        };
        match (fault.access, slot.kind) {
            (Access::Write, _) if !slot.is_writable() => return Ok(FaultOutcome::Mmio),
            (Access::Fetch, SlotKind::Mmio) => return Ok(FaultOutcome::Abort),
            _ => {}
        }
        if is_unexpected(&slot, fault) {
            self.count(|c| c.unexpected_faults += 1);
        }
        let removals = self.removals();
        let Ok(run) = self.frames.resolve(&slot, gfn, fault.access) else {
            return Ok(FaultOutcome::NoFrame(gfn));
        };
        let mmu = self.mmu.read_inline();
        // Whoever takes a page away does it in a section that excludes this one: either that is
        // seen here, or the leaf is seen there.
        let moved = self.removals() != removals || !self.frames.is_current(&slot, &run);
        if mmu.generation != generation || moved {
            return Ok(FaultOutcome::Retry);
        }
        self.install(&mmu, &slot, (gfn, fault), run, vcpu)
    }

    /// The slot that holds `gfn` and the generation of the slots; or what a guest meets without one.
    fn look_up(&self, gfn: Gfn) -> Result<(Memslot, u64), FaultOutcome> {
        let slots = self.slots.read_inline();
        match slots.set.find(gfn) {
            Some(slot) => Ok((*slot, slots.set.generation())),
            None if slots.is_moving(gfn) => Err(FaultOutcome::Retry),
            None => Err(FaultOutcome::Mmio),
        }
    }

    /// Installs the leaf; the mmu lock is held, and the slot is current.
    fn install(
        &self,
        mmu: &Mmu<T>,
        slot: &Memslot,
        (gfn, fault): (Gfn, &Stage2Fault),
        run: FrameRun,
        vcpu: &P::Vcpu,
    ) -> Result<FaultOutcome, Error> {
        let query = TypeQuery::of(slot, gfn, mmu.noncoherent.any());
        let leaf = self.policy.leaf_type(&query, vcpu);
        let (mem, combine) = self.policy.encode(leaf);
        let attrs = LeafAttrs::new(perms(slot, fault.access), mem, combine);
        let run = self.limited(slot, leaf, gfn, run);
        let Some(request) = self.request(slot, &query, vcpu, run, attrs) else {
            return Ok(FaultOutcome::NoFrame(gfn));
        };
        if attrs.perms.contains(Perms::WRITE)
            && let Some(bitmap) = mmu.bitmap(slot.id)
        {
            // Before the leaf: a writable leaf has its bits set, one per 4 KiB.
            let index = (gfn.get() - slot.range.start().get()) >> self.page_order;
            let first = index << self.page_order;
            (first..first + (1 << self.page_order)).for_each(|page| bitmap.mark(page));
        }
        let request = match fault.kind {
            FaultKind::Translation => request.on_missing(),
            FaultKind::Permission | FaultKind::AccessFlag => request,
        };
        match mmu.table.fault(&request)? {
            stage2::FaultOutcome::Mapped(_)
            | stage2::FaultOutcome::AlreadyMapped
            | stage2::FaultOutcome::Relaxed => Ok(FaultOutcome::Resolved),
            stage2::FaultOutcome::Retry => Ok(FaultOutcome::Retry),
            stage2::FaultOutcome::Annotated(_) => Ok(FaultOutcome::NoFrame(gfn)),
            stage2::FaultOutcome::Conflict(_) => self.resolve_conflict(mmu, slot, gfn),
        }
    }

    /// Another leaf stands there: of a vCPU whose registers differ, or of a backing that has
    /// changed. It goes, and the guest faults again. A locked leaf never goes.
    fn resolve_conflict(
        &self,
        mmu: &Mmu<T>,
        slot: &Memslot,
        gfn: Gfn,
    ) -> Result<FaultOutcome, Error> {
        if slot.lock.is_some() {
            return Err(Error::BackingChanged);
        }
        if let Some(page) = GfnRange::block(gfn, self.page_order).and_then(bytes) {
            mmu.table.zap(page)?;
        }
        Ok(FaultOutcome::Retry)
    }

    /// The request with the widest window in which memory is consecutive and of one type.
    fn request(
        &self,
        slot: &Memslot,
        query: &TypeQuery,
        vcpu: &P::Vcpu,
        run: FrameRun,
        attrs: LeafAttrs,
    ) -> Option<FaultRequest> {
        let within = run
            .range
            .intersection(slot.range)
            .and_then(|r| r.whole_blocks(self.page_order))
            .filter(|r| r.contains(query.gfn))?;
        let blocks = if slot.needs_base_pages() {
            Blocks::Never
        } else {
            Blocks::Largest
        };
        let window = if P::VARIES_WITHIN_SLOT && blocks != Blocks::Never {
            self.uniform_window(query, vcpu, within)?
        } else {
            within
        };
        let skip = window.start().get() - run.range.start().get();
        let pa = run
            .pfn
            .start()
            .checked_add(skip << stage2::addr::FRAME_SHIFT)?;
        let request = FaultRequest::new(query.gfn.start(), bytes(window)?, pa, attrs);
        let request = request.with_blocks(blocks);
        // A device has no cache lines to maintain.
        Some(if slot.kind == SlotKind::Mmio {
            request.deferred()
        } else {
            request
        })
    }

    /// The part of a run that one fault may map. Where leaves owe cache maintenance that is 2 MiB, which
    /// are cleaned in one go.
    #[inline]
    fn limited(&self, slot: &Memslot, leaf: LeafType, gfn: Gfn, run: FrameRun) -> FrameRun {
        if slot.kind != SlotKind::Ram || !self.policy.needs_maintenance(leaf) {
            return run;
        }
        let block = GfnRange::block(gfn, 9).and_then(|block| block.intersection(run.range));
        let skipped = |range: GfnRange| {
            let skip = range.start().get() - run.range.start().get();
            Some((range, Pfn::try_new(run.pfn.get() + skip)?))
        };
        match block.and_then(skipped) {
            Some((range, pfn)) => FrameRun { range, pfn },
            None => run,
        }
    }

    /// The largest aligned block around the page that lies in `within` and has one type.
    fn uniform_window(
        &self,
        query: &TypeQuery,
        vcpu: &P::Vcpu,
        within: GfnRange,
    ) -> Option<GfnRange> {
        let block = |order: u32| GfnRange::block(query.gfn, order);
        // 1 GiB, 2 MiB: the sizes of EPT leaves.
        let fits = |order: &u32| {
            block(*order).is_some_and(|b| within.covers(b))
                && self.policy.is_uniform(query, vcpu, *order)
        };
        block([18, 9].into_iter().find(fits).unwrap_or(0))
    }
}

/// Permissions of a new leaf. Execution comes with the first fetch, which does the instruction
/// cache's maintenance; writing comes with the first write where that must be seen.
fn perms(slot: &Memslot, access: Access) -> Perms {
    let lazy = slot.flags.contains(SlotFlags::DIRTY_LOG) || slot.lock.is_some();
    let mut perms = Perms::READ;
    if slot.is_writable() && (!lazy || access == Access::Write) {
        perms |= Perms::WRITE;
    }
    if access == Access::Fetch {
        perms |= Perms::EXEC;
    }
    perms
}

/// A locked slot faults only for permissions that its lock did not give.
fn is_unexpected(slot: &Memslot, fault: &Stage2Fault) -> bool {
    let Some(lock) = slot.lock else { return false };
    match (fault.kind, fault.access) {
        (FaultKind::AccessFlag, _) => true,
        (FaultKind::Translation, _) => true,
        (FaultKind::Permission, Access::Write) => lock.flags.contains(LockFlags::WRITE),
        (FaultKind::Permission, Access::Read) => true,
        (FaultKind::Permission, Access::Fetch) => false,
    }
}
