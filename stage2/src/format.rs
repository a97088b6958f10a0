//! Descriptor formats: the only code that knows which bit means what.

mod arm_config;
mod arm_fields;
mod arm_s2;
#[cfg(feature = "x86")]
mod ept;

pub use arm_config::{ArmConfig, ArmFeatures, Execute, ForceWriteBack, Granule, WideAddresses};
pub use arm_s2::ArmStage2;

#[cfg(feature = "x86")]
pub use ept::{Ept, EptConfig, Offered};

use crate::addr::Pa;
use crate::attr::{Age, LeafAttrs, Maintenance};
use crate::entry::{Entry, SoftWord};
use crate::error::EncodeError;
use crate::level::{Geometry, Level};

/// What a raw word is to the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordKind {
    /// Not valid; may hold a note.
    Invalid,
    /// Points to a table.
    Table,
    /// Maps memory.
    Leaf,
}

/// A descriptor format. Pure: never touches memory.
///
/// `&self`, because a format has run-time facts (granule, features, address sizes); none is
/// global, so two settings can live in one test.
///
/// The core composes a leaf as `leaf_word(encode_attrs(attrs)?, pa, level)`, so that the
/// attributes of a bulk map are encoded once.
///
/// # Safety
/// `decode(encode(e, l), l) == e` for every encodable `e`. A word with bits 2:0 clear is invalid.
/// `output(table_word(pa), l) == pa` for every page-aligned `pa` that fits the output size, and
/// `plain_table(w)` is `Some(output(w, l))` only where `kind(w, l)` is a table: the core
/// dereferences what they say. `plain_page(a, pa)` is `leaf_word(a, pa, Level::PAGE)` for every
/// `pa` that has only bits of `plain_outputs()`, and those are addresses of pages that fit.
#[expect(
    unsafe_code,
    reason = "the core dereferences addresses that a format decodes"
)]
pub unsafe trait TableFormat: core::fmt::Debug {
    /// Shape of the tables.
    fn geometry(&self) -> &Geometry;

    /// Bits of an output address.
    fn output_bits(&self) -> u32;

    /// Whether a leaf may stand at `level`.
    fn supports_leaf(&self, level: Level) -> bool;

    /// Everything of a leaf but its address and size.
    ///
    /// # Errors
    /// Whatever of `attrs` the architecture forbids or the format cannot say.
    fn encode_attrs(&self, attrs: &LeafAttrs) -> Result<u64, EncodeError>;

    /// [`encode_attrs`](TableFormat::encode_attrs), and which cache maintenance the leaf owes:
    /// `attrs.maintenance()`, which a format may answer faster.
    ///
    /// # Errors
    /// As [`encode_attrs`](TableFormat::encode_attrs).
    #[inline]
    fn encode_owing(&self, attrs: &LeafAttrs) -> Result<(u64, Maintenance), EncodeError> {
        Ok((self.encode_attrs(attrs)?, attrs.maintenance()))
    }

    /// A leaf from encoded attributes. `pa` is aligned and in range; see [`check_output`].
    ///
    /// [`check_output`]: TableFormat::check_output
    fn leaf_word(&self, attrs: u64, pa: Pa, level: Level) -> u64;

    /// The encoded attributes of a leaf: the inverse of [`leaf_word`](TableFormat::leaf_word).
    fn attrs_word(&self, raw: u64, level: Level) -> u64;

    /// A pointer to a table.
    fn table_word(&self, table: Pa) -> u64;

    /// What the word is to the hardware.
    fn kind(&self, raw: u64, level: Level) -> WordKind;

    /// The address of the table that a word of a level above the pages points to, if that is
    /// quickly said; nothing may be a table all the same.
    #[inline]
    fn plain_table(&self, raw: u64) -> Option<Pa> {
        let _ = raw;
        None
    }

