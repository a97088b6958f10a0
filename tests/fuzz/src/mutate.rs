//! Blind mutation, for runs without coverage: bounded and repeatable.

/// Makes inputs out of others, always the same ones for a seed.
#[derive(Clone, Debug)]
pub struct Mutator {
    state: u64,
}

impl Mutator {
    /// Starts from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number (SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
    /// generators", OOPSLA 2014).
    pub const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.state;
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.next() % end).unwrap_or(0)
    }

    /// Random bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next());
        words.flat_map(u64::to_le_bytes).take(length).collect()
    }

    /// A few changes of `input`: bits, bytes, numbers on the edge, pieces that are cut, doubled or new.
    #[must_use]
    pub fn mutant(&mut self, input: &[u8]) -> Vec<u8> {
        let mut bytes = input.to_vec();
        for _ in 0..=self.below(4) {
            self.change(&mut bytes);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        const EDGES: [u64; 8] = [
            0,
            1,
            0x7f,
            0xff,
            0x7fff_ffff,
            0xffff_ffff,
            1 << 63,
            u64::MAX,
        ];
        if bytes.is_empty() {
            *bytes = self.bytes(64);
        }
        let at = self.below(bytes.len());
        let end = (at + 1 + self.below(16)).min(bytes.len());
        match self.below(6) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = self.next().to_le_bytes()[0],
            2 => {
                let edge = EDGES[self.below(EDGES.len())];
                let (little, big) = (edge.to_le_bytes(), edge.to_be_bytes());
                let source = if self.below(2) == 0 { little } else { big };
                let to = (at + 8).min(bytes.len());
                bytes[at..to].copy_from_slice(&source[..to - at]);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let piece = self.bytes(end - at);
                bytes.splice(at..at, piece);
            }
        }
    }
}
