//! How EL2's memory is divided. One contiguous range holds all of it:
//!
//! ```text
//! base                                                                        base + size
//! │ boot │ text, constants, data, bss (image) │ CPU 0 │ CPU 1 │ .. │ low pool │ page states │ frame pool │
//!                                                │
//!        ┌───────────────────────────────────────┘
//!        │ guard │ stack 16 KiB │ guard │ emergency stack 8 KiB │ CPU data 4 KiB │
//! ```
//!
//! `boot` is the first part of the image, what only boot needs: the host's memory once boot is over.
//! Guards are pages that are never mapped: an overflow of a stack faults on the first byte below.
//!
//! Three pages of the two pools, as far apart as these are, are for the memory overwrite request
//! (`overwrite.rs`): a boot loader that works in a part of this memory leaves a copy.

use board::{AddrRange, PAGE_SIZE};

use crate::overwrite::{COPIES, STRIDE};

/// Bytes of a CPU's stack.
pub const STACK: u64 = 4 * PAGE_SIZE;
/// Bytes of a CPU's block: guard, stack, guard, emergency stack, data.
pub const CPU_BLOCK: u64 = PAGE_SIZE + STACK + PAGE_SIZE + EMERGENCY + PAGE_SIZE;
/// Bytes of a CPU's emergency stack: the panic report is formatted on it.
pub const EMERGENCY: u64 = 2 * PAGE_SIZE;
/// Bytes of page state per page of RAM.
pub const STATE_PER_PAGE: u64 = 4;
/// Alignment of EL2's memory: a 64 KiB host kernel must be able to leave it out exactly.
pub const ALIGN: u64 = 0x1_0000;
/// Table pages for EL2's own map and for the host's stage 2, beyond one per GiB of RAM.
const POOL_PAGES: u64 = 128;
/// Pages of the low pool: one of them is at a multiple of [`STRIDE`].
const LOW_PAGES: u64 = STRIDE / PAGE_SIZE;

/// Offsets from EL2's base, in bytes; each part ends where the next one starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    /// First CPU's block.
    pub cpus: u64,
    /// The part of the frame pool before the page states.
    pub low_pool: u64,
    /// Page states.
    pub states: u64,
    /// Frame pool.
    pub pool: u64,
    /// End.
    pub size: u64,
}

/// Where the parts of one CPU's block are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CpuBlock {
    /// Its stack; the page below is a guard.
    pub stack: AddrRange,
    /// Its emergency stack, for exceptions taken at EL2 itself; the page below is a guard.
    pub emergency: AddrRange,
    /// Its data.
    pub data: AddrRange,
}

impl Layout {
    /// The layout for an image of `image` bytes, `cpus` CPUs and `ram` bytes of RAM.
    ///
    /// `None` if the sizes overflow.
    #[must_use]
    pub fn new(image: u64, cpus: u64, ram: u64) -> Option<Self> {
        let gib = ram.div_ceil(1 << 30);
        let start = image.checked_next_multiple_of(PAGE_SIZE)?;
        let low_pool = start.checked_add(cpus.checked_mul(CPU_BLOCK)?)?;
        let states = low_pool.checked_add(LOW_PAGES * PAGE_SIZE)?;
        let states_size = ram.div_ceil(PAGE_SIZE).checked_mul(STATE_PER_PAGE)?;
        let pool = states
            .checked_add(states_size)?
            .checked_next_multiple_of(PAGE_SIZE)?;
        let pages = (POOL_PAGES + COPIES as u64 - LOW_PAGES).checked_add(gib)?;
        let size = pool
            .checked_add(pages.checked_mul(PAGE_SIZE)?)?
            .checked_next_multiple_of(ALIGN)?;
        Some(Self {
            cpus: start,
            low_pool,
            states,
            pool,
            size,
        })
    }

    /// The block of CPU `index` for EL2's memory at `base`; `None` beyond the last CPU.
    #[must_use]
    pub fn cpu(&self, base: u64, index: u64) -> Option<CpuBlock> {
        let start = index.checked_mul(CPU_BLOCK)?.checked_add(self.cpus)?;
        if start.checked_add(CPU_BLOCK)? > self.low_pool {
            return None;
        }
        let stack = AddrRange::with_size(base.checked_add(start + PAGE_SIZE)?, STACK)?;
        let emergency = AddrRange::with_size(stack.end().checked_add(PAGE_SIZE)?, EMERGENCY)?;
        let data = AddrRange::with_size(emergency.end(), PAGE_SIZE)?;
        Some(CpuBlock {
            stack,
            emergency,
            data,
        })
    }
}

