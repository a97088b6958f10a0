//! Where the memory behind a slot comes from.

use stage2::Pfn;

use crate::account::LockedMemory;
use crate::addr::{Gfn, GfnRange};
use crate::fault::Access;
use crate::slot::Memslot;

/// Consecutive frames behind consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRun {
    /// The pages.
    pub range: GfnRange,
    /// The frame behind the first of them.
    pub pfn: Pfn,
}

/// There is no frame, or this VM may not use it; the host must act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no frame behind {0:?}")]
pub struct FrameMissing(pub Gfn);

/// What a pin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinIntent {
    /// The page is read.
    Read,
    /// The page may be written.
    Write,
}

/// The host's side of a slot: which frames stand behind it, and who holds them.
pub trait FrameSource {
    /// The run of frames around `gfn`. The caller takes from it what lies inside the slot.
    ///
    /// # Errors
    /// [`FrameMissing`].
    fn resolve(&self, slot: &Memslot, gfn: Gfn, access: Access) -> Result<FrameRun, FrameMissing>;

    /// Pins frames from the start of `want` on, for the long term: as many as are consecutive,
    /// at least one page. Pins all of what it returns, or nothing.
    ///
    /// # Errors
    /// [`FrameMissing`] for the first page; nothing is pinned then.
    fn pin(
        &self,
        slot: &Memslot,
        want: GfnRange,
        intent: PinIntent,
    ) -> Result<FrameRun, FrameMissing>;

    /// Lets go of what one [`FrameSource::pin`] returned. With [`PinIntent::Write`] the pages
    /// count as dirty.
    fn unpin(&self, slot: &Memslot, run: FrameRun, intent: PinIntent);

    /// Changes whenever a frame behind any slot changes. Whoever takes a frame away does it in this
    /// order: change what [`FrameSource::resolve`] answers, and the sequence;
    /// [`crate::vm::GuestMemory::host_unmap`]; only then give the frame another use.
    fn sequence(&self) -> u64;

    /// Whether a run that was resolved or pinned is still the guest's. Asked inside the section that
    /// installs it: who takes frames away removes their leaves first, in a section of his own, and
    /// changes what this says afterwards.
    fn is_current(&self, _: &Memslot, _: &FrameRun) -> bool {
        true
    }

    /// Whom locked pages are charged to.
    fn account(&self) -> &LockedMemory;
}
