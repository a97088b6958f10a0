//! Addresses, frame numbers and ranges: one type for each, no mixing.
//!
//! An [`Ipa`] is what a guest calls physical (x86 says GPA), a [`Pa`] is what the machine calls
//! physical. Both hold any 64-bit value; whether a value fits a table is checked by the operation
//! that uses it, against that table's geometry, and out of range is an error, never a wrap.

use core::fmt;

/// Shift of the frame numbers [`Gfn`] and [`Pfn`]: 4 KiB, whatever the granule of a table is.
pub const FRAME_SHIFT: u32 = 12;

/// A range that does not describe memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The range holds no byte.
    #[error("empty range at {start:#x}")]
    Empty {
        /// First byte of the range.
        start: u64,
    },
    /// Start plus size leaves 64 bits.
    #[error("range at {start:#x} of {size:#x} bytes overflows")]
    Overflow {
        /// First byte of the range.
        start: u64,
        /// Bytes asked for.
        size: u64,
    },
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $range:ident, $frame:ident, $text:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a byte address.
            #[must_use]
            #[inline]
            pub const fn new(address: u64) -> Self {
                Self(address)
            }

            /// The byte address.
            #[must_use]
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The frame that holds this byte.
            #[must_use]
            #[inline]
            pub const fn frame(self) -> $frame {
                $frame(self.0 >> FRAME_SHIFT)
            }

            /// `self + bytes`, or nothing when that leaves 64 bits.
            #[must_use]
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Whether the address is a multiple of `size`, a power of two in bytes.
            #[must_use]
            #[inline]
            pub const fn is_aligned_to(self, size: u64) -> bool {
                self.0 & size.wrapping_sub(1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($text, "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        /// A 4 KiB frame number of the address type of the same letter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $frame(u64);

        impl $frame {
            /// Wraps a frame number; nothing when its address would leave 64 bits.
            #[must_use]
            #[inline]
            pub const fn try_new(number: u64) -> Option<Self> {
                if number >> (64 - FRAME_SHIFT) == 0 { Some(Self(number)) } else { None }
            }

            /// The frame number.
            #[must_use]
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// First byte of the frame.
            #[must_use]
            #[inline]
            pub const fn start(self) -> $name {
                $name(self.0 << FRAME_SHIFT)
            }
        }

        /// A non-empty half-open range of bytes whose end fits 64 bits.
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $range {
            start: $name,
            end: $name,
        }

        impl $range {
            /// `size` bytes from `start`.
            ///
            /// # Errors
            /// [`RangeError::Empty`] for no byte, [`RangeError::Overflow`] past 64 bits.
            #[inline]
            pub const fn new(start: $name, size: u64) -> Result<Self, RangeError> {
                if size == 0 {
                    return Err(RangeError::Empty { start: start.0 });
                }
                match start.checked_add(size) {
                    Some(end) => Ok(Self { start, end }),
                    None => Err(RangeError::Overflow { start: start.0, size }),
                }
            }

            /// For callers inside the crate that know `start < end`.
            #[inline]
            pub(crate) const fn from_bounds(start: u64, end: u64) -> Self {
                debug_assert!(start < end);
                Self { start: $name(start), end: $name(end) }
            }

            /// First byte.
            #[must_use]
            #[inline]
            pub const fn start(&self) -> $name {
                self.start
            }

            /// First byte behind the range.
            #[must_use]
            #[inline]
            pub const fn end(&self) -> $name {
                self.end
            }

            /// Bytes in the range, at least 1.
            #[must_use]
            #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
            #[inline]
            pub const fn len(&self) -> u64 {
                self.end.0 - self.start.0
            }

            /// Whether `address` lies inside.
            #[must_use]
            #[inline]
            pub const fn contains(&self, address: $name) -> bool {
                self.start.0 <= address.0 && address.0 < self.end.0
            }

            /// Whether every byte of `other` lies inside.
            #[must_use]
            #[inline]
            pub const fn contains_range(&self, other: &Self) -> bool {
                self.start.0 <= other.start.0 && other.end.0 <= self.end.0
            }

            /// Whether some byte lies in both.
            #[must_use]
            #[inline]
            pub const fn overlaps(&self, other: &Self) -> bool {
                self.start.0 < other.end.0 && other.start.0 < self.end.0
            }
        }

        impl fmt::Debug for $range {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($text, "[{:#x}..{:#x})"), self.start.0, self.end.0)
            }
        }
    };
}

address!(
    /// An intermediate (guest) physical byte address: the input of a stage-2 table.
    Ipa, IpaRange, Gfn, "Ipa"
);
address!(
    /// A physical byte address of the machine: the output of a stage-2 table.
    Pa, PaRange, Pfn, "Pa"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_refuses_no_bytes() {
        assert_eq!(
            IpaRange::new(Ipa::new(8), 0),
            Err(RangeError::Empty { start: 8 })
        );
    }

    #[test]
    fn range_may_end_at_the_last_byte_but_not_wrap() {
        assert!(PaRange::new(Pa::new(u64::MAX - 1), 1).is_ok());
        assert_eq!(
            PaRange::new(Pa::new(u64::MAX), 1),
            Err(RangeError::Overflow {
                start: u64::MAX,
                size: 1
            })
        );
    }

    #[test]
    fn contains_is_half_open() {
        let range = IpaRange::new(Ipa::new(0x1000), 0x1000).unwrap();
        assert!(range.contains(Ipa::new(0x1000)) && range.contains(Ipa::new(0x1fff)));
        assert!(!range.contains(Ipa::new(0xfff)) && !range.contains(Ipa::new(0x2000)));
        assert_eq!(range.len(), 0x1000);
    }

    #[test]
    fn ranges_that_touch_do_not_overlap() {
        let low = IpaRange::from_bounds(0, 0x1000);
        let high = IpaRange::from_bounds(0x1000, 0x2000);
        let both = IpaRange::from_bounds(0, 0x2000);
        assert!(!low.overlaps(&high) && !high.overlaps(&low));
        assert!(low.overlaps(&both) && both.overlaps(&high));
        assert!(both.contains_range(&low) && both.contains_range(&high));
        assert!(!low.contains_range(&both) && !high.contains_range(&both));
    }

    #[test]
    fn frames_round_trip_and_refuse_what_has_no_address() {
        assert_eq!(Ipa::new(0x12_3fff).frame().get(), 0x123);
        assert_eq!(
            Pfn::try_new(0x123).map(Pfn::start),
            Some(Pa::new(0x12_3000))
        );
        assert_eq!(
            Gfn::try_new((1 << 52) - 1).map(Gfn::get),
            Some((1 << 52) - 1)
        );
        assert_eq!(Gfn::try_new(1 << 52), None);
    }

    #[test]
    fn alignment_looks_at_every_low_bit() {
        assert!(Pa::new(0x4000).is_aligned_to(0x4000));
        assert!(!Pa::new(0x4001).is_aligned_to(0x4000));
        assert!(!Pa::new(0x2000).is_aligned_to(0x4000));
    }

    #[test]
    fn debug_names_the_kind_in_hex() {
        assert_eq!(std::format!("{:?}", Ipa::new(0x80)), "Ipa(0x80)");
        assert_eq!(std::format!("{:x}", Pa::new(0x80)), "80");
        assert_eq!(
            std::format!("{:?}", PaRange::from_bounds(1, 16)),
            "Pa[0x1..0x10)"
        );
    }
}
