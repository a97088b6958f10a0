//! The maintenance gate: every maintenance step of the source, taken away or delayed behind the
//! next, must be noticed by a scenario.
//!
//! The steps are not listed by hand. A first run without a mutation collects every call of a
//! maintenance or store method by its place in the source; each of those is then dropped, and
//! delayed, in runs of its own.

#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up fails")]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use stage2::arm::{ArmCache, ArmCacheFacts, ArmTlb, ArmTlbFacts, FetchPolicy, LevelHint, Repeat};
use stage2::testing::{Event, FakeArm, FakeMachine, Mutation, Site};
use stage2::{
    Aging, Annotation, CacheMaintenance, FaultRequest, ForceWriteBack, Granule, Importer,
    InvalidateListener, Ipa, IpaRange, LeafAttrs, Level, MapRequest, Pa, PaRange, Perms, RangeOps,
    TlbCaps, TlbInvalidate,
};

use crate::kit::*;

/// What a scenario leaves behind: all that is wrong, and the mappings.
type Outcome = (Vec<String>, Vec<State>);

/// Mappings, and tables in use, after an operation.
type State = (Vec<(u64, i8, stage2::testing::RawLeaf)>, usize);

/// A scenario: what to do on a space, operation by operation.
struct Scenario {
    name: &'static str,
    fwb: ForceWriteBack,
    run: fn(&mut Space<'_>, &FakeMachine, &mut Vec<String>),
}

fn end(machine: &FakeMachine, wrong: &mut Vec<String>) {
    wrong.extend(machine.finish());
    LOG.with_borrow_mut(|log| log.push((machine.leaves(), machine.tables_in_use())));
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "map pages and blocks",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, BLOCK - PAGE, BLOCK + PAGE, BLOCK - PAGE);
            end(machine, wrong);
            map(space, BLOCK - 2 * PAGE, PAGE, BLOCK - 2 * PAGE);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "replace a page",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, PAGE, 0x10_0000);
            end(machine, wrong);
            map(space, 0, PAGE, 0x20_0000);
            end(machine, wrong);
            machine.host_writes(0x10_0000, PAGE);
            map(space, 0, PAGE, 0x10_0000);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "force and honour",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            let forced = LeafAttrs::forced_write_back(Perms::RWX);
            space
                .map(&MapRequest {
                    attrs: forced,
                    ..request(0, PAGE, 0x1000)
                })
                .unwrap();
            end(machine, wrong);
            map(space, 0, PAGE, 0x1000);
            end(machine, wrong);
            space
                .map(&MapRequest {
                    attrs: forced,
                    ..request(0, PAGE, 0x1000)
                })
                .unwrap();
            end(machine, wrong);
            space.zap_all();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "a page into a block",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, BLOCK, GIB);
            end(machine, wrong);
            map(space, PAGE, PAGE, 0x100_0000);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "a block over pages of other memory",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, PAGE, 2 * PAGE, GIB);
            end(machine, wrong);
            map(space, 0, BLOCK, 0);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "permissions",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            let with = |perms| MapRequest {
                attrs: LeafAttrs::normal(perms),
                ..request(0, PAGE, 0x1000)
            };
            space.map(&with(Perms::RW)).unwrap();
            end(machine, wrong);
            space.map(&with(Perms::READ | Perms::EXEC)).unwrap();
            end(machine, wrong);
            space.map(&with(Perms::RWX)).unwrap();
            end(machine, wrong);
            space.write_protect(range(0, PAGE)).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "software bits",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, PAGE, 0x1000);
            end(machine, wrong);
            let sw = stage2::SwBits::try_new(3).unwrap();
            let marked = MapRequest {
                attrs: normal().with_sw(sw),
                ..request(0, PAGE, 0x1000)
            };
            space.map(&marked).unwrap();
            end(machine, wrong);
            let raw = machine.snapshot().into_values().flatten();
            let seen = raw
                .filter(|word| word & 3 == 3 && word >> 55 & 0xf == 3)
                .count();
            wrong.extend((seen != 1).then(|| "software bits are not there".into()));
        },
    },
    Scenario {
        name: "unmap pages, tables and parts of blocks",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, 3 * PAGE, GIB);
            map(space, BLOCK, 2 * BLOCK, 2 * GIB);
            end(machine, wrong);
            space.unmap(range(PAGE, PAGE)).unwrap();
            end(machine, wrong);
            space.unmap(range(2 * PAGE, BLOCK - PAGE)).unwrap();
            end(machine, wrong);
            space.unmap(range(0, PAGE)).unwrap();
            end(machine, wrong);
            let mut gone = 0;
            space
                .unmap_with(range(0, GIB), &mut |leaf| {
                    let frames = leaf.frames();
                    let clean = machine.is_clean(frames.start().get(), frames.len());
                    wrong.extend((!clean).then(|| "handed out dirty".into()));
                    gone += frames.len();
                })
                .unwrap();
            wrong.extend((gone != 2 * BLOCK - PAGE).then(|| "memory was lost".into()));
            wrong.extend((machine.tables_in_use() != 1).then(|| "a table was lost".into()));
            end(machine, wrong);
        },
    },
    Scenario {
        name: "unmap what is forced",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            let forced = LeafAttrs::forced_write_back(Perms::RW);
            let two = MapRequest {
                attrs: forced,
                ..request(0, 2 * PAGE, 0x1000)
            };
            space.map(&two).unwrap();
            end(machine, wrong);
            space.unmap(range(0, PAGE)).unwrap();
            end(machine, wrong);
            space
                .map(&MapRequest {
                    attrs: forced,
                    ..request(BLOCK, BLOCK, BLOCK)
                })
                .unwrap();
            end(machine, wrong);
            space.unmap(range(BLOCK + PAGE, PAGE)).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "notes",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            let note = Annotation::try_new(9).unwrap();
            map(space, 0, 2 * PAGE, GIB);
            map(space, BLOCK, BLOCK, 2 * GIB);
            end(machine, wrong);
            space.annotate(range(PAGE, PAGE), note).unwrap();
            end(machine, wrong);
            space.annotate(range(BLOCK, PAGE), note).unwrap();
            end(machine, wrong);
            space.annotate(range(3 * BLOCK, PAGE), note).unwrap();
            end(machine, wrong);
            space.annotate(range(3 * BLOCK, BLOCK), note).unwrap();
            end(machine, wrong);
            space.unmap(range(3 * BLOCK, PAGE)).unwrap();
            end(machine, wrong);
            let there = |at| space.lookup(Ipa::new(at)).unwrap().entry;
            let empty = [3 * BLOCK].map(there);
            let noted = [PAGE, BLOCK, 3 * BLOCK + PAGE].map(there);
            let right = noted.iter().all(|e| *e == stage2::Entry::Annotated(note))
                && empty == [stage2::Entry::Invalid];
            wrong.extend((!right).then(|| "notes are not as written".into()));
        },
    },
    Scenario {
        name: "zap beside others, then map again",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, 2 * PAGE, GIB);
            end(machine, wrong);
            space.zap(range(0, PAGE)).unwrap();
            end(machine, wrong);
            let retried = fault(space, 0, 0x5000);
            wrong.extend((!retried).then(|| "not installed after a zap".into()));
            end(machine, wrong);
            space.zap_exclusive(range(0, 2 * PAGE)).unwrap();
            end(machine, wrong);
            map(space, 0, 2 * PAGE, GIB);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "zap and free what is scattered",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            for round in 0..2 {
                for n in 0..12 {
                    map(space, n * PAGE, PAGE, GIB + 2 * n * PAGE);
                }
                end(machine, wrong);
                match round {
                    0 => space.zap_exclusive(range(0, BLOCK)).unwrap(),
                    _ => space.unmap(range(0, BLOCK)).unwrap(),
                }
                end(machine, wrong);
            }
        },
    },
    Scenario {
        name: "zap what is forced",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            let forced = LeafAttrs::forced_write_back(Perms::RW);
            space
                .map(&MapRequest {
                    attrs: forced,
                    ..request(0, PAGE, 0x1000)
                })
                .unwrap();
            space.zap_all();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "faults",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            for at in [0, PAGE, BLOCK] {
                fault(space, at, at);
                end(machine, wrong);
            }
            let window = range(2 * BLOCK, BLOCK);
            let pa = Pa::new(2 * BLOCK);
            let block = FaultRequest::new(window.start(), window, pa, normal());
            let mapped = stage2::FaultOutcome::Mapped(Level::L2);
            wrong.extend((space.fault(&block) != Ok(mapped)).then(|| "no block".into()));
            end(machine, wrong);
            let read = LeafAttrs::normal(Perms::READ);
            space
                .map(&MapRequest {
                    attrs: read,
                    ..request(GIB, PAGE, GIB)
                })
                .unwrap();
            end(machine, wrong);
            space.relax_perms(Ipa::new(GIB), Perms::EXEC).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "age",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, PAGE, 0);
            end(machine, wrong);
            drop(machine.take_events());
            space
                .test_and_clear_young(range(0, PAGE), Aging::Clear)
                .unwrap();
            // A CPU that has it cached would go on using it unnoticed.
            let events = machine.take_events();
            let told = matches!(
                events[..],
                [.., Event::TlbRange(pages, _)] if pages == range(0, PAGE)
            );
            wrong.extend((!told).then(|| "still cached".into()));
            end(machine, wrong);
            let old = !leaf_at(machine, 0).young;
            wrong.extend((!old).then(|| "not old".into()));
            space.make_young(Ipa::new(0)).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "deferred maintenance",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            machine.expect_deferred(true);
            for at in [0, 2] {
                space
                    .map(&request(at * PAGE, PAGE, at * PAGE).deferred())
                    .unwrap();
            }
            end(machine, wrong);
            space.flush(range(0, 3 * PAGE)).unwrap();
            for at in [0, 2] {
                let fit =
                    machine.is_clean(at * PAGE, PAGE) && machine.is_fetchable(at * PAGE, PAGE);
                wrong.extend((!fit).then(|| "not fit to run".into()));
            }
            end(machine, wrong);
        },
    },
    Scenario {
        name: "deferred maintenance of one page",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            machine.expect_deferred(true);
            space.map(&request(0, PAGE, 0).deferred()).unwrap();
            space.flush(range(0, PAGE)).unwrap();
            let fit = machine.is_clean(0, PAGE) && machine.is_fetchable(0, PAGE);
            wrong.extend((!fit).then(|| "not fit to run".into()));
            end(machine, wrong);
        },
    },
    Scenario {
        name: "a forced page into a block that honours",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            map(space, 0, BLOCK, GIB);
            end(machine, wrong);
            let forced = LeafAttrs::forced_write_back(Perms::RW);
            space
                .map(&MapRequest {
                    attrs: forced,
                    ..request(PAGE, PAGE, GIB + PAGE)
                })
                .unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "split and collapse",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, BLOCK, GIB);
            end(machine, wrong);
            space.split(range(0, BLOCK), Level::PAGE).unwrap();
            end(machine, wrong);
            let pages = mapped(machine).len();
            wrong.extend((pages != 512).then(|| "not split".into()));
            space.collapse(Ipa::new(0), Level::L2).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "no range operations",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            machine.set_caps(TlbCaps {
                range_ops: RangeOps::Missing,
                whole_beyond: 2,
            });
            map(space, 0, 4 * PAGE, GIB);
            end(machine, wrong);
            space.unmap(range(0, 3 * PAGE)).unwrap();
            end(machine, wrong);
            space.unmap(range(3 * PAGE, PAGE)).unwrap();
            end(machine, wrong);
            map(space, 0, 4 * PAGE, GIB);
            end(machine, wrong);
            space
                .unmap_with(range(0, 4 * PAGE), &mut |leaf| {
                    assert!(leaf.frames().len() > 0)
                })
                .unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "an importer",
        fwb: ForceWriteBack::Off,
        run: with_importer,
    },
];

