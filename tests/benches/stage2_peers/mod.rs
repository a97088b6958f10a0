//! The peers, on the same arena.

use std::hint::black_box;
use std::ptr::NonNull;
use std::time::Duration;

use aarch64_paging::Mapping;
use aarch64_paging::descriptor::{PhysicalAddress, Stage2Attributes};
use aarch64_paging::paging::{Constraints, MemoryRegion, PageTable, Stage2, Translation};
use memory_addr::{PhysAddr, VirtAddr};
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{MappingFlags, PageSize, PageTable64, PagingHandler, PagingMetaData};

use crate::stage2_memory::Machine;
use crate::{BLOCK, EMPTY_TABLES, GIB, PAGE, PAGES, shuffled, time};

struct Arena(&'static Machine);

type Table = PageTable<Stage2Attributes>;

impl Translation<Stage2Attributes> for Arena {
    fn allocate_table(&mut self) -> (NonNull<Table>, PhysicalAddress) {
        let offset = self.0.take_zeroed();
        (self.0.at(offset).cast(), PhysicalAddress(offset))
    }
    unsafe fn deallocate_table(&mut self, table: NonNull<Table>) {
        self.0.give(self.0.offset_of(table.as_ptr().cast()));
    }
    fn physical_to_virtual(&self, pa: PhysicalAddress) -> NonNull<Table> {
        self.0.at(pa.0).cast()
    }
}

fn attributes() -> Stage2Attributes {
    Stage2Attributes::VALID
        | Stage2Attributes::MEMATTR_NORMAL_INNER_WB
        | Stage2Attributes::MEMATTR_NORMAL_OUTER_WB
        | Stage2Attributes::S2AP_ACCESS_RW
        | Stage2Attributes::SH_INNER
        | Stage2Attributes::ACCESS_FLAG
}

/// google/aarch64-paging, stage-2 regime, table not live: its live path issues instructions.
pub struct AarchPaging;

impl AarchPaging {
    fn empty() -> Mapping<Arena, Stage2> {
        Self::on(Machine::fresh())
    }

    fn on(machine: &'static Machine) -> Mapping<Arena, Stage2> {
        Mapping::new(Arena(machine), 1, Stage2)
    }

    fn fill(map: &mut Mapping<Arena, Stage2>, start: u64, size: u64, unit: u64) {
        let region = MemoryRegion::new(start as usize, (start + size) as usize);
        let mut limits = Constraints::NO_CONTIGUOUS_HINT;
        if unit == PAGE {
            limits |= Constraints::NO_BLOCK_MAPPINGS;
        }
        let pa = PhysicalAddress((4 * GIB + start) as usize);
        map.map_range(black_box(&region), pa, attributes(), limits)
            .expect("memory suffices");
    }

    fn filled() -> Mapping<Arena, Stage2> {
        let mut map = Self::empty();
        Self::fill(&mut map, 0, GIB, PAGE);
        map
    }

    /// It has no limit on blocks but "none": 2 MiB blocks are one call for each.
    pub fn map(unit: u64) -> Duration {
        let mut map = Self::empty();
        time(|| {
            if unit == BLOCK {
                (0..512).for_each(|n| Self::fill(&mut map, n * BLOCK, BLOCK, BLOCK));
            } else {
                Self::fill(&mut map, 0, GIB, unit);
            }
        })
    }

    pub fn largest() -> Duration {
        let machine = Machine::fresh();
        let mut maps: Vec<_> = (0..EMPTY_TABLES).map(|_| Self::on(machine)).collect();
        time(|| maps.iter_mut().for_each(|map| Self::fill(map, 0, GIB, GIB)))
    }

    pub fn map_single() -> Duration {
        let mut map = Self::empty();
        time(|| (0..PAGES).for_each(|n| Self::fill(&mut map, n * PAGE, PAGE, PAGE)))
    }

    pub fn faults() -> Duration {
        let mut map = Self::empty();
        time(|| shuffled().for_each(|at| Self::fill(&mut map, at, PAGE, PAGE)))
    }

    pub fn unmap() -> Duration {
        let mut map = Self::filled();
        let region = MemoryRegion::new(0, GIB as usize);
        time(|| {
            map.modify_range(&region, &|_, entry| {
                entry.modify_flags(Stage2Attributes::empty(), Stage2Attributes::VALID)
            })
        })
    }

    pub fn protect() -> Duration {
        let mut map = Self::filled();
        let region = MemoryRegion::new(0, GIB as usize);
        time(|| {
            map.modify_range(&region, &|_, entry| {
                entry.modify_flags(Stage2Attributes::empty(), Stage2Attributes::S2AP_ACCESS_WO)
            })
        })
    }

    pub fn lookup() -> Duration {
        let map = Self::filled();
        time(|| {
            let mut sum = 0;
            for at in shuffled() {
                let region = MemoryRegion::new(at as usize, (at + PAGE) as usize);
                let mut read =
                    |_: &MemoryRegion, d: &aarch64_paging::descriptor::Descriptor<_>, _| {
                        sum += d.output_address().0;
                        Ok(())
                    };
                map.walk_range(black_box(&region), &mut read)
                    .expect("inside");
            }
            sum
        })
    }

    /// It splits by mapping a page inside that says something else.
    pub fn split() -> Duration {
        let mut map = Self::empty();
        (0..512).for_each(|n| Self::fill(&mut map, n * BLOCK, BLOCK, BLOCK));
        let other = attributes() | Stage2Attributes::XN;
        time(|| {
            for n in 0..512 {
                let at = (n * BLOCK) as usize;
                let region = MemoryRegion::new(at, at + PAGE as usize);
                let pa = PhysicalAddress(4 * GIB as usize + at);
                let limits = Constraints::NO_BLOCK_MAPPINGS | Constraints::NO_CONTIGUOUS_HINT;
                map.map_range(black_box(&region), pa, other, limits)
                    .expect("memory suffices");
            }
        })
    }
}

mod long_mode;

pub use long_mode::LongMode;

struct Meta;

/// As its own x86 metadata, without INVLPG, which user space cannot execute.
impl PagingMetaData for Meta {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = VirtAddr;
    fn flush_tlb(vaddr: Option<VirtAddr>) {
        black_box(vaddr);
    }
}

struct Handler;

fn arena() -> &'static Machine {
    CURRENT
        .with(|current| current.get())
        .expect("set by `empty`")
}

