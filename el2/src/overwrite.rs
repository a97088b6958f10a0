//! Memory overwrite request: what a protected guest leaves in memory when the machine is reset.
//!
//! A reset keeps RAM, and the host may reset at any time. So as long as there is a protected VM, three lines
//! of EL2's own memory say so, as TCG's memory overwrite request does by a firmware variable. EL2 looks for
//! them when it boots; where one is left, it wipes all that the host gets.
//!
//! Invariant: while RAM outside of EL2's memory may hold what was a protected guest's, a whole copy of the
//! request is at the point of coherency, before the reset and behind it. So it is raised before the first page
//! moves and withdrawn when the last one is wiped; behind a reset the copies stand where EL2 is going to be
//! before it goes there, and the wipe ends with them. A reset on the way finds a request again.
//!
//! Memory that the board has reserved is not wiped: it can't be donated (`PageStates::reserve`).

use board::{AddrRange, RangeList};

use crate::sync::SpinLock;

/// Copies are at multiples of this, in bytes: EL2's memory is aligned so, wherever it is.
pub const STRIDE: u64 = 0x1_0000;
/// Copies of a request.
pub const COPIES: usize = 3;
/// Doublewords of a copy: the magic, the version, the copy's own address. Neither the image's constants
/// nor a copy of memory has the right address.
pub const WORDS: usize = 6;

const MAGIC: [u64; 4] = words(*b"Ravelin: overwrite memory first!");
/// Of what stands behind the magic and the address: nothing yet. Any version asks for the wipe.
const VERSION: u64 = 1;
/// Bytes that are wiped before progress is told.
const STEP: u64 = 1 << 20;

const fn words(text: [u8; 32]) -> [u64; 4] {
    let (chunks, _) = text.as_chunks();
    let [a, b, c, d] = chunks else { panic!() };
    [
        u64::from_le_bytes(*a),
        u64::from_le_bytes(*b),
        u64::from_le_bytes(*c),
        u64::from_le_bytes(*d),
    ]
}

/// RAM, as whoever boots next will find it.
pub trait Memory {
    /// The doubleword at an address that is a multiple of 8.
    fn word(&self, address: u64) -> u64;

    /// Writes a copy of the request, or zeros, to the point of coherency.
    fn put(&self, address: u64, words: [u64; WORDS]);

    /// Fills a range with zeros, to the point of coherency.
    fn wipe(&self, range: AddrRange);
}

const fn copy_for(address: u64) -> [u64; WORDS] {
    let [a, b, c, d] = MAGIC;
    [a, b, c, d, address, VERSION]
}

fn is_copy(memory: &impl Memory, at: u64) -> bool {
    let expected = copy_for(at).into_iter().take(WORDS - 1);
    (at..)
        .step_by(8)
        .zip(expected)
        .all(|(at, word)| memory.word(at) == word)
}

/// The first copy in a range. Seldom more than one doubleword of each place is looked at: this is what a
/// boot costs that has nothing to wipe.
fn first_copy(memory: &impl Memory, range: AddrRange) -> Option<u64> {
    let mut at = range.start().checked_next_multiple_of(STRIDE)?;
    while at < range.end() {
        if memory.word(at) == MAGIC[0] && is_copy(memory, at) {
            return Some(at);
        }
        at += STRIDE;
    }
    None
}

/// Whether an earlier EL2 has left a request in RAM that is nobody's now.
#[must_use]
pub fn is_requested<const M: usize, const T: usize>(
    memory: &impl Memory,
    ram: &RangeList<M>,
    taken: &RangeList<T>,
) -> bool {
    let free = |ram: &AddrRange| ram.without_all(taken.as_slice());
    let mut parts = ram.as_slice().iter().flat_map(free);
    parts.any(|part| first_copy(memory, part).is_some())
}

/// Makes memory ready for an EL2 that has found a request, before it is there: the copies first, then all
/// else is wiped. Another boot may put EL2 elsewhere, and this is the host's then.
pub fn carry_over(memory: &impl Memory, el2: AddrRange, copies: &[u64; COPIES]) {
    copies.iter().for_each(|at| memory.put(*at, copy_for(*at)));
    let ends = copies.iter().copied().chain([el2.end()]);
    let mut from = el2.start();
    for end in ends {
        AddrRange::new(from, end)
            .into_iter()
            .for_each(|part| memory.wipe(part));
        from = end + WORDS as u64 * 8;
    }
}

/// Wipes everything; tells `progress` how many bytes are done.
pub fn wipe(
    memory: &impl Memory,
    parts: impl Iterator<Item = AddrRange>,
    mut progress: impl FnMut(u64),
) {
    let mut done = 0;
    for part in parts {
        let mut at = part.start();
        // To multiples of a step: what is aligned is wiped faster.
        while let Some(step) = AddrRange::new(at, part.end().min((at / STEP + 1) * STEP)) {
            memory.wipe(step);
            at = step.end();
            done += step.size();
            progress(done);
        }
    }
}

/// The request of the EL2 that runs.
#[derive(Debug)]
pub struct Request {
    copies: [u64; COPIES],
    /// Protected VMs, and 1 for what there was before the reset.
    reasons: SpinLock<u32>,
}

impl Request {
    /// The request whose copies are at these addresses; whether it stands, for what there was before the
    /// reset: the end of that wipe withdraws it.
    #[must_use]
    pub const fn new(copies: [u64; COPIES], stands: bool) -> Self {
        Self {
            copies,
            reasons: SpinLock::new(stands as u32),
        }
    }

    /// From now on there is one more protected VM. The request is in memory when this returns, whichever
    /// core was the first.
    pub fn raise(&self, memory: &impl Memory) {
        let mut reasons = self.reasons.lock();
        if *reasons == 0 {
            self.copies
                .iter()
                .for_each(|at| memory.put(*at, copy_for(*at)));
        }
        *reasons += 1;
    }

    /// All memory of one of them is wiped.
    pub fn withdraw(&self, memory: &impl Memory) {
        let mut reasons = self.reasons.lock();
        debug_assert!(*reasons > 0, "raised before");
        *reasons = reasons.saturating_sub(1);
        if *reasons == 0 {
            self.copies
                .iter()
                .for_each(|at| memory.put(*at, [0; WORDS]));
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "overwrite_tests.rs"]
mod tests;
