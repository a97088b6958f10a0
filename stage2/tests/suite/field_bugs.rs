//! Bugs that shipped elsewhere, each reproduced on the model of the CPU: the right sequence
//! passes, the sequence of the field does not.

use stage2::arm::{ArmCache, ArmCacheFacts, ArmTlb, ArmTlbFacts, FetchPolicy, LevelHint, Repeat};
use stage2::testing::{FakeArm, Op, Wrong};
use stage2::{CacheMaintenance, Granule, Level, Pa, PaRange, RangeOps, TlbInvalidate};

use crate::kit::*;

const AT: u64 = 0x8000_0000;
const NONE: Vec<String> = Vec::new();

fn invalidated(wrong: Option<Wrong>, pages: u64) -> FakeArm {
    let cpus = FakeArm::caching(AT, AT + pages * PAGE);
    if let Some(wrong) = wrong {
        cpus.misuse(wrong);
    }
    let facts = ArmTlbFacts {
        granule: Granule::K4,
        hint: LevelHint::Missing,
        range_ops: RangeOps::Missing,
        whole_beyond: 64,
        repeat: Repeat::No,
    };
    ArmTlb::new(&cpus, facts).invalidate_range(FakeArm::GUEST, range(AT, pages * PAGE), None);
    cpus
}

fn cleaned(wrong: Option<Wrong>) -> Vec<String> {
    let caches = FakeArm::dirty(AT, AT + PAGE, true);
    if let Some(wrong) = wrong {
        caches.misuse(wrong);
    }
    let facts = ArmCacheFacts {
        data_line: 64,
        fetch_line: 64,
        data_seen_by_fetch: true,
        fetch: FetchPolicy::Coherent,
    };
    let frames = PaRange::new(Pa::new(AT), PAGE).expect("a page");
    ArmCache::new(&caches, facts).clean_invalidate_data(frames);
    caches.finish_data(AT, AT + PAGE)
}

#[test]
fn stage_1_is_invalidated_after_stage_2_is_complete() {
    let cpus = invalidated(None, 2);
    assert_eq!(cpus.finish_tlb(AT, AT + 2 * PAGE), NONE);
    let expected = [
        Op::DsbIshst,
        Op::Enter,
        Op::Isb,
        Op::TlbiIpa,
        Op::TlbiIpa,
        Op::DsbIsh,
        Op::TlbiStage1,
        Op::DsbIsh,
        Op::Isb,
        Op::Leave,
        Op::Isb,
    ];
    assert_eq!(cpus.trace(), expected);
}

#[test]
fn the_operand_is_a_page_number() {
    let cpus = invalidated(None, 1);
    assert_eq!(cpus.operands()[0], AT >> 12);
    let wrong = invalidated(Some(Wrong::UnshiftedOperand), 1);
    assert_ne!(wrong.finish_tlb(AT, AT + PAGE), NONE);
}

#[test]
fn another_regimes_invalidation_does_not_reach_the_guest() {
    let wrong = invalidated(Some(Wrong::OtherRegime), 1);
    assert_ne!(wrong.finish_tlb(AT, AT + PAGE), NONE);
}

#[test]
fn the_context_before_comes_back_not_the_target() {
    assert_eq!(invalidated(None, 1).finish_tlb(AT, AT + PAGE), NONE);
    let wrong = invalidated(Some(Wrong::RestoresTarget), 1);
    assert_ne!(wrong.finish_tlb(AT, AT + PAGE), NONE);
}

#[test]
fn cleaning_comes_with_invalidating() {
    assert_eq!(cleaned(None), NONE);
    assert_ne!(cleaned(Some(Wrong::InvalidateOnly)), NONE);
}

#[test]
fn cleaning_goes_to_the_point_of_coherency() {
    assert_ne!(cleaned(Some(Wrong::PointOfUnification)), NONE);
}

#[test]
fn an_affected_cpu_gets_every_invalidation_twice() {
    let cpus = FakeArm::caching(AT, AT + PAGE);
    let facts = ArmTlbFacts {
        granule: Granule::K4,
        hint: LevelHint::Offered,
        range_ops: RangeOps::Missing,
        whole_beyond: 64,
        repeat: Repeat::Yes,
    };
    let tlb = ArmTlb::new(&cpus, facts);
    tlb.invalidate_range(FakeArm::GUEST, range(AT, PAGE), Some(Level::PAGE));
    let count = |op| cpus.trace().into_iter().filter(|done| *done == op).count();
    assert_eq!(
        (count(Op::TlbiIpa), count(Op::TlbiStage1), count(Op::DsbIsh)),
        (2, 2, 4)
    );
    tlb.invalidate_all(FakeArm::GUEST);
    assert_eq!((count(Op::TlbiBoth), count(Op::DsbIsh)), (2, 6));
    assert_eq!(cpus.finish_tlb(AT, AT + PAGE), NONE);
}

/// One operation for each block, at its start, whatever part of it the range begins with.
#[test]
fn blocks_are_invalidated_by_one_operation_each() {
    for (granule, block) in [
        (Granule::K4, 2 << 20),
        (Granule::K16, 32 << 20),
        (Granule::K64, 512 << 20),
    ] {
        let cpus = FakeArm::caching(0, PAGE);
        let facts = ArmTlbFacts {
            granule,
            hint: LevelHint::Missing,
            range_ops: RangeOps::Missing,
            whole_beyond: 64,
            repeat: Repeat::No,
        };
        let part = range(block + 0x1_0000, 2 * block);
        ArmTlb::new(&cpus, facts).invalidate_range(FakeArm::GUEST, part, Some(Level::L2));
        let starts = [1, 2, 3].map(|n| (n * block) >> 12);
        assert_eq!(cpus.operands()[..3], starts);
        let operations = cpus.trace().into_iter().filter(|op| *op == Op::TlbiIpa);
        assert_eq!(operations.count(), 3);
    }
}

#[test]
fn publishing_is_a_barrier_for_stores() {
    let cpus = FakeArm::dirty(AT, AT + PAGE, true);
    let facts = ArmCacheFacts {
        data_line: 64,
        fetch_line: 64,
        data_seen_by_fetch: true,
        fetch: FetchPolicy::Coherent,
    };
    ArmCache::new(&cpus, facts).publish();
    assert_eq!(cpus.trace(), [Op::DsbIshst]);
}