impl Layout {
    /// Where the copies of the overwrite request are, for EL2's memory at `base`, a multiple of [`ALIGN`].
    #[must_use]
    pub fn copies(&self, base: u64) -> [u64; COPIES] {
        let first = |from: u64| base + from.next_multiple_of(STRIDE);
        [
            first(self.low_pool),
            first(self.pool),
            base + self.size - STRIDE,
        ]
    }

    /// The frame pool, for EL2's memory at `base`: its largest part, and the others.
    #[must_use]
    pub fn pools(&self, base: u64) -> (Option<AddrRange>, [Option<AddrRange>; 4]) {
        let [low, middle, high] = self.copies(base);
        let range = AddrRange::new;
        let others = [
            range(base + self.low_pool, low),
            range(low + PAGE_SIZE, base + self.states),
            range(base + self.pool, middle),
            range(high + PAGE_SIZE, base + self.size),
        ];
        (range(middle + PAGE_SIZE, high), others)
    }
}

/// The size in memory that an arm64 Image states in its header, in bytes; `None` if this is none
/// (Linux arm64 boot protocol: `image_size` at 16, magic at 56).
#[must_use]
pub fn image_size(image: &[u8]) -> Option<u64> {
    let header = image.get(..64)?;
    if header.get(56..60)? != b"ARM\x64" {
        return None;
    }
    let size = header.get(16..24)?.try_into().ok()?;
    Some(u64::from_le_bytes(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_page_aligned() {
        let layout = Layout::new(0x2_a123, 4, 1 << 30).unwrap();
        assert_eq!(layout.cpus, 0x2_b000);
        assert_eq!(layout.low_pool, 0x2_b000 + 4 * 0x9000);
        assert_eq!(layout.states, layout.low_pool + 0x1_0000);
        assert_eq!(layout.pool, layout.states + (1 << 20));
        assert_eq!(layout.size % ALIGN, 0);
    }

    #[test]
    fn resident_memory_stays_under_2_mib_and_a_500th_of_ram() {
        for gib in [1u64, 2, 8, 64] {
            let layout = Layout::new(0x4_0000, 8, gib << 30).unwrap();
            assert!(layout.size < (2 << 20) + (gib << 30) / 500, "{gib} GiB");
        }
    }

    #[test]
    fn stacks_have_a_hole_below_and_lie_inside_their_block() {
        let layout = Layout::new(0x1000, 2, 1 << 30).unwrap();
        let first = layout.cpu(0x8000_0000, 0).unwrap();
        let second = layout.cpu(0x8000_0000, 1).unwrap();
        assert_eq!(first.stack.start(), 0x8000_2000);
        assert_eq!(first.stack.end() + PAGE_SIZE, first.emergency.start());
        assert_eq!(first.data.end() + PAGE_SIZE, second.stack.start());
        assert_eq!(second.data.end(), 0x8000_0000 + layout.low_pool);
        assert_eq!(layout.cpu(0x8000_0000, 2), None);
    }

    #[test]
    fn the_pool_is_whole_but_for_the_requests_copies() {
        for image in [0x1000, 0x4_0000, 0x5_f123] {
            let layout = Layout::new(image, 3, 5 << 30).unwrap();
            let base = 0x8000_0000;
            let copies = layout.copies(base);
            let (main, others) = layout.pools(base);
            let parts: std::vec::Vec<_> = others.into_iter().flatten().chain(main).collect();
            for copy in copies {
                let page = AddrRange::with_size(copy, PAGE_SIZE).unwrap();
                assert!(copy.is_multiple_of(STRIDE) && page.end() <= base + layout.size);
                assert!(parts.iter().all(|part| !part.overlaps(page)));
            }
            let pages: u64 = parts.iter().map(|part| part.size() / PAGE_SIZE).sum();
            assert!(pages >= POOL_PAGES + 5);
            assert!(main.unwrap().size() > 48 * PAGE_SIZE);
            let low = layout.low_pool..layout.states;
            assert!(low.contains(&(copies[0] - base)));
            assert!(copies[1] >= base + layout.pool && copies[1] + STRIDE <= copies[2]);
        }
    }

    #[test]
    fn image_size_is_read_only_behind_the_magic() {
        let mut image = [0; 64];
        image[16..24].copy_from_slice(&0x12_3000u64.to_le_bytes());
        assert_eq!(image_size(&image), None);
        image[56..60].copy_from_slice(b"ARM\x64");
        assert_eq!(image_size(&image), Some(0x12_3000));
        assert_eq!(image_size(&image[..63]), None);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert_eq!(Layout::new(u64::MAX, 1, 1), None);
        assert_eq!(Layout::new(1, u64::MAX / 2, 1), None);
    }
}
