//! EL2's frame pool: table pages from a buddy allocator.

use core::alloc::Layout;
use core::ptr::NonNull;

use board::{AddrRange, PAGE_SIZE};
use buddy_system_allocator::Heap;
use spin::Mutex;

/// A naturally aligned piece of `size` bytes, a power of two; `None` for other sizes.
fn layout(size: u64) -> Option<Layout> {
    let size = usize::try_from(size).ok()?;
    Layout::from_size_align(size, size).ok()
}

/// The pool. Its free lists live in the free pages themselves.
pub(crate) struct FramePool {
    heap: Mutex<Heap<32>>,
}

impl core::fmt::Debug for FramePool {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FramePool").finish_non_exhaustive()
    }
}

impl FramePool {
    /// A pool over `range`.
    ///
    /// # Safety
    ///
    /// `range` is page-aligned, mapped, part of EL2's memory, and used by nothing else.
    pub(crate) unsafe fn new(range: AddrRange) -> Self {
        let mut heap = Heap::empty();
        // SAFETY: the caller's promise.
        unsafe { heap.add_to_heap(range.start() as usize, range.end() as usize) };
        Self {
            heap: Mutex::new(heap),
        }
    }

    /// The pool of EL2 itself, over the part of its memory that boot left for it.
    pub(crate) fn of_el2(range: AddrRange) -> Self {
        // SAFETY: called once, by boot, with the rest of the pool that EL2's own map left.
        unsafe { Self::new(range) }
    }

    /// `size` bytes (a power of two, at least a page), aligned to their size, contents unknown;
    /// `None` if the pool has no such piece.
    pub(crate) fn alloc(&self, size: u64) -> Option<u64> {
        debug_assert!(size >= PAGE_SIZE);
        let pointer = self.heap.lock().alloc(layout(size)?).ok()?;
        Some(pointer.as_ptr().expose_provenance() as u64)
    }

    /// Takes `size` bytes back.
    ///
    /// # Safety
    ///
    /// They came from [`Self::alloc`] with this size, and neither a table nor a TLB refers to them
    /// any more.
    pub(crate) unsafe fn free(&self, address: u64, size: u64) {
        let pointer = core::ptr::with_exposed_provenance_mut(address as usize);
        if let Some((pointer, layout)) = NonNull::new(pointer).zip(layout(size)) {
            // SAFETY: the caller's promise; the layout is that of `alloc`.
            unsafe { self.heap.lock().dealloc(pointer, layout) };
        }
    }
}
