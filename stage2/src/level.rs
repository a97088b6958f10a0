//! Levels of a table and the arithmetic of its shape.

use crate::addr::{Ipa, IpaRange};

/// A lookup level in Arm's numbering: 3 holds pages, −1 is the coarsest.
///
/// There is no order on levels, because "higher" means opposite things to different people: use
/// [`Level::is_page`], [`Level::child`] and [`Level::parent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Level(i8);

impl Level {
    /// The fifth level that LPA2 adds to 4 KiB tables.
    pub const MINUS_1: Self = Self(-1);
    /// Level 0.
    pub const L0: Self = Self(0);
    /// Level 1: 1 GiB entries with 4 KiB pages.
    pub const L1: Self = Self(1);
    /// Level 2: 2 MiB entries with 4 KiB pages.
    pub const L2: Self = Self(2);
    /// The page level.
    pub const PAGE: Self = Self(3);

    /// The level of that number, −1 to 3.
    #[must_use]
    #[inline]
    pub const fn try_new(number: i8) -> Option<Self> {
        if number >= -1 && number <= 3 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Arm's number of the level.
    #[must_use]
    #[inline]
    pub const fn number(self) -> i8 {
        self.0
    }

    /// Whether entries of this level map single pages and cannot point to tables.
    #[must_use]
    #[inline]
    pub const fn is_page(self) -> bool {
        self.0 == 3
    }

    /// The next finer level; the page level has none.
    #[must_use]
    #[inline]
    pub const fn child(self) -> Option<Self> {
        Self::try_new(self.0 + 1)
    }

    /// The next coarser level; −1 has none.
    #[must_use]
    #[inline]
    pub const fn parent(self) -> Option<Self> {
        Self::try_new(self.0 - 1)
    }

    /// Levels between this one and the pages: 0 for the page level, 4 for −1.
    #[must_use]
    #[expect(clippy::cast_sign_loss, reason = "a level is at most 3")]
    #[inline]
    pub const fn height(self) -> u32 {
        (3 - self.0) as u32
    }

    /// The next finer level. At the page level it stays, which no caller reaches: a page entry
    /// never decodes as a table.
    #[inline]
    pub(crate) const fn finer(self) -> Self {
        debug_assert!(!self.is_page());
        if self.is_page() {
            self
        } else {
            Self(self.0 + 1)
        }
    }
}

/// The shape of one table: page size, input size, where the walk starts, how wide the root is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    page_shift: u8,
    index_bits: u8,
    input_bits: u8,
    start: Level,
    /// log2 of the entries of the whole root.
    root_bits: u8,
    page_size: u64,
    input_end: u64,
    common: bool,
    root_mask: usize,
}

impl Geometry {
    /// Widest shift arithmetic ever needs: Arm's largest input address.
    const MAX_INPUT_BITS: u8 = 52;

