//! Raw memory by physical address, and cache maintenance by virtual address (the same numbers).

use core::slice;
use core::sync::atomic::AtomicU32;

use board::{AddrRange, PAGE_SIZE};

use super::instructions;

unsafe extern "C" {
    static __image_start: u8;
    static __boot_text_end: u8;
    static __boot_rodata_end: u8;
    static __boot_end: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __file_end: u8;
    static __image_end: u8;
    static __shim_start: u8;
    static __shim_end: u8;
    static secondary_entry: u8;
    static placed: u8;
    fn jump_placed(entry: u64, argument: u64, ticks: u64, size: u64) -> !;
}

/// The address of a symbol, relative to the program counter: the compiler would read it from a table
/// (the GOT), and what stays of the image must not hold addresses of what goes after boot.
macro_rules! symbol {
    ($name:ident) => {{
        let address: u64;
        // SAFETY: computes an address.
        unsafe {
            core::arch::asm!("adrp {0}, {1}", "add {0}, {0}, :lo12:{1}", out(reg) address,
                sym $name, options(pure, nomem, nostack, preserves_flags));
        }
        address
    }};
}

/// Addresses of the image's parts, where it runs now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Image {
    pub(crate) start: u64,
    /// Ends of boot's own parts: instructions, constants, and all of it with its stack, where the
    /// instructions that stay begin.
    pub(crate) boot_text_end: u64,
    pub(crate) boot_rodata_end: u64,
    pub(crate) boot_end: u64,
    pub(crate) text_end: u64,
    pub(crate) rodata_end: u64,
    /// End of what is in the file; the rest is zero.
    pub(crate) file_end: u64,
    pub(crate) end: u64,
    /// Where secondary cores enter.
    pub(crate) secondary_entry: u64,
}

impl Image {
    pub(crate) fn here() -> Self {
        Self {
            start: symbol!(__image_start),
            boot_text_end: symbol!(__boot_text_end),
            boot_rodata_end: symbol!(__boot_rodata_end),
            boot_end: symbol!(__boot_end),
            text_end: symbol!(__text_end),
            rodata_end: symbol!(__rodata_end),
            file_end: symbol!(__file_end),
            end: symbol!(__image_end),
            secondary_entry: symbol!(secondary_entry),
        }
    }
}

/// Where a placed image is entered.
pub(crate) fn placed_entry() -> u64 {
    symbol!(placed)
}

/// The host shim that is linked into the image.
pub(crate) fn shim() -> &'static [u8] {
    let (start, end) = (symbol!(__shim_start), symbol!(__shim_end));
    let pointer = core::ptr::with_exposed_provenance(start as usize);
    // SAFETY: the linker script puts the shim's read-only bytes between the two symbols. Only boot
    // reads them, while they are there.
    unsafe { slice::from_raw_parts(pointer, (end - start) as usize) }
}

/// The first eight bytes at `address`, which firmware says is a device tree. 0 gives zeros.
pub(crate) fn header_at(address: u64) -> [u8; 8] {
    if address == 0 || !address.is_multiple_of(8) {
        return [0; 8];
    }
    if let Some(range) = AddrRange::with_size(address, 8) {
        clean_invalidate_to_poc(range);
    }
    let pointer = core::ptr::with_exposed_provenance::<[u8; 8]>(address as usize);
    // SAFETY: aligned; at worst there is no memory, which is an abort that is reported, not
    // undefined behaviour of the machine. No one writes there: only this core runs.
    unsafe { pointer.read_volatile() }
}

/// The device tree that firmware left at `range`, which [`header_at`] showed to begin one.
///
/// The boot protocol has firmware clean the image to the point of coherency, not the tree, and the
/// caches are off here: what firmware has written may still be in them.
pub(crate) fn device_tree(range: AddrRange) -> &'static [u8] {
    clean_invalidate_to_poc(range);
    let pointer = core::ptr::with_exposed_provenance(range.start() as usize);
    // SAFETY: initialised by firmware, 8-byte aligned, at most 2 MiB. Until the host runs nobody
    // writes it: it is reserved before anything is placed. EL2 does not read it after that.
    unsafe { slice::from_raw_parts(pointer, range.size() as usize) }
}

/// Memory of the host before the host runs.
pub(crate) fn host_memory(range: AddrRange) -> &'static mut [u8] {
    let pointer = core::ptr::with_exposed_provenance_mut(range.start() as usize);
    // SAFETY: free RAM that boot has just chosen, mapped read-write; no one else runs. EL2 drops
    // the reference before it enters the host.
    unsafe { slice::from_raw_parts_mut(pointer, range.size() as usize) }
}

