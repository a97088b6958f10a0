//! Raw memory and cache maintenance.

use core::arch::asm;
use core::slice;

use board::AddrRange;

unsafe extern "C" {
    static __image_start: u8;
    static __image_end: u8;
}

/// Where the shim is.
pub(crate) fn image() -> Option<AddrRange> {
    let start = (&raw const __image_start).addr() as u64;
    AddrRange::new(start, (&raw const __image_end).addr() as u64)
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

/// Cleans and invalidates the data cache to the point of coherency.
pub(crate) fn clean_invalidate_to_poc(range: AddrRange) {
    let line = 4 << (super::mrs!("ctr_el0") >> 16 & 0xf);
    let mut address = range.start() - range.start() % line;
    while address < range.end() {
        // SAFETY: loses no data.
        unsafe { asm!("dc civac, {}", in(reg) address, options(nostack, preserves_flags)) };
        address += line;
    }
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
}