fn fault(space: &Space<'_>, at: u64, pa: u64) -> bool {
    let request = FaultRequest::new(Ipa::new(at), range(at, PAGE), Pa::new(pa), normal());
    matches!(space.fault(&request), Ok(stage2::FaultOutcome::Mapped(_)))
}

struct Device(&'static FakeMachine);

impl InvalidateListener for Device {
    fn invalidate(&self, range: IpaRange) {
        self.0.told(range);
    }
}

/// The machine of this scenario lives as long as the test: importers are registered for good.
fn with_importer(space: &mut Space<'_>, machine: &FakeMachine, wrong: &mut Vec<String>) {
    let machine: &'static FakeMachine = LEAKED.with(|leaked| leaked.get()).unwrap_or_else(|| {
        panic!("{machine:?} is not the leaked one");
    });
    let root = space.export(1 << 11).unwrap();
    let device: &'static Device = Box::leak(Box::new(Device(machine)));
    let importer = Importer {
        listener: device,
        must_be_zero: 1 << 11,
        output_bits: 48,
        coarsest_leaf: Level::L1,
    };
    space.register(&root, importer).unwrap();
    machine.import();
    map(space, 0, 2 * PAGE, GIB);
    end(machine, wrong);
    map(space, 0, PAGE, 2 * GIB);
    end(machine, wrong);
    space.zap(range(0, PAGE)).unwrap();
    end(machine, wrong);
    space.unmap(range(0, 2 * PAGE)).unwrap();
    end(machine, wrong);
    map(space, 0, PAGE, GIB);
    end(machine, wrong);
    space.unregister(device).unwrap();
    machine.stop_importing(wrong);
    end(machine, wrong);
    assert!(space.unexport(root).is_ok());
}