/// Zeroed page-state words for `ram` bytes of RAM at `address`, where the layout put them.
pub(crate) fn page_state_words(address: u64, ram: u64) -> &'static [AtomicU32] {
    let count = (ram / PAGE_SIZE) as usize;
    // SAFETY: the layout has room for them in EL2's memory, page-aligned; called once, at boot.
    let words = unsafe { slice_at::<AtomicU32>(address, count) };
    words.iter_mut().for_each(|word| *word.get_mut() = 0);
    words
}

/// Copies the image's file part to EL2's memory-to-be, cache maintenance included.
///
/// The MMU is off: stores go past the cache. Lines that firmware left in it, dirty ones above all,
/// must be gone before, and what was prefetched meanwhile must be gone after.
pub(crate) fn place_image(file: AddrRange, to: AddrRange) {
    clean_invalidate_to_poc(to);
    let source = core::ptr::with_exposed_provenance::<u64>(file.start() as usize);
    let target = core::ptr::with_exposed_provenance_mut::<u64>(to.start() as usize);
    // SAFETY: both are RAM, page-aligned and apart: the target was chosen free of the image.
    unsafe { core::ptr::copy_nonoverlapping(source, target, file.size().div_ceil(8) as usize) };
    clean_invalidate_to_poc(to);
    invalidate_icache();
}

/// Leaves `value` at the end of EL2's memory-to-be, for the copy of this image; gives its address.
pub(crate) fn hand_over<T>(value: T, to: AddrRange) -> u64 {
    let address = to.end() - (size_of::<T>() as u64).next_multiple_of(PAGE_SIZE);
    let pointer = core::ptr::with_exposed_provenance_mut::<T>(address as usize);
    // SAFETY: page-aligned memory that boot has chosen; the copied image does not reach so far.
    unsafe { pointer.write(value) };
    address
}

/// Takes what [`hand_over`] left: the same image wrote it, so it is a `T`.
pub(crate) fn take_over<T>(address: u64) -> T {
    let pointer = core::ptr::with_exposed_provenance::<T>(address as usize);
    // SAFETY: written by `hand_over` with the MMU off, as it is now; read once, before the pool
    // that the memory belongs to is used.
    unsafe { pointer.read() }
}

/// Enters the copy that [`place_image`] made.
pub(crate) fn enter_copy(entry: u64, argument: u64, ticks: u64, size: u64) -> ! {
    // SAFETY: complete, at the point of coherency, and not stale in the instruction cache: see
    // `place_image`.
    unsafe { jump_placed(entry, argument, ticks, size) }
}

/// Memory that lives as long as EL2.
///
/// # Safety
///
/// `address` is aligned for `T`, in EL2's memory, mapped, and given out once only; all bits are a
/// valid `T`.
pub(crate) unsafe fn slice_at<T>(address: u64, count: usize) -> &'static mut [T] {
    let pointer = core::ptr::with_exposed_provenance_mut::<T>(address as usize);
    // SAFETY: the caller's promise: in bounds, aligned, exclusively ours.
    unsafe { slice::from_raw_parts_mut(pointer, count) }
}

/// Writes a spin-table word: 8-byte aligned RAM that only firmware's spinning core reads. The
/// caller has checked both.
pub(crate) fn release_core(word: u64, entry: u64) {
    let pointer = core::ptr::with_exposed_provenance_mut::<u64>(word as usize);
    // SAFETY: aligned, mapped as RAM, reserved by firmware for this purpose (checked by the caller).
    unsafe { pointer.write_volatile(entry) };
    if let Some(range) = AddrRange::with_size(word, 8) {
        clean_invalidate_to_poc(range);
    }
}

fn each_line(range: AddrRange, operate: impl Fn(u64)) {
    let line = 4 << ((super::regs::mrs!("ctr_el0") >> 16) & 0xf);
    let mut address = range.start() - range.start() % line;
    // Many at a time: a guest's memory has millions.
    const AT_ONCE: u64 = 32;
    for _ in 0..(range.end() - address) / (AT_ONCE * line) {
        for _ in 0..AT_ONCE {
            operate(address);
            address += line;
        }
    }
    while address < range.end() {
        operate(address);
        address += line;
    }
}

