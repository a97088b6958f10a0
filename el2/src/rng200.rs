//! The random number generator of a Raspberry Pi 4 or 5: Broadcom's RNG200, as the BCM2711 has it.
//!
//! Invariant: a word of its FIFO is read once, and goes into one answer or into none. No answer has bits from before
//! the generator was warm, from between a failed test and the reset behind it, or from a word that came twice in a row.
//! A call never waits, and reads and writes registers at most [`MAX_ACCESSES`] times.
//!
//! There is no public manual. Source: registers, values and the order of a reset are those of drivers that run on these
//! boards: Linux's and NetBSD's for this device, and what the boards' own firmware does. Nobody outside Broadcom knows
//! how random the words are, or what its tests look for. So EL2 takes each of their bits for half a bit of entropy, tests
//! for repetition itself, and conditions them: 64 bits of an answer are SHA-256 over 128 (a vetted conditioning
//! component, NIST SP 800-90B 3.1.5.1.1).

use board::uart::UartRegs;
use sha2::{Digest, Sha256};

use crate::sync::SpinLock;

const CTRL: usize = 0x00;
const RNG_SOFT_RESET: usize = 0x04;
const RBG_SOFT_RESET: usize = 0x08;
const TOTAL_BIT_COUNT: usize = 0x0c;
const TOTAL_BIT_COUNT_THRESHOLD: usize = 0x10;
const INT_STATUS: usize = 0x18;
const INT_ENABLE: usize = 0x1c;
const FIFO_DATA: usize = 0x20;
const FIFO_COUNT: usize = 0x24;

/// RBGEN, bits 12:0 of CTRL: the generator runs.
const RUNS: u32 = 0x1fff;
/// CTRL: it runs, and takes a sample each microsecond.
const START: u32 = 3 << 13 | RUNS;
/// Bits that are "less random" at first, as Linux and firmware say it to the device. Nothing says whether it drops
/// them, so EL2 waits for so many samples and more, and drops what there is.
const WARM_UP_BITS: u32 = 0x4_0000;
/// FIFO_COUNT 15:8: words at which the FIFO would raise an interrupt.
const FIFO_LEVEL: u32 = 2 << 8;
/// FIFO_COUNT 7:0: words that can be read.
const FIFO_WORDS: u32 = 0xff;
/// INT_STATUS: MASTER_FAIL_LOCKOUT, NIST_FAIL, and a third one that firmware takes for a failure. They stay until they
/// are written.
const FAILURES: u32 = 1 << 31 | 1 << 5 | 1 << 1;
/// TOTAL_BIT_COUNT that Linux waits to be exceeded.
const FIRST_BITS: u32 = 16;
/// Words for 64 bits. A call of TRNG wants at most three times as many: 12 of the 16 that the FIFO holds.
const WORDS: usize = 4;
/// How the generator is stopped, emptied and started anew: registers and values, in order.
const RESET: [(usize, u32); 10] = [
    (CTRL, 0),
    (INT_ENABLE, 0),
    (RBG_SOFT_RESET, 1),
    (RNG_SOFT_RESET, 1),
    (RNG_SOFT_RESET, 0),
    (RBG_SOFT_RESET, 0),
    (INT_STATUS, u32::MAX),
    (TOTAL_BIT_COUNT_THRESHOLD, WARM_UP_BITS),
    (FIFO_COUNT, FIFO_LEVEL),
    (CTRL, START),
];
/// Register accesses of a call, at most: status, bit count, word count, as many words as may be told, status once more,
/// and a reset. All but the first call of a warm generator end after 12 words, and a held one, at most.
pub const MAX_ACCESSES: usize = 4 + FIFO_WORDS as usize + RESET.len();

/// Words that are not to be given, since they were made before the generator was warm.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Cold {
    /// All of the FIFO, and one more.
    Fifo,
    /// The next word: one that was complete when the FIFO was full may have been held back until there was room.
    Next,
    /// There are none.
    None,
}

/// The generator, shared by all cores.
#[derive(Debug)]
pub struct Rng200<R> {
    registers: R,
    /// Counter ticks until a reset generator is warm.
    warm_up: u64,
    state: SpinLock<State>,
}

