//! The measurement of a protected VM: what its memory and its first vCPU are when it starts.
//!
//! Invariant: two VMs with the same measurement start with the same bytes at the same addresses,
//! zeros everywhere else that they can reach, the same vCPUs and the same first instruction. What is less: a page
//! that the host took back before the seal is measured as it was, and an access to it is an abort.
//!
//! SHA-256 (FIPS 180-4) over: for every run of pages, in the order of their donation, its contents
//! (nothing for zeros) and a trailer of three words: [`Kind`], IPA, bytes; then a trailer of the VM:
//! `CLOSING`, vCPUs, PC and `x0` of the first one. Words are 64 bits, little-endian. A run ends where
//! the next page is of another kind or at another address, so that the host's choice of how many
//! pages it donates with one call does not show. Read from its end, the text has one meaning only:
//! each trailer has the same length and says how much belongs to it.

use sha2::{Digest, Sha256};

/// What a page is before the VM starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
pub enum Kind {
    /// All zeros, whatever the host had there.
    Zeros = 0,
    /// What the host had there.
    Contents = 1,
}

/// First word of the last trailer: no [`Kind`].
const CLOSING: u64 = 0x5241_5645_4c49_4e01;

/// Bytes of a measurement.
pub const SIZE: usize = 32;

/// How the VM starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Start {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// First instruction of the first one.
    pub entry: u64,
    /// Its `x0`.
    pub context: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Run {
    kind: Kind,
    ipa: u64,
    bytes: u64,
}

/// A measurement that is being made.
#[derive(Clone, Debug)]
pub struct Measurer {
    hash: Sha256,
    run: Option<Run>,
}

impl Default for Measurer {
    fn default() -> Self {
        Self::new()
    }
}

impl Measurer {
    /// Of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        let hash = Sha256::new();
        Self { hash, run: None }
    }

    /// Whether nothing has been measured.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.run.is_none()
    }

    /// Pages of zeros at `ipa`.
    pub fn zeros(&mut self, ipa: u64, bytes: u64) {
        self.begin(Kind::Zeros, ipa, bytes);
    }

    /// Pages at `ipa` with these contents.
    pub fn contents(&mut self, ipa: u64, contents: &[u8]) {
        self.begin(Kind::Contents, ipa, contents.len() as u64);
        self.hash.update(contents);
    }

    /// The measurement, of a VM that starts like this.
    #[must_use]
    pub fn finish(mut self, start: &Start) -> [u8; SIZE] {
        self.end_run();
        let vcpus = u64::from(start.vcpus);
        for word in [CLOSING, vcpus, start.entry, start.context] {
            self.hash.update(word.to_le_bytes());
        }
        self.hash.finalize().into()
    }

    /// Lengthens the run, or ends it and begins another.
    fn begin(&mut self, kind: Kind, ipa: u64, bytes: u64) {
        if let Some(run) = &mut self.run
            && run.kind == kind
            && run.ipa.checked_add(run.bytes) == Some(ipa)
        {
            run.bytes += bytes;
            return;
        }
        self.end_run();
        self.run = Some(Run { kind, ipa, bytes });
    }

    fn end_run(&mut self) {
        if let Some(run) = self.run.take() {
            for word in [run.kind as u64, run.ipa, run.bytes] {
                self.hash.update(word.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    const START: Start = Start {
        vcpus: 2,
        entry: 0x4008_0000,
        context: 0x4000_0000,
    };

    fn of(parts: &[(u64, Option<&[u8]>, u64)]) -> [u8; SIZE] {
        let mut measurer = Measurer::new();
        for (ipa, contents, bytes) in parts {
            match contents {
                Some(contents) => measurer.contents(*ipa, contents),
                None => measurer.zeros(*ipa, *bytes),
            }
        }
        measurer.finish(&START)
    }

    /// The text of the module's documentation, put together by hand.
    #[test]
    fn the_hashed_text_is_the_documented_one() {
        let mut text = Vec::new();
        let words = |words: &[u64], text: &mut Vec<u8>| {
            words
                .iter()
                .for_each(|w| text.extend_from_slice(&w.to_le_bytes()));
        };
        text.extend_from_slice(&[7; 8192]);
        words(&[1, 0x4000_0000, 8192], &mut text);
        words(&[0, 0x4000_2000, 4096], &mut text);
        words(
            &[0x5241_5645_4c49_4e01, 2, 0x4008_0000, 0x4000_0000],
            &mut text,
        );
        let expected: [u8; SIZE] = Sha256::digest(&text).into();
        let parts: [(u64, Option<&[u8]>, u64); 2] = [
            (0x4000_0000, Some(&[7; 8192]), 0),
            (0x4000_2000, None, 4096),
        ];
        assert_eq!(of(&parts), expected);
    }

    #[test]
    fn every_input_changes_it() {
        let page: &[u8] = &[1; 4096];
        let base = of(&[(0x1000, Some(page), 0), (0x2000, None, 4096)]);
        let mut other = [1; 4096];
        other[4095] = 2;
        for different in [
            of(&[(0x1000, Some(&other), 0), (0x2000, None, 4096)]),
            of(&[(0x3000, Some(page), 0), (0x2000, None, 4096)]),
            of(&[(0x1000, Some(page), 0), (0x2000, None, 8192)]),
            of(&[(0x1000, Some(page), 0), (0x2000, Some(&[0; 4096]), 0)]),
            of(&[(0x1000, Some(page), 0)]),
        ] {
            assert_ne!(base, different);
        }
        let starts = [
            Start { vcpus: 1, ..START },
            Start { entry: 0, ..START },
            Start {
                context: 1,
                ..START
            },
        ];
        for start in starts {
            assert_ne!(
                Measurer::new().finish(&START),
                Measurer::new().finish(&start)
            );
        }
    }

    proptest! {
        /// How many pages go with one call does not show.
        #[test]
        fn pieces_do_not_show(cuts in prop::collection::vec(1usize..5, 1..6), zeros: bool) {
            let pages: usize = cuts.iter().sum();
            let contents: Vec<u8> = (0..pages * 4096).map(|i| (i * 31).to_le_bytes()[0]).collect();
            let (mut whole, mut pieces) = (Measurer::new(), Measurer::new());
            let mut at = 0;
            if zeros {
                whole.zeros(0, contents.len() as u64);
            } else {
                whole.contents(0, &contents);
            }
            for cut in cuts {
                let end = at + cut * 4096;
                if zeros {
                    pieces.zeros(at as u64, (end - at) as u64);
                } else {
                    pieces.contents(at as u64, &contents[at..end]);
                }
                at = end;
            }
            prop_assert_eq!(whole.finish(&START), pieces.finish(&START));
        }
    }
}
