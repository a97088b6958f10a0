//! Where the host's random numbers come from on this machine.

use spin::Mutex;
use vmm::random::{KEY, Random, Sources};

use crate::arch;
use crate::call::{Conduit, raw};
use crate::console::line;
use crate::machine::Machine;

/// TRNG_RND64 (Arm DEN 0098).
const TRNG_RND64: u32 = 0xc400_0053;

/// Status of a source that has none right now.
const NO_ENTROPY: u64 = u64::MAX - 2;

static GENERATOR: Mutex<Option<Random>> = Mutex::new(None);

/// Keys the generator: by the core's RNDR, by TRNG, by the boot loader's seed.
pub(super) fn start(machine: &Machine) {
    let mut sources = Sources::default();
    sources.add(machine.board.chosen.rng_seed);
    // A board's generator that EL2 drives warms up for half a second.
    let deadline = arch::ticks().saturating_add(arch::ticks_per_second());
    for _ in 0..KEY / 8 {
        if let Some(word) = (0..16).find_map(|_| arch::random()) {
            sources.add(&word.to_le_bytes());
        }
        if let Some(word) = from_trng(deadline) {
            sources.add(&word.to_le_bytes());
        }
    }
    sources.spice(&arch::ticks().to_le_bytes());
    let generator = sources.generator();
    if generator.is_none() {
        line(format_args!(
            "host: this machine has no source of random numbers; guests get none"
        ));
    }
    *GENERATOR.lock() = generator;
}

/// 64 bits from firmware or EL2, until `deadline` as soon as it has some.
fn from_trng(deadline: u64) -> Option<u64> {
    loop {
        match raw(Conduit::Smc, TRNG_RND64, [64, 0, 0]) {
            [0, _, _, word] => return Some(word),
            [NO_ENTROPY, ..] if arch::ticks() < deadline => core::hint::spin_loop(),
            _ => return None,
        }
    }
}

/// Whether there are random numbers.
pub(super) fn exists() -> bool {
    GENERATOR.lock().is_some()
}

/// Fills `bytes`; leaves them as they are if there is no generator.
pub(super) fn fill(bytes: &mut [u8]) {
    if let Some(generator) = GENERATOR.lock().as_mut() {
        generator.fill(bytes);
    }
}

/// Five words for a guest's device tree.
pub(super) fn seed() -> Option<[u64; 5]> {
    let mut generator = GENERATOR.lock();
    let generator = generator.as_mut()?;
    Some(core::array::from_fn(|_| generator.word()))
}
