//! The same for the instruction sequences of the TLB and the caches.

use super::*;

/// What to invalidate, on CPUs that have it cached.
struct Invalidation {
    range_ops: RangeOps,
    whole: bool,
    pages: u64,
}

const INVALIDATIONS: &[Invalidation] = &[
    Invalidation {
        range_ops: RangeOps::Missing,
        whole: false,
        pages: 3,
    },
    Invalidation {
        range_ops: RangeOps::Offered,
        whole: false,
        pages: 4,
    },
    Invalidation {
        range_ops: RangeOps::Offered,
        whole: false,
        pages: 5,
    },
    Invalidation {
        range_ops: RangeOps::Missing,
        whole: true,
        pages: 3,
    },
];

const FIRST: u64 = 0x8000_0000;

fn tlb(cpus: &FakeArm, range_ops: RangeOps, repeat: Repeat) -> ArmTlb<&FakeArm> {
    let granule = Granule::K4;
    let facts = ArmTlbFacts {
        granule,
        hint: LevelHint::Offered,
        range_ops,
        whole_beyond: 64,
        repeat,
    };
    ArmTlb::new(cpus, facts)
}

fn invalidate(
    case: &Invalidation,
    mutation: Option<Mutation>,
    sites: &mut BTreeSet<Site>,
) -> Vec<String> {
    let behind = FIRST + case.pages * PAGE;
    let cpus = FakeArm::caching(FIRST, behind);
    if let Some(mutation) = mutation {
        cpus.mutate(mutation);
    }
    let tlb = tlb(&cpus, case.range_ops, Repeat::No);
    if case.whole {
        tlb.invalidate_all(FakeArm::GUEST);
    } else {
        tlb.invalidate_range(
            FakeArm::GUEST,
            range(FIRST, behind - FIRST),
            Some(Level::PAGE),
        );
    }
    sites.extend(cpus.sites());
    cpus.finish_tlb(FIRST, behind)
}

fn maintain(
    facts: ArmCacheFacts,
    mutation: Option<Mutation>,
    sites: &mut BTreeSet<Site>,
) -> Vec<String> {
    let (start, bytes) = (0x9_0020, 0x1000);
    let frames = PaRange::new(Pa::new(start), bytes).unwrap();
    let caches = FakeArm::dirty(start, start + bytes, facts.data_seen_by_fetch);
    if let Some(mutation) = mutation {
        caches.mutate(mutation);
    }
    let cache = ArmCache::new(&caches, facts);
    cache.clean_invalidate_data(frames);
    let mut wrong = caches.finish_data(start, start + bytes);
    cache.invalidate_fetch(frames);
    if facts.fetch != FetchPolicy::Coherent {
        wrong.extend(caches.finish_fetch(start, start + bytes));
    }
    sites.extend(caches.sites());
    wrong
}

const CACHES: &[ArmCacheFacts] = &[
    ArmCacheFacts {
        data_line: 64,
        fetch_line: 64,
        data_seen_by_fetch: false,
        fetch: FetchPolicy::ByLine,
    },
    ArmCacheFacts {
        data_line: 64,
        fetch_line: 64,
        data_seen_by_fetch: true,
        fetch: FetchPolicy::Everything,
    },
];

fn all_sequences(mutation: Option<Mutation>, sites: &mut BTreeSet<Site>) -> Vec<Vec<String>> {
    let mut wrong = Vec::new();
    for case in INVALIDATIONS {
        wrong.push(invalidate(case, mutation, sites));
    }
    for facts in CACHES {
        wrong.push(maintain(*facts, mutation, sites));
    }
    wrong
}

#[test]
fn every_instruction_of_the_sequences_is_needed_where_it_stands() {
    let mut sites = BTreeSet::new();
    for wrong in all_sequences(None, &mut sites) {
        assert_eq!(wrong, Vec::<String>::new());
    }
    let mutants = mutants(&sites);
    let unnoticed = |mutation: &&Mutation| {
        let wrong = all_sequences(Some(**mutation), &mut BTreeSet::new());
        wrong.iter().all(Vec::is_empty)
    };
    let left: Vec<&Mutation> = mutants.iter().filter(unnoticed).collect();
    println!(
        "{} instructions, {} mutants, {} survivors",
        sites.len(),
        mutants.len(),
        left.len()
    );
    assert!(mutants.len() >= 40);
    assert_eq!(left, Vec::<&Mutation>::new());
}