/// Cleans and invalidates the data cache to the point of coherency, and waits for it
/// (Arm ARM D7.5.9: DC CIVAC, completed by DSB).
pub(crate) fn clean_invalidate_to_poc(range: AddrRange) {
    each_line(range, instructions::dc_civac);
    data_barrier();
}

/// Cleans the data cache to the point of unification, where instruction fetches read, and waits.
pub(crate) fn clean_to_pou(range: AddrRange) {
    each_line(range, instructions::dc_cvau);
    data_barrier();
}

/// Makes what was just written executable: the data is at the point of coherency already.
pub(crate) fn invalidate_icache() {
    instructions::ic_ialluis();
    instructions::dsb_ish();
    instructions::isb();
}

/// DSB SY.
pub(crate) fn data_barrier() {
    instructions::dsb_sy();
}

/// What the host left in memory that it has donated, and that is nobody else's yet. What its caches
/// hold of it is at the point of coherency, where a guest with its caches off will read.
pub(crate) fn donated_bytes(range: AddrRange) -> &'static [u8] {
    clean_invalidate_to_poc(range);
    let pointer = core::ptr::with_exposed_provenance(range.start() as usize);
    // SAFETY: page-aligned RAM that is EL2's since its donation: out of the host's reach, in no
    // guest's tables. The caller drops the reference before it hands the pages over.
    unsafe { slice::from_raw_parts(pointer, range.size() as usize) }
}

/// Fills memory that nothing refers to any more with zeros, to the point of coherency: whoever gets it
/// may map it non-cacheable. Memory that was donated, or that only boot needed; at boot the host's and EL2's.
pub(crate) fn wipe(range: AddrRange) {
    // With the MMU off all memory is device memory, where DC ZVA faults (Arm ARM C6.2, DC).
    let zva = super::regs::mrs!("dczid_el0");
    let block = 4 << (zva & 0xf);
    let at_once = block * BLOCKS;
    let whole = range.start().is_multiple_of(at_once) && range.end().is_multiple_of(at_once);
    let normal = super::regs::mrs!("sctlr_el2") & 1 != 0;
    if !normal {
        // What caches hold would overwrite the zeros.
        clean_invalidate_to_poc(range);
    }
    if zva & 1 << 4 == 0 && whole && normal {
        zero_blocks(range, block);
    } else {
        let pointer = core::ptr::with_exposed_provenance_mut::<u8>(range.start() as usize);
        // SAFETY: RAM of EL2's, or before the host runs the host's, mapped normal and read-write; no
        // reference of EL2 goes there, as boot has not come there or is over, or as the VM that had it
        // can't reach it (any more).
        unsafe { pointer.write_bytes(0, range.size() as usize) };
    }
    clean_invalidate_to_poc(range);
}

/// Blocks of DC ZVA that [`zero_blocks`] fills at once.
const BLOCKS: u64 = 16;

/// Fills whole blocks with zeros, [`BLOCKS`] at once. `make bench-target` compares it with our host's.
#[inline(never)]
fn zero_blocks(range: AddrRange, block: u64) {
    let mut address = range.start();
    while address < range.end() {
        // SAFETY: as in `wipe`; the range holds all blocks.
        unsafe {
            core::arch::asm!(".rept 16", "dc zva, {a}", "add {a}, {a}, {block}", ".endr",
                a = inout(reg) address, block = in(reg) block, options(nostack, preserves_flags));
        }
    }
}

/// A doubleword, 8-byte aligned, of RAM that may have been anybody's before the reset. The MMU is off, so it is
/// read past the caches; or nobody writes it.
pub(crate) fn word_at(address: u64) -> u64 {
    let pointer = core::ptr::with_exposed_provenance::<u64>(address as usize);
    // SAFETY: aligned RAM. No one writes there: only this core runs.
    unsafe { pointer.read_volatile() }
}

/// Writes a few doublewords of memory that is for nothing else, to the point of coherency. The MMU may be off:
/// then what caches hold of it goes first.
pub(crate) fn put_words<const N: usize>(address: u64, words: [u64; N]) {
    let pointer = core::ptr::with_exposed_provenance_mut::<[u64; N]>(address as usize);
    let line = AddrRange::with_size(address, size_of::<[u64; N]>() as u64);
    line.into_iter().for_each(clean_invalidate_to_poc);
    // SAFETY: aligned; a place of EL2's memory that its layout keeps for this alone, or will be when the
    // image is placed there.
    unsafe { pointer.write_volatile(words) };
    line.into_iter().for_each(clean_invalidate_to_poc);
}
