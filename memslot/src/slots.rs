//! The slots of a VM: sorted, never overlapping, replaced as a whole.
//!
//! A change builds a new collection and swaps it in, so that no reader sees a half-made one, and
//! carries a new generation, so that work prepared from the old one can tell.

use alloc::vec::Vec;

use crate::addr::{Gfn, GfnRange};
use crate::error::Error;
use crate::slot::{Memslot, SlotId, SlotLock};

/// An immutable sorted collection of slots.
///
/// The first frames stand in an array of their own: a look-up touches only these few cache
/// lines, and the slot itself once.
#[derive(Debug, Default)]
pub struct Memslots {
    starts: Vec<u64>,
    slots: Vec<Memslot>,
    /// Positions in `slots`, ordered by slot number.
    by_id: Vec<u16>,
    generation: u64,
}

impl Memslots {
    /// No slots, generation 0.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            starts: Vec::new(),
            slots: Vec::new(),
            by_id: Vec::new(),
            generation: 0,
        }
    }

    /// Number of slots.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Changes with every replacement.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The slot that holds `gfn`.
    #[inline]
    #[must_use]
    pub fn find(&self, gfn: Gfn) -> Option<&Memslot> {
        let slot = match self.slots.as_slice() {
            [only] => only,
            slots => {
                let after = self.starts.partition_point(|&start| start <= gfn.get());
                slots.get(after.checked_sub(1)?)?
            }
        };
        slot.range.contains(gfn).then_some(slot)
    }

    /// The slot with number `id`.
    #[must_use]
    pub fn get(&self, id: SlotId) -> Option<&Memslot> {
        let at = self.id_position(id).ok()?;
        self.slots.get(usize::from(*self.by_id.get(at)?))
    }

    /// All slots in ascending order of guest frames.
    pub fn iter(&self) -> impl Iterator<Item = &Memslot> {
        self.slots.iter()
    }

    /// A new collection with `slot` added.
    ///
    /// # Errors
    /// [`Error::SlotExists`], [`Error::Overlap`] with the slot that is in the way, or
    /// [`Error::OutOfMemory`].
    pub fn with(&self, slot: Memslot) -> Result<Self, Error> {
        let Err(id_at) = self.id_position(slot.id) else {
            return Err(Error::SlotExists(slot.id));
        };
        if let Some(other) = self.overlapping(slot.range) {
            return Err(Error::Overlap(other.id));
        }
        let at = self
            .starts
            .partition_point(|&start| start < slot.range.start().get());
        let mut slots = Self::vec_of(self.slots.len() + 1)?;
        slots.extend_from_slice(self.slots.get(..at).unwrap_or_default());
        slots.push(slot);
        slots.extend_from_slice(self.slots.get(at..).unwrap_or_default());
        let at = u16::try_from(at).map_err(|_| Error::OutOfMemory)?;
        let moved = |&old: &u16| old + u16::from(old >= at);
        let (before, behind) = self.by_id.split_at_checked(id_at).unwrap_or_default();
        let by_id = before.iter().map(moved).chain([at]);
        self.successor(slots, by_id.chain(behind.iter().map(moved)))
    }

    /// A new collection without slot `id`.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`] or [`Error::OutOfMemory`].
    pub fn without(&self, id: SlotId) -> Result<Self, Error> {
        let at = self.id_position(id).ok().and_then(|at| self.by_id.get(at));
        let &at = at.ok_or(Error::NoSuchSlot(id))?;
        let mut slots = Self::vec_of(self.slots.len())?;
        slots.extend(self.slots.iter().filter(|s| s.id != id));
        let others = self.by_id.iter().filter(|&&old| old != at);
        self.successor(slots, others.map(|&old| old - u16::from(old > at)))
    }

    /// A new collection in which the slot with `slot`'s number is replaced by `slot`.
    ///
    /// # Errors
    /// [`Error::NoSuchSlot`], [`Error::Overlap`] with another slot, or [`Error::OutOfMemory`].
    pub fn replacing(&self, slot: Memslot) -> Result<Self, Error> {
        let mut next = self.without(slot.id)?.with(slot)?;
        next.generation = self.generation + 1;
        Ok(next)
    }

    /// Sets or clears the lock of slot `id` and returns the new generation. In place, because
    /// the geometry stays and this must not fail; readers are out.
    pub(crate) fn relock(&mut self, id: SlotId, lock: Option<SlotLock>) -> u64 {
        let at = self.id_position(id).ok().and_then(|at| self.by_id.get(at));
        if let Some(slot) = at.and_then(|&at| self.slots.get_mut(usize::from(at))) {
            slot.lock = lock;
            self.generation += 1;
        }
        self.generation
    }

    /// Any slot that shares a frame with `range`.
    #[must_use]
    pub fn overlapping(&self, range: GfnRange) -> Option<&Memslot> {
        // The only candidates: the last slot that starts before the range's end.
        let before_end = self.starts.partition_point(|&start| start < range.end());
        let slot = self.slots.get(before_end.checked_sub(1)?)?;
        slot.range.intersection(range).map(|_| slot)
    }

    /// The same, but for slot `id`.
    pub(crate) fn overlapping_but(&self, range: GfnRange, id: SlotId) -> Option<&Memslot> {
        let mut others = self.slots.iter().filter(|slot| slot.id != id);
        others.find(|slot| slot.range.intersection(range).is_some())
    }

    fn id_position(&self, id: SlotId) -> Result<usize, usize> {
        self.by_id.binary_search_by_key(&Some(id), |&at| {
            self.slots.get(usize::from(at)).map(|s| s.id)
        })
    }

    fn vec_of(capacity: usize) -> Result<Vec<Memslot>, Error> {
        let mut v = Vec::new();
        v.try_reserve_exact(capacity)?;
        Ok(v)
    }

    /// The collection of `slots`, which are sorted and do not overlap, with their positions in the
    /// order of their numbers.
    fn successor(
        &self,
        slots: Vec<Memslot>,
        order: impl Iterator<Item = u16>,
    ) -> Result<Self, Error> {
        if slots.len() > usize::from(u16::MAX) {
            return Err(Error::OutOfMemory);
        }
        let mut starts = Vec::new();
        starts.try_reserve_exact(slots.len())?;
        starts.extend(slots.iter().map(|s| s.range.start().get()));
        let mut by_id = Vec::new();
        by_id.try_reserve_exact(slots.len())?;
        by_id.extend(order);
        Ok(Self {
            starts,
            slots,
            by_id,
            generation: self.generation + 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::gfn;
    use crate::slot::{SlotFlags, SlotKind};
    #[cfg(not(miri))]
    use proptest::prelude::*;
    use std::vec::Vec;

    fn slot(id: u16, base: u64, npages: u64) -> Memslot {
        let flags = SlotFlags::empty();
        Memslot::new(SlotId(id), gfn(base), npages, 0, flags, SlotKind::Ram).unwrap()
    }

    fn two() -> Memslots {
        Memslots::new()
            .with(slot(7, 0x100, 0x10))
            .unwrap()
            .with(slot(3, 0x40, 0x20))
            .unwrap()
    }

    #[test]
    fn find_knows_both_ends_of_each_slot() {
        let s = two();
        assert!(!s.is_empty());
        assert_eq!(s.find(gfn(0x3f)), None);
        assert_eq!(s.find(gfn(0x40)).unwrap().id, SlotId(3));
        assert_eq!(s.find(gfn(0x5f)).unwrap().id, SlotId(3));
        assert_eq!(s.find(gfn(0x60)), None);
        assert_eq!(s.find(gfn(0xff)), None);
        assert_eq!(s.find(gfn(0x100)).unwrap().id, SlotId(7));
        assert_eq!(s.find(gfn(0x10f)).unwrap().id, SlotId(7));
        assert_eq!(s.find(gfn(0x110)), None);
    }

    #[test]
    fn an_empty_collection_finds_nothing() {
        let s = Memslots::new();
        assert!(s.is_empty());
        assert_eq!(s.find(gfn(0)), None);
        assert_eq!(s.get(SlotId(0)), None);
        assert_eq!(s.overlapping(GfnRange::ALL), None);
    }

    #[test]
    fn slots_come_out_in_order_of_frames() {
        let ids: Vec<_> = two().iter().map(|s| s.id.0).collect();
        assert_eq!(ids, [3, 7]);
    }

    #[test]
    fn overlap_by_one_page_is_refused_on_either_side() {
        assert_eq!(
            two().with(slot(9, 0x10f, 1)).unwrap_err(),
            Error::Overlap(SlotId(7))
        );
        assert_eq!(
            two().with(slot(9, 0xf0, 0x11)).unwrap_err(),
            Error::Overlap(SlotId(7))
        );
        assert_eq!(
            two().with(slot(9, 0, 0x41)).unwrap_err(),
            Error::Overlap(SlotId(3))
        );
        assert_eq!(
            two().with(slot(9, 0, 0x1000)).unwrap_err(),
            Error::Overlap(SlotId(7))
        );
    }

    #[test]
    fn neighbours_may_touch() {
        let s = two().with(slot(9, 0xf0, 0x10)).unwrap();
        assert_eq!(s.len(), 3);
        assert_eq!(s.find(gfn(0xff)).unwrap().id, SlotId(9));
    }

    #[test]
    fn a_number_is_used_once() {
        assert_eq!(
            two().with(slot(3, 0x1000, 1)).unwrap_err(),
            Error::SlotExists(SlotId(3))
        );
    }

    #[test]
    fn every_replacement_has_a_new_generation_and_leaves_the_old_one_alone() {
        let old = two();
        assert_eq!(old.generation(), 2);
        let new = old.without(SlotId(3)).unwrap();
        assert_eq!(new.generation(), 3);
        assert_eq!((old.len(), new.len()), (2, 1));
        assert_eq!(old.replacing(slot(3, 0x40, 1)).unwrap().generation(), 3);
    }

    #[test]
    fn removing_a_missing_slot_is_an_error() {
        assert_eq!(
            two().without(SlotId(4)).unwrap_err(),
            Error::NoSuchSlot(SlotId(4))
        );
    }

    #[test]
    fn a_slot_may_move_over_itself_but_not_over_another() {
        let s = two().replacing(slot(3, 0x50, 0x20)).unwrap();
        assert_eq!(s.get(SlotId(3)).unwrap().range.start(), gfn(0x50));
        let r = two().replacing(slot(3, 0xf8, 0x20));
        assert_eq!(r.unwrap_err(), Error::Overlap(SlotId(7)));
    }

    // Arithmetic only: nothing for Miri to see, and long in it.
    #[cfg(not(miri))]
    proptest! {
        #[test]
        fn look_ups_agree_with_a_linear_search(
            // A length of 0 removes the slot.
            raw in prop::collection::vec((0u16..64, 0u64..256, 0u64..16), 0..96),
            probes in prop::collection::vec(0u64..300, 32),
        ) {
            let mut fast = Memslots::new();
            let mut naive: Vec<Memslot> = Vec::new();
            for (id, base, n) in raw {
                if n == 0 {
                    let known = naive.iter().position(|o| o.id.0 == id);
                    let next = fast.without(SlotId(id));
                    prop_assert_eq!(next.is_ok(), known.is_some());
                    if let (Ok(next), Some(known)) = (next, known) {
                        naive.remove(known);
                        fast = next;
                    }
                    continue;
                }
                let s = slot(id, base, n);
                let free = naive.iter().all(|o| {
                    o.id != s.id
                        && (o.range.end() <= base || s.range.end() <= o.range.start().get())
                });
                match fast.with(s) {
                    Ok(next) => { prop_assert!(free); naive.push(s); fast = next; }
                    Err(_) => prop_assert!(!free),
                }
            }
            for p in probes {
                let want = naive.iter().find(|s| s.range.start().get() <= p && p < s.range.end());
                prop_assert_eq!(fast.find(gfn(p)), want);
            }
            for id in 0..64 {
                let want = naive.iter().find(|s| s.id.0 == id);
                prop_assert_eq!(fast.get(SlotId(id)), want);
            }
        }
    }
}
