//! A change of a VM's memory that is not complete: which one, and how far it is.
//!
//! Invariant: there is at most one. Until the call that began it is repeated to its end, every other
//! change of slots, locks, devices and single pages is refused, so none of them ever meets half of it.
//! Ending the VM needs none of this. What the guest may do meanwhile:
//!
//! | change | a vCPU that runs | a vCPU that would enter |
//! |---|---|---|
//! | delete | finds nothing in the slot from the first step on, but what is mapped | enters |
//! | move | waits wherever the slot was or will be, but for what is mapped | is refused |
//! | dirty log begins | goes on; what it writes is logged when the last step is done | enters |
//! | reset | there is none | is refused |
//! | device, cleaning | goes on | enters, and cleans what is left |
//! | device, types change | goes on with old and new types | is refused |

use crate::addr::{Gfn, GfnRange};
use crate::edge::{Direction, Dma};
use crate::error::Error;
use crate::noncoherent::Edge;
use crate::slot::{Memslot, SlotId};
use crate::vm::SlotTable;

/// What is being changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A slot goes from its place, to another one if there is one; it is no slot meanwhile.
    Leave {
        /// As it was.
        from: Memslot,
        /// As it will be.
        to: Option<Memslot>,
    },
    /// A slot's dirty log begins.
    Log(SlotId),
    /// On-demand leaves go, everywhere.
    Reset,
    /// A device comes or goes; pending pages are being cleaned for it.
    Clean(Dma, Direction),
    /// It has come or gone, and types follow.
    Types(Dma, Direction, Edge),
}

/// How far a change is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    pub(crate) change: Change,
    /// The first frame that it has not come to.
    pub(crate) at: u64,
}

impl Change {
    /// Whether nobody may enter the guest before it is complete.
    pub(crate) const fn keeps_vcpus_out(&self) -> bool {
        match self {
            Self::Leave { to, .. } => to.is_some(),
            Self::Reset | Self::Types(..) => true,
            Self::Log(_) | Self::Clean(..) => false,
        }
    }
}

impl SlotTable {
    /// Refuses what must not meet half of a change.
    pub(crate) fn unchanged(&self) -> Result<(), Error> {
        match self.unfinished {
            Some(_) => Err(Error::ChangeUnfinished),
            None => Ok(()),
        }
    }

    /// Where `change` goes on; nothing if it would begin. Another one is in the way.
    pub(crate) fn resumes(&self, is_it: impl Fn(&Change) -> bool) -> Result<Option<u64>, Error> {
        match &self.unfinished {
            Some(unfinished) if is_it(&unfinished.change) => Ok(Some(unfinished.at)),
            Some(_) => Err(Error::ChangeUnfinished),
            None => Ok(None),
        }
    }

    /// The slot that has left, or is leaving, its place.
    pub(crate) fn leaving(&self) -> Option<&Memslot> {
        match self.unfinished.as_ref()?.change {
            Change::Leave { ref from, .. } => Some(from),
            _ => None,
        }
    }

    /// Whether a slot is on its way from or to this frame.
    pub(crate) fn is_moving(&self, gfn: Gfn) -> bool {
        let Some(Change::Leave { from, to: Some(to) }) = self.unfinished.map(|u| u.change) else {
            return false;
        };
        from.range.contains(gfn) || to.range.contains(gfn)
    }

    /// The first part at or behind frame `at` of the slots that `picks` says.
    pub(crate) fn next_of(
        &self,
        at: u64,
        picks: impl Fn(&Memslot) -> bool,
    ) -> Option<(Memslot, GfnRange)> {
        let mut slots = self.set.iter().filter(|slot| picks(slot));
        slots.find_map(|slot| {
            let start = slot.range.start().get().max(at);
            Some((*slot, GfnRange::new(start, slot.range.end())?))
        })
    }
}
