//! The registers: which exist, what may be written, what is read back.

use crate::addr::GfnRange;
use crate::pat::{PatType, X86Type};

/// Value of the read-only capability register: 8 variable pairs, fixed ranges and WC supported,
/// no SMRR (SDM vol. 3, "IA32_MTRRCAP").
const CAPABILITY: u64 = 0x508;
/// Number of variable pairs.
pub(super) const PAIRS: usize = 8;
/// Number of fixed type bytes.
pub(super) const FIXED_BYTES: usize = 88;
/// Default-type register: fixed-range enable.
const FE: u64 = 1 << 10;
/// Default-type register: MTRR enable.
const E: u64 = 1 << 11;
/// Variable mask register: the pair is in use.
const VALID: u64 = 1 << 11;
/// PAT after reset: WB, WT, UC−, UC, twice (SDM vol. 3, "Programming the PAT").
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// The guest must get a general-protection fault; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write of {value:#x} to register {msr:#x} is not allowed")]
pub struct GeneralProtection {
    /// Register number.
    pub msr: u32,
    /// The value that was refused; 0 for a read.
    pub value: u64,
}

/// A register that concerns memory types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Msr {
    /// IA32_MTRRCAP, read only.
    Capability,
    /// IA32_MTRR_DEF_TYPE.
    DefaultType,
    /// One of the eleven fixed registers, 0 to 10 in ascending order of address.
    Fixed(u8),
    /// IA32_MTRR_PHYSBASE of pair 0 to 7.
    VariableBase(u8),
    /// IA32_MTRR_PHYSMASK of pair 0 to 7.
    VariableMask(u8),
    /// IA32_PAT: not an MTRR, but kept with them.
    Pat,
}

impl Msr {
    /// Decodes a register number; `None` if it is none of these.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "each arm bounds the number"
    )]
    pub const fn from_number(msr: u32) -> Option<Self> {
        Some(match msr {
            0xfe => Self::Capability,
            0x200..=0x20f if msr & 1 == 0 => Self::VariableBase(((msr - 0x200) / 2) as u8),
            0x200..=0x20f => Self::VariableMask(((msr - 0x200) / 2) as u8),
            0x250 => Self::Fixed(0),
            0x258 | 0x259 => Self::Fixed((msr - 0x257) as u8),
            0x268..=0x26f => Self::Fixed((msr - 0x265) as u8),
            0x277 => Self::Pat,
            0x2ff => Self::DefaultType,
            _ => return None,
        })
    }

    /// Guest frames that fixed register `n` (0 to 10) describes.
    #[must_use]
    pub const fn fixed_span(n: u8) -> Option<GfnRange> {
        let (start, len) = match n {
            0 => (0, 0x80),
            1 => (0x80, 0x20),
            2 => (0xa0, 0x20),
            3..=10 => (0xc0 + 8 * (n as u64 - 3), 8),
            _ => return None,
        };
        GfnRange::new(start, start + len)
    }
}

/// One variable base and mask pair as stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VariableRange {
    pub(super) base: u64,
    /// With all bits at and above MAXPHYADDR set, which bounds the range.
    pub(super) mask: u64,
}

impl VariableRange {
    /// Whether the pair is in use.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.mask & VALID != 0
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> X86Type {
        // Validated on write, so the fallback is never taken; UC is the safe one.
        X86Type::from_byte(low_byte(self.base)).unwrap_or(X86Type::Uc)
    }

    /// Address bits that the mask compares, from bit 12 up.
    pub(super) const fn compared(&self) -> u64 {
        self.mask & !0xfff
    }

    /// The smallest range that holds every page of the pair, whether or not it is valid.
    ///
    /// Exact for a contiguous mask; for a mask with holes or a base that is not aligned to its
    /// size it is larger than the set of pages that match.
    #[must_use]
    pub fn span(&self) -> GfnRange {
        let first = self.base & self.compared();
        let last = first | !self.compared();
        GfnRange::new(first >> 12, (last >> 12) + 1).unwrap_or(GfnRange::ALL)
    }
}

/// All memory-type registers of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mtrrs {
    pub(super) def_type: u64,
    pub(super) fixed: [u8; FIXED_BYTES],
    pub(super) variable: [VariableRange; PAIRS],
    pat: u64,
    phys_bits: u8,
    offered: bool,
}

impl Mtrrs {
    /// Registers after reset: everything disabled.
    ///
    /// `phys_bits` is the guest's MAXPHYADDR, clamped to 32–52. `offered` says whether the
    /// guest's CPUID shows MTRRs; without it they can be neither read nor written.
    #[must_use]
    pub fn new(phys_bits: u8, offered: bool) -> Self {
        let phys_bits = phys_bits.clamp(32, 52);
        let unused = VariableRange {
            base: 0,
            mask: !low_bits(phys_bits),
        };
        Self {
            def_type: 0,
            fixed: [0; FIXED_BYTES],
            variable: [unused; PAIRS],
            pat: PAT_RESET,
            phys_bits,
            offered,
        }
    }

