//! Hardware values are what QEMU 10.0.2 reports at EL2 for each `-cpu`; expected ones were derived
//! by hand from the manual's field descriptions.

use proptest::prelude::*;

use super::*;

const V3: Model = Model {
    ipa_bits: 40,
    gic_v3: true,
};
/// Debug architecture 6, two breakpoints, two watchpoints, no double lock: the same everywhere.
const NO_DEBUG: u64 = 0x00f0_0010_1006;

const A72: HardwareIds = HardwareIds {
    pfr0: 0x0100_0222,
    pfr1: 0,
    isar0: 0x0001_1120,
    isar1: 0,
    isar2: 0,
    mmfr0: 0x1124,
    mmfr1: 0,
    mmfr2: 0,
};
const A76: HardwareIds = HardwareIds {
    pfr0: 0x1100_0000_1111_0112,
    pfr1: 0x10,
    isar0: 0x0000_1000_1021_1120,
    isar1: 0x0010_0001,
    isar2: 0,
    mmfr0: 0x0010_1122,
    mmfr1: 0x1021_2122,
    mmfr2: 0x1011,
};
const NEOVERSE_V1: HardwareIds = HardwareIds {
    pfr0: 0x1101_0001_2111_0112,
    pfr1: 0x20,
    isar0: 0x1011_1111_1021_2120,
    isar1: 0x0011_1000_1021_1302,
    isar2: 0,
    mmfr0: 0x0010_1125,
    mmfr1: 0x1021_2122,
    mmfr2: 0x0220_0111_0210_1011,
};
const MAX: HardwareIds = HardwareIds {
    pfr0: 0x1301_0011_2111_0222,
    pfr1: 0x0000_0010_0100_0121,
    isar0: 0x1221_1111_1021_2120,
    isar1: 0x0111_2111_1021_1502,
    isar2: 0x0011_0012,
    mmfr0: 0x2100_0323_1020_1126,
    mmfr1: 0x0110_1120_1031_2122,
    mmfr2: 0x1221_0111_1201_1011,
};

fn seen(hardware: &HardwareIds, model: &Model) -> HardwareIds {
    let ids = GuestIds::new(hardware, model);
    assert_eq!(ids.read(5, 0), NO_DEBUG);
    HardwareIds {
        pfr0: ids.read(4, 0),
        pfr1: ids.read(4, 1),
        isar0: ids.read(6, 0),
        isar1: ids.read(6, 1),
        isar2: ids.read(6, 2),
        mmfr0: ids.read(7, 0),
        mmfr1: ids.read(7, 1),
        mmfr2: ids.read(7, 2),
    }
}

#[test]
fn cortex_a72_loses_aarch32_and_big_endian_data() {
    let expected = HardwareIds {
        pfr0: 0x0100_0011,
        mmfr0: 0x1022,
        ..A72
    };
    assert_eq!(seen(&A72, &V3), expected);
}

#[test]
fn cortex_a76_loses_ras_and_hypervisor_features() {
    let expected = HardwareIds {
        pfr0: 0x1100_0000_0111_0011,
        mmfr0: 0x0010_1022,
        mmfr1: 0x0020_2002,
        mmfr2: 0x11,
        ..A76
    };
    assert_eq!(seen(&A76, &V3), expected);
}

#[test]
fn neoverse_v1_keeps_its_pointer_authentication_and_loses_sve() {
    let expected = HardwareIds {
        pfr0: 0x1101_0000_0111_0011,
        mmfr0: 0x0010_1022,
        mmfr1: 0x0020_2002,
        mmfr2: 0x0020_0011_0010_0011,
        ..NEOVERSE_V1
    };
    assert_eq!(seen(&NEOVERSE_V1, &V3), expected);
}

#[test]
fn max_is_cut_to_what_is_handled() {
    let expected = HardwareIds {
        pfr0: 0x1301_0000_0111_0011,
        pfr1: 0x21,
        isar2: 0x0010_0010,
        mmfr0: 0x1000_0000_0010_1022,
        mmfr1: 0x0110_1020_0030_2002,
        mmfr2: 0x1021_0011_1001_0011,
        ..MAX
    };
    assert_eq!(seen(&MAX, &V3), expected);
}

#[test]
fn gic_registers_need_both_the_model_and_the_core() {
    let v2 = Model {
        gic_v3: false,
        ..V3
    };
    assert_eq!(GuestIds::new(&A72, &v2).read(4, 0), 0x11);
    assert!(!GuestIds::new(&A72, &v2).has_gic_registers());
    assert!(GuestIds::new(&A72, &V3).has_gic_registers());
    assert!(!GuestIds::new(&HardwareIds::default(), &V3).has_gic_registers());
}

#[test]
fn physical_addresses_are_as_wide_as_the_vm_but_not_wider_than_the_core() {
    let range = |hardware: &HardwareIds, ipa_bits| {
        let model = Model { ipa_bits, ..V3 };
        GuestIds::new(hardware, &model).read(7, 0) & 0xf
    };
    let all: std::vec::Vec<_> = [32, 36, 39, 40, 42, 44, 48, 52]
        .into_iter()
        .map(|bits| range(&MAX, bits))
        .collect();
    assert_eq!(all, [0, 1, 1, 2, 3, 4, 5, 5]);
    assert_eq!(range(&A76, 48), 2);
}

#[test]
fn missing_fp_stays_missing() {
    let without = HardwareIds {
        pfr0: 0x00ff_0011,
        ..A72
    };
    assert_eq!(GuestIds::new(&without, &V3).read(4, 0), 0x00ff_0011);
}

#[test]
fn missing_granules_stay_missing() {
    let without = HardwareIds {
        mmfr0: 0xff00_0002,
        ..A72
    };
    assert_eq!(GuestIds::new(&without, &V3).read(7, 0), 0xff00_0002);
}

#[test]
fn aarch32_and_reserved_registers_are_zero() {
    let ids = GuestIds::new(&MAX, &V3);
    let named = [
        (4, 0),
        (4, 1),
        (5, 0),
        (6, 0),
        (6, 1),
        (6, 2),
        (7, 0),
        (7, 1),
        (7, 2),
    ];
    for crm in 1..8 {
        for op2 in 0..8 {
            if !named.contains(&(crm, op2)) {
                assert_eq!(ids.read(crm, op2), 0, "S3_0_C0_C{crm}_{op2}");
            }
        }
    }
}

proptest! {
    /// No field of a feature register is above the hardware's, whatever a newer core says.
    #[test]
    fn nothing_is_promised_that_the_core_lacks(isar0: u64, isar1: u64, mmfr1: u64, mmfr2: u64) {
        let hardware = HardwareIds { isar0, isar1, mmfr1, mmfr2, ..MAX };
        let ids = GuestIds::new(&hardware, &V3);
        let pairs = [
            (ids.read(6, 0), isar0), (ids.read(6, 1), isar1),
            (ids.read(7, 1), mmfr1), (ids.read(7, 2), mmfr2),
        ];
        for (guest, hardware) in pairs {
            for shift in (0..64).step_by(4) {
                prop_assert!(guest >> shift & 0xf <= hardware >> shift & 0xf);
            }
        }
    }
}