thread_local! {
    static LOG: std::cell::RefCell<Vec<State>> = const { std::cell::RefCell::new(Vec::new()) };
    static LEAKED: std::cell::Cell<Option<&'static FakeMachine>> = const { std::cell::Cell::new(None) };
}

fn run(scenario: &Scenario, mutation: Option<Mutation>, sites: &mut BTreeSet<Site>) -> Outcome {
    let machine: &'static FakeMachine = Box::leak(Box::new(match scenario.fwb {
        ForceWriteBack::Off => machine(12),
        ForceWriteBack::On => machine_fwb(12),
    }));
    LEAKED.with(|leaked| leaked.set(Some(machine)));
    let mut wrong = Vec::new();
    let done = catch_unwind(AssertUnwindSafe(|| {
        if let Some(mutation) = mutation {
            machine.mutate(mutation);
        }
        let mut space = match scenario.fwb {
            ForceWriteBack::Off => space(machine),
            ForceWriteBack::On => space_fwb(machine),
        };
        end(machine, &mut wrong);
        (scenario.run)(&mut space, machine, &mut wrong);
        machine.detach();
        drop(space);
        wrong.extend(machine.finish());
    }));
    sites.extend(machine.sites());
    if done.is_err() {
        wrong.push("panicked".into());
    }
    (wrong, LOG.take())
}

