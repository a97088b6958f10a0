//! The host's random numbers: a ChaCha20 generator, keyed by what the machine has.
//!
//! Sources are mixed by exclusive or, so that none can make the key worse; at least one must be
//! worth its name, or there is no generator. What only jitters is not a source.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Bytes of a key.
pub const KEY: usize = 32;

/// Collects sources.
#[derive(Debug, Default)]
pub struct Sources {
    key: [u8; KEY],
    have: usize,
}

impl Sources {
    /// Adds bytes that an outsider can't guess. Fewer than [`KEY`] of them count only together
    /// with others.
    pub fn add(&mut self, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            if let Some(place) = self.key.get_mut((self.have + n) % KEY) {
                *place ^= byte;
            }
        }
        self.have += bytes.len();
    }

    /// Adds bytes that make keys differ but are no secret.
    pub fn spice(&mut self, bytes: &[u8]) {
        for (place, byte) in self.key.iter_mut().zip(bytes) {
            *place ^= byte;
        }
    }

    /// The generator; `None` if there was too little to make a key.
    #[must_use]
    pub fn generator(&self) -> Option<Random> {
        (self.have >= KEY).then(|| Random(ChaCha20Rng::from_seed(self.key)))
    }
}

/// The generator.
#[derive(Debug)]
pub struct Random(ChaCha20Rng);

impl Random {
    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill_bytes(bytes);
    }

    /// 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0.next_u64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_is_no_key() {
        let mut sources = Sources::default();
        sources.add(&[7; KEY - 1]);
        sources.spice(&[1; KEY]);
        assert!(sources.generator().is_none());
        sources.add(&[1]);
        assert!(sources.generator().is_some());
    }

    #[test]
    fn every_byte_of_a_source_counts() {
        let first = |bytes: &[u8]| {
            let mut sources = Sources::default();
            sources.add(bytes);
            sources.generator().unwrap().word()
        };
        let base = [0x55; 2 * KEY];
        let expected = first(&base);
        for at in [0, KEY - 1, KEY, 2 * KEY - 1] {
            let mut other = base;
            other[at] ^= 1;
            assert_ne!(first(&other), expected, "{at}");
        }
    }

    #[test]
    fn zeros_as_key_give_the_standard_stream() {
        // RFC 8439, appendix A.1, test vector 1.
        let mut sources = Sources::default();
        sources.add(&[0; KEY]);
        let mut bytes = [0; 8];
        sources.generator().unwrap().fill(&mut bytes);
        assert_eq!(bytes, [0x76, 0xb8, 0xe0, 0xad, 0xa0, 0xf1, 0x3d, 0x90]);
    }
}
