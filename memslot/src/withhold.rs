//! Pages that a guest has lost, or has given away, inside a slot that it keeps.
//!
//! Invariant: a page with a note has no leaf, and no fault gives it one before the note goes. So what
//! was taken from a protected guest can't come back as something else behind its back. Resetting the
//! VM and unlocking a slot remove leaves, and keep notes.

use stage2::Annotation;

use crate::addr::GfnRange;
use crate::error::Error;
use crate::frames::FrameSource;
use crate::policy::MemTypePolicy;
use crate::table::GuestTable;
use crate::vm::{GuestMemory, slot_bytes};

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Takes pages out of the guest's reach, of a locked slot, too, and remembers why. When this
    /// returns, no leaf, TLB entry or importer refers to them.
    ///
    /// # Errors
    /// A range beyond the guest's addresses, or missing tables; nothing has changed then.
    pub fn withhold(&self, range: GfnRange, note: Annotation) -> Result<(), Error> {
        self.check_range(range)?;
        let bytes = slot_bytes(range)?;
        Ok(self.remove_pages().table.annotate(bytes, note)?)
    }

    /// Ends that: pages of a range whose notes go are faulted in again, from frames that are looked
    /// up from now on. Leaves go, too.
    ///
    /// # Errors
    /// As [`Self::withhold`].
    pub fn release(&self, range: GfnRange) -> Result<(), Error> {
        self.check_range(range)?;
        self.remove_pages().unmap(range)
    }
}
