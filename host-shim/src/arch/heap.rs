//! The host's heap: a buddy allocator.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;

use board::AddrRange;
use buddy_system_allocator::Heap;
use spin::Mutex;

struct HostHeap(Mutex<Heap<32>>);

#[global_allocator]
static HEAP: HostHeap = HostHeap(Mutex::new(Heap::empty()));

// SAFETY: the buddy allocator hands out each piece once, aligned as asked.
unsafe impl GlobalAlloc for HostHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let piece = self.0.lock().alloc(layout).ok();
        piece.map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: the caller's promise: it came from `alloc` with this layout.
            unsafe { self.0.lock().dealloc(pointer, layout) };
        }
    }
}

/// Gives the heap memory: free RAM that the caller has chosen for it alone.
pub(crate) fn give(range: AddrRange) {
    let (start, end) = (range.start() as usize, range.end() as usize);
    // SAFETY: mapped RAM that nothing else uses.
    unsafe { HEAP.0.lock().add_to_heap(start, end) };
}
