//! rust-osdev/x86_64: a mapper for long-mode tables, the third reference.

use std::hint::black_box;
use std::time::Duration;

use x86_64::structures::paging::mapper::{MappedFrame, PageTableFrameMapping, TranslateResult};
use x86_64::structures::paging::{
    FrameAllocator, MappedPageTable, Mapper, Page, PageSize, PageTable, PageTableFlags, PhysFrame,
    Size1GiB, Size2MiB, Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::stage2_memory::Machine;
use crate::{EMPTY_TABLES, GIB, PAGES, shuffled, time};

/// Where its tables are.
struct Arena(&'static Machine);

// SAFETY: a frame of the arena is at its offset, and only tables are asked for.
unsafe impl PageTableFrameMapping for Arena {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        let offset = frame.start_address().as_u64() as usize;
        self.0.at(offset).as_ptr().cast()
    }
}

/// Where it gets new ones.
struct Frames(&'static Machine);

// SAFETY: `take` hands every frame out once.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let start = PhysAddr::new(self.0.take() as u64); // it zeroes them itself
        PhysFrame::from_start_address(start).ok()
    }
}

/// A mapper with four levels. Its flushes, which are INVLPG, are left out.
pub struct LongMode {
    table: MappedPageTable<'static, Arena>,
    frames: Frames,
}

const FLAGS: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::USER_ACCESSIBLE);

impl LongMode {
    fn empty() -> Self {
        Self::on(Machine::fresh())
    }

    fn on(machine: &'static Machine) -> Self {
        let mut root = machine.at(machine.take_zeroed()).cast::<PageTable>();
        // SAFETY: a zeroed table of the arena that nobody else has.
        let root = unsafe { root.as_mut() };
        // SAFETY: it is the root, and `Arena` says where the tables below it are.
        let table = unsafe { MappedPageTable::new(root, Arena(machine)) };
        let frames = Frames(machine);
        Self { table, frames }
    }

    fn one<S: PageSize>(&mut self, at: u64)
    where
        MappedPageTable<'static, Arena>: Mapper<S>,
    {
        let page = Page::<S>::containing_address(VirtAddr::new(black_box(at)));
        let frame = PhysFrame::<S>::containing_address(PhysAddr::new(4 * GIB + at));
        // SAFETY: the table is never loaded.
        let done = unsafe { self.table.map_to(page, frame, FLAGS, &mut self.frames) };
        done.map_err(|_| "refused")
            .expect("memory suffices")
            .ignore();
    }

    fn filled() -> Self {
        let mut space = Self::empty();
        (0..PAGES).for_each(|n| space.one::<Size4KiB>(n * Size4KiB::SIZE));
        space
    }

    fn map<S: PageSize>() -> Duration
    where
        MappedPageTable<'static, Arena>: Mapper<S>,
    {
        let mut space = Self::empty();
        time(|| (0..GIB / S::SIZE).for_each(|n| space.one::<S>(n * S::SIZE)))
    }

    /// It maps one page or block a call.
    pub fn map_pages() -> Duration {
        Self::map::<Size4KiB>()
    }

    pub fn map_blocks() -> Duration {
        Self::map::<Size2MiB>()
    }

    pub fn largest() -> Duration {
        let machine = Machine::fresh();
        let mut spaces: Vec<_> = (0..EMPTY_TABLES).map(|_| Self::on(machine)).collect();
        time(|| spaces.iter_mut().for_each(|space| space.one::<Size1GiB>(0)))
    }

    pub fn faults() -> Duration {
        let mut space = Self::empty();
        time(|| shuffled().for_each(|at| space.one::<Size4KiB>(at)))
    }

    fn pages() -> impl Iterator<Item = Page<Size4KiB>> {
        (0..PAGES).map(|n| Page::containing_address(VirtAddr::new(n * Size4KiB::SIZE)))
    }

    /// It keeps empty tables.
    pub fn unmap() -> Duration {
        let mut space = Self::filled();
        time(|| {
            for page in Self::pages() {
                let (_, flush) = space
                    .table
                    .unmap(page)
                    .map_err(|_| "refused")
                    .expect("there");
                flush.ignore();
            }
        })
    }

    pub fn protect() -> Duration {
        let mut space = Self::filled();
        let flags = FLAGS.difference(PageTableFlags::WRITABLE);
        time(|| {
            for page in Self::pages() {
                // SAFETY: the table is never loaded.
                let done = unsafe { space.table.update_flags(page, flags) };
                done.map_err(|_| "refused").expect("there").ignore();
            }
        })
    }

    pub fn lookup() -> Duration {
        let space = Self::filled();
        time(|| {
            let mut sum = 0;
            for at in shuffled() {
                let at = VirtAddr::new(black_box(at));
                if let TranslateResult::Mapped {
                    frame: MappedFrame::Size4KiB(frame),
                    ..
                } = space.table.translate(at)
                {
                    sum += frame.start_address().as_u64();
                }
            }
            sum
        })
    }
}
