//! Injecting a synchronous abort into EL1: the state with which its handler starts.
//!
//! Source: Arm ARM (DDI 0487) D1.3.5 "Exception entry" (pseudocode `AArch64.TakeException`) and
//! D24.2.40 ESR_ELx.

use crate::esr::{Abort, Access};

/// SPSR mode field: EL1 with its own stack pointer.
const EL1H: u64 = 0b00101;
/// D, A, I and F masked.
const DAIF: u64 = 0xf << 6;
const PAN: u64 = 1 << 22;
const SSBS: u64 = 1 << 12;
const TCO: u64 = 1 << 25;
/// N, Z, C, V, and DIT (bit 24), which an exception keeps.
const KEPT: u64 = 0xf << 28 | 1 << 24;
/// SPSR.M\[4\]: the exception came from AArch32.
const FROM_AARCH32: u64 = 1 << 4;
/// SCTLR_EL1.SPAN (bit 23): 0 sets PSTATE.PAN on entry; DSSBS (44) gives PSTATE.SSBS.
const SCTLR_SPAN: u64 = 1 << 23;
const SCTLR_DSSBS: u64 = 1 << 44;

/// What the injection reads.
#[derive(Clone, Copy, Debug)]
pub struct Interrupted {
    /// SPSR_EL2.
    pub spsr: u64,
    /// VBAR_EL1.
    pub vbar: u64,
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// FEAT_PAN is implemented.
    pub pan: bool,
    /// FEAT_MTE2 is implemented.
    pub mte: bool,
}

/// What the injection writes (besides ELR_EL1 = ELR_EL2, SPSR_EL1 = SPSR_EL2, and, if it
/// [is an abort](Entry::is_abort), FAR_EL1 = FAR_EL2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    /// New ELR_EL2: the vector.
    pub pc: u64,
    /// New SPSR_EL2: the state of the handler.
    pub spsr: u64,
    /// New ESR_EL1.
    pub esr: u64,
}

impl Entry {
    /// Whether FAR_EL2 is this exception's address. Otherwise it is that of the last abort on this
    /// core, which may have been another world's: EL1 must not see it.
    #[must_use]
    pub const fn is_abort(&self) -> bool {
        matches!(self.esr >> 26 & 0x3f, 0x20 | 0x21 | 0x24 | 0x25)
    }
}

/// A synchronous external abort at EL1 for an access that the owner of the memory refuses.
///
/// External, because for the host that address answers like a bus error; with bit S1PTW's
/// counterpart, "on translation table walk", where its own walk was refused.
#[must_use]
pub fn external_abort(from: &Interrupted, abort: &Abort, esr_el2: u64) -> Entry {
    Entry {
        pc: from.vbar.wrapping_add(vector_offset(from.spsr)),
        spsr: handler_state(from),
        esr: syndrome(from, abort, esr_el2),
    }
}

/// An undefined-instruction exception at EL1: exception class 0, IL set.
#[must_use]
pub fn undefined(from: &Interrupted) -> Entry {
    Entry {
        pc: from.vbar.wrapping_add(vector_offset(from.spsr)),
        spsr: handler_state(from),
        esr: 1 << 25,
    }
}

/// Offset of the synchronous vector for the interrupted state (Arm ARM D1.3.1, table of vectors).
fn vector_offset(spsr: u64) -> u64 {
    if spsr & FROM_AARCH32 != 0 {
        return 0x600;
    }
    match spsr & 0xf {
        0b0101 => 0x200,
        0b0100 => 0x000,
        _ => 0x400,
    }
}

fn handler_state(from: &Interrupted) -> u64 {
    let mut state = EL1H | DAIF;
    if from.spsr & FROM_AARCH32 == 0 {
        state |= from.spsr & KEPT;
        state |= from.spsr & PAN;
    }
    if from.pan && from.sctlr & SCTLR_SPAN == 0 {
        state |= PAN;
    }
    if from.sctlr & SCTLR_DSSBS != 0 {
        state |= SSBS;
    }
    if from.mte {
        state |= TCO;
    }
    state
}

