//! EL2's own stage 1: the identity map, W^X.
//!
//! Text is read-execute, constants (with the relocated ones) read-only, everything else
//! read-write and never executable; SCTLR_EL2.WXN enforces it a second time. Guard pages and
//! memory that firmware marked `no-map` are not mapped at all.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use aarch64_paging::MapError;
use aarch64_paging::descriptor::{El23Attributes, PhysicalAddress};
use aarch64_paging::paging::{Constraints, El2, MemoryRegion, PageTable, RootTable, Translation};
use board::{AddrRange, PAGE_SIZE};

use super::mem;

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
