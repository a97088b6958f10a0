//! EL2's own stage 1: the identity map, W^X.
//!
//! Text is read-execute, constants (with the relocated ones) read-only, everything else
//! read-write and never executable; SCTLR_EL2.WXN enforces it a second time. Guard pages and
//! memory that firmware marked `no-map` are not mapped at all.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use aarch64_paging::MapError;
use aarch64_paging::descriptor::{El23Attributes, PhysicalAddress};
use aarch64_paging::paging::{Constraints, El2, MemoryRegion, PageTable, RootTable, Translation};
use board::{AddrRange, PAGE_SIZE};

use super::frames::shared_word;
use super::{instructions, mem, regs};

/// MAIR_EL2: 0 = Device-nGnRE, 1 = Normal write-back (Arm ARM D24.2.116).
const MAIR: u64 = 0xff04;

/// Normal write-back, read-write, never executable.
pub(crate) const DATA: El23Attributes = El23Attributes::VALID
    .union(El23Attributes::ATTRIBUTE_INDEX_1)
    .union(El23Attributes::INNER_SHAREABLE)
    .union(El23Attributes::USER_RES1)
    .union(El23Attributes::ACCESSED)
    .union(El23Attributes::XN);
/// Read-only, never executable.
pub(crate) const CONSTANTS: El23Attributes = DATA.union(El23Attributes::READ_ONLY);
/// Read-only, executable.
pub(crate) const TEXT: El23Attributes = CONSTANTS.difference(El23Attributes::XN);
/// Device-nGnRE.
pub(crate) const DEVICE: El23Attributes = DATA.difference(El23Attributes::ATTRIBUTE_INDEX_1);

/// Pages for tables, taken from the start of the frame pool before there is an allocator.
#[derive(Debug)]
pub(crate) struct EarlyTables {
    next: u64,
    end: u64,
}

impl EarlyTables {
    /// Pages from the start of EL2's pool, at boot, before there is an allocator over it.
    pub(crate) fn from_pool(range: AddrRange) -> Self {
        Self {
            next: range.start(),
            end: range.end(),
        }
    }
}

impl Translation<El23Attributes> for EarlyTables {
    fn allocate_table(&mut self) -> (NonNull<PageTable<El23Attributes>>, PhysicalAddress) {
        let page = self.next;
        assert!(page < self.end, "EL2's pool is too small for its own map");
        self.next += PAGE_SIZE;
        // SAFETY: EL2's own pool, unused before; each page is given out once.
        unsafe { mem::slice_at::<u64>(page, PAGE_SIZE as usize / 8) }.fill(0);
        let address = PhysicalAddress(page as usize);
        (self.physical_to_virtual(address), address)
    }

    unsafe fn deallocate_table(&mut self, _: NonNull<PageTable<El23Attributes>>) {
        // The map is only ever built, and lives for ever.
    }

    fn physical_to_virtual(&self, pa: PhysicalAddress) -> NonNull<PageTable<El23Attributes>> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(pa.0))
            .expect("a table is never at address 0: it is in EL2's memory")
    }
}

/// EL2's map while it is being built.
pub(crate) struct Map {
    root: ManuallyDrop<RootTable<El2, EarlyTables>>,
}

impl core::fmt::Debug for Map {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Map").finish_non_exhaustive()
    }
}

impl Map {
    /// An empty map with 48-bit addresses.
    pub(crate) fn new(tables: EarlyTables) -> Self {
        Self {
            root: ManuallyDrop::new(RootTable::new(tables, 0, El2)),
        }
    }

    /// Maps `range` to itself.
    pub(crate) fn map(&mut self, range: AddrRange, how: El23Attributes) -> Result<(), MapError> {
        let region = MemoryRegion::new(range.start() as usize, range.end() as usize);
        let to = PhysicalAddress(region.start().0);
        self.root.map_range(&region, to, how, Constraints::empty())
    }

