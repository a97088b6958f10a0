//! The hypervisor's library against its specification: after every step both say the same, and the tables, read
//! back by an independent walk, show nobody what is not theirs.
//!
//! In the small world every state that so many steps lead to is left by every step. States are one if they
//! differ only in which page, which guest or which unprotected VM is meant (`Model::key`). So what a wrong
//! step leaves in the library must show at once, in what is compared after it (`World::agrees`): else a later
//! step might only be tried on the way to the same state that has no fault. Not compared are the lists of
//! leases and donations as such, and what the tables happen to map of what they may.
//!
//! There all steps are of single pages, and each VM's state has a page of its own. Ranges, any page for a
//! VM's state, and worlds that last are for the random steps, which merge nothing. Not here: a slot that is
//! moved or locked, several slots, an expected measurement, and EL2 without memory.
//!
//! `make test` runs it optimised; without optimisation it takes fewer steps, with `RAVELIN_SOAK=1` more steps.
#![allow(clippy::cast_possible_truncation, reason = "a few pages, two guests")]

mod model;
mod plain;
mod plain_steps;
mod plain_world;
mod world;

use std::collections::HashSet;
use std::panic::resume_unwind;
use std::thread;

use model::{BORROWERS, GUESTS, Key, Model, Said, Step};
use world::World;

/// Whether there is time.
pub(crate) fn soak() -> bool {
    std::env::var_os("RAVELIN_SOAK").is_some()
}

/// Does a step in both; whether they agree.
fn compare(world: &World<'_>, model: &mut Model, step: Step) -> Result<(), String> {
    let expected = model.step(step);
    let said = world.step(step);
    if said != expected {
        return Err(format!("said {said:?}, not {expected:?}"));
    }
    model.promises()?;
    world.agrees(model)
}

/// What the protocol checker of the tables has found.
fn is_in_order(world: &World<'_>) -> Result<(), String> {
    let wrong = world.violations();
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(format!("{wrong:?}"))
    }
}

/// Says where an assertion of the world has failed.
struct At<'a>(&'a [Step], &'a [Step]);

impl Drop for At<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("after {:?} and some of {:?}", self.0, self.1);
        }
    }
}

/// Does the steps of a path, which have been compared before, and then some more.
fn follow(pages: usize, path: &[Step], more: &[Step]) -> Result<Model, String> {
    let ground = world::ground(pages);
    let ownership = ground.ownership();
    let world = World::new(&ground, &ownership, pages);
    let mut model = Model::new(pages);
    let _at = At(path, more);
    for step in path {
        model.step(*step);
        world.step(*step);
    }
    let done = more.iter().try_for_each(|step| {
        let done = compare(&world, &mut model, *step);
        done.map_err(|what| format!("{what}\nat {step:?}"))
    });
    let done = done.and_then(|()| is_in_order(&world));
    done.map_err(|what| format!("{what}\nafter {path:?} and some of {more:?}"))?;
    Ok(model)
}

/// Every step with single pages, of which so many are as good as another; the state of each VM goes to a page
/// of its own behind them.
fn every_step(pages: usize) -> Vec<Step> {
    let mut steps = vec![Step::Reserve];
    for guest in 0..GUESTS {
        steps.extend([
            Step::Create(guest, pages + guest),
            Step::Seal(guest),
            Step::Destroy(guest),
            Step::DestroyInUse(guest),
            Step::TakeBack(guest),
        ]);
        for page in 0..pages {
            steps.extend([
                Step::TopUp(guest, page, 1),
                Step::Donate(guest, page, 1, false),
                Step::Donate(guest, page, 1, true),
                Step::Share(guest, page, 1),
                Step::Unshare(guest, page, 1),
                Step::Relinquish(guest, page, 1),
                Step::GuestWrites(guest, page),
            ]);
        }
    }
    steps.extend((0..BORROWERS).map(Step::EndLeases));
    for page in 0..pages {
        let lend = (0..BORROWERS).map(|vm| Step::Lease(vm, page, 1));
        let end = (0..BORROWERS).map(|vm| Step::EndLease(vm, page, 1));
        let others = [
            Step::DonateHeap(page, 1),
            Step::Reclaim(page),
            Step::HostWrites(page),
        ];
        steps.extend(lend.chain(end).chain(others));
    }
    steps
}

/// A small world: so many pages that are as good as another, steps, and how far.
struct Small {
    pages: usize,
    steps: Vec<Step>,
    depth: usize,
}

/// A state that was not known, and how it is reached.
type Found = (Key, Vec<Step>);

impl Small {
    fn all_pages(&self) -> usize {
        self.pages + GUESTS
    }

    /// Every step from the end of a path. Those that are refused are all taken in one world, as each of them
    /// must leave it as it was; every other one in a world of its own. How many steps those were.
    fn explore(&self, path: &[Step], found: &mut impl FnMut(Found)) -> Result<usize, String> {
        let mut model = Model::new(self.all_pages());
        for step in path {
            model.step(*step);
        }
        let changes_nothing = |step: &Step| {
            let mut after = model.clone();
            let said = after.step(*step);
            let refused = matches!(said, Said::No(_) | Said::Refused | Said::Missing);
            refused && after == model
        };
        // One lease of a page for each VM, or there would be no end of them.
        let is_again = |step: &Step| matches!(step, Step::Lease(vm, n, 1) if model.leases.contains(&(*vm, *n, 1)));
        let steps = self.steps.iter().copied().filter(|step| !is_again(step));
        let (refused, others): (Vec<_>, Vec<_>) = steps.partition(changes_nothing);
        follow(self.all_pages(), path, &refused)?;
        for step in &others {
            let after = follow(self.all_pages(), path, &[*step])?;
            if after != model {
                let longer = path.iter().copied().chain([*step]).collect();
                found((after.key(self.pages), longer));
            }
        }
        Ok(refused.len() + others.len())
    }

