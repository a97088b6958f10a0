//! The owner's side of a slot: which frames stand behind it.
//!
//! A slot's backing is the host-physical address of its first page; frames are consecutive and
//! stay where they are, so a pin is only counted.

use core::sync::atomic::{AtomicU64, Ordering};

use memslot::account::LockedMemory;
use memslot::addr::{Gfn, GfnRange};
use memslot::fault::Access;
use memslot::frames::{FrameMissing, FrameRun, FrameSource, PinIntent};
use memslot::slot::Memslot;
use stage2::{Pa, Pfn};

/// Frames of one VM.
#[derive(Debug)]
pub struct Backing {
    account: LockedMemory,
    pinned: AtomicU64,
}

impl Backing {
    /// Nothing pinned; at most `limit` pages locked.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            account: LockedMemory::new(limit),
            pinned: AtomicU64::new(0),
        }
    }

    /// Pages pinned now.
    pub fn pinned(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }
}

/// The frame behind `gfn` of a slot.
fn frame(slot: &Memslot, gfn: Gfn) -> Option<Pfn> {
    let skip = gfn.get().checked_sub(slot.range.start().get())?;
    let bytes = skip.checked_mul(1 << stage2::addr::FRAME_SHIFT)?;
    Some(Pa::new(slot.backing).checked_add(bytes)?.frame())
}

impl FrameSource for Backing {
    fn resolve(&self, slot: &Memslot, gfn: Gfn, _access: Access) -> Result<FrameRun, FrameMissing> {
        let pfn = frame(slot, slot.range.start()).ok_or(FrameMissing(gfn))?;
        Ok(FrameRun {
            range: slot.range,
            pfn,
        })
    }

    fn pin(
        &self,
        slot: &Memslot,
        want: GfnRange,
        _intent: PinIntent,
    ) -> Result<FrameRun, FrameMissing> {
        let pfn = frame(slot, want.start()).ok_or(FrameMissing(want.start()))?;
        self.pinned.fetch_add(want.npages(), Ordering::Relaxed);
        Ok(FrameRun { range: want, pfn })
    }

    fn unpin(&self, _slot: &Memslot, run: FrameRun, _intent: PinIntent) {
        self.pinned.fetch_sub(run.range.npages(), Ordering::Relaxed);
    }

    /// Frames never move.
    fn sequence(&self) -> u64 {
        0
    }

    fn account(&self) -> &LockedMemory {
        &self.account
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memslot::slot::{SlotFlags, SlotId, SlotKind};

    fn slot() -> Memslot {
        let base = Gfn::try_new(0x100).unwrap();
        Memslot::new(
            SlotId(0),
            base,
            16,
            0x80_0000,
            SlotFlags::empty(),
            SlotKind::Ram,
        )
        .unwrap()
    }

    #[test]
    fn frames_follow_the_backing() {
        let b = Backing::new(100);
        let gfn = Gfn::try_new(0x105).unwrap();
        let run = b.resolve(&slot(), gfn, Access::Read).unwrap();
        assert_eq!(run.pfn.start(), Pa::new(0x80_0000));
        assert_eq!(run.range, slot().range);
    }

    #[test]
    fn pins_begin_where_they_are_asked_and_are_counted() {
        let b = Backing::new(100);
        let want = GfnRange::new(0x104, 0x108).unwrap();
        let run = b.pin(&slot(), want, PinIntent::Write).unwrap();
        assert_eq!(run.pfn.start(), Pa::new(0x80_4000));
        assert_eq!(b.pinned(), 4);
        b.unpin(&slot(), run, PinIntent::Write);
        assert_eq!(b.pinned(), 0);
    }
}
