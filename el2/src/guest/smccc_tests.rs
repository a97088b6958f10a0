use proptest::prelude::*;

use super::*;
use crate::guest::idregs::{HardwareIds, Model};

struct Never;

impl EntropySource for Never {
    fn fill(&self, _: &mut [u64]) -> bool {
        false
    }
}

const MODEL: Model = Model {
    ipa_bits: 40,
    gic_v3: false,
};

/// What a guest is, for the calls.
struct Guest<'a> {
    power: Power,
    ids: GuestIds,
    mitigations: Mitigations,
    entropy: Option<&'a Never>,
    guard: Option<MmioGuard>,
    memory_end: u64,
}

impl Caller for Guest<'_> {
    fn power(&self) -> &Power {
        &self.power
    }

    fn ids(&self) -> &GuestIds {
        &self.ids
    }

    fn mitigations(&self) -> &Mitigations {
        &self.mitigations
    }

    fn entropy(&self) -> Option<&dyn EntropySource> {
        self.entropy.map(|source| -> &dyn EntropySource { source })
    }

    fn guard(&self) -> Option<&MmioGuard> {
        self.guard.as_ref()
    }

    fn is_memory(&self, ipa: u64) -> bool {
        ipa < self.memory_end
    }
}

fn with(csv2: u64, mitigations: Mitigations, entropy: bool, x: [u64; 4]) -> Action {
    let hardware = HardwareIds {
        pfr0: csv2 << 56,
        ..HardwareIds::default()
    };
    let guest = Guest {
        power: Power::new(2),
        ids: GuestIds::new(&hardware, &MODEL),
        mitigations,
        entropy: entropy.then_some(&Never),
        guard: None,
        memory_end: 0x1000,
    };
    call(0, x, &guest)
}

fn protected(x: [u64; 4]) -> Action {
    let guest = Guest {
        power: Power::new(1),
        ids: GuestIds::new(&HardwareIds::default(), &MODEL),
        mitigations: Mitigations::default(),
        entropy: None,
        guard: Some(MmioGuard::new()),
        memory_end: u64::MAX,
    };
    call(0, x, &guest)
}

#[test]
fn only_a_protected_guest_has_calls_about_protection() {
    for id in (0xc600_0002..=0xc600_000b).chain([0xc600_0181]) {
        assert_eq!(ask(id, 0), one(u64::MAX), "{id:#x}");
        assert!(
            matches!(protected([id, 0, 0, 0]), Action::Protected(_)),
            "{id:#x}"
        );
    }
    assert_eq!(ask(0x8600_0000, 0), Action::Return([1, 0, 0, 0]));
    assert_eq!(
        protected([0x8600_0000, 0, 0, 0]),
        Action::Return([0xffd, 0, 0, 0])
    );
    assert_eq!(protected([0xc600_000c, 0, 0, 0]), one(u64::MAX));
}

fn ask(id: u64, argument: u64) -> Action {
    with(0, Mitigations::default(), false, [id, argument, 0, 0])
}

const ALL_BY_FIRMWARE: Mitigations = Mitigations {
    workaround_1: Mitigation::Firmware,
    workaround_2: Mitigation::NotNeeded,
    workaround_3: Mitigation::Unknown,
};

#[test]
fn version_is_1_2_and_known_by_features() {
    assert_eq!(ask(0x8000_0000, 0), one(0x1_0002));
    assert_eq!(ask(0x8000_0001, 0x8000_0000), one(0));
    assert_eq!(ask(0x8000_0001, 0x8000_0001), one(0));
    assert_eq!(ask(0x8000_0001, 0x8000_0002), one(u64::MAX)); // no SOC_ID
}

#[test]
fn psci_is_reached_through_the_same_door() {
    let on = with(0, Mitigations::default(), false, [0xc400_0003, 1, 0x800, 5]);
    assert_eq!(on, Action::Power(psci::Action::TurnedOn { index: 1 }));
    assert_eq!(ask(0x8400_0008, 0), Action::Power(psci::Action::SystemOff));
}

