//! Raw memory and cache maintenance.

use core::arch::asm;
use core::slice;

use board::AddrRange;

use super::fault::{self, NotOurs};

unsafe extern "C" {
    static __image_start: u8;
    static __image_end: u8;
    static __file_end: u8;
}

/// Where the shim is.
pub(crate) fn image() -> Option<AddrRange> {
    let start = (&raw const __image_start).addr() as u64;
    AddrRange::new(start, (&raw const __image_end).addr() as u64)
}

/// Bytes of the shim's file: of its image less what is zero at first.
pub(crate) fn file_size() -> u64 {
    let start = (&raw const __image_start).addr();
    ((&raw const __file_end).addr() - start) as u64
}

/// The first eight bytes at `address`, where EL2 says a device tree is.
pub(crate) fn header_at(address: u64) -> [u8; 8] {
    let pointer = core::ptr::with_exposed_provenance::<[u8; 8]>(address as usize);
    // SAFETY: EL2 put a device tree there, page-aligned.
    unsafe { pointer.read_volatile() }
}

/// Memory that nobody writes while the host runs: the device tree, the payload.
pub(crate) fn bytes(range: AddrRange) -> &'static [u8] {
    let pointer = core::ptr::with_exposed_provenance(range.start() as usize);
    // SAFETY: RAM that a boot loader or EL2 initialised; `bytes_mut` is only used on other memory,
    // or (the device tree) after the last use of this.
    unsafe { slice::from_raw_parts(pointer, range.size() as usize) }
}

/// Memory that belongs to the caller: free RAM, or the device tree's buffer.
pub(crate) fn bytes_mut(range: AddrRange) -> &'static mut [u8] {
    let pointer = core::ptr::with_exposed_provenance_mut(range.start() as usize);
    // SAFETY: mapped RAM that the caller has chosen as free, once.
    unsafe { slice::from_raw_parts_mut(pointer, range.size() as usize) }
}

/// Copies `from` to `to`, which must be as long: a kernel's megabytes.
///
/// With pairs of registers, 256 bytes at a time: the compiler's `memcpy` for this target never
/// makes an unaligned access, and a payload in a FIT is only aligned to four bytes, so it would go
/// byte by byte. The MMU is on, so unaligned accesses to RAM are allowed.
pub(crate) fn copy(from: &[u8], to: &mut [u8]) {
    const STEP: usize = 256;
    let bulk = from.len().min(to.len()) / STEP * STEP;
    if bulk > 0 {
        // SAFETY: reads and writes `bulk` bytes, at least one step, inside the two slices.
        unsafe {
            asm!(
                "2:",
                ".irp offset, 0,32,64,96,128,160,192,224",
                "ldp {a}, {b}, [{from}, #\\offset]",
                "ldp {c}, {d}, [{from}, #\\offset + 16]",
                "stp {a}, {b}, [{to}, #\\offset]",
                "stp {c}, {d}, [{to}, #\\offset + 16]",
                ".endr",
                "add {from}, {from}, #256",
                "add {to}, {to}, #256",
                "subs {left}, {left}, #256",
                "b.ne 2b",
                from = inout(reg) from.as_ptr() => _,
                to = inout(reg) to.as_mut_ptr() => _,
                left = inout(reg) bulk => _,
                a = out(reg) _, b = out(reg) _, c = out(reg) _, d = out(reg) _,
                options(nostack));
        }
    }
    for (target, byte) in to[bulk..].iter_mut().zip(&from[bulk..]) {
        *target = *byte;
    }
}

/// Copies from memory that a guest may write, or take back, meanwhile. The caller has checked that it
/// is the guest's.
pub(crate) fn read_shared(address: u64, to: &mut [u8]) -> Result<(), NotOurs> {
    let mut address = address;
    let mut left = to;
    while !left.is_empty() {
        let word = left.first_chunk_mut().filter(|_| address.is_multiple_of(8));
        let step = if let Some(word) = word {
            *word = fault::try_load(address)?.to_ne_bytes();
            8
        } else {
            let byte = fault::try_load_byte(address)?.to_le_bytes()[0];
            left.iter_mut().take(1).for_each(|first| *first = byte);
            1
        };
        left = left.get_mut(step..).unwrap_or_default();
        address += step as u64;
    }
    Ok(())
}

/// Copies to memory that a guest may read, write or take back meanwhile; as above.
pub(crate) fn write_shared(address: u64, from: &[u8]) -> Result<(), NotOurs> {
    let mut address = address;
    let mut left = from;
    while let Some(first) = left.first() {
        let word = left.first_chunk().filter(|_| address.is_multiple_of(8));
        let step = if let Some(word) = word {
            fault::try_store(address, u64::from_ne_bytes(*word))?;
            8
        } else {
            fault::try_store_byte(address, u64::from(*first))?;
            1
        };
        left = left.get(step..).unwrap_or_default();
        address += step as u64;
    }
    Ok(())
}

/// Cleans and invalidates the data cache to the point of coherency.
pub(crate) fn clean_invalidate_to_poc(range: AddrRange) {
    let line = 4 << (super::mrs!("ctr_el0") >> 16 & 0xf);
    let mut address = range.start() - range.start() % line;
    // Many lines at a time, as EL2 does it: a kernel has most of a million.
    for _ in 0..(range.end() - address) / (32 * line) {
        // SAFETY: loses no data.
        unsafe {
            asm!(".rept 32", "dc civac, {a}", "add {a}, {a}, {line}", ".endr",
                a = inout(reg) address, line = in(reg) line, options(nostack, preserves_flags));
        }
    }
    while address < range.end() {
        // SAFETY: loses no data.
        unsafe { asm!("dc civac, {}", in(reg) address, options(nostack, preserves_flags)) };
        address += line;
    }
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
}

/// Fills memory of the host's with zeros, to the point of coherency, as EL2 does it.
pub(crate) fn wipe(range: AddrRange) {
    let zva = super::mrs!("dczid_el0");
    let block = 4 << (zva & 0xf);
    let at_once = block * BLOCKS;
    let whole = range.start().is_multiple_of(at_once) && range.end().is_multiple_of(at_once);
    if zva & 1 << 4 == 0 && whole {
        zero_blocks(range, block);
    } else {
        bytes_mut(range).fill(0);
    }
    clean_invalidate_to_poc(range);
}

/// Blocks of DC ZVA that [`zero_blocks`] fills at once.
const BLOCKS: u64 = 16;

/// Fills whole blocks with zeros, [`BLOCKS`] at once.
#[inline(never)]
fn zero_blocks(range: AddrRange, block: u64) {
    let mut address = range.start();
    while address < range.end() {
        // SAFETY: memory of the host's, for which the caller has no other use; the range holds all blocks.
        unsafe {
            asm!(".rept 16", "dc zva, {a}", "add {a}, {a}, {block}", ".endr",
                a = inout(reg) address, block = in(reg) block, options(nostack, preserves_flags));
        }
    }
}

/// Bytes of the smallest data cache line.
pub(crate) fn line_size() -> u64 {
    4 << (super::mrs!("ctr_el0") >> 16 & 0xf)
}
