//! What newer cores can trap bit by bit, as the host has it: HCRX_EL2 and the fine-grained traps.
//!
//! Nothing of it traps, and nothing that needs EL2's help is on. Two kinds of fields say so in opposite
//! ways: where a name begins with "n", or with or ends in "En", clear traps or turns off; all other
//! fields trap, or change what instructions do, where they are set. So of the first kind those are
//! set that are known here, and a field that a later core adds stays clear, whichever kind it is: its
//! registers then trap for the host, too. A field of a feature that a core lacks is RES0.
//!
//! A guest's are all zero: registers of these features are trapped, and what they hold, the host's,
//! counts as zero for the guest (HCRX_EL2.{TCR2En, SCTLR2En, GCSEn, SRMASKEn, EnFPM, D128En}).
//!
//! Source: Arm ARM (DDI 0487) D24.2, HCRX_EL2, HFG*_EL2, HDFG*_EL2, HFG*2_EL2, HDFG*2_EL2.

/// HCRX_EL2: EnAS0, EnALS, EnASR; MSCEn; TCR2En, SCTLR2En; D128En, EnSNERR; EnSDERR, EnIDCP128, GCSEn,
/// EnFPM, PACMEn; SRMASKEn.
pub const HCRX: u64 = 0b111 | 1 << 11 | 0b11 << 14 | 0b11 << 17 | 0b1_1111 << 20 | 1 << 26;

/// HFGRTR_EL2 and HFGWTR_EL2: nACCDATA_EL1 (50), nGCS_EL0 (52) to nAMAIR2_EL1 (63).
pub const REGISTERS: u64 = 1 << 50 | 0xfff << 52;

/// HFGITR_EL2: nBRBINJ (55) to nGCSEPP (59).
pub const INSTRUCTIONS: u64 = 0x1f << 55;

/// HDFGRTR_EL2 and HDFGWTR_EL2: nBRBIDR (59) to nPMSNEVFR_EL1 (62).
pub const DEBUG: u64 = 0xf << 59;

/// HFGRTR2_EL2 and HFGWTR2_EL2: nPFAR_EL1 (0) to nACTLRALIAS_EL1 (14).
pub const REGISTERS_2: u64 = 0x7fff;

/// HFGITR2_EL2: nDCCIVAPS (1). TSBCSYNC (0), TSB CSYNC's trap, and those of PLBI above are of the other kind.
pub const INSTRUCTIONS_2: u64 = 1 << 1;

/// HDFGRTR2_EL2 and HDFGWTR2_EL2: nPMECR_EL1 (0) to nPMBMAR_EL1 (24).
pub const DEBUG_2: u64 = 0x1ff_ffff;

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields of the manual's register descriptions, by their bits.
    fn bits(of: &[u32]) -> u64 {
        of.iter().fold(0, |all, bit| all | 1 << bit)
    }

    /// What traps where it is set: in HFGITR_EL2 all instructions but the five with an "n", in
    /// HFGRTR2_EL2 TFSR_EL1, RGSR_EL1, GCR_EL1, in HFGITR2_EL2 TSBCSYNC, PLBI's and DCGBVA; in HCRX_EL2
    /// FnXS, FGTnXS, SMPME, TALLINT, VINMI, VFNMI, CMOW, MCE2, PTTWI, TMEA.
    #[test]
    fn the_host_traps_nothing_by_a_field_that_traps_where_it_is_set() {
        let instructions: std::vec::Vec<u32> = (0..55).chain([60, 62, 63]).collect();
        assert_eq!(INSTRUCTIONS & bits(&instructions), 0);
        assert_eq!(REGISTERS_2 & bits(&[33, 34, 35]), 0);
        let others: std::vec::Vec<u32> = (2..=14).chain([0]).collect();
        assert_eq!(INSTRUCTIONS_2 & bits(&others), 0);
        assert_eq!(HCRX & bits(&[3, 4, 5, 6, 7, 8, 9, 10, 16, 19]), 0);
        // HFGRTR_EL2 and HDFGRTR_EL2: everything below the first "n", and 51; 63 is PMBIDR_EL1's.
        assert_eq!(REGISTERS & bits(&[51]), 0);
        assert_eq!(DEBUG & bits(&[63]), 0);
        assert_eq!(REGISTERS.trailing_zeros(), 50);
        assert_eq!(DEBUG.trailing_zeros(), 59);
    }

    #[test]
    fn what_traps_where_it_is_clear_is_open_to_the_host() {
        let en = [0, 1, 2, 11, 14, 15, 17, 18, 20, 21, 22, 23, 24, 26];
        assert_eq!(HCRX, bits(&en));
        let registers = [50, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63];
        assert_eq!(REGISTERS, bits(&registers));
        assert_eq!(INSTRUCTIONS, bits(&[55, 56, 57, 58, 59]));
        assert_eq!(DEBUG, bits(&[59, 60, 61, 62]));
        let second: std::vec::Vec<u32> = (0..=14).collect();
        assert_eq!(REGISTERS_2, bits(&second));
        assert_eq!(INSTRUCTIONS_2, bits(&[1]));
        let debug: std::vec::Vec<u32> = (0..=24).collect();
        assert_eq!(DEBUG_2, bits(&debug));
    }
}
