//! TLB maintenance for stage 2.
//!
//! One order, everywhere (Arm ARM D8.17 "TLB maintenance", and the rule that stage-1 results are
//! cached without the IPA they came from): stores published, stage 2 by IPA, completed, then
//! stage 1 of the VMID, completed, then ISB. The VMID is that of VTTBR_EL2, which while the host
//! runs, and during boot from the moment its root exists, is the host's.

use core::arch::asm;

/// log2 of the page that a TLBI by IPA names.
const PAGE_SHIFT: u32 = 12;

/// Invalidates stage-1 and stage-2 entries of the current VMID for `pages` pages from `ipa`, on
/// all cores, and completes.
pub(crate) fn invalidate_ipa_pages(ipa: u64, pages: u64) {
    publish();
    for page in 0..pages {
        let operand = (ipa >> PAGE_SHIFT) + page;
        // SAFETY: invalidation loses nothing that a walk does not bring back.
        unsafe { asm!("tlbi ipas2e1is, {}", in(reg) operand, options(nostack, preserves_flags)) };
    }
    // SAFETY: as above. Stage 1 goes after stage 2 has completed, or it could be refilled from it.
    unsafe {
        asm!(
            "dsb ish",
            "tlbi vmalle1is",
            "dsb ish",
            "isb",
            options(nostack, preserves_flags)
        )
    };
}

/// Invalidates everything of the current VMID, on all cores, and completes.
pub(crate) fn invalidate_vmid() {
    publish();
    // SAFETY: as above.
    unsafe {
        asm!(
            "tlbi vmalls12e1is",
            "dsb ish",
            "isb",
            options(nostack, preserves_flags)
        )
    };
}

/// Makes earlier table stores visible to the walkers of all cores.
pub(crate) fn publish() {
    // SAFETY: a barrier.
    unsafe { asm!("dsb ishst", options(nostack, preserves_flags)) };
}
