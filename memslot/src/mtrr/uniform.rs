//! Whether a whole block has one memory type, exactly.
//!
//! A block may be mapped by one leaf only if all its pages have the same type. The answer is
//! found by fixing, from the top, only those address bits that some pair compares inside the
//! block: on one side of each such bit a pair drops out, so that aligned ranges need a handful
//! of steps. Pathological masks are cut off by [`STEPS`]; then the answer is "mixed", which
//! costs a smaller leaf and is never wrong.

use super::lookup::{FIXED_END, TypeSet};
use super::registers::Mtrrs;
use crate::addr::Gfn;
use crate::pat::X86Type;

/// Most pieces looked at for one block. Eight aligned ranges in a 1 GiB block need at most
/// 8 × 18 + 1.
const STEPS: u32 = 4096;

/// What is known about an aligned block.
struct Search<'a> {
    mtrrs: &'a Mtrrs,
    /// The type of all pages seen so far.
    found: Option<X86Type>,
    steps: u32,
}

impl Mtrrs {
    /// The type of all pages of the block of 2^`order` pages around `gfn`, or `None` if they
    /// differ. Order 0 always has an answer.
    #[must_use]
    pub fn block_type(&self, gfn: Gfn, order: u32) -> Option<X86Type> {
        if !self.enabled() {
            return Some(self.disabled_type());
        }
        if order == 0 {
            return Some(self.page_type(gfn));
        }
        let npages = 1u64
            .checked_shl(order)
            .filter(|n| *n <= crate::addr::GFN_LIMIT)?;
        let first = gfn.get() & !(npages - 1);
        let mut search = Search {
            mtrrs: self,
            found: None,
            steps: 0,
        };
        let uniform = if first < FIXED_END && self.fixed_enabled() {
            search.low_block(first, npages)
        } else {
            search.aligned(first << 12, (npages - 1) << 12)
        };
        if uniform { search.found } else { None }
    }
}

impl Search<'_> {
    /// A block that begins below 1 MiB: fixed bytes first, then aligned pieces above.
    fn low_block(&mut self, first: u64, npages: u64) -> bool {
        let fixed_end = FIXED_END.min(first + npages);
        // At most 256 pages.
        let mut uniform = (first..fixed_end).all(|page| self.see(self.mtrrs.type_of_page(page)));
        // Above 1 MiB the block splits into [1, 2), [2, 4), [4, 8) … MiB, each aligned.
        let mut piece = FIXED_END;
        while uniform && piece < first + npages {
            uniform = self.aligned(piece << 12, (piece - 1) << 12);
            piece *= 2;
        }
        uniform
    }

    /// The pages whose address equals `addr` outside the bits of `free`.
    fn aligned(&mut self, addr: u64, free: u64) -> bool {
        self.steps += 1;
        if self.steps > STEPS {
            return false;
        }
        let mut types = TypeSet::default();
        let mut undecided = 0;
        for pair in self.mtrrs.variable.iter().filter(|p| p.is_valid()) {
            if (addr ^ pair.base) & pair.compared() & !free != 0 {
                continue;
            }
            match pair.compared() & free {
                0 => types.add(pair.kind()),
                bits => undecided |= bits,
            }
        }
        if undecided == 0 {
            return self.see(types.resolve(self.mtrrs.default_type()));
        }
        let bit = 1 << (63 - undecided.leading_zeros());
        self.aligned(addr, free & !bit) && self.aligned(addr | bit, free & !bit)
    }

    fn see(&mut self, t: X86Type) -> bool {
        *self.found.get_or_insert(t) == t
    }
}

// Arithmetic only: nothing for Miri to see, and long in it.
#[cfg(not(miri))]
#[cfg(test)]
mod tests {
    use super::super::registers::Msr;
    use super::*;
    use crate::addr::gfn;
    use X86Type::{Uc, Wb, Wc, Wt};
    use proptest::prelude::*;

    const MIB2: u32 = 9;
    const GIB1: u32 = 18;

