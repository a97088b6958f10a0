//! Operands of stage-2 TLB invalidations (Arm ARM C5.5, TLBI IPAS2E1IS and RIPAS2E1IS).

use super::tlb::LevelHint;
use crate::addr::IpaRange;
use crate::bits::join;
use crate::format::Granule;
use crate::level::Level;

/// The granule as TLBI operands number it.
const fn translation_granule(granule: Granule) -> u64 {
    match granule {
        Granule::K4 => 1,
        Granule::K16 => 2,
        Granule::K64 => 3,
    }
}

/// The operand of TLBI IPAS2E1IS: the address in units of 4 KiB whatever the granule is, and a
/// level hint (FEAT_TTL) in bits 47:44. Level 0 and −1 have no encoding that every CPU knows, so
/// they are left out, which means "any".
#[must_use]
#[expect(clippy::cast_sign_loss, reason = "only levels 1 to 3 are encoded")]
pub const fn ipa_operand(ipa: u64, granule: Granule, level: Option<Level>, hint: LevelHint) -> u64 {
    let page = (ipa >> 12) & ((1 << 40) - 1);
    match (level, hint) {
        (Some(level), LevelHint::Offered) if level.number() >= 1 => {
            let hint = join([translation_granule(granule) << 2, level.number() as u64]);
            join([page, hint << 44])
        }
        _ => page,
    }
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeOp {
    /// TLBI IPAS2E1IS with this operand.
    Page(u64),
    /// TLBI RIPAS2E1IS with this operand.
    Range(u64),
}

/// The range operations that cover a range exactly, in order: each takes `(num + 1) ×
/// 2^(5 × scale + 1)` pages, so an odd page needs an operation of its own.
#[derive(Clone, Copy, Debug)]
pub struct TlbiOps {
    next: u64,
    pages: u64,
    granule: Granule,
    level: Option<Level>,
}

impl TlbiOps {
    /// Operations for `range`, whole pages of the granule. Bases are in units of the granule, as
    /// without VTCR_EL2.DS; a table with 52-bit addresses in small pages does not use this.
    #[must_use]
    pub const fn new(range: &IpaRange, granule: Granule, level: Option<Level>) -> Self {
        let shift = granule.page_shift();
        let start = range.start().get() >> shift;
        let end = range.end().get().div_ceil(1 << shift);
        Self {
            next: start,
            pages: end - start,
            granule,
            level,
        }
    }

    #[expect(clippy::cast_sign_loss, reason = "only levels 1 to 3 are encoded")]
    const fn range_operand(&self, scale: u64, count: u64) -> u64 {
        let level = match self.level {
            Some(level) if level.number() >= 1 => level.number() as u64,
            _ => 0,
        };
        join([
            translation_granule(self.granule) << 46,
            scale << 44,
            (count - 1) << 39,
            level << 37,
            self.next & ((1 << 37) - 1),
        ])
    }
}

impl Iterator for TlbiOps {
    type Item = RangeOp;

    fn next(&mut self) -> Option<RangeOp> {
        if self.pages == 0 {
            return None;
        }
        if self.pages == 1 {
            let ipa = self.next << self.granule.page_shift();
            self.pages = 0;
            // Range operations imply FEAT_TTL (Arm ARM A2.2).
            return Some(RangeOp::Page(ipa_operand(
                ipa,
                self.granule,
                self.level,
                LevelHint::Offered,
            )));
        }
        let scale = u64::from(self.pages.ilog2() - 1) / 5;
        let scale = scale.min(3);
        let unit = 5 * scale + 1;
        let count = (self.pages >> unit).min(32);
        let operand = self.range_operand(scale, count);
        self.next += count << unit;
        self.pages -= count << unit;
        Some(RangeOp::Range(operand))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Ipa;
    use std::vec::Vec;

    const PAGE_LEVEL: Option<Level> = Some(Level::PAGE);

    fn ops(start: u64, pages: u64, granule: Granule) -> Vec<RangeOp> {
        let shift = granule.page_shift();
        let range = IpaRange::new(Ipa::new(start), pages << shift).unwrap();
        TlbiOps::new(&range, granule, None).collect()
    }

    #[test]
    fn page_operand_is_shifted_by_twelve_for_every_granule() {
        let plain = |ipa, granule| ipa_operand(ipa, granule, None, LevelHint::Offered);
        assert_eq!(plain(0x1234_5000, Granule::K4), 0x1_2345);
        assert_eq!(plain(0x1234_4000, Granule::K16), 0x1_2344);
        assert_eq!(plain(0x1235_0000, Granule::K64), 0x1_2350);
        assert_eq!(plain(0xf_ffff_ffff_f000, Granule::K4), 0xff_ffff_ffff);
    }

    #[test]
    fn level_hint_is_granule_and_level() {
        let hinted =
            |granule, level| ipa_operand(0, granule, Some(level), LevelHint::Offered) >> 44;
        assert_eq!(hinted(Granule::K4, Level::PAGE), 0b0111);
        assert_eq!(hinted(Granule::K4, Level::L1), 0b0101);
        assert_eq!(hinted(Granule::K16, Level::L2), 0b1010);
        assert_eq!(hinted(Granule::K64, Level::PAGE), 0b1111);
        assert_eq!(hinted(Granule::K4, Level::L0), 0);
        assert_eq!(hinted(Granule::K4, Level::MINUS_1), 0);
        assert_eq!(
            ipa_operand(0, Granule::K4, PAGE_LEVEL, LevelHint::Missing),
            0
        );
    }

    #[test]
    fn known_range_operands() {
        // Two pages: TG 1, scale 0, num 0.
        assert_eq!(ops(0x5000, 2, Granule::K4), [RangeOp::Range(1 << 46 | 5)]);
        // 64 pages: scale 1, num 0; three: a pair and a page.
        assert_eq!(ops(0, 64, Granule::K4), [RangeOp::Range(1 << 46 | 1 << 44)]);
        let three = [RangeOp::Range(2 << 46 | 4), RangeOp::Page(0x18)];
        assert_eq!(ops(0x1_0000, 3, Granule::K16), three);
        let hinted = IpaRange::new(Ipa::new(0x20_0000), 0x40_0000).unwrap();
        let first = TlbiOps::new(&hinted, Granule::K4, Some(Level::L2)).next();
        assert_eq!(
            first,
            Some(RangeOp::Range(
                1 << 46 | 1 << 44 | 15 << 39 | 2 << 37 | 0x200
            ))
        );
    }

    #[test]
    fn range_operands_leave_out_levels_that_have_no_encoding() {
        let two = IpaRange::new(Ipa::new(0x5000), 0x2000).unwrap();
        for level in [None, Some(Level::L0), Some(Level::MINUS_1)] {
            let mut ops = TlbiOps::new(&two, Granule::K4, level);
            assert_eq!(ops.next(), Some(RangeOp::Range(1 << 46 | 5)));
        }
    }

    /// Pages covered by an operation, read back from its operand.
    fn covered(op: RangeOp, granule: Granule) -> (u64, u64) {
        match op {
            RangeOp::Page(operand) => {
                let page = (operand & 0xff_ffff_ffff) << 12 >> granule.page_shift();
                (page, page + 1)
            }
            RangeOp::Range(operand) => {
                let (scale, num) = (operand >> 44 & 3, operand >> 39 & 31);
                let base = operand & 0x1f_ffff_ffff;
                (base, base + (num + 1) * (1 << (5 * scale + 1)))
            }
        }
    }

    #[test]
    fn operations_cover_every_range_exactly() {
        for granule in [Granule::K4, Granule::K16, Granule::K64] {
            for pages in (1..4100).chain([1 << 18, (1 << 21) + 1, (1 << 22) + 4097]) {
                let start = 7 << granule.page_shift();
                let mut next = 7;
                for op in ops(start, pages, granule) {
                    let (from, to) = covered(op, granule);
                    assert_eq!(from, next);
                    next = to;
                }
                assert_eq!(next, 7 + pages);
            }
        }
    }

    #[test]
    fn a_gigabyte_takes_few_operations() {
        assert_eq!(ops(0, 1 << 18, Granule::K4).len(), 1);
        assert!(ops(0, (1 << 18) - 1, Granule::K4).len() <= 5);
    }
}
