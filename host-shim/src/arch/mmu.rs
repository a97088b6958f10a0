//! The host's stage 1: everything below 1 TiB, identity mapped.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use aarch64_paging::MapError;
use aarch64_paging::descriptor::{El1Attributes, PhysicalAddress};
use aarch64_paging::paging::{
    Constraints, El1And0, MemoryRegion, PageTable, RootTable, Translation, VaRange,
};
use board::{AddrRange, MAX_MEMORY, RangeList};

/// MAIR_EL1: 0 = Device-nGnRE, 1 = Normal write-back.
const MAIR: u64 = 0xff04;
const DEVICE: El1Attributes = El1Attributes::VALID
    .union(El1Attributes::ATTRIBUTE_INDEX_0)
    .union(El1Attributes::ACCESSED)
    .union(El1Attributes::UXN);
const NORMAL: El1Attributes = DEVICE
    .union(El1Attributes::ATTRIBUTE_INDEX_1)
    .union(El1Attributes::INNER_SHAREABLE);
/// SCTLR_EL1: RES1 bits, M, C, I.
const SCTLR_ON: u64 = 0x30d0_0800 | 1 | 1 << 2 | 1 << 12;
/// Everything that is mapped.
const EVERYTHING: usize = 1 << 40;

const TABLES: usize = 96;

#[repr(C, align(4096))]
struct Pages([[u64; 512]; TABLES]);

static mut PAGES: Pages = Pages([[0; 512]; TABLES]);

/// Tables from a static array; the host never frees any.
struct Pool {
    used: usize,
}

impl Translation<El1Attributes> for Pool {
    fn allocate_table(&mut self) -> (NonNull<PageTable<El1Attributes>>, PhysicalAddress) {
        assert!(self.used < TABLES, "the host's page tables are used up");
        let first = (&raw mut PAGES).cast::<PageTable<El1Attributes>>();
        // SAFETY: inside the array: `used` is below its length.
        let page = unsafe { first.add(self.used) };
        self.used += 1;
        let address = PhysicalAddress(page.expose_provenance());
        (self.physical_to_virtual(address), address)
    }

    unsafe fn deallocate_table(&mut self, _: NonNull<PageTable<El1Attributes>>) {}

    fn physical_to_virtual(&self, pa: PhysicalAddress) -> NonNull<PageTable<El1Attributes>> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(pa.0))
            .expect("a table is in the image, which is not at address 0")
    }
}

/// Register values with which every core turns on its MMU.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) ttbr0: u64,
    pub(crate) tcr: u64,
    pub(crate) mair: u64,
    pub(crate) sctlr: u64,
}

unsafe extern "C" {
    fn enable_mmu(ttbr0: u64, tcr: u64, mair: u64, sctlr: u64);
}

/// Builds the map and turns the MMU on.
pub(crate) fn enable(memory: &RangeList<MAX_MEMORY>) -> Result<Settings, MapError> {
    let pool = Pool { used: 0 };
    let root = RootTable::with_va_range(pool, 0, El1And0, VaRange::Lower);
    let mut root = ManuallyDrop::new(root);
    let mut map = |range: MemoryRegion, how| {
        let to = PhysicalAddress(range.start().0);
        root.map_range(&range, to, how, Constraints::empty())
    };
    map(MemoryRegion::new(0, EVERYTHING), DEVICE)?;
    for ram in memory.as_slice() {
        map(
            MemoryRegion::new(ram.start() as usize, ram.end() as usize),
            NORMAL,
        )?;
    }
    let settings = Settings {
        ttbr0: root.to_physical().0 as u64,
        tcr: tcr(),
        mair: MAIR,
        sctlr: SCTLR_ON,
    };
    // The image was written past the caches until now (bss, tables): what they may hold of it is older.
    if let Some(image) = super::mem::image() {
        super::mem::clean_invalidate_to_poc(image);
    }
    // SAFETY: everything that runs or is referred to is identity mapped.
    unsafe { enable_mmu(settings.ttbr0, settings.tcr, settings.mair, settings.sctlr) };
    Ok(settings)
}

/// TCR_EL1: 48-bit addresses below, nothing above (EPD1), 4 KiB granule, walks cacheable; IPS as
/// the core has it, at most 48 bits.
fn tcr() -> u64 {
    let ips = (super::mrs!("id_aa64mmfr0_el1") & 0xf).min(5);
    ips << 32 | 1 << 23 | 3 << 12 | 1 << 10 | 1 << 8 | 16
}

/// Reads a 32-bit word with the MMU off, so that every address can be tried. The caller expects
/// a fault (see `fault`).
pub(crate) fn read_physical(address: u64) -> u32 {
    let value: u64;
    // SAFETY: the code is identity mapped and uses no memory while the MMU is off.
    unsafe {
        core::arch::asm!(
            "mrs {sctlr}, sctlr_el1",
            "bic {off}, {sctlr}, #1",
            "msr sctlr_el1, {off}",
            "isb",
            "mov {value}, xzr",
            "ldr {value:w}, [{address}]",
            "dsb sy",
            "msr sctlr_el1, {sctlr}",
            "isb",
            sctlr = out(reg) _, off = out(reg) _, value = out(reg) value,
            address = in(reg) address, options(nostack, preserves_flags));
    }
    value as u32
}

/// The whole of memory as ranges for scenarios: RAM that may be tried.
pub(crate) fn mapped(range: AddrRange) -> bool {
    range.end() <= EVERYTHING as u64
}

/// Whether the MMU is on: before, locks must not be used.
pub(crate) fn is_on() -> bool {
    super::mrs!("sctlr_el1") & 1 != 0
}
