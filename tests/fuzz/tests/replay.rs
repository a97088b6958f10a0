//! Each target with its corpus and a bounded number of mutants of it: what `make test` runs.
//!
//! `RAVELIN_FUZZ_INPUTS` is the number of mutants of each target (default: 2,000), or
//! `RAVELIN_FUZZ_SECONDS` how long they are made; `RAVELIN_FUZZ_SEED` makes them others.

use ravelin_fuzz::{Mutator, TARGETS, Target, target};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const INPUTS: u64 = 2_000;
/// Bytes of an input that is not from the corpus.
const LENGTH: usize = 512;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// The committed inputs, by name.
fn corpus(target: Target) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let entries = std::fs::read_dir(&folder).expect("every target has a corpus");
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).expect("a file of the corpus"))
        .collect()
}

/// Runs an input; one that fails is kept, and named.
fn run(target: Target, input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
        let path =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("failed-{}", target.name));
        std::fs::write(&path, input).expect("the failing input can't be kept");
        panic!("{} fails on {}", target.name, path.display());
    }
}

fn replay(name: &str) {
    let target = target(name).expect("a target");
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "the corpus of {name} is empty");
    corpus.iter().for_each(|input| run(target, input));
    let mut mutator = Mutator::new(number("RAVELIN_FUZZ_SEED", 1));
    let (begin, seconds) = (Instant::now(), number("RAVELIN_FUZZ_SECONDS", 0));
    let most = number("RAVELIN_FUZZ_INPUTS", INPUTS);
    let mut made = 0;
    while made < most || begin.elapsed() < Duration::from_secs(seconds) {
        made += 1;
        let input = match mutator.below(4) {
            0 => {
                let length = mutator.below(LENGTH);
                mutator.bytes(length)
            }
            _ => {
                let from = mutator.below(corpus.len());
                mutator.mutant(&corpus[from])
            }
        };
        run(target, &input);
    }
}

#[test]
fn host_calls() {
    replay("host_call");
}

#[test]
fn calls_about_vms() {
    replay("vm_call");
}

#[test]
fn guest_exits() {
    replay("guest_exit");
}

#[test]
fn whole_exits() {
    replay("exits");
}

#[test]
fn virtual_interrupt_controller() {
    replay("vgic");
}

#[test]
fn board_trees() {
    replay("board_tree");
}

#[test]
fn fit_images() {
    replay("fit");
}

#[test]
fn emulated_devices() {
    replay("virtio");
}

#[test]
fn every_target_is_replayed() {
    let names = TARGETS.map(|target| target.name);
    let replayed = [
        "host_call",
        "vm_call",
        "guest_exit",
        "exits",
        "vgic",
        "board_tree",
        "fit",
        "virtio",
    ];
    assert_eq!(names, replayed);
}