/// Whether a scenario that takes the mutated step comes to another end than `right`.
fn is_noticed(mutation: Mutation, right: &[(&Scenario, BTreeSet<Site>, Outcome)]) -> bool {
    right.iter().any(|(scenario, sites, outcome)| {
        sites.contains(mutation.site())
            && run(scenario, Some(mutation), &mut BTreeSet::new()) != *outcome
    })
}

fn mutants(sites: &BTreeSet<Site>) -> Vec<Mutation> {
    let both = |site: &Site| [Mutation::Drop(*site), Mutation::Delay(*site)];
    sites.iter().flat_map(both).collect()
}

#[test]
fn every_step_of_the_core_is_needed_where_it_stands() {
    let mut all = BTreeSet::new();
    let mut right = Vec::new();
    for scenario in SCENARIOS {
        let mut sites = BTreeSet::new();
        let outcome = run(scenario, None, &mut sites);
        assert_eq!(outcome.0, Vec::<String>::new(), "{}", scenario.name);
        all.extend(&sites);
        right.push((scenario, sites, outcome));
    }
    let mutants = mutants(&all);
    let left: Vec<&Mutation> = mutants
        .iter()
        .filter(|m| !is_noticed(**m, &right))
        .collect();
    println!(
        "{} steps, {} mutants, {} survivors",
        all.len(),
        mutants.len(),
        left.len()
    );
    assert!(mutants.len() >= 100);
    assert_eq!(left, Vec::<&Mutation>::new());
}

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