    /// Whether the guest's CPUID offers MTRRs.
    #[must_use]
    pub const fn offered(&self) -> bool {
        self.offered
    }

    /// Bit E: all MTRRs enabled.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.def_type & E != 0
    }

    /// Bit FE: fixed ranges enabled (if all are).
    #[must_use]
    pub const fn fixed_enabled(&self) -> bool {
        self.def_type & FE != 0
    }

    /// Type of memory that no range describes.
    #[must_use]
    pub fn default_type(&self) -> X86Type {
        X86Type::from_byte(low_byte(self.def_type)).unwrap_or(X86Type::Uc)
    }

    /// The fixed type bytes: 8 steps of 64 KiB, 16 of 16 KiB, 64 of 4 KiB.
    #[must_use]
    pub const fn fixed_bytes(&self) -> &[u8; FIXED_BYTES] {
        &self.fixed
    }

    /// The variable pairs.
    #[must_use]
    pub const fn variable(&self) -> &[VariableRange; PAIRS] {
        &self.variable
    }

    /// Reads a register.
    ///
    /// # Errors
    /// [`GeneralProtection`] if MTRRs are not offered (PAT is always there) or the number within
    /// the register's kind does not exist.
    pub fn read(&self, msr: Msr) -> Result<u64, GeneralProtection> {
        let refused = GeneralProtection {
            msr: number(msr),
            value: 0,
        };
        if !self.offered && msr != Msr::Pat {
            return Err(refused);
        }
        match msr {
            Msr::Capability => Ok(CAPABILITY),
            Msr::DefaultType => Ok(self.def_type),
            Msr::Pat => Ok(self.pat),
            Msr::Fixed(n) => self
                .fixed_bytes_of(n)
                .map(u64::from_le_bytes)
                .ok_or(refused),
            Msr::VariableBase(n) => self.pair(n).map(|p| p.base).ok_or(refused),
            Msr::VariableMask(n) => self
                .pair(n)
                .map(|p| p.mask & low_bits(self.phys_bits))
                .ok_or(refused),
        }
    }

    /// Writes a register.
    ///
    /// # Errors
    /// [`GeneralProtection`] for a reserved bit or type, a read-only register, or when MTRRs are
    /// not offered (SDM vol. 3, "MTRR Feature Identification" to "Variable Range MTRRs").
    pub fn write(&mut self, msr: Msr, value: u64) -> Result<(), GeneralProtection> {
        let refused = GeneralProtection {
            msr: number(msr),
            value,
        };
        let known = self.offered || msr == Msr::Pat;
        if !known || !self.is_writable_value(msr, value) {
            return Err(refused);
        }
        self.store(msr, value).ok_or(refused)
    }

    fn is_writable_value(&self, msr: Msr, value: u64) -> bool {
        let too_high = value & !low_bits(self.phys_bits) != 0;
        match msr {
            Msr::Capability => false,
            Msr::DefaultType => value & !(0xff | FE | E) == 0 && is_type(low_byte(value)),
            Msr::Fixed(_) => value.to_le_bytes().into_iter().all(is_type),
            Msr::VariableBase(_) => value & 0xf00 == 0 && is_type(low_byte(value)) && !too_high,
            Msr::VariableMask(_) => value & 0x7ff == 0 && !too_high,
            Msr::Pat => value
                .to_le_bytes()
                .into_iter()
                .all(|b| PatType::from_byte(b).is_some()),
        }
    }

    fn store(&mut self, msr: Msr, value: u64) -> Option<()> {
        let above = !low_bits(self.phys_bits);
        match msr {
            Msr::Capability => return None,
            Msr::DefaultType => self.def_type = value,
            Msr::Pat => self.pat = value,
            Msr::Fixed(n) => {
                let at = 8 * usize::from(n);
                self.fixed
                    .get_mut(at..at + 8)?
                    .copy_from_slice(&value.to_le_bytes());
            }
            Msr::VariableBase(n) => self.variable.get_mut(usize::from(n))?.base = value,
            Msr::VariableMask(n) => self.variable.get_mut(usize::from(n))?.mask = value | above,
        }
        Some(())
    }

    fn fixed_bytes_of(&self, n: u8) -> Option<[u8; 8]> {
        let at = 8 * usize::from(n);
        self.fixed.get(at..at + 8)?.try_into().ok()
    }

    fn pair(&self, n: u8) -> Option<&VariableRange> {
        self.variable.get(usize::from(n))
    }
}

const fn is_type(byte: u8) -> bool {
    X86Type::from_byte(byte).is_some()
}

const fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

