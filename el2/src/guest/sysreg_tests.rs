use proptest::prelude::*;

use super::*;
use crate::guest::idregs::{GuestIds, HardwareIds, Model};

/// ISS typed from the manual's layout: op0 21:20, op2 19:17, op1 16:14, CRn 13:10, Rt 9:5, CRm
/// 4:1, direction 0.
fn iss(op0: u32, op1: u32, crn: u32, crm: u32, op2: u32, read: u32) -> u32 {
    op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | 3 << 5 | crm << 1 | read
}

fn ids(gic_v3: bool) -> GuestIds {
    let hardware = HardwareIds {
        pfr0: 0x1101_0000_1311_1112,
        isar0: 0x1120,
        ..HardwareIds::default()
    };
    GuestIds::new(
        &hardware,
        &Model {
            ipa_bits: 40,
            gic_v3,
        },
    )
}

fn read(op0: u32, op1: u32, crn: u32, crm: u32, op2: u32) -> Outcome {
    decide(Trapped::decode(iss(op0, op1, crn, crm, op2, 1)), &ids(true))
}

fn write(op0: u32, op1: u32, crn: u32, crm: u32, op2: u32) -> Outcome {
    decide(Trapped::decode(iss(op0, op1, crn, crm, op2, 0)), &ids(true))
}

#[test]
fn fields_of_the_syndrome_are_where_the_manual_puts_them() {
    // MRS x5, ID_AA64MMFR0_EL1 (S3_0_C0_C7_0), as QEMU reports it: ISS 0x3000af.
    let trapped = Trapped::decode(0x0030_00af);
    assert_eq!(trapped.register.parts(), (3, 0, 0, 7, 0));
    assert_eq!((trapped.rt, trapped.direction), (5, Direction::Read));
    // MSR ICC_SGI1R_EL1 (S3_0_C12_C11_5), x1: ISS 0x3a3036.
    let trapped = Trapped::decode(0x003a_3036);
    assert_eq!(trapped.register.parts(), (3, 0, 12, 11, 5));
    assert_eq!((trapped.rt, trapped.direction), (1, Direction::Write));
}

#[test]
fn names_are_printed_as_assemblers_take_them() {
    let name = std::format!("{:?}", SysReg::new(3, 0, 12, 11, 5));
    assert_eq!(name, "S3_0_C12_C11_5");
}

#[test]
fn identification_registers_come_from_the_model_and_cannot_be_written() {
    assert_eq!(read(3, 0, 0, 6, 0), Outcome::Read(0x1120));
    assert_eq!(read(3, 0, 0, 3, 7), Outcome::Read(0)); // reserved: reads as zero
    assert_eq!(write(3, 0, 0, 6, 0), Outcome::Undefined);
}

#[test]
fn set_way_operations_are_told_from_their_neighbours() {
    for crm in [6, 10, 14] {
        assert_eq!(write(1, 0, 7, crm, 2), Outcome::SetWay);
        assert_eq!(write(1, 0, 7, crm, 4), Outcome::Undefined); // tags
    }
    assert_eq!(write(1, 0, 7, 6, 1), Outcome::Undefined); // DC IVAC never traps by TSW
}

#[test]
fn sgi_registers_give_their_group_and_cannot_be_read() {
    assert_eq!(write(3, 0, 12, 11, 5), Outcome::Sgi(SgiGroup::One));
    assert_eq!(write(3, 0, 12, 11, 6), Outcome::Sgi(SgiGroup::Zero));
    assert_eq!(write(3, 0, 12, 11, 7), Outcome::Sgi(SgiGroup::Zero));
    assert_eq!(read(3, 0, 12, 11, 5), Outcome::Undefined);
    assert_eq!(read(3, 0, 12, 12, 5), Outcome::Read(7));
    assert_eq!(write(3, 0, 12, 12, 5), Outcome::WriteIgnored);
}

#[test]
fn without_a_gicv3_its_registers_are_undefined() {
    for (crm, op2) in [(11, 5), (11, 7), (12, 5)] {
        let trapped = Trapped::decode(iss(3, 0, 12, crm, op2, 0));
        assert_eq!(decide(trapped, &ids(false)), Outcome::Undefined);
    }
}

