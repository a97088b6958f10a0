//! Where in memory something of our own can go.

use crate::{AddrRange, RangeList};

/// What is wanted: `size` bytes, aligned to `align` (a power of two), below `limit`.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// Bytes, at least 1.
    pub size: u64,
    /// Alignment in bytes, a power of two.
    pub align: u64,
    /// First address that may not be used.
    pub limit: u64,
}

/// The highest aligned place in `memory` that overlaps nothing in `taken`.
#[must_use]
pub fn highest_free<const M: usize, const T: usize>(
    memory: &RangeList<M>,
    taken: &RangeList<T>,
    want: Placement,
) -> Option<AddrRange> {
    memory
        .as_slice()
        .iter()
        .rev()
        .find_map(|ram| highest_in(*ram, taken, want))
}

fn highest_in<const T: usize>(
    ram: AddrRange,
    taken: &RangeList<T>,
    want: Placement,
) -> Option<AddrRange> {
    let mut end = ram.end().min(want.limit);
    loop {
        let start = end.checked_sub(want.size)?;
        let start = start - start % want.align;
        if start < ram.start() {
            return None;
        }
        let candidate = AddrRange::with_size(start, want.size)?;
        match taken.overlapping(candidate) {
            None => return Some(candidate),
            Some(obstacle) => end = obstacle.start(),
        }
    }
}

/// The lowest aligned place in `memory` that overlaps nothing in `taken`.
#[must_use]
pub fn lowest_free<const M: usize, const T: usize>(
    memory: &RangeList<M>,
    taken: &RangeList<T>,
    want: Placement,
) -> Option<AddrRange> {
    memory
        .as_slice()
        .iter()
        .find_map(|ram| lowest_in(*ram, taken, want))
}

fn lowest_in<const T: usize>(
    ram: AddrRange,
    taken: &RangeList<T>,
    want: Placement,
) -> Option<AddrRange> {
    let mut from = ram.start();
    loop {
        let start = from.checked_next_multiple_of(want.align)?;
        let candidate = AddrRange::with_size(start, want.size)?;
        if candidate.end() > ram.end().min(want.limit) {
            return None;
        }
        match taken.overlapping(candidate) {
            None => return Some(candidate),
            Some(obstacle) => from = obstacle.end(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANT: Placement = Placement {
        size: 0x1000,
        align: 0x1000,
        limit: u64::MAX,
    };

    fn lists(ram: &[(u64, u64)], taken: &[(u64, u64)]) -> (RangeList<4>, RangeList<4>) {
        let mut lists = (RangeList::new(), RangeList::new());
        for &(start, end) in ram {
            lists
                .0
                .insert(AddrRange::new(start, end).unwrap(), "ram")
                .unwrap();
        }
        for &(start, end) in taken {
            lists
                .1
                .insert(AddrRange::new(start, end).unwrap(), "taken")
                .unwrap();
        }
        lists
    }

    #[test]
    fn highest_free_takes_the_top_of_the_last_range() {
        let (ram, taken) = lists(&[(0, 0x8000), (0x1_0000, 0x1_8800)], &[]);
        let place = highest_free(&ram, &taken, WANT).unwrap();
        assert_eq!(place.start(), 0x1_7000);
    }

    #[test]
    fn highest_free_goes_below_what_is_taken() {
        let (ram, taken) = lists(&[(0, 0x8000)], &[(0x6800, 0x8000)]);
        assert_eq!(highest_free(&ram, &taken, WANT).unwrap().start(), 0x5000);
    }

    #[test]
    fn limit_is_respected() {
        let (ram, taken) = lists(&[(0, 0x8000)], &[]);
        let want = Placement {
            limit: 0x3000,
            ..WANT
        };
        assert_eq!(highest_free(&ram, &taken, want).unwrap().start(), 0x2000);
        assert_eq!(
            lowest_free(
                &ram,
                &taken,
                Placement {
                    limit: 0x800,
                    ..WANT
                }
            ),
            None
        );
    }

    #[test]
    fn lowest_free_skips_what_is_taken() {
        let (ram, taken) = lists(&[(0x800, 0x8000)], &[(0x1800, 0x2001)]);
        assert_eq!(lowest_free(&ram, &taken, WANT).unwrap().start(), 0x3000);
    }

    #[test]
    fn nothing_is_found_where_nothing_fits() {
        let (ram, taken) = lists(&[(0, 0x2000)], &[(0x800, 0x1800)]);
        assert_eq!(highest_free(&ram, &taken, WANT), None);
        assert_eq!(lowest_free(&ram, &taken, WANT), None);
        let huge = Placement {
            size: u64::MAX,
            ..WANT
        };
        assert_eq!(lowest_free(&ram, &taken, huge), None);
    }
}
