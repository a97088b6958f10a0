//! What the tests share.

use stage2::testing::{Arch, FakeMachine, RawLeaf};
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Blocks, ForceWriteBack, Granule, Ipa, IpaRange, LeafAttrs,
    Level, MapOutcome, MapRequest, Pa, Perms, Stage2,
};

pub const PAGE: u64 = 0x1000;
pub const BLOCK: u64 = 0x20_0000;
pub const GIB: u64 = 0x4000_0000;

pub type Space<'m> = Stage2<ArmStage2, &'m FakeMachine>;

/// 39 input bits from level 1, no forced write-back.
pub fn arm(fwb: ForceWriteBack) -> ArmStage2 {
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
    .unwrap()
}

pub fn machine(tables: usize) -> FakeMachine {
    FakeMachine::new(
        Arch {
            xnx: false,
            ..Arch::arm_4k(1, 39, false)
        },
        tables,
    )
}

pub fn machine_fwb(tables: usize) -> FakeMachine {
    FakeMachine::new(
        Arch {
            xnx: false,
            ..Arch::arm_4k(1, 39, true)
        },
        tables,
    )
}

/// An attached space.
pub fn space(machine: &FakeMachine) -> Space<'_> {
    let space = Stage2::new(arm(ForceWriteBack::Off), machine, 5).unwrap();
    machine.attach(space.root());
    space
}

pub fn space_fwb(machine: &FakeMachine) -> Space<'_> {
    let space = Stage2::new(arm(ForceWriteBack::On), machine, 5).unwrap();
    machine.attach(space.root());
    space
}

pub fn range(start: u64, size: u64) -> IpaRange {
    IpaRange::new(Ipa::new(start), size).unwrap()
}

pub fn normal() -> LeafAttrs {
    LeafAttrs::normal(Perms::RWX)
}

pub fn request(ipa: u64, size: u64, pa: u64) -> MapRequest {
    MapRequest::new(Ipa::new(ipa), size, Pa::new(pa), normal())
}

pub fn map(space: &mut Space<'_>, ipa: u64, size: u64, pa: u64) -> MapOutcome {
    space.map(&request(ipa, size, pa)).unwrap()
}

pub fn map_pages(space: &mut Space<'_>, ipa: u64, size: u64, pa: u64) -> MapOutcome {
    space
        .map(&request(ipa, size, pa).with_blocks(Blocks::Never))
        .unwrap()
}

/// Leaves as (input, level, output), read from raw memory.
pub fn mapped(machine: &FakeMachine) -> Vec<(u64, i8, u64)> {
    machine
        .leaves()
        .into_iter()
        .map(|(at, level, leaf)| (at, level, leaf.pa))
        .collect()
}

/// The raw leaf at an address.
pub fn leaf_at(machine: &FakeMachine, at: u64) -> RawLeaf {
    let found = machine.leaves().into_iter().find(|(start, level, _)| {
        let size = 1u64 << (12 + 9 * (3 - i32::from(*level)));
        (*start..*start + size).contains(&at)
    });
    found.map(|(_, _, leaf)| leaf).unwrap()
}

/// Nothing was done against the rules, and nothing is left to do.
pub fn assert_clean(machine: &FakeMachine) {
    assert_eq!(machine.finish(), Vec::<String>::new());
}