#[test]
fn workarounds_say_what_the_core_needs_and_do_it() {
    let known = |id, argument| with(0, ALL_BY_FIRMWARE, false, [id, argument, 0, 0]);
    assert_eq!(known(0x8000_0001, 0x8000_8000), one(0));
    assert_eq!(known(0x8000_8000, 0), Action::Firmware(0x8000_8000));
    assert_eq!(known(0x8000_0001, 0x8000_7fff), one(1));
    assert_eq!(known(0x8000_7fff, 1), one(0));
    assert_eq!(known(0x8000_0001, 0x8000_3fff), one(u64::MAX));
    assert_eq!(known(0x8000_3fff, 0), one(u64::MAX));
}

/// SMCCC_ARCH_WORKAROUND_2 has an argument, and what it does stays with the core.
#[test]
fn a_guest_does_not_turn_the_cores_mitigation_off() {
    let switched = Mitigations {
        workaround_2: Mitigation::Firmware,
        ..ALL_BY_FIRMWARE
    };
    let known = |id, argument| with(0, switched, false, [id, argument, 0, 0]);
    assert_eq!(known(0x8000_0001, 0x8000_7fff), one(u64::MAX));
    assert_eq!(known(0x8000_7fff, 0), one(u64::MAX));
    assert_eq!(known(0x8000_7fff, 1), one(u64::MAX));
}

#[test]
fn predictors_are_cleared_between_worlds_where_firmware_can() {
    assert_eq!(Mitigations::default().between_worlds(), None);
    assert_eq!(ALL_BY_FIRMWARE.between_worlds(), Some(0x8000_8000));
    let both = Mitigations {
        workaround_3: Mitigation::Firmware,
        ..ALL_BY_FIRMWARE
    };
    assert_eq!(both.between_worlds(), Some(0x8000_3fff));
    let none_needed = Mitigations {
        workaround_1: Mitigation::NotNeeded,
        ..Mitigations::default()
    };
    assert_eq!(none_needed.between_worlds(), None);
}

#[test]
fn csv2_says_that_workaround_1_is_not_needed() {
    let csv2 = |id, argument| with(1, ALL_BY_FIRMWARE, false, [id, argument, 0, 0]);
    assert_eq!(csv2(0x8000_0001, 0x8000_8000), one(1));
    assert_eq!(csv2(0x8000_8000, 0), one(0));
}

#[test]
fn firmware_answers_are_understood() {
    assert_eq!(Mitigation::from_firmware(0), Mitigation::Firmware);
    assert_eq!(Mitigation::from_firmware(1), Mitigation::NotNeeded);
    assert_eq!(Mitigation::from_firmware(-1), Mitigation::Unknown);
}

#[test]
fn vendor_is_kvm_with_its_bitmap() {
    let uid = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];
    assert_eq!(ask(0x8600_ff01, 0), Action::Return(uid));
    assert_eq!(ask(0x8600_0000, 0), Action::Return([1, 0, 0, 0]));
    assert_eq!(ask(0xc600_0003, 0), one(u64::MAX));
}

#[test]
fn attributes_are_measured_by_the_caller() {
    assert_eq!(
        ask(0xc600_0180, 0x4008_0000),
        Action::Attributes(0x4008_0000)
    );
}

#[test]
fn host_calls_and_strange_ids_are_not_supported() {
    for id in [
        0,
        0xc600_0100,
        0xc600_0132,
        0x8200_0000,
        0x1_8400_0000,
        u64::MAX,
    ] {
        assert_eq!(ask(id, 0), one(u64::MAX), "{id:#x}");
    }
}

#[test]
fn random_numbers_need_a_source() {
    assert_eq!(ask(0x8400_0050, 0), one(u64::MAX));
    let version = with(0, Mitigations::default(), true, [0x8400_0050, 0, 0, 0]);
    assert_eq!(version, Action::Return([0x1_0000, 0, 0, 0]));
}

#[test]
fn immediates_are_not_supported() {
    let guest = Guest {
        power: Power::new(1),
        ids: GuestIds::new(&HardwareIds::default(), &MODEL),
        mitigations: Mitigations::default(),
        entropy: None,
        guard: None,
        memory_end: u64::MAX,
    };
    assert_eq!(call(1, [0x8400_0000, 0, 0, 0], &guest), one(u64::MAX));
}

proptest! {
    /// Firmware is called only for a workaround that it has.
    #[test]
    fn firmware_calls_are_an_allow_list(id: u64, argument: u64) {
        if let Action::Firmware(id) = with(0, ALL_BY_FIRMWARE, true, [id, argument, 0, 0]) {
            prop_assert_eq!(id, 0x8000_8000);
        }
    }
}
