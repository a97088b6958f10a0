//! Decoding of exception syndromes.
//!
//! Source: Arm ARM (DDI 0487) D24.2.40 ESR_ELx, and its ISS encodings.

/// Bit of PSTATE, as SPSR_EL2 has it, that says AArch32, the highest of M.
pub const AARCH32: u64 = 1 << 4;
/// ESR_EL2.IL: the instruction has 32 bits, not 16.
const IL: u64 = 1 << 25;

/// Where code goes on behind the instruction that trapped: its PC and PSTATE.
///
/// All instructions of A64 and A32 have four bytes, of T32 some have two (ESR_EL2.IL), and there each
/// one moves the state of an IT block on (Arm ARM G1.3.4, ITAdvance).
#[must_use]
#[inline]
pub const fn behind(pc: u64, pstate: u64, esr: u64) -> (u64, u64) {
    if pstate & AARCH32 == 0 {
        return (pc.wrapping_add(4), pstate);
    }
    behind_32(pc, pstate, esr)
}

#[cold]
const fn behind_32(pc: u64, pstate: u64, esr: u64) -> (u64, u64) {
    let length = if esr & IL != 0 { 4 } else { 2 };
    (pc.wrapping_add(length) & 0xffff_ffff, after_it(pstate))
}

/// PSTATE behind one instruction of an IT block: IT is in bits 15:10 (IT[7:2]) and 26:25 (IT[1:0]).
const fn after_it(pstate: u64) -> u64 {
    let it = pstate >> 8 & 0xfc | pstate >> 25 & 3;
    let next = if it & 7 == 0 {
        0
    } else {
        it & 0xe0 | it << 1 & 0x1f
    };
    pstate & !(0xfc << 8 | 3 << 25) | (next & 0xfc) << 8 | (next & 3) << 25
}

/// Access that caused an abort.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Data read, or a cache maintenance or translation instruction.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

impl Access {
    /// What a message calls it: for a derived `Debug` EL2 would have to keep its machinery.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Fetch => "fetch",
        }
    }
}

/// Kind of an abort, from the fault status code.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FaultKind {
    /// The address is larger than the tables allow (0b0000LL, 0b101001).
    AddressSize,
    /// No translation (DFSC 0b0001LL, or 0b101011 for level -1).
    Translation,
    /// The access flag is clear (0b0010LL).
    AccessFlag,
    /// The permissions refuse it (0b0011LL).
    Permission,
    /// Anything else: external aborts, alignment, atomics on a type that has none, TLB conflicts.
    Other(u8),
}

impl FaultKind {
    /// What a message calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AddressSize => "address size",
            Self::Translation => "translation",
            Self::AccessFlag => "access flag",
            Self::Permission => "permission",
            Self::Other(_) => "external or alignment",
        }
    }
}

/// An abort from a lower exception level that was taken at EL2.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Abort {
    /// What was attempted.
    pub access: Access,
    /// Why it failed.
    pub kind: FaultKind,
    /// The access was a stage-1 table walk (S1PTW): then HPFAR holds the table's address.
    pub on_s1_walk: bool,
    /// FAR_EL2 does not hold the virtual address (FnV).
    pub far_invalid: bool,
}

impl Abort {
    /// The access that memory has to allow. A walk of stage 1 reads the table, whatever the access
    /// was that it is for; where it lacks a permission it wants to write: the core sets access flags
    /// and dirty states in the table itself (FEAT_HAFDBS), and WnR tells nothing of that.
    #[must_use]
    pub const fn needs(&self) -> Access {
        match (self.on_s1_walk, self.kind) {
            (false, _) => self.access,
            (true, FaultKind::Permission) => Access::Write,
            (true, _) => Access::Read,
        }
    }
}

/// Why EL2 was entered from a lower exception level.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// HVC from AArch64 with this immediate. ELR already points behind it.
    Hvc(u16),
    /// SMC from AArch64 with this immediate, trapped by HCR_EL2.TSC. ELR points at it.
    Smc(u16),
    /// WFI or WFE.
    WaitFor,
    /// MSR, MRS or a system instruction in AArch64; the ISS names it.
    SystemRegister(u32),
    /// Data or instruction abort.
    Abort(Abort),
    /// Everything else, with its exception class.
    Other(u8),
}

