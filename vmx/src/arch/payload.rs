//! What the image tool has put behind the hypervisor: loaded at 32 MiB by boot.S.

use core::ops::Range;

/// Where boot.S loads it.
const AT: u64 = 32 << 20;

unsafe extern "C" {
    /// Filled in by the image tool.
    static boot_payload_bytes: u32;
}

/// Addresses of the payload.
pub(crate) fn range() -> Range<u64> {
    let size = &raw const boot_payload_bytes;
    // SAFETY: part of the boot sector, written by the tool before the machine started.
    let size = unsafe { size.read_volatile() };
    AT..AT + u64::from(size)
}

/// The payload's bytes.
pub(crate) fn bytes() -> &'static [u8] {
    let range = range();
    let start = core::ptr::with_exposed_provenance(range.start as usize);
    // SAFETY: loaded by boot.S, kept out of the frame pool, never written.
    unsafe { core::slice::from_raw_parts(start, (range.end - range.start) as usize) }
}