    /// Address bits that a page may have for [`plain_page`](TableFormat::plain_page): of pages
    /// that fit the output size.
    #[inline]
    fn plain_outputs(&self) -> u64 {
        let in_range = (1 << self.output_bits()) - 1;
        in_range & !(self.geometry().page_size() - 1)
    }

    /// [`leaf_word`](TableFormat::leaf_word) of a page whose address has only bits of
    /// [`plain_outputs`](TableFormat::plain_outputs), which a format may write faster.
    #[inline]
    fn plain_page(&self, attrs: u64, pa: Pa) -> u64 {
        self.leaf_word(attrs, pa, Level::PAGE)
    }

    /// The output address of a leaf, or the address of the table.
    fn output(&self, raw: u64, level: Level) -> Pa;

    /// The attributes of a leaf.
    fn decode_attrs(&self, raw: u64) -> LeafAttrs;

    /// Which cache maintenance a leaf owes: `decode_attrs(raw).maintenance()`, which a format may
    /// answer faster.
    #[inline]
    fn maintenance(&self, raw: u64) -> Maintenance {
        self.decode_attrs(raw).maintenance()
    }

    /// Bytes, a power of two, within which adding to an output address is the same as adding to
    /// its descriptor.
    fn address_chunk(&self) -> u64;

    /// The leaf without write permission.
    fn without_write(&self, raw: u64) -> u64;

    /// The leaf with another age.
    ///
    /// # Errors
    /// [`EncodeError::NoAccessFlag`] when the format has none.
    fn with_age(&self, raw: u64, age: Age) -> Result<u64, EncodeError>;

    /// Bits the hardware may set on its own while the core rewrites a leaf.
    fn hardware_bits(&self) -> u64;

    /// Refuses an address that a leaf of `level` cannot hold.
    ///
    /// # Errors
    /// [`EncodeError::NoLeafAt`], [`EncodeError::Misaligned`] or [`EncodeError::OutOfRange`].
    fn check_output(&self, pa: Pa, level: Level) -> Result<(), EncodeError> {
        let size = self.geometry().slot_size(level);
        if !self.supports_leaf(level) {
            return Err(EncodeError::NoLeafAt(level));
        }
        if !pa.is_aligned_to(size) {
            return Err(EncodeError::Misaligned { pa, level });
        }
        let bits = self.output_bits();
        if pa.get() >> bits != 0 {
            return Err(EncodeError::OutOfRange { pa, bits });
        }
        Ok(())
    }

    /// Reads a word.
    #[inline]
    fn decode(&self, raw: u64, level: Level) -> Entry {
        match self.kind(raw, level) {
            WordKind::Invalid => SoftWord::decode(raw).entry(),
            WordKind::Table => Entry::Table(self.output(raw, level)),
            WordKind::Leaf => Entry::Leaf {
                pa: self.output(raw, level),
                attrs: self.decode_attrs(raw),
            },
        }
    }

    /// Writes a word.
    ///
    /// # Errors
    /// Whatever the architecture forbids, with what it was.
    fn encode(&self, entry: &Entry, level: Level) -> Result<u64, EncodeError> {
        match *entry {
            Entry::Invalid => Ok(SoftWord::EMPTY),
            Entry::Annotated(note) => Ok(SoftWord::Annotation(note).encode()),
            Entry::Broken => Err(EncodeError::Transient),
            Entry::Leaf { pa, attrs } => {
                self.check_output(pa, level)?;
                Ok(self.leaf_word(self.encode_attrs(&attrs)?, pa, level))
            }
            Entry::Table(pa) => {
                let bits = self.output_bits();
                if level.is_page() {
                    Err(EncodeError::NoTableAt(level))
                } else if !pa.is_aligned_to(self.geometry().page_size()) {
                    Err(EncodeError::Misaligned {
                        pa,
                        level: Level::PAGE,
                    })
                } else if pa.get() >> bits != 0 {
                    Err(EncodeError::OutOfRange { pa, bits })
                } else {
                    Ok(self.table_word(pa))
                }
            }
        }
    }
}