    fn with(def: u64, pairs: &[(u64, u64)]) -> Mtrrs {
        let mut m = Mtrrs::new(40, true);
        m.write(Msr::DefaultType, def).unwrap();
        for (n, &(base, mask)) in (0u8..).zip(pairs) {
            m.write(Msr::VariableBase(n), base).unwrap();
            m.write(Msr::VariableMask(n), mask).unwrap();
        }
        m
    }

    fn all_wb_fixed(m: &mut Mtrrs) {
        for n in 0..11 {
            m.write(Msr::Fixed(n), 0x0606_0606_0606_0606).unwrap();
        }
    }

    #[test]
    fn disabled_is_uniform() {
        assert_eq!(Mtrrs::new(40, true).block_type(gfn(0), GIB1), Some(Uc));
        assert_eq!(Mtrrs::new(40, false).block_type(gfn(0), GIB1), Some(Wb));
    }

    #[test]
    fn a_block_across_a_range_border_is_mixed() {
        // UC, 4 KiB at 4 MiB.
        let m = with(0x806, &[(0x40_0000, 0xff_ffff_f800)]);
        assert_eq!(m.block_type(gfn(0x400), MIB2), None);
        assert_eq!(m.block_type(gfn(0x400), 0), Some(Uc));
        assert_eq!(m.block_type(gfn(0x5ff), MIB2), None);
        assert_eq!(m.block_type(gfn(0x600), MIB2), Some(Wb));
        assert_eq!(m.block_type(gfn(0x3ff), MIB2), Some(Wb));
    }

    #[test]
    fn adjoining_equal_ranges_are_uniform() {
        // WT 4–5 MiB and WT 5–6 MiB; the default is WB.
        let m = with(
            0x806,
            &[(0x40_0004, 0xff_fff0_0800), (0x50_0004, 0xff_fff0_0800)],
        );
        assert_eq!(m.block_type(gfn(0x400), MIB2), Some(Wt));
    }

    #[test]
    fn overlaps_that_resolve_to_one_type_are_uniform() {
        // UC over the block, WB over its first half.
        let m = with(
            0x806,
            &[(0x40_0000, 0xff_ffe0_0800), (0x40_0006, 0xff_fff0_0800)],
        );
        assert_eq!(m.block_type(gfn(0x400), MIB2), Some(Uc));
    }

    #[test]
    fn the_first_block_needs_fixed_bytes_and_tail_to_agree() {
        let mut m = with(0xc06, &[]);
        assert_eq!(m.block_type(gfn(0), MIB2), None);
        all_wb_fixed(&mut m);
        assert_eq!(m.block_type(gfn(0), MIB2), Some(Wb));
        assert_eq!(m.block_type(gfn(0), GIB1), Some(Wb));
        m.write(Msr::Fixed(10), 0x0106_0606_0606_0606).unwrap();
        assert_eq!(m.block_type(gfn(0), MIB2), None);
    }

    #[test]
    fn a_range_from_1_mib_on_counts_for_the_first_block() {
        // UC [1, 2) MiB; fixed all WB.
        let mut m = with(0xc06, &[(0x10_0000, 0xff_fff0_0800)]);
        all_wb_fixed(&mut m);
        assert_eq!(m.block_type(gfn(0), MIB2), None);
        // With WB there the block is uniform although the tail has a range of its own.
        m.write(Msr::VariableBase(0), 0x10_0006).unwrap();
        assert_eq!(m.block_type(gfn(0), MIB2), Some(Wb));
        assert_eq!(m.block_type(gfn(0x1f), MIB2), Some(Wb));
    }

    #[test]
    fn a_block_right_behind_the_fixed_area_is_looked_at_alone() {
        // UC, the third page above 1 MiB.
        let m = with(0xc06, &[(0x10_2000, 0xff_ffff_f800)]);
        assert_eq!(m.block_type(gfn(0x100), 1), Some(Wb));
        assert_eq!(m.block_type(gfn(0x100), 2), None);
    }

