//! The hypervisor's library against its specification: after every step both say the same, and the tables, read
//! back by an independent walk, show nobody what is not theirs.
//!
//! `make test` runs it optimised; without optimisation it takes fewer steps, with `RAVELIN_SOAK=1` more pages and steps.
#![allow(clippy::cast_possible_truncation, reason = "a few pages, two guests")]

mod model;
mod plain;
mod plain_steps;
mod plain_world;
mod world;

use std::collections::{HashSet, VecDeque};

use model::{GUESTS, Model, Step};
use world::{Ground, World};

/// Whether there is time.
pub(crate) fn soak() -> bool {
    std::env::var_os("RAVELIN_SOAK").is_some()
}

/// Does the steps in both; the model in the end, and whether the last step changed it.
fn replay(pages: usize, steps: &[Step]) -> Result<(Model, bool), String> {
    let ground = Ground::new(pages);
    let ownership = ground.ownership();
    let mut world = World::new(&ground, &ownership);
    let mut model = Model::new(pages);
    let mut changed = false;
    for (number, step) in steps.iter().enumerate() {
        let before = model.clone();
        let expected = model.step(*step);
        let said = world.step(*step, &before);
        let context = |what: String| format!("{what}\nafter {:?}", &steps[..=number]);
        if said != expected {
            return Err(context(format!("said {said:?}, not {expected:?}")));
        }
        // What came before has been compared before.
        if number + 1 == steps.len() {
            model.promises().map_err(context)?;
            world.agrees(&model).map_err(context)?;
            let wrong = world.violations();
            if !wrong.is_empty() {
                return Err(context(format!("{wrong:?}")));
            }
            changed = model != before;
        }
    }
    Ok((model, changed))
}

/// Every step with single pages.
fn every_step(pages: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for guest in 0..GUESTS {
        steps.extend([
            Step::Create(guest),
            Step::Seal(guest),
            Step::Destroy(guest),
            Step::TakeBack(guest),
        ]);
        for page in 0..pages {
            steps.extend([
                Step::Donate(guest, page, 1, false),
                Step::Donate(guest, page, 1, true),
                Step::Share(guest, page, 1),
                Step::Unshare(guest, page, 1),
                Step::Relinquish(guest, page),
                Step::GuestWrites(guest, page),
            ]);
        }
    }
    for page in 0..pages {
        steps.extend([
            Step::Reclaim(page),
            Step::HostWrites(page),
            Step::Lease(page),
            Step::EndLease(page),
        ]);
    }
    steps
}

/// From every state that can be reached at all, or within so many steps, every step.
fn exhaust(pages: usize, depth: usize) -> Result<(usize, usize), String> {
    let steps = every_step(pages);
    let mut known = HashSet::from([Model::new(pages).key()]);
    let mut open = VecDeque::from([Vec::new()]);
    let mut tried = 0;
    while let Some(path) = open.pop_front() {
        for step in &steps {
            let mut longer: Vec<Step> = path.clone();
            longer.push(*step);
            tried += 1;
            let (model, changed) = replay(pages, &longer)?;
            if changed && known.insert(model.key()) && longer.len() < depth {
                open.push_back(longer);
            }
        }
    }
    Ok((known.len(), tried))
}

#[test]
fn in_a_small_world_every_step_from_every_state_keeps_the_promises() {
    let (pages, depth) = match (soak(), cfg!(debug_assertions)) {
        (true, _) => (3, 12),
        (false, true) => (2, 4),
        (false, false) => (2, 9),
    };
    let (states, tried) = exhaust(pages, depth).unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("{pages} pages, up to {depth} steps: {states} states, {tried} sequences");
    assert!(states > 50, "only {states} states");
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
    let count = 1 + random.below(3);
    match random.below(32) {
        0 => Step::Create(guest),
        1 => Step::Seal(guest),
        2 if random.below(8) == 0 => Step::Destroy(guest),
        2 | 3 => Step::TakeBack(guest),
        4..9 => Step::Donate(guest, page, count, false),
        9 | 10 => Step::Donate(guest, page, count, true),
        11..15 => Step::Share(guest, page, count),
        15..18 => Step::Unshare(guest, page, count),
        18..20 => Step::Relinquish(guest, page),
        20 => Step::Reclaim(page),
        21..26 => Step::GuestWrites(guest, page),
        26..29 => Step::HostWrites(page),
        29 | 30 => Step::Lease(page),
        _ => Step::EndLease(page),
    }
}

/// So many steps in one world, compared after each.
fn wander(seed: u64, pages: usize, steps: usize) -> Result<(), String> {
    let ground = Ground::new(pages);
    let ownership = ground.ownership();
    let mut world = World::new(&ground, &ownership);
    let mut model = Model::new(pages);
    let mut random = Random(seed);
    for number in 0..steps {
        let step = any_step(&mut random, pages);
        let before = model.clone();
        let expected = model.step(step);
        let said = world.step(step, &before);
        let context = |what: String| format!("seed {seed}, step {number}, {step:?}: {what}");
        if said != expected {
            return Err(context(format!("said {said:?}, not {expected:?}")));
        }
        model.promises().map_err(context)?;
        world.agrees(&model).map_err(context)?;
        if number % 64 == 0 {
            let wrong = world.violations();
            if !wrong.is_empty() {
                return Err(context(format!("{wrong:?}")));
            }
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
