//! What the tests share.

use stage2::testing::{Arch, FakeMachine, RawLeaf};
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Blocks, ForceWriteBack, Granule, Ipa, IpaRange, LeafAttrs,
    Level, MapOutcome, MapRequest, Pa, Perms, Stage2,
};

pub(crate) const PAGE: u64 = 0x1000;
pub(crate) const BLOCK: u64 = 0x20_0000;
pub(crate) const GIB: u64 = 0x4000_0000;

pub(crate) type Space<'m> = Stage2<ArmStage2, &'m FakeMachine>;

/// 39 input bits from level 1, no forced write-back.
pub(crate) fn arm(fwb: ForceWriteBack) -> ArmStage2 {
    ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: 39,
        output_bits: 40,
        features: ArmFeatures {
            fwb,
            ..ArmFeatures::V8_0
        },
        start: Some(Level::L1),
    })
    .expect("a valid set-up")
}

pub(crate) fn machine(tables: usize) -> FakeMachine {
    FakeMachine::new(
        Arch {
            xnx: false,
            ..Arch::arm_4k(1, 39, false)
        },
        tables,
    )
}

pub(crate) fn machine_fwb(tables: usize) -> FakeMachine {
    FakeMachine::new(
        Arch {
            xnx: false,
            ..Arch::arm_4k(1, 39, true)
        },
        tables,
    )
}

/// An attached space.
pub(crate) fn space(machine: &FakeMachine) -> Space<'_> {
    let space = Stage2::new(arm(ForceWriteBack::Off), machine, 5).expect("a valid set-up");
    machine.attach(space.root());
    space
}

pub(crate) fn space_fwb(machine: &FakeMachine) -> Space<'_> {
    let space = Stage2::new(arm(ForceWriteBack::On), machine, 5).expect("a valid set-up");
    machine.attach(space.root());
    space
}

pub(crate) fn range(start: u64, size: u64) -> IpaRange {
    IpaRange::new(Ipa::new(start), size).expect("a valid set-up")
}

pub(crate) fn normal() -> LeafAttrs {
    LeafAttrs::normal(Perms::RWX)
}

pub(crate) fn request(ipa: u64, size: u64, pa: u64) -> MapRequest {
    MapRequest::new(Ipa::new(ipa), size, Pa::new(pa), normal())
}

pub(crate) fn map(space: &mut Space<'_>, ipa: u64, size: u64, pa: u64) -> MapOutcome {
    space.map(&request(ipa, size, pa)).expect("a valid set-up")
}

/// The same with these attributes.
pub(crate) fn map_as(
    space: &mut Space<'_>,
    attrs: LeafAttrs,
    ipa: u64,
    size: u64,
    pa: u64,
) -> MapOutcome {
    let request = MapRequest {
        attrs,
        ..request(ipa, size, pa)
    };
    space.map(&request).expect("a valid set-up")
}

pub(crate) fn map_pages(space: &mut Space<'_>, ipa: u64, size: u64, pa: u64) -> MapOutcome {
    space
        .map(&request(ipa, size, pa).with_blocks(Blocks::Never))
        .expect("a valid set-up")
}

/// Leaves as (input, level, output), read from raw memory.
pub(crate) fn mapped(machine: &FakeMachine) -> Vec<(u64, i8, u64)> {
    machine
        .leaves()
        .into_iter()
        .map(|(at, level, leaf)| (at, level, leaf.pa))
        .collect()
}

/// The raw leaf at an address.
pub(crate) fn leaf_at(machine: &FakeMachine, at: u64) -> RawLeaf {
    let found = machine.leaves().into_iter().find(|(start, level, _)| {
        let size = 1u64 << (12 + 9 * (3 - i32::from(*level)));
        (*start..*start + size).contains(&at)
    });
    found.map(|(_, _, leaf)| leaf).expect("a valid set-up")
}

/// Nothing was done against the rules, and nothing is left to do.
pub(crate) fn assert_clean(machine: &FakeMachine) {
    assert_eq!(machine.finish(), Vec::<String>::new());
}
