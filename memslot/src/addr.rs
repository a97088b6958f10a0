//! Half-open ranges of guest frame numbers.

use core::fmt;

pub use stage2::{Gfn, Pfn};

/// One past the last guest frame that any 64-bit guest physical address can name.
pub const GFN_LIMIT: u64 = 1 << 52;

/// A half-open range of guest frames, `[start, end)`, never empty and never inverted.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GfnRange {
    start: Gfn,
    end: u64,
}

impl GfnRange {
    /// Every guest frame: `[0, 2^52)`.
    pub const ALL: Self = match Self::new(0, GFN_LIMIT) {
        Some(all) => all,
        None => unreachable!(),
    };

    /// The range `[start, end)` in frames, or `None` if it is empty, inverted or ends beyond 2^52.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        match Gfn::try_new(start) {
            Some(first) if start < end && end <= GFN_LIMIT => Some(Self { start: first, end }),
            _ => None,
        }
    }

    /// `npages` frames from `base` on; `None` as for [`GfnRange::new`] and on overflow.
    #[must_use]
    pub const fn from_base(base: Gfn, npages: u64) -> Option<Self> {
        match base.get().checked_add(npages) {
            Some(end) => Self::new(base.get(), end),
            None => None,
        }
    }

    /// First frame.
    #[inline]
    #[must_use]
    pub const fn start(self) -> Gfn {
        self.start
    }

    /// One past the last frame.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Number of frames, at least 1.
    #[must_use]
    pub const fn npages(self) -> u64 {
        self.end - self.start.get()
    }

    /// Whether `gfn` lies inside.
    #[inline]
    #[must_use]
    pub const fn contains(self, gfn: Gfn) -> bool {
        self.start.get() <= gfn.get() && gfn.get() < self.end
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.start.get() <= other.start.get() && other.end <= self.end
    }

    /// The aligned block of 2^`order` frames around `gfn`; `None` past the last frame.
    #[must_use]
    pub const fn block(gfn: Gfn, order: u32) -> Option<Self> {
        let first = gfn.get() >> order << order;
        Self::new(first, first + (1 << order))
    }

    /// Without the frames of blocks of 2^`order` frames that it cuts.
    #[must_use]
    pub const fn whole_blocks(self, order: u32) -> Option<Self> {
        let size = 1 << order;
        Self::new(
            self.start.get().next_multiple_of(size),
            self.end >> order << order,
        )
    }

    /// The frames in both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start).get(), self.end.min(other.end))
    }

    /// One range over both, if they overlap or touch.
    #[must_use]
    pub fn merged(self, other: Self) -> Option<Self> {
        let touch = self.start.get() <= other.end && other.start.get() <= self.end;
        touch.then(|| Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        })
    }
}

impl fmt::Debug for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start.get(), self.end)
    }
}

/// A frame number in a test.
#[cfg(test)]
pub(crate) fn gfn(n: u64) -> Gfn {
    Gfn::try_new(n).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_inverted_and_too_long_ranges_are_refused() {
        assert_eq!(GfnRange::new(5, 5), None);
        assert_eq!(GfnRange::new(6, 5), None);
        assert_eq!(GfnRange::new(0, GFN_LIMIT + 1), None);
        assert_eq!(GfnRange::new(0, GFN_LIMIT), Some(GfnRange::ALL));
    }

    #[test]
    fn from_base_refuses_overflow() {
        assert_eq!(GfnRange::from_base(gfn(GFN_LIMIT - 1), 2), None);
        assert_eq!(GfnRange::from_base(gfn(3), 0), None);
        assert_eq!(GfnRange::from_base(gfn(3), 2), GfnRange::new(3, 5));
    }

    #[test]
    fn blocks_are_aligned_and_end_with_the_last_frame() {
        assert_eq!(
            GfnRange::block(gfn(0x1237), 4),
            GfnRange::new(0x1230, 0x1240)
        );
        assert_eq!(
            GfnRange::block(gfn(0x1237), 0),
            GfnRange::new(0x1237, 0x1238)
        );
        let last = gfn(GFN_LIMIT - 1);
        assert_eq!(
            GfnRange::block(last, 2),
            GfnRange::new(GFN_LIMIT - 4, GFN_LIMIT)
        );
    }

    #[test]
    fn only_whole_blocks_are_left_of_a_range_that_cuts_some() {
        let whole = |start, end| GfnRange::new(start, end).unwrap().whole_blocks(2);
        assert_eq!(whole(4, 12), GfnRange::new(4, 12));
        assert_eq!(whole(3, 13), GfnRange::new(4, 12));
        assert_eq!(whole(5, 12), GfnRange::new(8, 12));
        assert_eq!(whole(5, 8), None);
        assert_eq!(whole(5, 7), None);
        assert_eq!(GfnRange::ALL.whole_blocks(4), Some(GfnRange::ALL));
    }

    #[test]
    fn intersection_of_neighbours_is_none_and_merge_joins_them() {
        let low = GfnRange::new(0, 4).unwrap();
        let high = GfnRange::new(4, 8).unwrap();
        assert_eq!(low.intersection(high), None);
        assert_eq!(low.merged(high), GfnRange::new(0, 8));
        assert_eq!(low.merged(GfnRange::new(5, 6).unwrap()), None);
        assert_eq!(
            low.intersection(GfnRange::new(3, 9).unwrap()),
            GfnRange::new(3, 4)
        );
    }

    #[test]
    fn the_end_is_not_contained() {
        let r = GfnRange::new(2, 4).unwrap();
        assert!(r.contains(gfn(2)) && r.contains(gfn(3)));
        assert!(!r.contains(gfn(4)) && !r.contains(gfn(1)));
        assert!(r.covers(r) && !r.covers(GfnRange::new(2, 5).unwrap()));
        assert!(!r.covers(GfnRange::new(1, 3).unwrap()));
    }
}