    #[test]
    fn what_stands_behind_the_first_block_does_not_count() {
        // UC from 2 to 4 MiB.
        let mut m = with(0xc06, &[(0x20_0000, 0xff_ffe0_0800)]);
        all_wb_fixed(&mut m);
        assert_eq!(m.block_type(gfn(0), MIB2), Some(Wb));
        assert_eq!(m.block_type(gfn(0x200), MIB2), Some(Uc));
    }

    #[test]
    fn masks_that_take_too_many_steps_count_as_mixed() {
        // Each pair, WB as the default, compares three bits of its own below 1 GiB: 4^6 pieces.
        let pair = |n: u64| (0x4000_0006, 0xff_c000_0800 | 0b111 << (12 + 3 * n));
        let pairs: std::vec::Vec<_> = (0..6).map(pair).collect();
        let m = with(0x806, &pairs);
        assert_eq!(m.block_type(gfn(0x4_0000), GIB1), None);
        assert_eq!(m.block_type(gfn(0x4_0000), MIB2), Some(Wb));
    }

    #[test]
    fn the_last_page_of_the_first_gib_counts() {
        let mut m = with(0xc06, &[(0x3fff_f001, 0xff_ffff_f800)]);
        all_wb_fixed(&mut m);
        assert_eq!(m.block_type(gfn(0), GIB1), None);
        assert_eq!(m.block_type(gfn(0x3_ffff), 0), Some(Wc));
    }

    #[test]
    fn every_other_page_of_the_default_type_is_uniform() {
        // Compares bit 12 and everything above 1 GiB; WB as the default.
        let m = with(0x806, &[(0x4000_0006, 0xff_c000_1800)]);
        assert_eq!(m.block_type(gfn(0x4_0000), GIB1), Some(Wb));
        // The same pages UC are mixed.
        let m = with(0x806, &[(0x4000_0000, 0xff_c000_1800)]);
        assert_eq!(m.block_type(gfn(0x4_0000), GIB1), None);
    }

    #[test]
    fn an_impossible_order_has_no_type() {
        assert_eq!(with(0x806, &[]).block_type(gfn(0), 64), None);
        assert_eq!(with(0x806, &[]).block_type(gfn(0), 53), None);
    }

    #[test]
    fn eight_aligned_ranges_stay_within_the_steps() {
        // Eight 4 KiB WB ranges spread over 1 GiB, all like the default: the longest search.
        let page = |n: u64| (0x4000_0006 + n * 0x0777_7000, 0xff_ffff_f800);
        let pairs: std::vec::Vec<_> = (0..8).map(page).collect();
        assert_eq!(
            with(0x806, &pairs).block_type(gfn(0x4_0000), GIB1),
            Some(Wb)
        );
    }

    fn pair() -> impl Strategy<Value = (u64, u64)> {
        let kind = prop::sample::select(std::vec![0u64, 1, 4, 5, 6]);
        // Addresses below 8 MiB, masks with and without holes.
        (kind, 0u64..0x800, 0u64..0x800, any::<bool>()).prop_map(|(t, base, holes, contiguous)| {
            let low = if contiguous {
                !0x7ffu64 << holes.count_ones() >> 1
            } else {
                !0x7ff | holes
            };
            (base << 12 | t, (low << 12 & 0xff_ffff_f000) | 0x800)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn uniformity_is_exact(
            pairs in prop::collection::vec(pair(), 0..9),
            fixed in prop::collection::vec(prop::sample::select(std::vec![0x06u64, 0x06, 0]), 11),
            def in prop::sample::select(std::vec![0x806u64, 0xc06, 0x800, 0xc04]),
            block in 0u64..4,
        ) {
            let mut m = with(def, &pairs);
            for (n, byte) in (0u8..).zip(fixed) {
                m.write(Msr::Fixed(n), byte * 0x0101_0101_0101_0101).unwrap();
            }
            let first = block << MIB2;
            let types: std::collections::BTreeSet<_> =
                (first..first + 512).map(|g| m.page_type(gfn(g))).collect();
            let want = if types.len() == 1 { types.first().copied() } else { None };
            prop_assert_eq!(m.block_type(gfn(first + 77), MIB2), want);
        }
    }
}