    /// A shape, or nothing when it contradicts itself: the root must use at least one bit and be
    /// at most 16 tables wide (Arm ARM D8.2, concatenated translation tables).
    #[must_use]
    #[inline]
    pub const fn new(page_shift: u8, index_bits: u8, input_bits: u8, start: Level) -> Option<Self> {
        let sound = page_shift >= 12 && page_shift <= 16 && index_bits >= 1 && index_bits <= 13;
        if !sound || input_bits > Self::MAX_INPUT_BITS {
            return None;
        }
        let mut shape = Self {
            page_shift,
            index_bits,
            input_bits,
            start,
            root_bits: index_bits,
            page_size: 1 << page_shift,
            input_end: 1 << input_bits,
            root_mask: (1 << index_bits) - 1,
            common: page_shift == 12
                && (index_bits == 9 || cfg!(loom))
                && (start.number() == 0 || start.number() == 1),
        };
        let root_shift = shape.shift(start);
        let narrowest = root_shift + 1;
        let widest = root_shift + index_bits as u32 + 4;
        if (input_bits as u32) < narrowest || (input_bits as u32) > widest {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most 13 + 4 bits")]
        let needed = (input_bits as u32 - root_shift) as u8;
        if needed > index_bits {
            shape.root_bits = needed;
            shape.root_mask = (1 << needed) - 1;
        }
        Some(shape)
    }

    /// log2 of the page size in bytes: 12, 14 or 16.
    #[must_use]
    #[inline]
    pub const fn page_shift(&self) -> u32 {
        self.page_shift as u32
    }

    /// Bytes of a page, and of every table that is not the root.
    #[must_use]
    #[inline]
    pub const fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Bits of the input address.
    #[must_use]
    #[inline]
    pub const fn input_bits(&self) -> u32 {
        self.input_bits as u32
    }

    /// First input address behind the table.
    #[must_use]
    #[inline]
    pub const fn input_end(&self) -> u64 {
        self.input_end
    }

    /// The level at which a walk starts.
    #[must_use]
    #[inline]
    pub const fn start_level(&self) -> Level {
        self.start
    }

    /// Levels of a walk, 1 to 5.
    #[must_use]
    #[inline]
    pub const fn levels(&self) -> u32 {
        self.start.height() + 1
    }

    /// log2 of the bytes one entry of `level` spans.
    #[must_use]
    #[inline]
    pub const fn shift(&self, level: Level) -> u32 {
        self.page_shift as u32 + self.index_bits as u32 * level.height()
    }

    /// Bytes one entry of `level` spans.
    #[must_use]
    #[inline]
    pub const fn slot_size(&self, level: Level) -> u64 {
        1 << self.shift(level)
    }

    /// The slot of `level` that holds `ipa`.
    #[must_use]
    #[inline]
    pub const fn slot(&self, ipa: Ipa, level: Level) -> IpaRange {
        let size = self.slot_size(level);
        let start = ipa.get() & !(size - 1);
        IpaRange::from_bounds(start, start + size)
    }

    /// Whether this is the common shape: 4 KiB tables from level 0 or 1.
    #[inline]
    pub(crate) const fn is_common(&self) -> bool {
        self.common
    }

    /// [`shift`](Self::shift) in the common shape, which the compiler knows. Models of
    /// concurrency have smaller tables.
    #[inline]
    pub(crate) const fn common_shift(&self, level: Level) -> u32 {
        if cfg!(loom) {
            self.shift(level)
        } else {
            12 + 9 * level.height()
        }
    }

    /// [`entries`](Self::entries) in the common shape.
    #[inline]
    pub(crate) const fn common_entries(&self) -> usize {
        if cfg!(loom) { self.entries() } else { 512 }
    }

    /// Entries of a table below the root.
    #[must_use]
    #[inline]
    pub const fn entries(&self) -> usize {
        1 << self.index_bits
    }

    /// Concatenated tables of the root: 1, 2, 4, 8 or 16 (Arm ARM D8.2).
    #[must_use]
    #[inline]
    pub const fn root_tables(&self) -> usize {
        1 << (self.root_bits - self.index_bits)
    }

    /// Bytes of the root, which is also its alignment.
    #[must_use]
    #[inline]
    pub const fn root_size(&self) -> u64 {
        self.root_tables() as u64 * self.page_size()
    }

    /// Entries of the root as allocated, all concatenated tables together.
    #[inline]
    pub(crate) const fn root_entries(&self) -> usize {
        self.root_mask + 1
    }

    /// Whether the whole range is input of this table, page aligned.
    #[inline]
    pub(crate) const fn admits(&self, range: &IpaRange) -> bool {
        range.end().get() <= self.input_end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape_4k(input_bits: u8, start: Level) -> Geometry {
        Geometry::new(12, 9, input_bits, start).unwrap()
    }

    #[test]
    fn levels_end_at_both_ends() {
        assert_eq!(Level::PAGE.child(), None);
        assert_eq!(Level::MINUS_1.parent(), None);
        assert_eq!(Level::L2.child(), Some(Level::PAGE));
        assert_eq!(Level::L0.parent(), Some(Level::MINUS_1));
        assert_eq!(Level::try_new(4), None);
        assert_eq!(Level::try_new(-2), None);
    }

    #[test]
    fn slots_of_a_4k_table_have_the_known_sizes() {
        let shape = shape_4k(48, Level::L0);
        assert_eq!(shape.slot_size(Level::PAGE), 4 << 10);
        assert_eq!(shape.slot_size(Level::L2), 2 << 20);
        assert_eq!(shape.slot_size(Level::L1), 1 << 30);
        assert_eq!(shape.slot_size(Level::L0), 512 << 30);
        assert_eq!(
            shape.slot(Ipa::new(0x4020_1234), Level::L2),
            IpaRange::from_bounds(0x4020_0000, 0x4040_0000)
        );
    }

    #[test]
    fn root_grows_by_concatenation() {
        assert_eq!(shape_4k(39, Level::L1).root_tables(), 1);
        assert_eq!(shape_4k(40, Level::L1).root_tables(), 2);
        assert_eq!(shape_4k(43, Level::L1).root_tables(), 16);
        assert_eq!(shape_4k(40, Level::L1).root_size(), 8192);
        assert_eq!(shape_4k(44, Level::L0).root_entries(), 512);
    }

    #[test]
    fn shapes_that_contradict_themselves_are_refused() {
        assert_eq!(Geometry::new(12, 9, 44, Level::L1), None);
        assert_eq!(Geometry::new(12, 9, 30, Level::L1), None);
        assert!(Geometry::new(12, 9, 31, Level::L1).is_some());
        assert_eq!(Geometry::new(12, 9, 53, Level::MINUS_1), None);
        assert_eq!(Geometry::new(11, 9, 40, Level::L1), None);
        assert_eq!(Geometry::new(17, 9, 40, Level::L1), None);
        assert_eq!(Geometry::new(12, 0, 13, Level::L2), None);
        assert_eq!(Geometry::new(12, 14, 27, Level::L2), None);
    }

    #[test]
    fn height_counts_to_the_pages() {
        assert_eq!(Level::PAGE.height(), 0);
        assert_eq!(Level::MINUS_1.height(), 4);
        assert_eq!(shape_4k(39, Level::L1).levels(), 3);
    }
}
