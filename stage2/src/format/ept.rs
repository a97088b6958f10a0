//! Extended page tables of Intel VMX (SDM vol. 3C 29.3.2, tables "Format of an EPT ... Entry").

use super::{TableFormat, WordKind};
use crate::addr::Pa;
use crate::attr::{Age, Combine, LeafAttrs, MemType, Perms, SwBits};
use crate::bits::join;
use crate::error::{ConfigError, EncodeError};
use crate::level::{Geometry, Level};

/// Whether something is offered by IA32_VMX_EPT_VPID_CAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// It is.
    Yes,
    /// It is not.
    No,
}

/// Facts about the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptConfig {
    /// MAXPHYADDR, 32 to 52.
    pub output_bits: u8,
    /// Execute-only translations (capability bit 0).
    pub execute_only: Offered,
    /// 1 GiB pages (capability bit 17). 2 MiB pages are taken for granted.
    pub gigabyte: Offered,
    /// Accessed and dirty flags, offered (capability bit 21) and enabled in the EPT pointer.
    pub access_dirty: Offered,
}

/// The EPT format: four levels, 48 input bits, 4 KiB pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept {
    geometry: Geometry,
    config: EptConfig,
}

const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const RWX: u64 = join([READ, WRITE, EXECUTE]);
const TYPE_SHIFT: u32 = 3;
const IGNORE_PAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;
/// What a leaf says besides its attributes.
const PLACE: u64 = join([ADDRESS, LARGE]);
/// What tells a table that grants everything from all else.
const TABLE_OR_LEAF: u64 = join([RWX, LARGE]);
/// What CPUs with flags set on their own.
const FLAGS: u64 = join([ACCESSED, DIRTY]);
/// Bits 55:52 are ignored by every CPU and by VT-d second-stage tables.
const SW_SHIFT: u32 = 52;

/// Memory types as MTRRs number them (SDM vol. 3A 12.11, table 12-8).
mod mem_type {
    pub(super) const UC: u64 = 0;
    pub(super) const WC: u64 = 1;
    pub(super) const WT: u64 = 4;
    pub(super) const WP: u64 = 5;
    pub(super) const WB: u64 = 6;
}

impl Ept {
    /// Checks a configuration.
    ///
    /// # Errors
    /// [`ConfigError::OutputBits`] outside 32 to 52.
    pub fn new(config: &EptConfig) -> Result<Self, ConfigError> {
        let bits = ConfigError::OutputBits(config.output_bits);
        if !(32..=52).contains(&config.output_bits) {
            return Err(bits);
        }
        let geometry = Geometry::new(12, 9, 48, Level::L0).ok_or(bits)?;
        Ok(Self {
            geometry,
            config: *config,
        })
    }

    /// The EPT pointer for a root (SDM vol. 3C 25.6.11): write-back walks, four levels.
    #[must_use]
    #[inline]
    pub fn pointer(&self, root: Pa) -> u64 {
        let walk_length_minus_one = 3 << 3;
        let flags = if self.has_flags() { 1 << 6 } else { 0 };
        join([
            root.get() & ADDRESS,
            flags,
            walk_length_minus_one,
            mem_type::WB,
        ])
    }

    #[inline]
    fn has_flags(&self) -> bool {
        self.config.access_dirty == Offered::Yes
    }

    /// Write without read is a misconfiguration, execute without read is one unless offered
    /// (SDM vol. 3C 29.3.3.1); no permission at all is "not present", not a leaf.
    #[inline]
    fn permissions(&self, perms: Perms) -> Result<u64, EncodeError> {
        let execute = perms.intersection(Perms::EXEC);
        let mut raw = 0;
        raw |= if perms.contains(Perms::READ) { READ } else { 0 };
        raw |= if perms.contains(Perms::WRITE) {
            WRITE
        } else {
            0
        };
        raw |= if execute == Perms::EXEC { EXECUTE } else { 0 };
        let split = !execute.is_empty() && execute != Perms::EXEC;
        let unreadable_write = raw & WRITE != 0 && raw & READ == 0;
        let execute_only = raw == EXECUTE && self.config.execute_only == Offered::No;
        if split || raw == 0 || unreadable_write || execute_only {
            return Err(EncodeError::UnsupportedPerms(perms));
        }
        Ok(raw)
    }
}

// SAFETY: an entry is present iff one of bits 2:0 is set (no mode-based execute control, whose
// bit 10 would count, too, is enabled by `pointer`'s users; we never set it), so bits 2:0 clear
// is invalid; addresses are stored in place, so a page-aligned one below 2^52 survives; pages are
// written by the trait's own `plain_page`.
#[expect(unsafe_code, reason = "the trait's promises are kept, see above")]
unsafe impl TableFormat for Ept {
    #[inline]
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    #[inline]
    fn output_bits(&self) -> u32 {
        u32::from(self.config.output_bits)
    }

