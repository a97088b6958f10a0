//! The memory type of one page (SDM vol. 3, "MTRR Precedences").

use super::registers::{FIXED_BYTES, Mtrrs};
use crate::addr::Gfn;
use crate::pat::X86Type;

/// First frame that no fixed register describes: 1 MiB.
pub(super) const FIXED_END: u64 = 0x100;

/// Types that overlap on a page. The rules depend on which occur, never on the order in which
/// they are met: a list walked in some order gets overlaps with UC and three-way overlaps wrong.
#[derive(Clone, Copy, Default)]
pub(super) struct TypeSet(u8);

impl TypeSet {
    pub(super) fn add(&mut self, t: X86Type) {
        self.0 |= 1 << t.byte();
    }

    /// The type of a page with these ranges over it; `default` if there is none.
    ///
    /// UC wins; WT wins over WB; equal types are that type. Everything else is undefined by the
    /// architecture and answered with WB.
    pub(super) fn resolve(self, default: X86Type) -> X86Type {
        const WT_WB: u8 = 1 << X86Type::Wt.byte() | 1 << X86Type::Wb.byte();
        let has = |t: X86Type| self.0 & 1 << t.byte() != 0;
        match self.0 {
            0 => default,
            _ if has(X86Type::Uc) => X86Type::Uc,
            WT_WB => X86Type::Wt,
            one if one.is_power_of_two() => X86Type::ALL
                .into_iter()
                .find(|&t| has(t))
                .unwrap_or(X86Type::Wb),
            _ => X86Type::Wb,
        }
    }
}

impl Mtrrs {
    /// The type of everything while E = 0: UC if the guest knows MTRRs at all, else WB.
    #[must_use]
    pub const fn disabled_type(&self) -> X86Type {
        if self.offered() {
            X86Type::Uc
        } else {
            X86Type::Wb
        }
    }

    /// The memory type of page `gfn`.
    #[must_use]
    pub fn page_type(&self, gfn: Gfn) -> X86Type {
        if self.enabled() {
            self.type_of_page(gfn.get())
        } else {
            self.disabled_type()
        }
    }

    /// As [`Mtrrs::page_type`], with E = 1 known.
    pub(super) fn type_of_page(&self, gfn: u64) -> X86Type {
        match fixed_index(gfn) {
            Some(i) if self.fixed_enabled() => self.fixed_type(i),
            _ => self.variable_type(gfn << 12),
        }
    }

    fn fixed_type(&self, index: usize) -> X86Type {
        let byte = self.fixed.get(index).copied().unwrap_or(0);
        X86Type::from_byte(byte).unwrap_or(X86Type::Uc)
    }

    /// A pair describes a page if address AND mask = base AND mask.
    fn variable_type(&self, addr: u64) -> X86Type {
        let mut types = TypeSet::default();
        for pair in self.variable.iter().filter(|p| p.is_valid()) {
            if (addr ^ pair.base) & pair.compared() == 0 {
                types.add(pair.kind());
            }
        }
        types.resolve(self.default_type())
    }
}

/// Index of the fixed byte for a frame below 1 MiB.
fn fixed_index(gfn: u64) -> Option<usize> {
    let index = match gfn {
        0..0x80 => gfn >> 4,
        0x80..0xc0 => 8 + ((gfn - 0x80) >> 2),
        0xc0..FIXED_END => 24 + (gfn - 0xc0),
        _ => return None,
    };
    usize::try_from(index).ok().filter(|&i| i < FIXED_BYTES)
}

// Arithmetic only: nothing for Miri to see, and long in it.
#[cfg(not(miri))]
#[cfg(test)]
mod tests {
    use super::super::registers::Msr;
    use super::*;
    use crate::addr::gfn;
    use X86Type::{Uc, Wb, Wc, Wp, Wt};

    /// 40 address bits; mask for a size in bytes.
    fn mask(size: u64) -> u64 {
        (0xff_ffff_ffff & !(size - 1)) | 0x800
    }

    fn with(def: u64, pairs: &[(u64, u64, X86Type)]) -> Mtrrs {
        let mut m = Mtrrs::new(40, true);
        m.write(Msr::DefaultType, def).unwrap();
        for (n, &(base, size, t)) in (0u8..).zip(pairs) {
            m.write(Msr::VariableBase(n), base | u64::from(t.byte()))
                .unwrap();
            m.write(Msr::VariableMask(n), mask(size)).unwrap();
        }
        m
    }

