//! Frame pools (EL2's own, and one per VM) and EL2's heap: buddy allocators.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;

use crate::console::say;
use board::{AddrRange, PAGE_SIZE};
use buddy_system_allocator::Heap;
use el2::sync::SpinLock;

static EL2_POOL: FramePool = FramePool::empty();

/// Gives EL2's own pool the part of its memory that boot left for it, and the heap its first piece
/// of it: later the host's tables may have taken everything. Only boot calls this, once.
pub(crate) fn create_el2_pool(parts: impl Iterator<Item = AddrRange>) -> &'static FramePool {
    for part in parts {
        // SAFETY: of the pool, and left by EL2's own map: mapped, unused.
        unsafe { EL2_POOL.add(part) };
    }
    if !HEAP.grow(FIRST) {
        say!(
            Error,
            "EL2's pool is too small for a heap: VMs can't be created"
        );
    }
    &EL2_POOL
}

/// EL2's heap: bookkeeping of VMs, never tables. It may run out; who allocates then gets an error.
struct El2Heap(SpinLock<Heap<32>>);

#[global_allocator]
static HEAP: El2Heap = El2Heap(SpinLock::new(Heap::empty()));

/// Bytes of EL2's pool that the heap leaves for the host's stage 2.
const RESERVE: u64 = 32 * PAGE_SIZE;
/// Bytes that the heap has from the start.
const FIRST: usize = 16 * PAGE_SIZE as usize;
/// Bytes that the heap takes at a time.
const STEP: u64 = 4 * PAGE_SIZE;

impl El2Heap {
    /// Takes a piece of EL2's pool that can hold `size` bytes; says whether there was one.
    fn grow(&self, size: usize) -> bool {
        let size = (size as u64).next_power_of_two().max(STEP);
        if EL2_POOL.free_bytes() < RESERVE + size {
            return false;
        }
        let Some(start) = EL2_POOL.alloc(size) else {
            return false;
        };
        let end = start + size;
        // SAFETY: the pool has just handed it out, for good.
        unsafe { self.0.lock().add_to_heap(start as usize, end as usize) };
        true
    }
}

// SAFETY: the buddy allocator hands out each piece once, aligned as asked.
unsafe impl GlobalAlloc for El2Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let take = || self.0.lock().alloc(layout).ok();
        let size = layout.size().max(layout.align());
        let piece = take().or_else(|| self.grow(size).then(take).flatten());
        piece.map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: the caller's promise: it came from `alloc` with this layout.
            unsafe { self.0.lock().dealloc(pointer, layout) };
        }
    }
}

/// A word of memory from EL2's pool that others read and write, too: an SMMU its tables and queues,
/// the cores' walks EL2's own map.
pub(crate) fn shared_word(address: u64) -> &'static AtomicU64 {
    debug_assert!(address.is_multiple_of(8));
    let word = core::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: the SMMU's driver only names words of what the pool has handed out to it for good, EL2's
    // map those of its tables; mapped at its own address, and everybody accesses it in one piece.
    unsafe { AtomicU64::from_ptr(word) }
}

/// Adds pages that were just donated to EL2 to its own pool, for good.
pub(crate) fn add_to_el2_pool(range: AddrRange) {
    EL2_POOL.add_donated(range);
}

/// A naturally aligned piece of `size` bytes, a power of two; `None` for other sizes.
fn layout(size: u64) -> Option<Layout> {
    let size = usize::try_from(size).ok()?;
    Layout::from_size_align(size, size).ok()
}

/// The pool. Its free lists live in the free pages themselves.
pub(crate) struct FramePool {
    heap: SpinLock<Heap<32>>,
}

impl core::fmt::Debug for FramePool {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FramePool").finish_non_exhaustive()
    }
}

impl FramePool {
    /// A pool that has nothing yet.
    const fn empty() -> Self {
        Self {
            heap: SpinLock::new(Heap::empty()),
        }
    }

    /// A pool over memory that was just donated to a VM.
    pub(crate) fn over_donated(range: AddrRange) -> Self {
        let pool = Self::empty();
        pool.add_donated(range);
        pool
    }

    /// Adds memory that was just donated to the VM whose pool this is.
    pub(crate) fn add_donated(&self, range: AddrRange) {
        // SAFETY: EL2's since the donation, page-aligned, mapped like all RAM; the caller hands it
        // to nobody else.
        unsafe { self.add(range) };
    }

    /// Adds memory to the pool.
    ///
    /// # Safety
    ///
    /// `range` is page-aligned, mapped, part of EL2's memory, and used by nothing else.
    unsafe fn add(&self, range: AddrRange) {
        let (start, end) = (range.start() as usize, range.end() as usize);
        // SAFETY: the caller's promise.
        unsafe { self.heap.lock().add_to_heap(start, end) };
    }

    /// Bytes that are free; perhaps not in one piece.
    pub(crate) fn free_bytes(&self) -> u64 {
        let heap = self.heap.lock();
        (heap.stats_total_bytes() - heap.stats_alloc_actual()) as u64
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
        // Added anew: looking for its other half would take as long as there are free pieces, and most
        // of what goes is a table, in whose place the next one comes.
        if let Some(range) = AddrRange::with_size(address, size) {
            // SAFETY: the caller's promise.
            unsafe { self.add(range) };
        }
    }
}