#[test]
fn physical_timer_is_emulated_and_others_are_unknown() {
    let timer = |register| Outcome::PhysicalTimer(register);
    assert_eq!(read(3, 3, 14, 2, 0), timer(TimerRegister::Tval));
    assert_eq!(write(3, 3, 14, 2, 1), timer(TimerRegister::Ctl));
    assert_eq!(write(3, 3, 14, 2, 2), timer(TimerRegister::Cval));
    assert_eq!(read(3, 3, 14, 0, 1), Outcome::PhysicalCounter);
    assert_eq!(write(3, 3, 14, 0, 1), Outcome::Undefined);
    assert_eq!(read(3, 3, 14, 2, 3), Outcome::Undefined);
    assert_eq!(read(3, 7, 14, 2, 1), Outcome::Undefined); // CNTPS_CTL_EL1
}

#[test]
fn debug_registers_are_there_without_effect() {
    for (crn, crm, op2) in [
        (0, 0, 4),
        (0, 15, 7),
        (0, 2, 2),
        (0, 2, 0),
        (1, 3, 4),
        (1, 4, 4),
    ] {
        assert_eq!(read(2, 0, crn, crm, op2), Outcome::Read(0));
        assert_eq!(write(2, 0, crn, crm, op2), Outcome::WriteIgnored);
    }
}

#[test]
fn what_tells_one_chip_from_another_is_zero() {
    for (op1, op2) in [(0, 6), (1, 7)] {
        assert_eq!(read(3, op1, 0, 0, op2), Outcome::Read(0));
        assert_eq!(write(3, op1, 0, 0, op2), Outcome::Undefined);
    }
    assert_eq!(read(3, 1, 0, 0, 6), Outcome::Undefined); // SMIDR_EL1
}

#[test]
fn os_lock_reads_as_open() {
    assert_eq!(write(2, 0, 1, 0, 4), Outcome::WriteIgnored); // OSLAR
    assert_eq!(read(2, 0, 1, 0, 4), Outcome::Undefined);
    assert_eq!(read(2, 0, 1, 1, 4), Outcome::Read(8)); // OSLSR
    assert_eq!(write(2, 0, 1, 1, 4), Outcome::Undefined);
}

#[test]
fn what_is_hidden_is_undefined() {
    let hidden = [
        (3, 3, 9, 12, 0),  // PMCR_EL0
        (3, 3, 9, 14, 0),  // PMUSERENR_EL0
        (3, 3, 14, 12, 0), // PMEVTYPER0_EL0
        (3, 0, 9, 14, 1),  // PMINTENSET_EL1
        (3, 3, 13, 2, 0),  // AMCR_EL0
        (2, 1, 0, 1, 0),   // TRCPRGCTLR
        (2, 1, 9, 0, 0),   // BRBCR_EL1
        (3, 0, 10, 4, 0),  // LORSA_EL1
        (3, 0, 10, 5, 0),  // MPAM1_EL1
        (3, 0, 13, 0, 7),  // SCXTNUM_EL1
        (3, 3, 13, 0, 7),  // SCXTNUM_EL0
        (3, 0, 9, 9, 0),   // PMSCR_EL1
        (3, 0, 15, 1, 0),  // IMPLEMENTATION DEFINED
        (3, 1, 11, 0, 2),  // IMPLEMENTATION DEFINED
        (3, 0, 1, 0, 3),   // SCTLR2_EL1
        (3, 0, 1, 2, 4),   // SMPRI_EL1
        (3, 0, 2, 0, 3),   // TCR2_EL1
        (3, 0, 2, 5, 0),   // GCSCR_EL1
        (3, 0, 2, 5, 1),   // GCSPR_EL1
        (3, 0, 2, 5, 2),   // GCSCRE0_EL1
        (3, 3, 2, 5, 1),   // GCSPR_EL0
        (3, 3, 4, 4, 2),   // FPMR
        (3, 0, 6, 0, 5),   // PFAR_EL1
        (3, 0, 10, 2, 1),  // MAIR2_EL1
        (3, 0, 10, 2, 2),  // PIRE0_EL1
        (3, 0, 10, 2, 3),  // PIR_EL1
        (3, 0, 10, 2, 4),  // POR_EL1
        (3, 3, 10, 2, 4),  // POR_EL0
        (3, 0, 10, 2, 5),  // S2POR_EL1
        (3, 0, 10, 3, 1),  // AMAIR2_EL1
        (3, 0, 10, 4, 4),  // MPAMIDR_EL1
        (3, 0, 10, 5, 1),  // MPAM0_EL1
        (3, 0, 10, 5, 3),  // MPAMSM_EL1
        (3, 0, 13, 0, 3),  // RCWSMASK_EL1
        (3, 0, 13, 0, 5),  // ACCDATA_EL1
        (3, 0, 13, 0, 6),  // RCWMASK_EL1
        (3, 3, 13, 0, 5),  // TPIDR2_EL0
        (3, 1, 0, 0, 4),   // GMID_EL1
    ];
    for (op0, op1, crn, crm, op2) in hidden {
        assert_eq!(read(op0, op1, crn, crm, op2), Outcome::Undefined);
        assert_eq!(write(op0, op1, crn, crm, op2), Outcome::Undefined);
    }
}

