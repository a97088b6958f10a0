//! Tables that a walk need not look for again.
//!
//! What hardware does with its paging-structure caches: of each gigabyte, the table that the
//! root leads to is remembered, so that the short way (`short.rs`) starts there. Eight words, a
//! cache line, by the low bits of the gigabyte's number. A place is filled by the first that finds
//! it empty and then stays as it is, so that vCPUs in different gigabytes don't take the line from
//! each other; a space that uses more gigabytes than there are places walks to some of them.
//!
//! A table is given back only under exclusive access and behind `break_table`, which empties all
//! places: what is remembered is linked.

use crate::addr::Pa;
use crate::bits::join;
use crate::sync::{AtomicEntry, Ordering};

/// Tables by the number of the gigabyte (the entry one level above blocks) that they are for.
#[derive(Debug)]
pub(crate) struct WalkCache([AtomicEntry; PLACES]);

const PLACES: usize = 8;

/// Bits of a word that hold the gigabyte's number; the rest is the table's address. A gigabyte
/// with a longer number is never found.
const NUMBER: u64 = 0xfff;

impl WalkCache {
    pub(crate) fn new() -> Self {
        Self(core::array::from_fn(|place| {
            AtomicEntry::new(Self::empty(place))
        }))
    }

    /// What an empty place says: a number that belongs elsewhere.
    const fn empty(place: usize) -> u64 {
        place as u64 ^ 1
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "masked to the places")]
    const fn place(number: u64) -> usize {
        number as usize & (PLACES - 1)
    }

    /// The table of a gigabyte, if it is remembered. What the table held when it was linked is
    /// seen, too.
    #[inline(always)]
    pub(crate) fn find(&self, number: u64) -> Option<Pa> {
        let word = self.0[Self::place(number)].load(Ordering::Acquire);
        (word & NUMBER == number).then_some(Pa::new(word & !NUMBER))
    }

    /// Remembers the table of a gigabyte, which the caller has just met on its way, if there is
    /// room.
    #[cold]
    pub(crate) fn keep(&self, number: u64, table: Pa) {
        let place = Self::place(number);
        let word = &self.0[place];
        if number <= NUMBER && word.load(Ordering::Relaxed) == Self::empty(place) {
            word.store(join([table.get(), number]), Ordering::Release);
        }
    }

    /// Empties all places. Exclusive.
    pub(crate) fn forget(&self) {
        for (place, word) in self.0.iter().enumerate() {
            word.store(Self::empty(place), Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_found_before_it_is_kept() {
        let cache = WalkCache::new();
        for number in (0..64).chain([0xfff, 0x1000, 1 << 18, u64::MAX]) {
            assert_eq!(cache.find(number), None);
        }
    }

    #[test]
    fn what_was_kept_is_found_by_its_number_alone() {
        let cache = WalkCache::new();
        for number in 0..8 {
            cache.keep(number, Pa::new(0x10_0000 + number * 0x1000));
        }
        for number in 0..8 {
            let table = Pa::new(0x10_0000 + number * 0x1000);
            assert_eq!(cache.find(number), Some(table));
            assert_eq!(cache.find(number + 8), None);
            assert_eq!(cache.find(number + 0x1000), None);
        }
    }

    #[test]
    fn the_first_keeps_its_place_until_all_is_forgotten() {
        let cache = WalkCache::new();
        cache.keep(3, Pa::new(0x1000));
        cache.keep(11, Pa::new(0x2000));
        assert_eq!(cache.find(3), Some(Pa::new(0x1000)));
        assert_eq!(cache.find(11), None);
        cache.forget();
        assert_eq!(cache.find(3), None);
        cache.keep(11, Pa::new(0x2000));
        assert_eq!(cache.find(11), Some(Pa::new(0x2000)));
    }

    #[test]
    fn the_highest_number_that_fits_is_kept_and_the_next_is_not() {
        let cache = WalkCache::new();
        let highest_table = Pa::new(0xf_ffff_ffff_f000);
        cache.keep(0xfff, highest_table);
        assert_eq!(cache.find(0xfff), Some(highest_table));
        cache.forget();
        cache.keep(0x1000, Pa::new(0x1000));
        assert_eq!(cache.find(0x1000), None);
        assert_eq!(cache.find(0), None);
    }
}