    /// The same from each of these: how many steps, and what they lead to that is not known.
    fn explore_all(
        &self,
        paths: &[Vec<Step>],
        known: &HashSet<Key>,
    ) -> Result<(usize, Vec<Found>), String> {
        let mut all = HashSet::new();
        let mut new = Vec::new();
        let mut tried = 0;
        for path in paths {
            tried += self.explore(path, &mut |(key, path)| {
                if !known.contains(&key) && all.insert(key.clone()) {
                    new.push((key, path));
                }
            })?;
        }
        Ok((tried, new))
    }

    /// From every state that can be reached at all, or within so many steps, every step: the states, how
    /// many of them were left by every step, and how many steps those were. On all CPUs.
    fn exhaust(&self) -> Result<[usize; 3], String> {
        let mut known = HashSet::from([Model::new(self.all_pages()).key(self.pages)]);
        let mut layer = vec![Vec::new()];
        let (mut left, mut tried) = (0, 0);
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..self.depth {
            left += layer.len();
            let parts = layer.chunks(layer.len().div_ceil(cpus).max(1));
            let found = thread::scope(|scope| {
                let known = &known;
                let workers: Vec<_> = parts
                    .map(|part| scope.spawn(move || self.explore_all(part, known)))
                    .collect();
                let found = workers
                    .into_iter()
                    .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
                found.collect::<Result<Vec<_>, _>>()
            })?;
            tried += found.iter().map(|(tried, _)| tried).sum::<usize>();
            let new = found.into_iter().flat_map(|(_, new)| new);
            layer = new
                .filter_map(|(key, path)| known.insert(key).then_some(path))
                .collect();
        }
        Ok([known.len(), left, tried])
    }
}

#[test]
fn in_a_world_of_three_pages_every_step_from_every_state_keeps_the_promises() {
    let (pages, depth) = match (soak(), cfg!(debug_assertions)) {
        (true, _) => (3, 13),
        (false, true) => (3, 4),
        (false, false) => (3, 11),
    };
    let steps = every_step(pages);
    let small = Small {
        pages,
        steps,
        depth,
    };
    let [states, left, tried] = small.exhaust().unwrap_or_else(|wrong| panic!("{wrong}"));
    println!(
        "{pages} pages, {depth} steps: {states} states; from {left} of them every step: {tried}"
    );
    assert!(states > 100, "only {states} states");
}

/// A linear congruential generator (Knuth's MMIX constants).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

fn any_step(random: &mut Random, pages: usize) -> Step {
    let (guest, page) = (random.below(GUESTS), random.below(pages));
    let (count, vm) = (1 + random.below(3), random.below(BORROWERS));
    let inside = count.min(pages - page);
    match random.below(38) {
        0 => Step::Reserve,
        1 | 2 => Step::Create(guest, page),
        3 => Step::Seal(guest),
        4 if random.below(8) == 0 => Step::Destroy(guest),
        4 => Step::DestroyInUse(guest),
        5..8 => Step::TakeBack(guest),
        8..13 => Step::Donate(guest, page, count, false),
        13 | 14 => Step::Donate(guest, page, count, true),
        15..19 => Step::Share(guest, page, count),
        19..22 => Step::Unshare(guest, page, count),
        22..24 => Step::Relinquish(guest, page, count),
        24 => Step::Reclaim(page),
        25..30 => Step::GuestWrites(guest, page),
        30..33 => Step::HostWrites(page),
        33 => Step::TopUp(guest, page, inside),
        34 => match random.below(1000) {
            0 => Step::DonateHeap(page, 1),
            1..300 => Step::EndLeases(vm),
            _ => Step::Lease(vm, page, inside),
        },
        _ => Step::EndLease(vm, page, inside),
    }
}

/// So many steps in one world, compared after each.
fn wander(seed: u64, pages: usize, steps: usize) -> Result<(), String> {
    let ground = world::ground(pages);
    let ownership = ground.ownership();
    let world = World::new(&ground, &ownership, pages);
    let mut model = Model::new(pages);
    let mut random = Random(seed);
    for number in 0..steps {
        let step = any_step(&mut random, pages);
        let context = |what: String| format!("seed {seed}, step {number}, {step:?}: {what}");
        compare(&world, &mut model, step).map_err(context)?;
        if number % 64 == 0 {
            is_in_order(&world).map_err(context)?;
        }
    }
    Ok(())
}

#[test]
fn a_million_random_steps_keep_the_promises() {
    let steps = match (soak(), cfg!(debug_assertions)) {
        (true, _) => 20_000_000,
        (false, true) => 20_000,
        (false, false) => 1_000_000,
    };
    let worlds = 20;
    for seed in 0..worlds {
        wander(seed, 8, steps / worlds as usize).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    println!("{steps} steps in {worlds} worlds");
}
