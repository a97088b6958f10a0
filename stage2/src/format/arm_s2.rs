//! Arm stage-2 descriptors (Arm ARM D8.3, "Translation table descriptor formats").

use super::arm_config::{ArmConfig, ArmFeatures, ForceWriteBack, Granule, WideAddresses};
use super::arm_fields::{ACCESS_FLAG, Fields, INNER_SHAREABLE, MARKS, S2AP_WRITE, VALID};
use super::{TableFormat, WordKind};
use crate::addr::Pa;
use crate::attr::{Age, LeafAttrs, Maintenance};
use crate::bits::join;
use crate::error::{ConfigError, EncodeError};
use crate::level::{Geometry, Level};

/// The Arm stage-2 format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmStage2 {
    geometry: Geometry,
    granule: Granule,
    output_bits: u8,
    address: AddressField,
    /// Address bits that are in place in a table or page descriptor.
    in_place: u64,
    /// Attribute bits that there are.
    attr_bits: u64,
    /// Bits that tell a table whose address is all in place.
    plain_table: u64,
    features: ArmFeatures,
    fields: &'static Fields,
}

/// Where the bits of an output address above 47 go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AddressField {
    /// There are none.
    Narrow,
    /// 4 and 16 KiB with 52-bit addresses: 51:50 in bits 9:8.
    Lpa2,
    /// 64 KiB with 52-bit addresses: 51:48 in bits 15:12.
    Lpa,
}

/// Bit 1: a table below level 3, a page at level 3; clear for blocks.
const TABLE_OR_PAGE: u64 = 1 << 1;
/// What every table says.
const TABLE: u64 = join([VALID, TABLE_OR_PAGE]);

/// Output address bits 47:12 in place.
const ADDRESS_47: u64 = ((1 << 48) - 1) & !0xfff;
/// Output address bits 49:12 in place.
const ADDRESS_49: u64 = ((1 << 50) - 1) & !0xfff;

impl AddressField {
    /// Where the high bits are that are not in place.
    const fn high_field(self) -> u64 {
        match self {
            Self::Narrow => 0,
            Self::Lpa2 => 0b11 << 8,
            Self::Lpa => 0xf << 12,
        }
    }
}

impl ArmStage2 {
    /// Checks a configuration.
    ///
    /// # Errors
    /// [`ConfigError`] with what contradicts the architecture.
    pub fn new(config: &ArmConfig) -> Result<Self, ConfigError> {
        let ArmConfig {
            granule,
            input_bits,
            output_bits,
            features,
            start,
        } = *config;
        let wide = features.wide == WideAddresses::On && granule != Granule::K64;
        let widest = if wide || granule == Granule::K64 {
            52
        } else {
            48
        };
        if !(32..=widest).contains(&output_bits) {
            return Err(ConfigError::OutputBits(output_bits));
        }
        if !(32..=widest).contains(&input_bits) {
            return Err(ConfigError::InputBits(input_bits));
        }
        if input_bits > output_bits {
            let (input, output) = (input_bits, output_bits);
            return Err(ConfigError::InputBeyondOutput { input, output });
        }
        let start = start.unwrap_or_else(|| shortest_walk(granule, input_bits));
        let geometry = shape(granule, wide, input_bits, start)?;
        let address = match granule {
            Granule::K64 if output_bits > 48 => AddressField::Lpa,
            Granule::K4 | Granule::K16 if wide => AddressField::Lpa2,
            _ => AddressField::Narrow,
        };
        let high = if address == AddressField::Lpa2 {
            ADDRESS_49
        } else {
            ADDRESS_47
        };
        let in_place = high & !(geometry.page_size() - 1);
        // With LPA2 shareability comes from VTCR_EL2 and its bits are address (D8.3).
        let attr_bits = match address {
            AddressField::Lpa2 => !join([MARKS, INNER_SHAREABLE]),
            AddressField::Narrow | AddressField::Lpa => !MARKS,
        };
        let plain_table = join([TABLE, address.high_field()]);
        Ok(Self {
            geometry,
            granule,
            output_bits,
            address,
            in_place,
            attr_bits,
            plain_table,
            features,
            fields: Fields::of(features.fwb, features.execute),
        })
    }

    /// VTCR_EL2.T0SZ: 64 minus the input bits.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "at most 52 input bits")]
    #[inline]
    pub const fn t0sz(&self) -> u8 {
        64 - self.geometry.input_bits() as u8
    }