thread_local! {
    static CURRENT: std::cell::Cell<Option<&'static Machine>> = const { std::cell::Cell::new(None) };
}

impl PagingHandler for Handler {
    fn alloc_frames(num: usize, _align: usize) -> Option<PhysAddr> {
        assert_eq!(num, 1);
        Some(PhysAddr::from(arena().take_zeroed()))
    }
    fn dealloc_frames(paddr: PhysAddr, _num: usize) {
        arena().give(paddr.as_usize());
    }
    fn phys_to_virt(paddr: PhysAddr) -> VirtAddr {
        VirtAddr::from(arena().at(paddr.as_usize()).as_ptr() as usize)
    }
}

type Peer = PageTable64<Meta, X64PTE, Handler>;

/// arceos-org/page_table_multiarch with its x86 entry, four levels.
pub struct Multiarch;

impl Multiarch {
    fn empty() -> Peer {
        Self::on(Machine::fresh())
    }

    fn on(machine: &'static Machine) -> Peer {
        CURRENT.with(|current| current.set(Some(machine)));
        Peer::try_new().expect("memory suffices")
    }

    fn flags() -> MappingFlags {
        MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE
    }

    fn fill(table: &mut Peer, start: u64, size: u64, huge: bool) {
        let to = |va: VirtAddr| PhysAddr::from(va.as_usize() + 4 * GIB as usize);
        let start = VirtAddr::from(black_box(start) as usize);
        table
            .cursor()
            .map_region(start, to, size as usize, Self::flags(), huge)
            .expect("memory suffices");
    }

    fn filled() -> Peer {
        let mut table = Self::empty();
        Self::fill(&mut table, 0, GIB, false);
        table
    }

    pub fn map(unit: u64) -> Duration {
        let mut table = Self::empty();
        time(|| {
            if unit == BLOCK {
                (0..512).for_each(|n| Self::fill(&mut table, n * BLOCK, BLOCK, true));
            } else {
                Self::fill(&mut table, 0, GIB, unit != PAGE);
            }
        })
    }

    pub fn largest() -> Duration {
        let machine = Machine::fresh();
        let mut tables: Vec<_> = (0..EMPTY_TABLES).map(|_| Self::on(machine)).collect();
        time(|| {
            tables
                .iter_mut()
                .for_each(|table| Self::fill(table, 0, GIB, true))
        })
    }

    pub fn map_single() -> Duration {
        let mut table = Self::empty();
        time(|| (0..PAGES).for_each(|n| Self::one(&mut table, n * PAGE)))
    }

    fn one(table: &mut Peer, at: u64) {
        let (from, to) = (
            VirtAddr::from(at as usize),
            PhysAddr::from((4 * GIB + at) as usize),
        );
        let done = table
            .cursor()
            .map(black_box(from), to, PageSize::Size4K, Self::flags());
        done.expect("memory suffices");
    }

    pub fn faults() -> Duration {
        let mut table = Self::empty();
        time(|| shuffled().for_each(|at| Self::one(&mut table, at)))
    }

    pub fn unmap() -> Duration {
        let mut table = Self::filled();
        time(|| {
            table
                .cursor()
                .unmap_region(VirtAddr::from(0), GIB as usize)
                .is_ok()
        })
    }

    pub fn protect() -> Duration {
        let mut table = Self::filled();
        let read = MappingFlags::READ | MappingFlags::EXECUTE;
        time(|| {
            table
                .cursor()
                .protect_region(VirtAddr::from(0), GIB as usize, read)
                .is_ok()
        })
    }

    pub fn lookup() -> Duration {
        let table = Self::filled();
        time(|| {
            let mut sum = 0;
            for at in shuffled() {
                if let Ok((pa, _, _)) = table.query(VirtAddr::from(black_box(at) as usize)) {
                    sum += pa.as_usize();
                }
            }
            sum
        })
    }
}