#[derive(Debug)]
struct State {
    /// When the generator is warm, in ticks.
    warm_at: u64,
    /// Where words from before that may be.
    cold: Cold,
    /// The last word: two equal ones in a row are refused. That is the repetition count test (SP 800-90B 4.4.1) with the
    /// least cutoff, 2. A good generator, of 16 bits of entropy in a word, fails it once in 2^16 words, and then
    /// warms up once more.
    last: Option<u32>,
}

impl<R: UartRegs> Rng200<R> {
    /// Resets the generator behind `registers` and lets it warm up. `now` is the time in ticks, `second` how many
    /// there are in one. `None` if nothing there takes the order to run.
    pub fn start(registers: R, now: u64, second: u64) -> Option<Self> {
        // At one sample each microsecond the first ones take 0.26 s.
        let warm_up = second / 2;
        let state = SpinLock::new(reset(&registers, now, warm_up));
        let control = registers.read(CTRL);
        let runs = control & RUNS != 0 && control != u32::MAX;
        runs.then_some(Self {
            registers,
            warm_up,
            state,
        })
    }

    /// Fills `words` with bits that nobody has had; `false`, and zeros, if there are not enough for all of them right
    /// now, or another core is here. What there is stays for later then. After a failed test there are none for half a
    /// second. `now` is the time in ticks.
    ///
    /// More than four words are never there at once.
    pub fn fill(&self, now: u64, words: &mut [u64]) -> bool {
        let Some(mut state) = self.state.try_lock() else {
            words.fill(0);
            return false;
        };
        let drawn = self.draw(&mut state, now, words);
        if drawn.is_err() {
            *state = reset(&self.registers, now, self.warm_up);
        }
        let is_filled = drawn.unwrap_or(false);
        if !is_filled {
            words.fill(0);
        }
        is_filled
    }

    /// The same, or that a test has failed.
    fn draw(&self, state: &mut State, now: u64, words: &mut [u64]) -> Result<bool, TestFailed> {
        self.check()?;
        if now < state.warm_at || self.registers.read(TOTAL_BIT_COUNT) <= FIRST_BITS {
            return Ok(false);
        }
        let count = self.registers.read(FIFO_COUNT) & FIFO_WORDS;
        let count = self.drop_cold(&mut state.cold, count);
        if (count as usize) < words.len().saturating_mul(WORDS) {
            return Ok(false);
        }
        for word in words {
            *word = self.condition(&mut state.last)?;
        }
        // What failed while they were read speaks against them, too.
        self.check()?;
        Ok(true)
    }

    /// Reads away what is cold of `count` words; gives how many are left. A FIFO that is empty is never read.
    fn drop_cold(&self, cold: &mut Cold, count: u32) -> u32 {
        let (dropped, then) = match *cold {
            Cold::Fifo => (count, Cold::Next),
            Cold::Next if count > 0 => (1, Cold::None),
            other => (0, other),
        };
        (0..dropped).for_each(|_| _ = self.registers.read(FIFO_DATA));
        *cold = then;
        count - dropped
    }

    /// 64 bits of the next words.
    fn condition(&self, last: &mut Option<u32>) -> Result<u64, TestFailed> {
        let mut hash = Sha256::new();
        for _ in 0..WORDS {
            let word = self.registers.read(FIFO_DATA);
            if last.replace(word) == Some(word) {
                return Err(TestFailed);
            }
            hash.update(word.to_le_bytes());
        }
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(hash.finalize());
        Ok(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
    }

    /// The generator's own tests.
    fn check(&self) -> Result<(), TestFailed> {
        if self.registers.read(INT_STATUS) & FAILURES == 0 {
            Ok(())
        } else {
            Err(TestFailed)
        }
    }
}

/// A health test of the generator, or EL2's own.
struct TestFailed;

/// Stops the generator, empties it and starts it anew.
fn reset(registers: &impl UartRegs, now: u64, warm_up: u64) -> State {
    for (register, value) in RESET {
        registers.write(register, value);
    }
    State {
        warm_at: now.saturating_add(warm_up),
        cold: Cold::Fifo,
        last: None,
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "rng200_tests.rs"]
mod tests;