    #[inline]
    fn supports_leaf(&self, level: Level) -> bool {
        match level.number() {
            2 | 3 => true,
            1 => self.config.gigabyte == Offered::Yes,
            _ => false,
        }
    }

    #[inline]
    fn encode_attrs(&self, attrs: &LeafAttrs) -> Result<u64, EncodeError> {
        let kind = match attrs.mem {
            MemType::Uncached => mem_type::UC,
            MemType::NonCacheable => mem_type::WC,
            MemType::WriteThrough => mem_type::WT,
            MemType::WriteProtected => mem_type::WP,
            MemType::WriteBack => mem_type::WB,
            MemType::Device(_) => return Err(EncodeError::UnsupportedType(attrs.mem)),
        };
        let mut raw = join([self.permissions(attrs.perms)?, kind << TYPE_SHIFT]);
        raw |= u64::from(attrs.sw.get()) << SW_SHIFT;
        if attrs.combine == Combine::ForceStage2 {
            raw |= IGNORE_PAT;
        }
        match (attrs.age, self.has_flags()) {
            (Age::Young, true) => raw |= ACCESSED,
            (Age::Old, false) => return Err(EncodeError::NoAccessFlag),
            (Age::Young, false) | (Age::Old, true) => {}
        }
        Ok(raw)
    }

    #[inline]
    fn leaf_word(&self, attrs: u64, pa: Pa, level: Level) -> u64 {
        let large = if level.is_page() { 0 } else { LARGE };
        join([attrs, large, pa.get() & ADDRESS])
    }

    #[inline]
    fn attrs_word(&self, raw: u64, _level: Level) -> u64 {
        raw & !PLACE
    }

    #[inline]
    fn table_word(&self, table: Pa) -> u64 {
        join([RWX, table.get() & ADDRESS])
    }

    #[inline]
    fn kind(&self, raw: u64, level: Level) -> WordKind {
        if raw & RWX == 0 {
            WordKind::Invalid
        } else if raw & LARGE == 0 && !level.is_page() {
            WordKind::Table
        } else {
            WordKind::Leaf
        }
    }

    /// Whatever is linked grants everything; see [`table_word`](TableFormat::table_word).
    #[inline]
    fn plain_table(&self, raw: u64) -> Option<Pa> {
        (raw & TABLE_OR_LEAF == RWX).then_some(Pa::new(raw & ADDRESS))
    }

    #[inline]
    fn output(&self, raw: u64, _level: Level) -> Pa {
        Pa::new(raw & ADDRESS)
    }

    /// Reserved types, which we never write, read as the strictest.
    #[inline]
    fn decode_attrs(&self, raw: u64) -> LeafAttrs {
        let mut perms = Perms::empty();
        perms.set(Perms::READ, raw & READ != 0);
        perms.set(Perms::WRITE, raw & WRITE != 0);
        perms.set(Perms::EXEC, raw & EXECUTE != 0);
        let mem = match raw >> TYPE_SHIFT & 7 {
            mem_type::WC => MemType::NonCacheable,
            mem_type::WT => MemType::WriteThrough,
            mem_type::WP => MemType::WriteProtected,
            mem_type::WB => MemType::WriteBack,
            _ => MemType::Uncached,
        };
        let forced = raw & IGNORE_PAT != 0;
        let young = raw & ACCESSED != 0 || !self.has_flags();
        LeafAttrs {
            perms,
            mem,
            combine: if forced {
                Combine::ForceStage2
            } else {
                Combine::HonourGuest
            },
            sw: SwBits::from_field(raw >> SW_SHIFT),
            age: if young { Age::Young } else { Age::Old },
        }
    }

    #[inline]
    fn address_chunk(&self) -> u64 {
        1 << 52
    }

    #[inline]
    fn without_write(&self, raw: u64) -> u64 {
        raw & !WRITE
    }

    #[inline]
    fn with_age(&self, raw: u64, age: Age) -> Result<u64, EncodeError> {
        match (age, self.has_flags()) {
            (Age::Young, true) => Ok(raw | ACCESSED),
            (Age::Young, false) => Ok(raw),
            (Age::Old, true) => Ok(raw & !ACCESSED),
            (Age::Old, false) => Err(EncodeError::NoAccessFlag),
        }
    }

    #[inline]
    fn hardware_bits(&self) -> u64 {
        if self.has_flags() { FLAGS } else { 0 }
    }
}