    /// VTCR_EL2.SL0, two bits (Arm ARM D24.2, VTCR_EL2).
    #[must_use]
    #[inline]
    pub const fn sl0(&self) -> u8 {
        let start = self.geometry.start_level().number();
        match (self.granule, start) {
            (Granule::K4, 0) => 2,
            (Granule::K4, 1) => 1,
            (Granule::K4, -1 | 2) => 0,
            (Granule::K4, _) | (Granule::K16, 0) => 3,
            (_, 1) => 2,
            (_, 2) => 1,
            _ => 0,
        }
    }

    /// VTCR_EL2.SL2: 1 only for a walk that starts at level −1.
    #[must_use]
    #[inline]
    pub const fn sl2(&self) -> u8 {
        (self.geometry.start_level().number() < 0) as u8
    }

    /// VTCR_EL2.TG0: 0 for 4 KiB, 1 for 64 KiB, 2 for 16 KiB.
    #[must_use]
    #[inline]
    pub const fn tg0(&self) -> u8 {
        match self.granule {
            Granule::K4 => 0,
            Granule::K64 => 1,
            Granule::K16 => 2,
        }
    }

    /// VTCR_EL2.DS: 1 with 52-bit addresses in 4 or 16 KiB tables.
    #[must_use]
    #[inline]
    pub fn ds(&self) -> u8 {
        u8::from(self.address == AddressField::Lpa2)
    }

    /// VTCR_EL2.PS for the output size: the next size the architecture knows.
    #[must_use]
    #[inline]
    pub const fn ps(&self) -> u8 {
        match self.output_bits {
            0..=32 => 0,
            33..=36 => 1,
            37..=40 => 2,
            41..=42 => 3,
            43..=44 => 4,
            45..=48 => 5,
            _ => 6,
        }
    }

    /// Whether leaves can force write-back.
    #[must_use]
    #[inline]
    pub fn forces_write_back(&self) -> bool {
        self.features.fwb == ForceWriteBack::On
    }

    /// The granule.
    #[must_use]
    #[inline]
    pub const fn granule(&self) -> Granule {
        self.granule
    }

    #[inline]
    fn address_field(&self, pa: Pa) -> u64 {
        let pa = pa.get();
        if pa & self.in_place == pa {
            return pa;
        }
        match self.address {
            AddressField::Narrow => pa & ADDRESS_47,
            AddressField::Lpa2 => join([pa & ADDRESS_49, (pa >> 50 & 0b11) << 8]),
            AddressField::Lpa => join([pa & ADDRESS_47 & !0xffff, (pa >> 48 & 0xf) << 12]),
        }
    }
}

/// Levels = ceil((input − 4 − page shift) / index bits), at least two: sixteen concatenated root
/// tables save four bits.
fn shortest_walk(granule: Granule, input_bits: u8) -> Level {
    let index_bits = granule.page_shift() - 3;
    let levels = (input_bits - 4 - granule.page_shift())
        .div_ceil(index_bits)
        .max(2);
    match levels {
        2 => Level::L2,
        3 => Level::L1,
        4 => Level::L0,
        _ => Level::MINUS_1,
    }
}

/// Start levels exist only where VTCR_EL2 can say them: −1 with 4 KiB and 52-bit addresses, 0
/// with 16 KiB only with them, never with 64 KiB; and a level −1 root is never concatenated.
fn shape(
    granule: Granule,
    wide: bool,
    input_bits: u8,
    start: Level,
) -> Result<Geometry, ConfigError> {
    let exists = match granule {
        Granule::K4 => start.number() >= 0 || wide,
        Granule::K16 => start.number() >= 1 || (wide && start.number() == 0),
        Granule::K64 => start.number() >= 1,
    };
    let shift = granule.page_shift();
    Geometry::new(shift, shift - 3, input_bits, start)
        .filter(|_| exists)
        .ok_or(ConfigError::StartLevel(start))
}

// SAFETY: bit 0 alone makes a descriptor valid and every valid word we write has it, so a word
// with bits 2:0 clear is invalid; a page-aligned address below 2^output_bits survives
// `address_field` and `output`, as the three layouts of `AddressField` are bijective on it; and
// `plain_table` takes a table whose high field is zero, where `output` adds nothing to the rest;
// `plain_outputs` are addresses that are all in place, so `plain_page` writes what `leaf_word` does.
#[expect(unsafe_code, reason = "the trait's promises are kept, see above")]
unsafe impl TableFormat for ArmStage2 {
    #[inline]
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    #[inline]
    fn output_bits(&self) -> u32 {
        u32::from(self.output_bits)
    }