/// Ones below bit `n`, for `n` up to 63.
const fn low_bits(n: u8) -> u64 {
    (1 << n) - 1
}

fn number(msr: Msr) -> u32 {
    match msr {
        Msr::Capability => 0xfe,
        Msr::DefaultType => 0x2ff,
        Msr::Pat => 0x277,
        Msr::VariableBase(n) => 0x200 + 2 * u32::from(n),
        Msr::VariableMask(n) => 0x201 + 2 * u32::from(n),
        Msr::Fixed(0) => 0x250,
        Msr::Fixed(n @ 1..=2) => 0x257 + u32::from(n),
        Msr::Fixed(n) => 0x265 + u32::from(n),
    }
}

// Arithmetic only: nothing for Miri to see, and long in it.
#[cfg(not(miri))]
#[cfg(test)]
mod tests {
    use super::*;

    fn regs() -> Mtrrs {
        Mtrrs::new(40, true)
    }

    fn refuses(msr: Msr, value: u64) -> bool {
        let mut m = regs();
        let before = m.clone();
        let refused = m.write(msr, value).is_err();
        assert_eq!(refused, m == before || m.read(msr) != Ok(value));
        refused
    }

    #[test]
    fn register_numbers_decode_and_encode_to_the_same() {
        let all = (0..0x1000u32).filter_map(|n| Msr::from_number(n).map(|m| (n, m)));
        let mut count = 0;
        for (n, m) in all {
            assert_eq!(number(m), n);
            count += 1;
        }
        // Capability, default type, PAT, 11 fixed, 16 variable.
        assert_eq!(count, 30);
        assert_eq!(Msr::from_number(0x26f), Some(Msr::Fixed(10)));
        assert_eq!(Msr::from_number(0x259), Some(Msr::Fixed(2)));
        assert_eq!(Msr::from_number(0x20f), Some(Msr::VariableMask(7)));
        assert_eq!(Msr::from_number(0x210), None);
        assert_eq!(Msr::from_number(0x251), None);
    }

    #[test]
    fn capability_is_0x508_and_read_only() {
        assert_eq!(regs().read(Msr::Capability), Ok(0x508));
        assert!(regs().write(Msr::Capability, 0x508).is_err());
    }

    #[test]
    fn default_type_accepts_the_five_types_with_e_and_fe() {
        for t in [0, 1, 4, 5, 6] {
            assert!(!refuses(Msr::DefaultType, 0xc00 | t));
        }
    }

    #[test]
    fn default_type_refuses_reserved_types_and_bits() {
        for v in [0x2, 0x3, 0x7, 0x8, 0xff, 0x106, 0x206, 0x1006, 1 << 63] {
            assert!(refuses(Msr::DefaultType, v), "{v:#x}");
        }
    }

    #[test]
    fn fixed_refuses_one_reserved_byte_among_eight() {
        assert!(!refuses(Msr::Fixed(0), 0x0605_0401_0006_0606));
        assert!(refuses(Msr::Fixed(0), 0x0605_0401_0002_0606));
        assert!(refuses(Msr::Fixed(10), 0x0706_0606_0606_0606));
        assert!(refuses(Msr::Fixed(3), 0x0000_0000_0000_0003));
    }

    #[test]
    fn variable_base_refuses_bits_8_to_11_reserved_types_and_high_addresses() {
        assert!(!refuses(Msr::VariableBase(0), 0xff_ffff_f006));
        for v in [
            0x106,
            0x206,
            0x406,
            0x806,
            0x1002,
            0x1003,
            0x1007,
            1 << 40,
            1 << 63,
        ] {
            assert!(refuses(Msr::VariableBase(7), v), "{v:#x}");
        }
    }

    #[test]
    fn variable_mask_refuses_bits_0_to_10_and_high_addresses() {
        assert!(!refuses(Msr::VariableMask(0), 0xff_ffff_f800));
        for bit in (0..11).chain([40, 63]) {
            assert!(refuses(Msr::VariableMask(0), 1 << bit), "bit {bit}");
        }
    }

    #[test]
    fn pat_accepts_uc_minus_and_refuses_2_3_and_8() {
        assert!(!refuses(Msr::Pat, 0x0706_0504_0100_0706));
        for v in [0x2, 0x3, 0x8, 0x80 << 56] {
            assert!(refuses(Msr::Pat, v), "{v:#x}");
        }
        assert_eq!(regs().read(Msr::Pat), Ok(0x0007_0406_0007_0406));
    }

    #[test]
    fn a_pair_or_fixed_register_that_does_not_exist_is_refused() {
        assert!(regs().write(Msr::VariableBase(8), 6).is_err());
        assert!(regs().write(Msr::VariableMask(8), 0x800).is_err());
        assert!(regs().write(Msr::Fixed(11), 0).is_err());
        assert!(regs().read(Msr::Fixed(11)).is_err());
        assert!(regs().read(Msr::VariableBase(8)).is_err());
        assert!(regs().read(Msr::VariableMask(8)).is_err());
    }