fn syndrome(from: &Interrupted, abort: &Abort, esr_el2: u64) -> u64 {
    const IL: u64 = 1 << 25;
    let from_el1 = vector_offset(from.spsr) < 0x400;
    let class: u64 = match (abort.access, from_el1) {
        (Access::Fetch, false) => 0x20,
        (Access::Fetch, true) => 0x21,
        (_, false) => 0x24,
        (_, true) => 0x25,
    };
    let status: u64 = if abort.on_s1_walk {
        0b01_0100
    } else {
        0b01_0000
    };
    // WnR, CM and FnV say the same at both levels; IL is the instruction's length.
    let kept = esr_el2 & (IL | 1 << 10 | 1 << 8 | 1 << 6);
    let kept = if abort.access == Access::Fetch {
        kept & (IL | 1 << 10)
    } else {
        kept
    };
    class << 26 | kept | status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::esr::FaultKind;

    const ABORT: Abort = Abort {
        access: Access::Write,
        kind: FaultKind::Translation,
        on_s1_walk: false,
        far_invalid: false,
    };
    const EL1: Interrupted = Interrupted {
        spsr: 0x6000_0005,
        vbar: 0xffff_8000_0000_0800,
        sctlr: SCTLR_SPAN,
        pan: true,
        mte: false,
    };

    #[test]
    fn from_el1h_the_second_vector_group_is_used() {
        let entry = external_abort(&EL1, &ABORT, 0x9200_0046);
        assert_eq!(entry.pc, 0xffff_8000_0000_0a00);
        // EC 0x25, IL, WnR, DFSC 0b010000.
        assert_eq!(entry.esr, 0x9600_0050);
    }

    #[test]
    fn flags_survive_and_interrupts_are_masked() {
        let entry = external_abort(&EL1, &ABORT, 0x9200_0046);
        assert_eq!(entry.spsr, 0x6000_03c5);
    }

    #[test]
    fn undefined_has_class_0_and_the_same_vector() {
        let entry = undefined(&EL1);
        assert_eq!(entry.esr, 0x0200_0000);
        assert_eq!(entry.pc, 0xffff_8000_0000_0a00);
    }

    #[test]
    fn only_aborts_have_an_address() {
        assert!(!undefined(&EL1).is_abort());
        for access in [Access::Read, Access::Write, Access::Fetch] {
            for spsr in [0, 5, 0x10] {
                let from = Interrupted { spsr, ..EL1 };
                let abort = Abort { access, ..ABORT };
                assert!(external_abort(&from, &abort, 0).is_abort());
            }
        }
    }

    #[test]
    fn vectors_follow_the_interrupted_state() {
        let at = |spsr| {
            external_abort(
                &Interrupted {
                    spsr,
                    vbar: 0,
                    ..EL1
                },
                &ABORT,
                0,
            )
            .pc
        };
        assert_eq!(at(0x4), 0x000);
        assert_eq!(at(0x5), 0x200);
        assert_eq!(at(0x0), 0x400);
        assert_eq!(at(0x10), 0x600);
    }

    #[test]
    fn pan_is_set_unless_span_says_keep() {
        let spanned = external_abort(&EL1, &ABORT, 0);
        assert_eq!(spanned.spsr & PAN, 0);
        let plain = external_abort(&Interrupted { sctlr: 0, ..EL1 }, &ABORT, 0);
        assert_eq!(plain.spsr & PAN, PAN);
        let without = external_abort(
            &Interrupted {
                sctlr: 0,
                pan: false,
                ..EL1
            },
            &ABORT,
            0,
        );
        assert_eq!(without.spsr & PAN, 0);
    }

    #[test]
    fn ssbs_and_tag_checks_follow_their_controls() {
        let from = Interrupted {
            sctlr: SCTLR_DSSBS | SCTLR_SPAN,
            mte: true,
            ..EL1
        };
        let entry = external_abort(&from, &ABORT, 0);
        assert_eq!(entry.spsr & (SSBS | TCO), SSBS | TCO);
    }

    #[test]
    fn fetch_from_el0_on_a_walk_is_an_instruction_abort_on_a_table_walk() {
        let abort = Abort {
            access: Access::Fetch,
            on_s1_walk: true,
            ..ABORT
        };
        let from = Interrupted { spsr: 0, ..EL1 };
        let entry = external_abort(&from, &abort, 0x8200_0087);
        assert_eq!(entry.esr, 0x8200_0014);
    }
}
