//! Decoded entries, and the software words that invalid entries carry.
//!
//! Hardware ignores an entry that is not valid, so its 63 bits are ours. Both formats agree that
//! a word with bits 2:0 clear is invalid, and share this layout:
//!
//! | bits  | annotation | broken leaf                     | broken, ready table |
//! |-------|------------|---------------------------------|---------------------|
//! | 63:60 | 2          | 1                               | 3, 4                |
//! | 59    | payload    | owes data-cache maintenance     | 0                   |
//! | 51:12 | payload    | output address                  | address of the table|
//! | 8:4   | 0          | claim of the zap that broke it  | 0                   |
//!
//! A *broken* word stands for an entry that was taken away from the hardware but whose TLB
//! invalidation is not known to be complete: nothing may be installed over it. It remembers what
//! was there, so that the second half of an operation needs no list.

use crate::addr::Pa;
use crate::attr::LeafAttrs;
use crate::bits::join;
use crate::level::Level;

/// One entry, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing: an access faults.
    Invalid,
    /// Nothing for hardware, a note for the owner of the table.
    Annotated(Annotation),
    /// Taken away, invalidation under way; an outcome to retry on, never seen under exclusive
    /// access.
    Broken,
    /// Points to a table of the next level.
    Table(Pa),
    /// Maps memory.
    Leaf {
        /// Output address, aligned to the slot.
        pa: Pa,
        /// What the leaf says.
        attrs: LeafAttrs,
    },
}

/// A 48-bit note in an invalid entry, such as who owns the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Annotation(u64);

impl Annotation {
    /// Bits an annotation holds.
    pub const WIDTH: u32 = 48;

    /// Wraps a value below 2^48.
    #[must_use]
    #[inline]
    pub const fn try_new(payload: u64) -> Option<Self> {
        if payload >> Self::WIDTH == 0 {
            Some(Self(payload))
        } else {
            None
        }
    }

    /// The payload.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }
}

const KIND_SHIFT: u32 = 60;
const KIND_BROKEN_LEAF: u64 = 1;
const KIND_ANNOTATION: u64 = 2;
const KIND_BROKEN_TABLE: u64 = 3;
const KIND_READY_TABLE: u64 = 4;
const PAYLOAD_SHIFT: u32 = 12;
const OWES_DATA: u64 = 1 << 59;
const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;
const CLAIM_SHIFT: u32 = 4;
const CLAIM_MASK: u64 = 0x1f;

/// Who broke a leaf: 0 under exclusive access, 1 to 31 for concurrent zaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim(u8);

impl Claim {
    pub(crate) const EXCLUSIVE: Self = Self(0);
    /// Concurrent zaps there can be at once.
    pub(crate) const SHARED: u32 = 31;

    /// The claim of bit `slot` in the set of claims, 0 to 30.
    #[inline]
    pub(crate) const fn from_slot(slot: u32) -> Self {
        Self((slot & 0x1f) as u8 + 1)
    }

    #[inline]
    pub(crate) const fn slot(self) -> u32 {
        self.0 as u32 - 1
    }
}

/// What an invalid word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SoftWord {
    Empty,
    Annotation(Annotation),
    BrokenLeaf {
        pa: Pa,
        owes_data: bool,
        claim: Claim,
    },
    BrokenTable(Pa),
    /// A broken leaf whose table is complete and waits to be linked.
    ReadyTable(Pa),
}

/// A word of a kind.
#[inline(always)]
const fn word(kind: u64, payload: u64) -> u64 {
    join([kind << KIND_SHIFT, payload])
}

impl SoftWord {
    pub(crate) const EMPTY: u64 = 0;

    #[inline]
    pub(crate) const fn encode(self) -> u64 {
        match self {
            Self::Empty => Self::EMPTY,
            Self::Annotation(note) => word(KIND_ANNOTATION, note.0 << PAYLOAD_SHIFT),
            Self::BrokenLeaf {
                pa,
                owes_data,
                claim,
            } => {
                let owes = if owes_data { OWES_DATA } else { 0 };
                let claim = (claim.0 as u64) << CLAIM_SHIFT;
                word(KIND_BROKEN_LEAF, join([owes, pa.get() & ADDRESS, claim]))
            }
            Self::BrokenTable(pa) => word(KIND_BROKEN_TABLE, pa.get() & ADDRESS),
            Self::ReadyTable(pa) => word(KIND_READY_TABLE, pa.get() & ADDRESS),
        }
    }

    /// Reads an invalid word. Kinds nobody writes read as empty: they can only come from memory
    /// that is not ours, and empty grants nothing.
    #[inline]
    pub(crate) const fn decode(raw: u64) -> Self {
        match raw >> KIND_SHIFT {
            KIND_ANNOTATION => Self::Annotation(Annotation(
                raw << (64 - KIND_SHIFT) >> (64 - KIND_SHIFT + PAYLOAD_SHIFT),
            )),
            KIND_BROKEN_LEAF => Self::BrokenLeaf {
                pa: Pa::new(raw & ADDRESS),
                owes_data: raw & OWES_DATA != 0,
                claim: Claim((raw >> CLAIM_SHIFT & CLAIM_MASK) as u8),
            },
            KIND_BROKEN_TABLE => Self::BrokenTable(Pa::new(raw & ADDRESS)),
            KIND_READY_TABLE => Self::ReadyTable(Pa::new(raw & ADDRESS)),
            _ => Self::Empty,
        }
    }

    /// The public view of an invalid word.
    #[inline]
    pub(crate) const fn entry(self) -> Entry {
        match self {
            Self::Empty => Entry::Invalid,
            Self::Annotation(note) => Entry::Annotated(note),
            Self::BrokenLeaf { .. } | Self::BrokenTable(_) | Self::ReadyTable(_) => Entry::Broken,
        }
    }
}

