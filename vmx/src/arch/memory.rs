//! Physical memory: what the BIOS reports as RAM, less what is in use. Everything below 4 GiB is
//! mapped one to one, so an address is its own pointer.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use buddy_system_allocator::Heap;
use spin::Mutex;
use stage2::Pa;

use super::payload;

/// Bytes of a frame.
pub(crate) const FRAME: u64 = 4096;
/// Bytes of the heap: bookkeeping only; tables and guests' memory are frames.
const HEAP_BYTES: u64 = 2 << 20;
/// Everything at and above this is not mapped.
const MAPPED_END: u64 = 1 << 32;

/// One entry of the BIOS's memory map (INT 15h, AX=E820h).
#[repr(C)]
#[derive(Clone, Copy)]
struct Region {
    start: u64,
    size: u64,
    kind: u32,
    attributes: u32,
}

/// Region kind: RAM.
const RAM: u32 = 1;
/// Where boot.S left the map: count, then entries.
const MAP_COUNT: usize = 0x1000;
const MAP_ENTRIES: usize = 0x1010;
const MAP_MOST: usize = 128;

unsafe extern "C" {
    static __image_end: u8;
}

/// RAM that nobody owns.
#[derive(Debug)]
pub(crate) struct FramePool(Mutex<Heap<32>>);

/// The machine's frames.
pub(crate) static FRAMES: FramePool = FramePool(Mutex::new(Heap::empty()));
static TOTAL: AtomicU64 = AtomicU64::new(0);

struct KernelHeap(Mutex<Heap<32>>);

#[global_allocator]
static HEAP: KernelHeap = KernelHeap(Mutex::new(Heap::empty()));

// SAFETY: the buddy allocator hands out each piece once, aligned as asked.
unsafe impl GlobalAlloc for KernelHeap {
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

/// Gives all RAM above 1 MiB to the pool, but the image and the payload. Called once, at boot.
pub(super) fn init() {
    let image_end = (&raw const __image_end).addr() as u64;
    let payload = payload::range();
    for region in bios_map().iter().filter(|r| r.kind == RAM) {
        let start = region.start.max(image_end);
        let end = region.start.saturating_add(region.size).min(MAPPED_END);
        give(start, end.min(payload.start));
        give(start.max(payload.end), end);
    }
    let heap = FRAMES.alloc(HEAP_BYTES);
    let Some(heap) = heap else {
        super::power::fatal(format_args!("not enough RAM for a heap"))
    };
    // SAFETY: the pool has just handed it out, for good.
    unsafe {
        let start = heap.get() as usize;
        HEAP.0
            .lock()
            .add_to_heap(start, start + HEAP_BYTES as usize);
    }
}

fn bios_map() -> &'static [Region] {
    let count = core::ptr::with_exposed_provenance::<u32>(MAP_COUNT);
    // SAFETY: boot.S has written the count there; nobody writes it again.
    let count = unsafe { count.read() } as usize;
    let entries = core::ptr::with_exposed_provenance::<Region>(MAP_ENTRIES);
    // SAFETY: boot.S has written that many entries of 24 bytes, and at most 128.
    unsafe { core::slice::from_raw_parts(entries, count.min(MAP_MOST)) }
}

/// Adds the whole frames of a range to the pool.
fn give(start: u64, end: u64) {
    let (start, end) = (start.next_multiple_of(FRAME), end & !(FRAME - 1));
    if start < end {
        // SAFETY: RAM by the BIOS's word, mapped, outside the image and the payload; each range
        // is given once.
        unsafe { FRAMES.0.lock().add_to_heap(start as usize, end as usize) };
        TOTAL.fetch_add(end - start, Ordering::Relaxed);
    }
}

/// Bytes of RAM that the pool began with.
pub(crate) fn total() -> u64 {
    TOTAL.load(Ordering::Relaxed)
}

impl FramePool {
    fn layout(bytes: u64) -> Option<Layout> {
        let bytes = usize::try_from(bytes.max(FRAME).checked_next_power_of_two()?).ok()?;
        Layout::from_size_align(bytes, bytes).ok()
    }

