//! Physical address ranges and bounded, sorted lists of them.

use core::fmt;

use crate::BoardError;

/// Size of a page in bytes: the only granule that EL2 uses.
pub const PAGE_SIZE: u64 = 4096;

/// A non-empty range of physical addresses, `start` inclusive, `end` exclusive, in bytes.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct AddrRange {
    start: u64,
    end: u64,
}

impl fmt::Debug for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl AddrRange {
    /// The range `start..end`, or `None` if it is empty.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start < end {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// The range of `size` bytes at `start`, or `None` if it is empty or wraps.
    #[must_use]
    pub const fn with_size(start: u64, size: u64) -> Option<Self> {
        match start.checked_add(size) {
            Some(end) => Self::new(start, end),
            None => None,
        }
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First address after the range.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes, at least 1.
    #[must_use]
    pub const fn size(self) -> u64 {
        self.end - self.start
    }

    /// Whether `addr` is inside.
    #[must_use]
    pub const fn contains(self, addr: u64) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether all of `other` is inside.
    #[must_use]
    pub const fn contains_range(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two share an address.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The parts of this range that are neither in `hole` nor in one of `holes`.
    pub fn without(self, holes: &[Self], hole: Self) -> impl Iterator<Item = Self> {
        self.outside(move || holes.iter().copied().chain([hole]))
    }

    /// The parts of this range that are in none of `holes`.
    pub fn without_all(self, holes: &[Self]) -> impl Iterator<Item = Self> {
        self.outside(move || holes.iter().copied())
    }

    fn outside<I: Iterator<Item = Self>>(
        self,
        holes: impl Fn() -> I,
    ) -> impl Iterator<Item = Self> {
        let mut from = self.start;
        core::iter::from_fn(move || {
            while from < self.end {
                let next = holes()
                    .filter(|h| h.end > from && h.start < self.end)
                    .min_by_key(|h| h.start);
                let (until, resume) = next.map_or((self.end, self.end), |h| (h.start, h.end));
                let part = Self::new(from, until);
                from = resume;
                if part.is_some() {
                    return part;
                }
            }
            None
        })
    }

    /// The largest page-aligned range inside, if any.
    #[must_use]
    pub fn shrink_to_pages(self) -> Option<Self> {
        let start = self.start.checked_next_multiple_of(PAGE_SIZE)?;
        Self::new(start, self.end - self.end % PAGE_SIZE)
    }

    /// The smallest page-aligned range around it; the end saturates at the last page boundary.
    #[must_use]
    pub fn grow_to_pages(self) -> Self {
        Self {
            start: self.start - self.start % PAGE_SIZE,
            end: self
                .end
                .checked_next_multiple_of(PAGE_SIZE)
                .unwrap_or(u64::MAX - PAGE_SIZE + 1),
        }
    }
}

/// A list of at most `N` ranges, sorted by address, without overlaps, adjacent ones merged.
#[derive(Clone, Debug, Default)]
pub struct RangeList<const N: usize> {
    ranges: heapless::Vec<AddrRange, N>,
}

impl<const N: usize> RangeList<N> {
    /// An empty list.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ranges: heapless::Vec::new(),
        }
    }

    /// The ranges in ascending order.
    #[must_use]
    pub fn as_slice(&self) -> &[AddrRange] {
        &self.ranges
    }