/// How a live leaf may become another leaf of the same size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateKind {
    /// They are the same.
    Same,
    /// Store it; nothing can be cached that grants too much.
    InPlace,
    /// Store it, then invalidate: cached copies grant more than the new entry, or fault where
    /// the new one does not.
    InPlaceThenInvalidate,
    /// Only through an invalid entry and a completed invalidation (Arm ARM D8.16.1): the output
    /// address or the memory type changes. x86 does not ask for it, but keeping one rule costs
    /// an INVEPT on a rare path and leaves no window in which two CPUs see different memory.
    BreakBeforeMake,
}

impl UpdateKind {
    /// What turning leaf `old` into leaf `new` takes.
    #[must_use]
    #[inline]
    pub fn between(old: (Pa, &LeafAttrs), new: (Pa, &LeafAttrs)) -> Self {
        let ((old_pa, old), (new_pa, new)) = (old, new);
        if old_pa != new_pa || old.mem != new.mem || old.combine != new.combine {
            Self::BreakBeforeMake
        } else if old.perms != new.perms {
            Self::InPlaceThenInvalidate
        } else if old.age == new.age {
            if old.sw == new.sw {
                Self::Same
            } else {
                Self::InPlace
            }
        } else if new.age == crate::attr::Age::Young {
            Self::InPlace // an old leaf is not cached (Arm ARM D8.5.1)
        } else {
            Self::InPlaceThenInvalidate
        }
    }
}

/// What a look-up found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The entry the walk ended at; never a table.
    pub entry: Entry,
    /// Its level.
    pub level: Level,
    /// The input addresses it stands for: the largest empty slot when nothing is mapped.
    pub slot: crate::addr::IpaRange,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attr::{Age, Combine, MemType, Perms, SwBits};

    #[test]
    fn software_words_round_trip_and_are_invalid_for_hardware() {
        let words = [
            SoftWord::Empty,
            SoftWord::Annotation(Annotation::try_new(0).unwrap()),
            SoftWord::Annotation(Annotation::try_new((1 << 48) - 1).unwrap()),
            SoftWord::BrokenLeaf {
                pa: Pa::new(0xf_ffff_ffff_f000),
                owes_data: true,
                claim: Claim::from_slot(30),
            },
            SoftWord::BrokenLeaf {
                pa: Pa::new(0),
                owes_data: false,
                claim: Claim::EXCLUSIVE,
            },
            SoftWord::BrokenTable(Pa::new(0xf_ffff_ffff_f000)),
            SoftWord::ReadyTable(Pa::new(0x1000)),
        ];
        for word in words {
            assert_eq!(SoftWord::decode(word.encode()), word);
            assert_eq!(word.encode() & 7, 0);
        }
    }

    #[test]
    fn zero_and_unknown_kinds_are_empty() {
        assert_eq!(SoftWord::decode(0), SoftWord::Empty);
        assert_eq!(SoftWord::decode(7 << 60 | 0xfff0), SoftWord::Empty);
    }

    #[test]
    fn annotations_hold_48_bits() {
        assert!(Annotation::try_new(1 << 48).is_none());
        assert_eq!(Annotation::try_new(77).map(Annotation::get), Some(77));
    }

    #[test]
    fn broken_words_show_as_broken() {
        assert_eq!(SoftWord::BrokenTable(Pa::new(0)).entry(), Entry::Broken);
        assert_eq!(SoftWord::Empty.entry(), Entry::Invalid);
    }

    #[test]
    fn claims_keep_their_slot() {
        for slot in 0..Claim::SHARED {
            assert_eq!(Claim::from_slot(slot).slot(), slot);
            assert_ne!(Claim::from_slot(slot), Claim::EXCLUSIVE);
        }
    }

    #[test]
    fn address_and_type_changes_need_break_before_make() {
        let leaf = LeafAttrs::normal(Perms::RW);
        let at = Pa::new(0x1000);
        let kind = |pa, attrs: &LeafAttrs| UpdateKind::between((at, &leaf), (pa, attrs));
        assert_eq!(kind(at, &leaf), UpdateKind::Same);
        assert_eq!(kind(Pa::new(0x2000), &leaf), UpdateKind::BreakBeforeMake);
        let forced = LeafAttrs {
            combine: Combine::ForceStage2,
            ..leaf
        };
        assert_eq!(kind(at, &forced), UpdateKind::BreakBeforeMake);
        let other = LeafAttrs {
            mem: MemType::NonCacheable,
            ..leaf
        };
        assert_eq!(kind(at, &other), UpdateKind::BreakBeforeMake);
    }

    #[test]
    fn permissions_and_age_change_in_place() {
        let leaf = LeafAttrs::normal(Perms::RW);
        let at = Pa::new(0x1000);
        let kind = |old: &LeafAttrs, new: &LeafAttrs| UpdateKind::between((at, old), (at, new));
        let read = LeafAttrs::normal(Perms::READ);
        assert_eq!(kind(&leaf, &read), UpdateKind::InPlaceThenInvalidate);
        assert_eq!(kind(&read, &leaf), UpdateKind::InPlaceThenInvalidate);
        let old = leaf.with_age(Age::Old);
        assert_eq!(kind(&leaf, &old), UpdateKind::InPlaceThenInvalidate);
        assert_eq!(kind(&old, &leaf), UpdateKind::InPlace);
        let marked = leaf.with_sw(SwBits::try_new(3).unwrap());
        assert_eq!(kind(&leaf, &marked), UpdateKind::InPlace);
    }
}