    /// A piece of at least `bytes` bytes, aligned to the power of two that holds it.
    pub(crate) fn alloc(&self, bytes: u64) -> Option<Pa> {
        let piece = self.0.lock().alloc(Self::layout(bytes)?).ok()?;
        Some(Pa::new(piece.as_ptr().expose_provenance() as u64))
    }

    /// Takes a piece back.
    ///
    /// # Safety
    /// [`FramePool::alloc`] gave it out for the same number of bytes, and nobody uses it.
    pub(super) unsafe fn free(&self, at: Pa, bytes: u64) {
        let pointer = core::ptr::with_exposed_provenance_mut(at.get() as usize);
        if let (Some(pointer), Some(layout)) = (NonNull::new(pointer), Self::layout(bytes)) {
            // SAFETY: the caller's promise.
            unsafe { self.0.lock().dealloc(pointer, layout) };
        }
    }
}

/// Frames that belong to whoever holds this; zeroed, given back when dropped.
#[derive(Debug)]
pub(crate) struct Frames {
    at: Pa,
    bytes: u64,
}

impl Frames {
    /// Takes at least `bytes` bytes.
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        let at = FRAMES.alloc(bytes)?;
        let frames = Self { at, bytes };
        frames.clear();
        Some(frames)
    }

    /// Where they are.
    pub(crate) const fn at(&self) -> Pa {
        self.at
    }

    fn clear(&self) {
        // SAFETY: this object owns the memory, which is mapped, writable, and long enough.
        unsafe { self.pointer().write_bytes(0, self.bytes as usize) };
    }

    fn pointer(&self) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut(self.at.get() as usize)
    }

    /// Fills the first words. Words past the end are dropped.
    pub(crate) fn write_words(&self, words: &[u64]) {
        let most = (self.bytes / 8) as usize;
        let target = self.pointer().cast::<u64>();
        for (n, word) in words.iter().take(most).enumerate() {
            // SAFETY: aligned to a frame, `n` is below the number of words, and this object owns
            // the memory. Volatile, because hardware reads it.
            unsafe { target.wrapping_add(n).write_volatile(*word) };
        }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        // SAFETY: `new` has taken it for that many bytes, and this was its only owner.
        unsafe { FRAMES.free(self.at, self.bytes) };
    }
}

/// A guest's memory, as the hypervisor sees it. The guest may write it at any time, so every
/// access is volatile and nothing borrows it.
#[derive(Debug)]
pub(crate) struct GuestRam(Frames);

impl GuestRam {
    /// Zeroed memory of `bytes` bytes.
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        Frames::new(bytes).map(Self)
    }

    /// Host-physical address of its first byte.
    pub(crate) const fn at(&self) -> Pa {
        self.0.at()
    }

    /// Size in bytes.
    pub(crate) const fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Copies bytes to an offset; says whether they fit.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.0.bytes) {
            return false;
        }
        let target = self.0.pointer().wrapping_add(offset as usize);
        // SAFETY: inside this memory (checked), which is not Rust's: the source cannot overlap.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
        true
    }

    /// Eight bytes at an aligned offset.
    pub(crate) fn word(&self, offset: u64) -> Option<u64> {
        let inside = offset.checked_add(8)? <= self.0.bytes && offset.is_multiple_of(8);
        let source = self.0.pointer().wrapping_add(offset as usize).cast::<u64>();
        // SAFETY: inside and aligned (checked).
        inside.then(|| unsafe { source.read_volatile() })
    }
}

/// Eight bytes of a page table, as the hardware walker would read them.
pub(crate) fn read_table(at: u64) -> u64 {
    let pointer = core::ptr::with_exposed_provenance::<u64>(at as usize);
    // SAFETY: the caller walks a live table, whose frames are mapped; the entry is aligned.
    unsafe { pointer.read_volatile() }
}

/// Gives an EPT leaf the reserved memory type 2 (SDM vol. 3C 29.3.3.1).
pub(crate) fn spoil_type(at: u64) {
    let pointer = core::ptr::with_exposed_provenance_mut::<u64>(at as usize);
    let spoilt = read_table(at) & !0x38 | 2 << 3;
    // SAFETY: an entry of a live table, aligned; nothing else changes this VM meanwhile, and all
    // that the hardware makes of it is an exit.
    unsafe { pointer.write_volatile(spoilt) };
}
