//! Random numbers for guests: from the core, from firmware, or from the board; never from the host.

use board::AddrRange;
use el2::guest::entropy::EntropySource;
use el2::rng200::Rng200;

use crate::arch::mmio::Mmio;
use crate::arch::{firmware, regs};

const TRNG_VERSION: u64 = 0x8400_0050;
const TRNG_RND_64: u64 = 0xc400_0053;

/// Where they come from on this machine.
#[derive(Debug)]
pub(crate) enum Entropy {
    /// The RNDR instruction.
    Instruction,
    /// The TRNG interface of EL3's firmware (Arm DEN 0098).
    Firmware,
    /// The board's generator, which is EL2's then.
    Generator(Rng200<Mmio>, AddrRange),
}

impl Entropy {
    /// What this machine has. `isar0` is ID_AA64ISAR0_EL1, whose upper field says RNDR; `generator`, which
    /// the device tree names and EL2 has mapped, is only started where there is nothing else.
    pub(crate) fn find(
        isar0: u64,
        has_firmware: bool,
        generator: Option<AddrRange>,
    ) -> Option<Self> {
        if isar0 >> 60 != 0 {
            return Some(Self::Instruction);
        }
        let version = || firmware::call(TRNG_VERSION, [0; 7])[0].cast_signed() as i32;
        if has_firmware && version() >= 0x1_0000 {
            return Some(Self::Firmware);
        }
        let range = generator?;
        let registers = Mmio::owned(range.start());
        let started = Rng200::start(registers, regs::ticks(), regs::ticks_per_second());
        started.map(|generator| Self::Generator(generator, range))
    }

    /// The registers of a generator that is EL2's.
    pub(crate) const fn registers(&self) -> Option<AddrRange> {
        match self {
            Self::Generator(_, range) => Some(*range),
            _ => None,
        }
    }
}

impl EntropySource for Entropy {
    fn fill(&self, words: &mut [u64]) -> bool {
        match self {
            // It may fail for a moment; who asks again does so by a call of its own.
            Self::Instruction => each(words, || (0..16).find_map(|_| regs::random())),
            Self::Firmware => each(words, || {
                let [status, _, _, word] = firmware::call(TRNG_RND_64, [64, 0, 0, 0, 0, 0, 0]);
                (status == 0).then_some(word)
            }),
            Self::Generator(generator, _) => generator.fill(regs::ticks(), words),
        }
    }
}

/// Fills one word after the other; `false` if `next` has none.
fn each(words: &mut [u64], next: impl Fn() -> Option<u64>) -> bool {
    words
        .iter_mut()
        .all(|word| next().map(|fresh| *word = fresh).is_some())
}