    #[test]
    fn mask_is_stored_with_high_bits_that_reads_hide() {
        let mut m = regs();
        m.write(Msr::VariableMask(2), 0xff_8000_0800).unwrap();
        assert_eq!(m.variable()[2].mask, 0xffff_ffff_8000_0800);
        assert_eq!(m.read(Msr::VariableMask(2)), Ok(0xff_8000_0800));
    }

    #[test]
    fn written_values_read_back() {
        let mut m = regs();
        m.write(Msr::Fixed(4), 0x0605_0401_0006_0605).unwrap();
        m.write(Msr::VariableBase(5), 0x8000_0001).unwrap();
        m.write(Msr::DefaultType, 0xc06).unwrap();
        assert_eq!(m.read(Msr::Fixed(4)), Ok(0x0605_0401_0006_0605));
        assert_eq!(m.read(Msr::Fixed(3)), Ok(0));
        assert_eq!(m.read(Msr::VariableBase(5)), Ok(0x8000_0001));
        assert_eq!(m.read(Msr::DefaultType), Ok(0xc06));
        assert!(m.enabled() && m.fixed_enabled());
        assert_eq!(m.default_type(), X86Type::Wb);
        assert_eq!(m.variable()[5].kind(), X86Type::Wc);
        // Byte k of a register is its k-th step, little end first.
        assert_eq!(m.fixed_bytes()[32], 5);
        assert_eq!(m.fixed_bytes()[39], 6);
    }

    #[test]
    fn without_cpuid_only_pat_exists() {
        let mut m = Mtrrs::new(40, false);
        assert!(m.write(Msr::DefaultType, 0xc06).is_err());
        assert!(m.read(Msr::Capability).is_err());
        assert!(m.write(Msr::Pat, 0x6).is_ok());
        assert_eq!(m.read(Msr::Pat), Ok(6));
        assert!(!m.enabled() && !m.offered());
    }

    #[test]
    fn fixed_spans_are_those_of_the_layout() {
        let span = |n| Msr::fixed_span(n).map(|r| (r.start().get(), r.end()));
        assert_eq!(span(0), Some((0, 0x80)));
        assert_eq!(span(1), Some((0x80, 0xa0)));
        assert_eq!(span(2), Some((0xa0, 0xc0)));
        assert_eq!(span(3), Some((0xc0, 0xc8)));
        assert_eq!(span(10), Some((0xf8, 0x100)));
        assert_eq!(span(11), None);
    }

    #[test]
    fn span_of_an_aligned_pair_is_the_range_itself() {
        let mut m = regs();
        // UC, 2 GiB at 2 GiB.
        m.write(Msr::VariableBase(0), 0x8000_0000).unwrap();
        m.write(Msr::VariableMask(0), 0xff_8000_0800).unwrap();
        assert_eq!(
            m.variable()[0].span(),
            GfnRange::new(0x8_0000, 0x10_0000).unwrap()
        );
    }

    #[test]
    fn span_of_an_unaligned_base_starts_where_the_mask_says() {
        let mut m = regs();
        m.write(Msr::VariableBase(0), 0x8010_0000).unwrap();
        m.write(Msr::VariableMask(0), 0xff_8000_0800).unwrap();
        assert_eq!(
            m.variable()[0].span(),
            GfnRange::new(0x8_0000, 0x10_0000).unwrap()
        );
    }

    #[test]
    fn span_of_a_mask_with_a_hole_covers_both_pieces() {
        let mut m = regs();
        // Bit 20 is not compared: [16 MiB, +4 KiB) and [17 MiB, +4 KiB).
        m.write(Msr::VariableBase(0), 0x100_0000).unwrap();
        m.write(Msr::VariableMask(0), 0xff_ffef_f800).unwrap();
        assert_eq!(
            m.variable()[0].span(),
            GfnRange::new(0x1000, 0x1101).unwrap()
        );
    }

    #[test]
    fn span_of_an_empty_mask_is_the_guests_whole_address_space() {
        assert_eq!(
            regs().variable()[0].span(),
            GfnRange::new(0, 1 << 28).unwrap()
        );
    }

    #[test]
    fn physical_address_width_is_clamped() {
        assert!(
            Mtrrs::new(60, true)
                .write(Msr::VariableBase(0), 1 << 52)
                .is_err()
        );
        assert!(
            Mtrrs::new(60, true)
                .write(Msr::VariableBase(0), 1 << 51)
                .is_ok()
        );
        assert!(
            Mtrrs::new(5, true)
                .write(Msr::VariableBase(0), 1 << 31)
                .is_ok()
        );
    }
}