    /// Where the pool's unused pages start.
    pub(crate) fn pages_left_from(&self) -> u64 {
        self.root.translation().next
    }

    /// The values with which every core turns on its MMU.
    pub(crate) fn settings(&self, pa_bits: u8) -> Settings {
        Settings {
            ttbr0: self.root.to_physical().0 as u64,
            tcr: tcr(pa_bits),
            mair: MAIR,
            sctlr: SCTLR_ON,
        }
    }
}

/// Register values of EL2's stage 1.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) ttbr0: u64,
    pub(crate) tcr: u64,
    pub(crate) mair: u64,
    pub(crate) sctlr: u64,
}

/// SCTLR_EL2: RES1 bits, M, C, SA (stack alignment), I, WXN (Arm ARM D24.2.172).
const SCTLR_ON: u64 = 0x30c5_0830 | 1 | 1 << 2 | 1 << 3 | 1 << 12 | 1 << 19;

/// TCR_EL2 without VHE (Arm ARM D24.2.197): 48-bit addresses (T0SZ 16), 4 KiB granule, walks
/// inner and outer write-back, inner shareable; PS from the core, at most 48 bits; RES1 31 and 23.
const fn tcr(pa_bits: u8) -> u64 {
    let ps = match pa_bits {
        0..=35 => 0,
        36..=39 => 1,
        40..=41 => 2,
        42..=43 => 3,
        44..=47 => 4,
        _ => 5,
    };
    1 << 31 | 1 << 23 | ps << 16 | 3 << 12 | 1 << 10 | 1 << 8 | 16
}

unsafe extern "C" {
    fn enable_mmu(ttbr0: u64, tcr: u64, mair: u64, sctlr: u64);
}

/// Turns on the boot core's MMU and caches, with the map that boot has built.
pub(crate) fn enable_first(settings: &Settings) {
    // SAFETY: the map holds the image with its permissions, the boot stack in it, RAM and the
    // console; the code is identity mapped.
    unsafe { enable_mmu(settings.ttbr0, settings.tcr, settings.mair, settings.sctlr) };
}

/// Makes a part of EL2's map data: it was mapped page by page, with other permissions, and no core
/// uses it any more. Says whether all of it was mapped so; where not, nothing has changed.
///
/// Break-before-make over all of it at once (Arm ARM D8.16.1): between the two halves no core has a
/// translation of it. A change of permissions alone would not need that; it costs one invalidation.
pub(crate) fn make_data(range: AddrRange) -> bool {
    let pages = || (range.start()..range.end()).step_by(PAGE_SIZE as usize);
    if !pages().all(|page| leaf(page).is_some()) {
        return false;
    }
    store_leaves(pages(), |_| 0);
    instructions::tlbi_alle2is();
    instructions::dsb_ish();
    instructions::isb();
    let page = DATA.union(El23Attributes::TABLE_OR_PAGE).bits() as u64;
    store_leaves(pages(), |address| address | page);
    instructions::isb();
    true
}

fn store_leaves(pages: impl Iterator<Item = u64>, value: impl Fn(u64) -> u64) {
    for page in pages {
        if let Some(entry) = leaf(page) {
            entry.store(value(page), Ordering::Relaxed);
        }
    }
    instructions::dsb_ishst();
}

/// The entry of the last level for an address of EL2's map; `None` if a block maps it, or nothing
/// has a table for it.
fn leaf(address: u64) -> Option<&'static AtomicU64> {
    const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
    let mut table = regs::mrs!("ttbr0_el2") & ADDRESS;
    for shift in [39, 30, 21] {
        let entry = shared_word(table + 8 * (address >> shift & 0x1ff)).load(Ordering::Relaxed);
        if entry & 3 != 3 {
            return None;
        }
        table = entry & ADDRESS;
    }
    Some(shared_word(table + 8 * (address >> 12 & 0x1ff)))
}
