//! Barriers, hints and maintenance instructions, as safe functions.
//!
//! The lists below are all there is: an instruction is on them only if EL2's own execution and
//! memory stay what they are, whatever the operand and the state of the core. What they are for,
//! above all their order, is their users' concern: forgetting one can break isolation, but issuing
//! one can't. Each is a compiler barrier, too.

use core::arch::asm;

macro_rules! instructions {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)+) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name() {
            // SAFETY: a barrier, a hint, a mask, or an invalidation of what a walk or a fetch
            // brings back; no data is lost and no general register changes.
            unsafe { asm!($text, options(nostack, preserves_flags)) };
        }
    )+};
}

instructions! {
    isb = "isb";
    dsb_sy = "dsb sy";
    dsb_ish = "dsb ish";
    dsb_ishst = "dsb ishst";
    dsb_nsh = "dsb nsh";
    sev = "sev";
    wfe = "wfe";
    wfi = "wfi";
    /// PSB CSYNC, by its encoding: assemblers know the name only with FEAT_SPE.
    psb_csync = "hint #17";
    /// TSB CSYNC, the same with FEAT_TRF.
    tsb_csync = "hint #18";
    /// Masks debug exceptions, SErrors and interrupts.
    mask_exceptions = "msr daifset, #0xf";
    tlbi_alle2is = "tlbi alle2is";
    tlbi_alle1 = "tlbi alle1";
    tlbi_vmalle1 = "tlbi vmalle1";
    tlbi_vmalle1is = "tlbi vmalle1is";
    tlbi_vmalls12e1 = "tlbi vmalls12e1";
    tlbi_vmalls12e1is = "tlbi vmalls12e1is";
    ic_iallu = "ic iallu";
    ic_ialluis = "ic ialluis";
}

macro_rules! with_operand {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)+) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name(operand: u64) {
            // SAFETY: invalidates translations, which a walk brings back, or cleans lines, which
            // loses nothing; at an address that EL2 has not mapped it is an abort, which is
            // reported.
            unsafe { asm!($text, in(reg) operand, options(nostack, preserves_flags)) };
        }
    )+};
}

with_operand! {
    tlbi_ipas2e1is = "tlbi ipas2e1is, {}";
    /// TLBI RIPAS2E1IS by its encoding: assemblers know the name only with FEAT_TLBIRANGE.
    tlbi_ripas2e1is = "sys #4, c8, c0, #2, {}";
    dc_civac = "dc civac, {}";
    dc_cvau = "dc cvau, {}";
}