/// Decodes ESR_EL2 of an exception from a lower level. Never fails: what is unknown is `Other`.
#[must_use]
#[inline(always)]
pub fn decode(esr: u64) -> Cause {
    match class(esr) {
        0x01 => Cause::WaitFor,
        0x16 => Cause::Hvc(immediate(esr)),
        0x17 => Cause::Smc(immediate(esr)),
        0x18 => Cause::SystemRegister(iss(esr)),
        0x20 | 0x24 => Cause::Abort(abort(esr)),
        other => Cause::Other(other),
    }
}

/// The exception class.
#[must_use]
#[inline]
pub const fn class(esr: u64) -> u8 {
    field(esr, 26, 6)
}

/// The syndrome of a system register's class.
#[must_use]
#[inline]
pub fn iss(esr: u64) -> u32 {
    bits32(esr, 25)
}

/// The abort that the syndrome of one tells of (class 0x20 or 0x24).
#[must_use]
#[inline]
pub fn abort(esr: u64) -> Abort {
    let access = if class(esr) == 0x20 {
        Access::Fetch
    } else {
        data_access(esr)
    };
    Abort {
        access,
        kind: fault_kind(field(esr, 0, 6)),
        on_s1_walk: esr & (1 << 7) != 0,
        far_invalid: esr & (1 << 10) != 0,
    }
}

/// The IPA of a data abort (class 0x24) whose access itself stage 2 does not translate: as [`fault_ipa`] of
/// such a one. `None` if it is on a walk of stage 1, without an address, or a fault of another kind.
#[must_use]
#[inline]
pub const fn untranslated(esr: u64, hpfar: u64, far: u64) -> Option<u64> {
    /// FnV and S1PTW clear, DFSC 0b0001LL.
    const LOOKED_AT: u64 = 1 << 10 | 1 << 7 | 0x3c;
    if esr & LOOKED_AT == 0b00_0100 {
        Some((hpfar >> 4 & 0xff_ffff_ffff) << 12 | far & 0xfff)
    } else {
        None
    }
}

/// WnR (bit 6) says write; cache maintenance (CM, bit 8) sets it too but only needs to read.
fn data_access(esr: u64) -> Access {
    let (write, maintenance) = (esr & (1 << 6) != 0, esr & (1 << 8) != 0);
    if write && !maintenance {
        Access::Write
    } else {
        Access::Read
    }
}

#[inline]
fn fault_kind(status: u8) -> FaultKind {
    // In the order of the enum: no comparison, where the level is 0 to 3.
    match status >> 2 {
        0b0000 => FaultKind::AddressSize,
        0b0001 => FaultKind::Translation,
        0b0010 => FaultKind::AccessFlag,
        0b0011 => FaultKind::Permission,
        _ if status == 0b10_1001 => FaultKind::AddressSize,
        _ if status == 0b10_1011 => FaultKind::Translation,
        _ => FaultKind::Other(status),
    }
}

/// The IPA of a stage-2 abort: HPFAR_EL2.FIPA (bits 43:4 are IPA bits 51:12) with the page offset
/// of FAR_EL2 (Arm ARM D24.2.61). On a stage-1 walk the offset is not that of the access: 0.
#[must_use]
pub fn fault_ipa(abort: &Abort, hpfar: u64, far: u64) -> u64 {
    let page = (hpfar >> 4 & 0xff_ffff_ffff) << 12;
    if abort.on_s1_walk || abort.far_invalid {
        page
    } else {
        page | (far & 0xfff)
    }
}

/// The immediate of an HVC or SMC.
#[must_use]
#[inline]
pub fn immediate(esr: u64) -> u16 {
    let [low, high, ..] = esr.to_le_bytes();
    u16::from_le_bytes([low, high])
}

fn bits32(esr: u64, count: u32) -> u32 {
    let [a, b, c, d, ..] = esr.to_le_bytes();
    u32::from_le_bytes([a, b, c, d]) & ((1 << count) - 1)
}

