//! The maintenance gate: every maintenance step of the source, taken away or delayed behind the
//! next, must be noticed by a scenario.
//!
//! The steps are not listed by hand. A first run without a mutation collects every call of a
//! maintenance or store method by its place in the source; each of those is then dropped, and
//! delayed, in runs of its own.

#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up fails")]

mod scenarios;
mod sequences;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use stage2::arm::{ArmCache, ArmCacheFacts, ArmTlb, ArmTlbFacts, FetchPolicy, LevelHint, Repeat};
use stage2::testing::{Event, FakeArm, FakeMachine, Mutation, Site};
use stage2::{
    Aging, Annotation, CacheMaintenance, FaultRequest, ForceWriteBack, Granule, Importer,
    InvalidateListener, Ipa, IpaRange, LeafAttrs, Level, Pa, PaRange, Perms, RangeOps, TlbCaps,
    TlbInvalidate,
};

use crate::kit::*;
use scenarios::SCENARIOS;

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