    fn at(m: &Mtrrs, page: u64) -> X86Type {
        m.page_type(gfn(page))
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn disabled_is_uc_for_a_guest_with_mtrrs() {
        assert_eq!(at(&with(0x406, &[(0, GIB, Wb)]), 0x200), Uc);
    }

    #[test]
    fn disabled_is_wb_for_a_guest_without_mtrrs() {
        assert_eq!(at(&Mtrrs::new(40, false), 0x200), Wb);
    }

    #[test]
    fn fixed_bytes_cover_their_steps() {
        let mut m = with(0xc06, &[]);
        m.write(Msr::Fixed(0), 0x0600_0000_0000_0001).unwrap();
        m.write(Msr::Fixed(1), 0x0000_0000_0000_0004).unwrap();
        m.write(Msr::Fixed(2), 0x0500_0000_0000_0000).unwrap();
        m.write(Msr::Fixed(3), 0x0600_0000_0000_0005).unwrap();
        m.write(Msr::Fixed(10), 0x0400_0000_0000_0000).unwrap();
        assert_eq!((at(&m, 0x0), at(&m, 0xf), at(&m, 0x10)), (Wc, Wc, Uc));
        assert_eq!((at(&m, 0x6f), at(&m, 0x70), at(&m, 0x7f)), (Uc, Wb, Wb));
        assert_eq!((at(&m, 0x80), at(&m, 0x83), at(&m, 0x84)), (Wt, Wt, Uc));
        assert_eq!((at(&m, 0xbb), at(&m, 0xbc), at(&m, 0xbf)), (Uc, Wp, Wp));
        assert_eq!(
            (at(&m, 0xc0), at(&m, 0xc1), at(&m, 0xc7), at(&m, 0xc8)),
            (Wp, Uc, Wb, Uc)
        );
        assert_eq!((at(&m, 0xfe), at(&m, 0xff), at(&m, 0x100)), (Uc, Wt, Wb));
    }

    #[test]
    fn fixed_ranges_hide_variable_ones_below_1_mib() {
        let m = with(0xc00, &[(0, GIB, Wb)]);
        assert_eq!((at(&m, 0xff), at(&m, 0x100)), (Uc, Wb));
    }

    #[test]
    fn with_fixed_disabled_variable_ranges_count_below_1_mib() {
        assert_eq!(at(&with(0x800, &[(0, GIB, Wb)]), 0xff), Wb);
    }

    #[test]
    fn no_range_gives_the_default() {
        let m = with(0x804, &[(GIB, GIB, Wb)]);
        assert_eq!(
            (at(&m, 0x3_ffff), at(&m, 0x4_0000), at(&m, 0x7_ffff)),
            (Wt, Wb, Wb)
        );
        assert_eq!(at(&m, 0x8_0000), Wt);
    }

    #[test]
    fn equal_overlaps_are_that_type() {
        assert_eq!(
            at(&with(0x800, &[(0, 4 * GIB, Wp), (0, GIB, Wp)]), 0x200),
            Wp
        );
    }

    #[test]
    fn uc_wins_when_seen_first_and_when_seen_last() {
        // WB 0–4 GiB plus UC 2–4 GiB: the descending-base walk answers WB here.
        let uc_high = with(0x806, &[(0, 4 * GIB, Wb), (2 * GIB, 2 * GIB, Uc)]);
        let uc_low = with(0x806, &[(2 * GIB, 2 * GIB, Uc), (0, 4 * GIB, Wb)]);
        assert_eq!((at(&uc_high, 0x8_0000), at(&uc_low, 0x8_0000)), (Uc, Uc));
        assert_eq!(at(&uc_high, 0x7_ffff), Wb);
    }

    #[test]
    fn wt_wins_over_wb_in_either_order() {
        assert_eq!(
            at(&with(0x800, &[(0, GIB, Wt), (0, 2 * GIB, Wb)]), 0x200),
            Wt
        );
        assert_eq!(
            at(&with(0x800, &[(0, GIB, Wb), (0, 2 * GIB, Wt)]), 0x200),
            Wt
        );
    }

    #[test]
    fn a_three_way_overlap_with_uc_is_uc_in_every_order() {
        let orders = [
            [Wb, Wc, Uc],
            [Wb, Uc, Wc],
            [Wc, Wb, Uc],
            [Wc, Uc, Wb],
            [Uc, Wb, Wc],
            [Uc, Wc, Wb],
        ];
        for [a, b, c] in orders {
            let m = with(0x806, &[(0, GIB, a), (0, 2 * GIB, b), (0, 4 * GIB, c)]);
            assert_eq!(at(&m, 0x200), Uc);
        }
    }

    #[test]
    fn undefined_overlaps_are_wb() {
        assert_eq!(
            at(&with(0x800, &[(0, GIB, Wc), (0, 2 * GIB, Wb)]), 0x200),
            Wb
        );
        assert_eq!(
            at(&with(0x800, &[(0, GIB, Wc), (0, 2 * GIB, Wt)]), 0x200),
            Wb
        );
        assert_eq!(
            at(&with(0x800, &[(0, GIB, Wp), (0, 2 * GIB, Wc)]), 0x200),
            Wb
        );
    }

    #[test]
    fn an_invalid_pair_does_not_count() {
        let mut m = with(0x806, &[(0, GIB, Uc)]);
        m.write(Msr::VariableMask(0), mask(GIB) & !0x800).unwrap();
        assert_eq!(at(&m, 0x200), Wb);
    }

    #[test]
    fn a_mask_with_a_hole_matches_both_pieces_and_not_the_gap() {
        let mut m = with(0x806, &[]);
        m.write(Msr::VariableBase(0), 0x100_0000).unwrap();
        m.write(Msr::VariableMask(0), 0xff_ffef_f800).unwrap();
        assert_eq!(
            (at(&m, 0x1000), at(&m, 0x1001), at(&m, 0x1100)),
            (Uc, Wb, Uc)
        );
        assert_eq!((at(&m, 0x1101), at(&m, 0x1200)), (Wb, Wb));
    }

    #[test]
    fn the_ovmf_layout_is_typed_as_published() {
        // Default WB, fixed bytes 0–15 WB and 16–87 UC, UC 2–4 GiB, later UC 32–64 GiB.
        let mut m = with(
            0xc06,
            &[(0x8000_0000, 2 * GIB, Uc), (0x8_0000_0000, 32 * GIB, Uc)],
        );
        m.write(Msr::Fixed(0), 0x0606_0606_0606_0606).unwrap();
        m.write(Msr::Fixed(1), 0x0606_0606_0606_0606).unwrap();
        assert_eq!((at(&m, 0x9f), at(&m, 0xa0), at(&m, 0xff)), (Wb, Uc, Uc));
        assert_eq!(
            (at(&m, 0x7_ffff), at(&m, 0x8_0000), at(&m, 0xf_ffff)),
            (Wb, Uc, Uc)
        );
        assert_eq!(
            (at(&m, 0x10_0000), at(&m, 0x80_0000), at(&m, 0x100_0000)),
            (Wb, Uc, Wb)
        );
    }
}
