//! Random numbers for guests, and for a host that has lost its generator to EL2: the TRNG firmware
//! interface, version 1.0.
//!
//! Source: Arm True Random Number Generator Firmware Interface (DEN 0098), section 2.

/// Where random numbers come from: the RNDR instruction, firmware, or the board's generator. Never the
/// host.
pub trait EntropySource {
    /// Fills all of `words`, three at most, with conditioned entropy; `false` if there is not enough for all of them
    /// right now. What they hold then is of no use. One call is for all that is asked, so that a source can say no
    /// before it has used up what it has.
    fn fill(&self, words: &mut [u64]) -> bool;
}

const VERSION: u32 = 0x8400_0050;
const FEATURES: u32 = 0x8400_0051;
const GET_UUID: u32 = 0x8400_0052;
const RND_32: u32 = 0x8400_0053;
const RND_64: u32 = 0xc400_0053;

const VERSION_1_0: u64 = 0x1_0000;
const NOT_SUPPORTED: u64 = u64::MAX;
const INVALID_PARAMETERS: u64 = u64::MAX - 1;
const NO_ENTROPY: u64 = u64::MAX - 2;
/// 6e9f3c4a-2d0b-47f1-9a36-5c1e88d0b7e2 of this implementation, little-endian words.
const UUID: [u64; 4] = [0x4a3c_9f6e, 0xf147_0b2d, 0x1e5c_369a, 0xe2b7_d088];

/// Answers `id` with `x1`; `None` if it is no call of this interface or there is no source.
#[must_use]
pub fn call(id: u32, argument: u64, source: Option<&dyn EntropySource>) -> Option<[u64; 4]> {
    let source = source?;
    match id {
        VERSION => Some([VERSION_1_0, 0, 0, 0]),
        FEATURES => Some([feature(argument), 0, 0, 0]),
        GET_UUID => Some(UUID),
        RND_32 => Some(random(argument & 0xffff_ffff, 32, source)),
        RND_64 => Some(random(argument, 64, source)),
        _ => None,
    }
}

fn feature(argument: u64) -> u64 {
    let served = [VERSION, FEATURES, GET_UUID, RND_32, RND_64];
    let asked = argument & 0xffff_ffff;
    if served.iter().any(|id| u64::from(*id) == asked) {
        0
    } else {
        NOT_SUPPORTED
    }
}

/// `bits` (1 to three times `width`) of entropy: the lowest word in `x3`, the highest in `x1`; what
/// was not asked for is zero.
fn random(bits: u64, width: u32, source: &dyn EntropySource) -> [u64; 4] {
    let bits = u32::try_from(bits).unwrap_or(0);
    if bits == 0 || bits > 3 * width {
        return [INVALID_PARAMETERS, 0, 0, 0];
    }
    let mut fresh = [0; 3];
    let wanted = fresh.get_mut(..bits.div_ceil(width) as usize);
    if !wanted.is_some_and(|words| source.fill(words)) {
        return [NO_ENTROPY, 0, 0, 0];
    }
    let mut answer = [0; 4];
    let mut left = bits;
    for (word, fresh) in answer.iter_mut().skip(1).rev().zip(fresh) {
        let take = left.min(width);
        // Nothing is taken of a word that was not asked for: it is zero.
        *word = fresh.checked_shr(64 - take).unwrap_or(0);
        left -= take;
    }
    answer
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use core::cell::Cell;

    use proptest::prelude::*;

    use super::*;

    /// Gives all ones, a limited number of times.
    struct Ones(Cell<usize>);

    impl EntropySource for Ones {
        fn fill(&self, words: &mut [u64]) -> bool {
            let left = self.0.get().checked_sub(words.len());
            self.0.set(left.unwrap_or(self.0.get()));
            words.fill(u64::MAX);
            left.is_some()
        }
    }

    fn ask(id: u32, argument: u64, words: usize) -> Option<[u64; 4]> {
        call(id, argument, Some(&Ones(Cell::new(words))))
    }

    #[test]
    fn version_features_and_uuid_are_told() {
        assert_eq!(ask(0x8400_0050, 0, 0), Some([0x1_0000, 0, 0, 0]));
        assert_eq!(ask(0x8400_0051, 0xc400_0053, 0), Some([0, 0, 0, 0]));
        assert_eq!(ask(0x8400_0051, 0xc400_0052, 0), Some([u64::MAX, 0, 0, 0]));
        let uuid = ask(0x8400_0052, 0, 0).unwrap();
        assert!(uuid.iter().all(|word| *word <= 0xffff_ffff));
        assert_ne!(uuid[0], 0xffff_ffff); // would read as NOT_SUPPORTED
    }

    #[test]
    fn words_are_filled_from_x3_down() {
        let all = u64::MAX;
        assert_eq!(ask(0xc400_0053, 192, 3), Some([0, all, all, all]));
        assert_eq!(ask(0xc400_0053, 65, 2), Some([0, 0, 1, all]));
        assert_eq!(ask(0x8400_0053, 33, 2), Some([0, 0, 1, 0xffff_ffff]));
        assert_eq!(ask(0x8400_0053, 8, 1), Some([0, 0, 0, 0xff]));
    }

    #[test]
    fn bad_widths_and_a_dry_source_are_told_apart() {
        assert_eq!(ask(0xc400_0053, 0, 9).unwrap()[0], u64::MAX - 1);
        assert_eq!(ask(0xc400_0053, 193, 9).unwrap()[0], u64::MAX - 1);
        assert_eq!(ask(0x8400_0053, 97, 9).unwrap()[0], u64::MAX - 1);
        assert_eq!(ask(0xc400_0053, 192, 2), Some([u64::MAX - 2, 0, 0, 0]));
    }

    #[test]
    fn without_a_source_nothing_is_served() {
        for id in [0x8400_0050, 0x8400_0053, 0xc400_0053] {
            assert_eq!(call(id, 1, None), None);
        }
        assert_eq!(ask(0xc400_0050, 0, 1), None);
    }

    proptest! {
        /// Never more bits than were asked for, and failures carry none.
        #[test]
        fn no_bit_too_many(bits: u64, words in 0usize..4) {
            let [status, high, middle, low] = ask(0xc400_0053, bits, words).unwrap();
            let given = high.count_ones() + middle.count_ones() + low.count_ones();
            prop_assert_eq!(u64::from(given), if status == 0 { bits } else { 0 });
        }
    }
}
