//! Sequences for an unprotected VM's memory: every one in a small world, and a million random steps.

use std::collections::{HashSet, VecDeque};

use super::plain::{PLACES, Plain, Step};
use super::plain_world::{PlainWorld, ground};
use super::{Random, soak};

/// Does the last step of a path, or all of them, in both, and compares.
fn compare(world: &PlainWorld<'_>, model: &mut Plain, step: Step) -> Result<(), String> {
    let expected = model.step(step);
    let said = world.step(step);
    if said != expected {
        return Err(format!("said {said:?}, not {expected:?}"));
    }
    model.promises()?;
    world.agrees(model)
}

/// Does the steps in both; the model in the end.
fn replay(pages: usize, steps: &[Step]) -> Result<Plain, String> {
    let ground = ground(pages);
    let ownership = ground.ownership();
    let world = PlainWorld::new(&ground, &ownership, pages);
    let mut model = Plain::new(pages);
    let context = |what: String| format!("{what}\nafter {steps:?}");
    let (last, before) = steps.split_last().expect("at least one");
    // What came before has been compared before.
    for step in before {
        model.step(*step);
        world.step(*step);
    }
    compare(&world, &mut model, *last).map_err(context)?;
    let wrong = world.violations();
    if wrong.is_empty() {
        Ok(model)
    } else {
        Err(context(format!("{wrong:?}")))
    }
}

/// Every step, with single pages.
fn every_step(pages: usize) -> Vec<Step> {
    let mut steps = vec![
        Step::Enter,
        Step::Dirty,
        Step::Delete,
        Step::Log(true),
        Step::Log(false),
        Step::Reset,
        Step::Device(true),
        Step::Device(false),
        Step::Young(0, pages, true),
    ];
    for place in 0..PLACES {
        steps.extend([Step::Create(place, place == 1), Step::Move(place)]);
        for page in 0..pages {
            steps.extend([false, true].map(|writes| Step::Touch(place, page, writes)));
        }
    }
    for page in 0..pages {
        steps.extend([
            Step::Unshare(page, 1),
            Step::Share(page, 1),
            Step::Young(page, 1, false),
            Step::Relax(page, false),
            Step::Relax(page, true),
        ]);
    }
    steps
}

/// From every state that can be reached within so many steps, every step.
fn exhaust(pages: usize, depth: usize) -> Result<(usize, usize), String> {
    let steps = every_step(pages);
    let mut known = HashSet::from([Plain::new(pages)]);
    let mut open = VecDeque::from([Vec::new()]);
    let mut tried = 0;
    while let Some(path) = open.pop_front() {
        for step in &steps {
            let mut longer: Vec<Step> = path.clone();
            longer.push(*step);
            tried += 1;
            let model = replay(pages, &longer)?;
            if known.insert(model) && longer.len() < depth {
                open.push_back(longer);
            }
        }
    }
    Ok((known.len(), tried))
}

#[test]
fn every_step_from_every_state_of_an_unprotected_vm_agrees() {
    let (pages, depth) = match (soak(), cfg!(debug_assertions)) {
        (true, _) => (2, 8),
        (false, true) => (2, 3),
        (false, false) => (2, 5),
    };
    let (states, tried) = exhaust(pages, depth).unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("{pages} pages, up to {depth} steps: {states} states, {tried} sequences");
    assert!(states > 30, "only {states} states");
}

fn any_step(random: &mut Random, pages: usize) -> Step {
    let (place, page) = (random.below(PLACES), random.below(pages));
    let count = 1 + random.below(pages - page);
    let flag = random.below(2) == 0;
    match random.below(40) {
        0..=2 => Step::Create(place, flag),
        3..16 => Step::Touch(place, page, flag),
        16 => Step::Enter,
        17 | 18 => Step::Unshare(page, count),
        19..22 => Step::Share(page, count),
        22..25 => Step::Young(page, count, flag),
        25..28 => Step::Relax(page, flag),
        28..30 => Step::Dirty,
        30..32 => Step::Delete,
        32..34 => Step::Move(place),
        34..36 => Step::Log(flag),
        36..38 => Step::Reset,
        _ => Step::Device(flag),
    }
}

/// So many steps in one world, compared after each.
fn wander(seed: u64, pages: usize, steps: usize) -> Result<(), String> {
    let ground = ground(pages);
    let ownership = ground.ownership();
    let world = PlainWorld::new(&ground, &ownership, pages);
    let mut model = Plain::new(pages);
    let mut random = Random(seed);
    for number in 0..steps {
        let step = any_step(&mut random, pages);
        let context = |what: String| format!("seed {seed}, step {number}, {step:?}: {what}");
        compare(&world, &mut model, step).map_err(context)?;
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
fn random_steps_of_an_unprotected_vm_agree() {
    let steps = match (soak(), cfg!(debug_assertions)) {
        (true, _) => 10_000_000,
        (false, true) => 20_000,
        (false, false) => 500_000,
    };
    let worlds = 20;
    for seed in 0..worlds {
        wander(seed, 6, steps / worlds as usize).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    println!("{steps} steps in {worlds} worlds");
}