/// Up to eight bits of a register.
const fn field(value: u64, shift: u32, width: u32) -> u8 {
    (value >> shift).to_le_bytes()[0] & (((1u16 << width) - 1).to_le_bytes()[0])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn instructions_of_64_bit_code_have_four_bytes() {
        assert_eq!(behind(0x1000, 0x3c5, 0), (0x1004, 0x3c5));
        assert_eq!(behind(u64::MAX - 3, 0, 0), (0, 0));
    }

    #[test]
    fn t32_instructions_are_as_long_as_the_syndrome_says() {
        let t32 = AARCH32 | 1 << 5;
        assert_eq!(behind(0x1000, t32, 0), (0x1002, t32));
        assert_eq!(behind(0x1000, t32, IL), (0x1004, t32));
        assert_eq!(behind(0xffff_fffe, t32, 0), (0, t32));
    }

    /// IT state of ITTE EQ, as the Arm ARM's table in F2.8.3 has it: base condition 0, mask 0110.
    #[test]
    fn a_skipped_instruction_moves_its_it_block_on() {
        let with = |it: u64| AARCH32 | 1 << 5 | (it & 0xfc) << 8 | (it & 3) << 25;
        let (_, second) = behind(0, with(0b0000_0110), 0);
        assert_eq!(second, with(0b0000_1100));
        let (_, third) = behind(0, second, 0);
        assert_eq!(third, with(0b0001_1000));
        let (_, outside) = behind(0, third, 0);
        assert_eq!(outside, with(0));
    }

    #[test]
    fn hvc_and_smc_keep_their_immediates() {
        assert_eq!(decode(0x5a00_0000), Cause::Hvc(0));
        assert_eq!(decode(0x5a00_4f5e), Cause::Hvc(0x4f5e));
        assert_eq!(decode(0x5e00_0001), Cause::Smc(1));
    }

    #[test]
    fn data_abort_write_translation_level_2() {
        // EC 0x24, IL, WnR, DFSC 0b000110.
        let expected = Abort {
            access: Access::Write,
            kind: FaultKind::Translation,
            on_s1_walk: false,
            far_invalid: false,
        };
        assert_eq!(decode(0x9200_0046), Cause::Abort(expected));
    }

    #[test]
    fn cache_maintenance_counts_as_a_read() {
        // EC 0x24, IL, CM and WnR, DFSC 0b000111.
        let Cause::Abort(abort) = decode(0x9200_0147) else {
            panic!("not an abort");
        };
        assert_eq!(abort.access, Access::Read);
    }

    #[test]
    fn instruction_abort_permission_on_a_table_walk() {
        // EC 0x20, IL, S1PTW, IFSC 0b001111.
        let Cause::Abort(abort) = decode(0x8200_008f) else {
            panic!("not an abort");
        };
        assert_eq!(abort.access, Access::Fetch);
        assert_eq!(abort.kind, FaultKind::Permission);
        assert!(abort.on_s1_walk);
    }

    #[test]
    fn a_walk_reads_and_with_a_permission_fault_writes() {
        let needs = |esr| match decode(esr) {
            Cause::Abort(abort) => abort.needs(),
            other => panic!("{other:?}"),
        };
        // Fetch, load and store, translation faults of level 3; then permission faults.
        for walk in [0x8200_0087, 0x9200_0087, 0x9200_00c7] {
            assert_eq!(needs(walk), Access::Read);
            assert_eq!(needs(walk | 8), Access::Write);
        }
        assert_eq!(needs(0x8200_000f), Access::Fetch);
        assert_eq!(needs(0x9200_0007), Access::Read);
        assert_eq!(needs(0x9200_0047), Access::Write);
    }

    #[test]
    fn external_abort_is_no_stage_2_fault() {
        let Cause::Abort(abort) = decode(0x9200_0010) else {
            panic!("not an abort");
        };
        assert_eq!(abort.kind, FaultKind::Other(0x10));
    }

    #[test]
    fn ipa_takes_the_offset_from_far_except_on_a_walk() {
        let mut abort = Abort {
            access: Access::Read,
            kind: FaultKind::Translation,
            on_s1_walk: false,
            far_invalid: false,
        };
        assert_eq!(fault_ipa(&abort, 0x0400_0010, 0xffff_1abc), 0x4000_01abc);
        abort.on_s1_walk = true;
        assert_eq!(fault_ipa(&abort, 0x0400_0010, 0xffff_1abc), 0x4000_01000);
    }

    proptest! {
        /// The short way to an address is the long one where it gives one, and it does for all accesses that
        /// are emulated.
        #[test]
        fn untranslated_accesses_have_the_address_of_their_abort(
            iss in 0u64..1 << 25, hpfar in 0u64..1 << 44, far: u64
        ) {
            let esr = 0x24 << 26 | iss;
            let Cause::Abort(abort) = decode(esr) else {
                panic!("not an abort");
            };
            let plain = abort.kind == FaultKind::Translation && !abort.on_s1_walk && !abort.far_invalid;
            let level = iss & 0x3f != 0b10_1011; // Level -1 takes the long way.
            let expected = (plain && level).then(|| fault_ipa(&abort, hpfar, far));
            prop_assert_eq!(untranslated(esr, hpfar, far), expected);
        }

        #[test]
        fn any_syndrome_decodes(esr: u64) {
            let _: Cause = decode(esr);
        }
    }
}