    /// Blocks: 4 KiB pages at levels 1 and 2 (0 with LPA2), 16 KiB at 2 (1 with LPA2), 64 KiB at
    /// 2 (1 with 52-bit output).
    #[inline]
    fn supports_leaf(&self, level: Level) -> bool {
        let coarsest = match (self.granule, self.address) {
            (Granule::K4, AddressField::Lpa2) => 0,
            (Granule::K4, _) | (Granule::K16, AddressField::Lpa2) => 1,
            (Granule::K64, AddressField::Lpa) => 1,
            _ => 2,
        };
        level.number() >= coarsest
    }

    #[inline]
    fn encode_attrs(&self, attrs: &LeafAttrs) -> Result<u64, EncodeError> {
        self.encode_owing(attrs).map(|(raw, _)| raw)
    }

    #[inline]
    fn encode_owing(&self, attrs: &LeafAttrs) -> Result<(u64, Maintenance), EncodeError> {
        match self.fields.encode(attrs) {
            Some((raw, owed)) => Ok((raw & self.attr_bits, owed)),
            None => Err(self.fields.refusal(attrs)),
        }
    }

    #[inline]
    fn leaf_word(&self, attrs: u64, pa: Pa, level: Level) -> u64 {
        let page = if level.is_page() { TABLE_OR_PAGE } else { 0 };
        join([attrs, page, self.address_field(pa)])
    }

    #[inline]
    fn attrs_word(&self, raw: u64, level: Level) -> u64 {
        let page = if level.is_page() { TABLE_OR_PAGE } else { 0 };
        raw & !page & !self.address_field(Pa::new(u64::MAX))
    }

    #[inline]
    fn table_word(&self, table: Pa) -> u64 {
        join([TABLE, self.address_field(table)])
    }

    /// A level-3 word with bit 1 clear is reserved and treated as invalid by hardware (D8.3);
    /// we never write one.
    #[inline]
    fn kind(&self, raw: u64, level: Level) -> WordKind {
        if raw & VALID == 0 || (level.is_page() && raw & TABLE_OR_PAGE == 0) {
            WordKind::Invalid
        } else if raw & TABLE_OR_PAGE != 0 && !level.is_page() {
            WordKind::Table
        } else {
            WordKind::Leaf
        }
    }

    #[inline]
    fn plain_table(&self, raw: u64) -> Option<Pa> {
        let plain = raw & self.plain_table == TABLE;
        plain.then_some(Pa::new(raw & self.in_place))
    }

    /// Where all of the address is in place.
    #[inline]
    fn plain_outputs(&self) -> u64 {
        self.in_place & ((1 << self.output_bits) - 1)
    }

    #[inline]
    fn plain_page(&self, attrs: u64, pa: Pa) -> u64 {
        join([attrs, TABLE_OR_PAGE, pa.get()])
    }

    #[inline]
    fn output(&self, raw: u64, _level: Level) -> Pa {
        let pa = raw & self.in_place;
        Pa::new(match self.address {
            AddressField::Narrow => pa,
            AddressField::Lpa2 => join([pa, (raw >> 8 & 0b11) << 50]),
            AddressField::Lpa => join([pa, (raw >> 12 & 0xf) << 48]),
        })
    }

    #[inline]
    fn decode_attrs(&self, raw: u64) -> LeafAttrs {
        self.fields.decode(raw)
    }

    #[inline]
    fn maintenance(&self, raw: u64) -> Maintenance {
        self.fields.maintenance(raw)
    }

    #[inline]
    fn address_chunk(&self) -> u64 {
        match self.address {
            AddressField::Narrow | AddressField::Lpa => 1 << 48,
            AddressField::Lpa2 => 1 << 50,
        }
    }

    #[inline]
    fn without_write(&self, raw: u64) -> u64 {
        raw & !S2AP_WRITE
    }

    #[inline]
    fn with_age(&self, raw: u64, age: Age) -> Result<u64, EncodeError> {
        Ok(match age {
            Age::Young => raw | ACCESS_FLAG,
            Age::Old => raw & !ACCESS_FLAG,
        })
    }

    /// The access flag, where VTCR_EL2.HA is set; losing an update of it costs a fault.
    #[inline]
    fn hardware_bits(&self) -> u64 {
        0
    }
}