#[test]
fn error_records_are_none() {
    assert_eq!(read(3, 0, 5, 3, 0), Outcome::Read(0));
    assert_eq!(write(3, 0, 5, 3, 0), Outcome::Undefined);
    assert_eq!(write(3, 0, 5, 3, 1), Outcome::WriteIgnored);
    assert_eq!(read(3, 0, 5, 5, 0), Outcome::Read(0));
    assert_eq!(read(3, 0, 5, 5, 7), Outcome::Undefined);
}

#[test]
fn control_registers_are_passed_on_when_written() {
    let vm = |register| Outcome::VmControl(register);
    assert_eq!(write(3, 0, 1, 0, 0), vm(VmRegister::Sctlr));
    assert_eq!(write(3, 0, 2, 0, 2), vm(VmRegister::Tcr));
    assert_eq!(write(3, 0, 5, 2, 0), vm(VmRegister::Esr));
    assert_eq!(write(3, 0, 13, 0, 1), vm(VmRegister::ContextIdr));
    assert_eq!(read(3, 0, 1, 0, 0), Outcome::Undefined);
    assert_eq!(read(3, 0, 1, 0, 1), Outcome::Read(0)); // ACTLR_EL1
}

proptest! {
    /// The short way to an SGI is the long one: for ICC_SGI1R_EL1's encoding, and with any of its bits wrong.
    #[test]
    fn an_sgi_is_known_without_a_look_at_all_others(rt in 0u32..32, wrong in 0u32..40) {
        let iss = 0x003a_3016 | rt << 5;
        let iss = if wrong < 22 { iss ^ 1 << wrong } else { iss };
        let trapped = Trapped::decode(iss);
        let is_sgi = decide(trapped, &ids(true)) == Outcome::Sgi(SgiGroup::One);
        prop_assert_eq!(sgi_written(iss), is_sgi.then_some(trapped.rt));
    }

    /// Reads never have a write's effect, nor the reverse; nothing panics.
    #[test]
    fn directions_do_not_mix(iss: u32, v3: bool) {
        let trapped = Trapped::decode(iss);
        let outcome = decide(trapped, &ids(v3));
        match trapped.direction {
            Direction::Read => prop_assert!(!matches!(
                outcome,
                Outcome::WriteIgnored | Outcome::Sgi(_) | Outcome::Deactivate | Outcome::SetWay
                    | Outcome::VmControl(_)
            )),
            Direction::Write => prop_assert!(!matches!(
                outcome,
                Outcome::Read(_) | Outcome::PhysicalCounter
            )),
        }
    }

    #[test]
    fn encodings_survive(op0 in 0u8..4, op1 in 0u8..8, crn in 0u8..16, crm in 0u8..16, op2 in 0u8..8) {
        prop_assert_eq!(SysReg::new(op0, op1, crn, crm, op2).parts(), (op0, op1, crn, crm, op2));
    }
}