    /// Sum of the sizes in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.ranges.iter().map(|r| r.size()).sum()
    }

    /// The range that contains `addr`.
    #[must_use]
    #[inline]
    pub fn find(&self, addr: u64) -> Option<AddrRange> {
        let after = self.ranges.partition_point(|r| r.start <= addr);
        let range = *self.ranges.get(after.checked_sub(1)?)?;
        range.contains(addr).then_some(range)
    }

    /// The largest range around `addr` that touches no range of the list, or `None` if `addr` is
    /// in one.
    #[must_use]
    pub fn gap_around(&self, addr: u64) -> Option<AddrRange> {
        let after = self.ranges.partition_point(|r| r.start <= addr);
        let start = match after.checked_sub(1) {
            Some(before) => self.ranges.get(before)?.end,
            None => 0,
        };
        let end = self.ranges.get(after).map_or(u64::MAX, |r| r.start);
        AddrRange::new(start, end).filter(|gap| gap.contains(addr))
    }

    /// Whether a range of the list overlaps `range`.
    #[must_use]
    pub fn overlapping(&self, range: AddrRange) -> Option<AddrRange> {
        self.ranges.iter().copied().find(|r| r.overlaps(range))
    }

    /// Adds a range; what overlaps or touches is merged.
    ///
    /// # Errors
    ///
    /// [`BoardError::TooMany`] if the list is full; it is unchanged then.
    pub fn insert(&mut self, range: AddrRange, what: &'static str) -> Result<(), BoardError> {
        let first = self.ranges.partition_point(|r| r.end < range.start);
        let last = self.ranges.partition_point(|r| r.start <= range.end);
        if first == last {
            return self
                .ranges
                .insert(first, range)
                .map_err(|_| BoardError::TooMany { what, limit: N });
        }
        let merged = AddrRange {
            start: range.start.min(self.ranges[first].start),
            end: range.end.max(self.ranges[last - 1].end),
        };
        for _ in first + 1..last {
            self.ranges.remove(first + 1);
        }
        self.ranges[first] = merged;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    fn range(start: u64, end: u64) -> AddrRange {
        AddrRange::new(start, end).unwrap()
    }

    #[test]
    fn wrapping_and_empty_ranges_are_refused() {
        assert_eq!(AddrRange::with_size(u64::MAX, 2), None);
        assert_eq!(AddrRange::with_size(5, 0), None);
        assert_eq!(AddrRange::new(5, 4), None);
    }

    #[test]
    fn shrink_to_pages_keeps_only_whole_pages() {
        assert_eq!(
            range(1, 0x3001).shrink_to_pages(),
            Some(range(0x1000, 0x3000))
        );
        assert_eq!(range(1, 0x1fff).shrink_to_pages(), None);
        assert_eq!(range(u64::MAX - 1, u64::MAX).shrink_to_pages(), None);
    }

    #[test]
    fn without_leaves_the_parts_between_the_holes() {
        let holes = [
            range(0, 0x1000),
            range(0x4000, 0x5000),
            range(0x9000, 0xf000),
        ];
        let parts: Vec<_> = range(0, 0xa000)
            .without(&holes, range(0x5000, 0x6000))
            .collect();
        assert_eq!(parts, [range(0x1000, 0x4000), range(0x6000, 0x9000)]);
        let whole: Vec<_> = range(5, 6).without(&[], range(6, 7)).collect();
        assert_eq!(whole, [range(5, 6)]);
        let none: Vec<_> = range(5, 6).without(&[], range(0, 9)).collect();
        assert_eq!(none, []);
    }

    #[test]
    fn touching_ranges_are_merged() {
        let mut list = RangeList::<4>::new();
        list.insert(range(0x3000, 0x4000), "t").unwrap();
        list.insert(range(0x1000, 0x2000), "t").unwrap();
        list.insert(range(0x2000, 0x3000), "t").unwrap();
        assert_eq!(list.as_slice(), [range(0x1000, 0x4000)]);
    }

    #[test]
    fn a_full_list_refuses_and_is_unchanged() {
        let mut list = RangeList::<1>::new();
        list.insert(range(0, 1), "t").unwrap();
        let full = list.insert(range(8, 9), "t");
        assert_eq!(
            full,
            Err(BoardError::TooMany {
                what: "t",
                limit: 1
            })
        );
        assert_eq!(list.as_slice(), [range(0, 1)]);
    }

    #[test]
    fn gap_around_ends_at_the_neighbours() {
        let mut list = RangeList::<4>::new();
        list.insert(range(0x1000, 0x2000), "t").unwrap();
        list.insert(range(0x8000, 0x9000), "t").unwrap();
        assert_eq!(list.gap_around(0x4000), Some(range(0x2000, 0x8000)));
        assert_eq!(list.gap_around(0), Some(range(0, 0x1000)));
        assert_eq!(list.gap_around(0x9000), Some(range(0x9000, u64::MAX)));
        assert_eq!(list.gap_around(0x8fff), None);
    }

    proptest! {
        /// The list equals a set of addresses, stays sorted and never holds touching ranges.
        #[test]
        fn insert_behaves_as_a_set(input in prop::collection::vec((0u64..64, 1u64..16), 1..20)) {
            let mut list = RangeList::<32>::new();
            let mut oracle = [false; 96];
            for (start, size) in input {
                list.insert(AddrRange::with_size(start, size).unwrap(), "t").unwrap();
                oracle[usize::try_from(start).unwrap()..][..usize::try_from(size).unwrap()].fill(true);
            }
            let found: Vec<bool> = (0..96).map(|a| list.find(a).is_some()).collect();
            prop_assert_eq!(&found[..], &oracle[..]);
            prop_assert!(list.as_slice().windows(2).all(|w| w[0].end() < w[1].start()));
        }
    }
}
