//! Effective x86 memory type: EPT type combined with the guest's PAT type.
//!
//! Used by tests and diagnostics; hardware does the combination.

/// A memory type in the numbering that MTRRs, PAT and EPT share (SDM vol. 3, table "Memory Types
/// That Can Be Encoded in MTRRs").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum X86Type {
    /// Uncacheable.
    Uc = 0,
    /// Write combining.
    Wc = 1,
    /// Write through.
    Wt = 4,
    /// Write protected.
    Wp = 5,
    /// Write back.
    Wb = 6,
}

impl X86Type {
    /// All five.
    pub const ALL: [Self; 5] = [Self::Uc, Self::Wc, Self::Wt, Self::Wp, Self::Wb];

    /// Decodes an MTRR or EPT type byte; `None` for reserved values (2, 3, 7 and above).
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Uc),
            1 => Some(Self::Wc),
            4 => Some(Self::Wt),
            5 => Some(Self::Wp),
            6 => Some(Self::Wb),
            _ => None,
        }
    }

    /// The type's number.
    #[must_use]
    pub const fn byte(self) -> u8 {
        match self {
            Self::Uc => 0,
            Self::Wc => 1,
            Self::Wt => 4,
            Self::Wp => 5,
            Self::Wb => 6,
        }
    }
}

/// A PAT entry: one of the five types, or UC− (7), which a WC of the MTRR or EPT overrides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PatType {
    /// One of the types that EPT has, too.
    Plain(X86Type),
    /// UC−.
    UcMinus,
}

impl PatType {
    /// Decodes one byte of the PAT register; `None` for reserved values (2, 3 and above 7).
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            7 => Some(Self::UcMinus),
            _ => match X86Type::from_byte(byte) {
                Some(t) => Some(Self::Plain(t)),
                None => None,
            },
        }
    }

    /// Column in [`COMBINED`].
    const fn column(self) -> usize {
        match self {
            Self::Plain(X86Type::Uc) => 0,
            Self::UcMinus => 1,
            Self::Plain(X86Type::Wc) => 2,
            Self::Plain(X86Type::Wt) => 3,
            Self::Plain(X86Type::Wb) => 4,
            Self::Plain(X86Type::Wp) => 5,
        }
    }
}

/// Rows: EPT type; columns: PAT type UC, UC−, WC, WT, WB, WP. SDM vol. 3A, table 11-7 "Effective
/// Page-Level Memory Types for Pentium III and More Recent Processor Families", with the EPT
/// type in the place of the MTRR type (SDM vol. 3, "EPT and Memory Typing").
const COMBINED: [[X86Type; 6]; 5] = {
    use X86Type::{Uc, Wb, Wc, Wp, Wt};
    [
        [Uc, Uc, Wc, Uc, Uc, Uc],
        [Uc, Wc, Wc, Uc, Wc, Uc],
        [Uc, Uc, Wc, Wt, Wt, Wp],
        [Uc, Wc, Wc, Wt, Wp, Wp],
        [Uc, Uc, Wc, Wt, Wb, Wp],
    ]
};

/// The effective type of an access through a leaf of type `ept` whose "ignore PAT" bit is clear.
#[must_use]
pub const fn effective_type(ept: X86Type, pat: PatType) -> X86Type {
    let row = match ept {
        X86Type::Uc => 0,
        X86Type::Wc => 1,
        X86Type::Wt => 2,
        X86Type::Wp => 3,
        X86Type::Wb => 4,
    };
    COMBINED[row][pat.column()]
}

#[cfg(test)]
mod tests {
    use super::X86Type::{Uc, Wb, Wc, Wp, Wt};
    use super::*;

    const PATS: [u8; 6] = [0, 7, 1, 4, 6, 5];

    fn row(ept: X86Type) -> [X86Type; 6] {
        PATS.map(|p| effective_type(ept, PatType::from_byte(p).unwrap()))
    }

    // Columns: UC, UC−, WC, WT, WB, WP.
    #[test]
    fn ept_uc_lets_pat_lift_to_wc_only() {
        assert_eq!(row(Uc), [Uc, Uc, Wc, Uc, Uc, Uc]);
    }

    #[test]
    fn ept_wc_row() {
        assert_eq!(row(Wc), [Uc, Wc, Wc, Uc, Wc, Uc]);
    }

    #[test]
    fn ept_wt_row() {
        assert_eq!(row(Wt), [Uc, Uc, Wc, Wt, Wt, Wp]);
    }

    #[test]
    fn ept_wb_lets_pat_choose() {
        assert_eq!(row(Wb), [Uc, Uc, Wc, Wt, Wb, Wp]);
    }

    #[test]
    fn ept_wp_row() {
        assert_eq!(row(Wp), [Uc, Wc, Wc, Wt, Wp, Wp]);
    }

    #[test]
    fn a_slot_flag_loses_wc_for_mtrr_wc_with_pat_uc_minus() {
        // memory-type decision R6 folds MTRR = WC in, R2 does not: WC against UC.
        assert_eq!(effective_type(Wc, PatType::UcMinus), Wc);
        assert_eq!(effective_type(Wb, PatType::UcMinus), Uc);
    }

    #[test]
    fn type_bytes_round_trip_and_reserved_ones_are_refused() {
        for t in X86Type::ALL {
            assert_eq!(X86Type::from_byte(t.byte()), Some(t));
        }
        for bad in [2, 3, 7, 8, 255] {
            assert_eq!(X86Type::from_byte(bad), None);
        }
        assert_eq!(X86Type::ALL.map(X86Type::byte), [0, 1, 4, 5, 6]);
        assert_eq!(PatType::from_byte(7), Some(PatType::UcMinus));
        assert_eq!(PatType::from_byte(8), None);
        assert_eq!(PatType::from_byte(2), None);
    }
}
