//! The dirty bitmap of a slot: one bit per page, set by faults, taken by the host.
//!
//! Invariant (kept by the fault and log paths together): a writable leaf of a logged slot has
//! its bit set, or its page is being handed to the host right now and the leaf is made
//! read-only before the call returns. So no write is lost. While a log begins, its bitmap covers what
//! that has come to; leaves behind it are still to go.

use alloc::vec::Vec;

use crate::error::Error;
use crate::sync::{AtomicU64, Ordering};

/// One bit per page. Setting is lock-free; taking needs the page-table lock of the caller.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Vec<AtomicU64>,
    npages: u64,
}

impl DirtyBitmap {
    /// Room for a bitmap of `npages` pages, which covers none of them yet.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(npages: u64) -> Result<Self, Error> {
        let mut words = Vec::new();
        words.try_reserve_exact(Self::words_for(npages)?)?;
        Ok(Self { words, npages })
    }

    /// Covers the first `npages` pages, too: those that come are clean.
    pub fn cover(&mut self, npages: u64) {
        let words = npages.min(self.npages).div_ceil(64);
        while (self.words.len() as u64) < words {
            self.words.push(AtomicU64::new(0));
        }
    }

    /// Number of 64-bit words for `npages` pages.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if this does not fit in memory.
    pub fn words_for(npages: u64) -> Result<usize, Error> {
        usize::try_from(npages.div_ceil(64)).map_err(|_| Error::OutOfMemory)
    }

    /// Number of words that are covered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// Whether the bitmap covers no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.npages == 0
    }

    /// Marks page `index` (counted from the slot's start). Pages that are not covered are ignored.
    pub fn mark(&self, index: u64) {
        if index >= self.npages {
            return;
        }
        if let Some(word) = self.word(index / 64) {
            // Release: whoever takes the bit also sees what was written before it was set.
            word.fetch_or(1 << (index % 64), Ordering::Release);
        }
    }

    /// Takes word `at` and clears it; 0 outside.
    #[must_use]
    pub fn take_word(&self, at: u64) -> u64 {
        self.word(at).map_or(0, |w| w.swap(0, Ordering::AcqRel))
    }

    /// Word `at`, which stays as it is; 0 outside.
    #[must_use]
    pub fn word_at(&self, at: u64) -> u64 {
        self.word(at).map_or(0, |w| w.load(Ordering::Acquire))
    }

    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(at).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_is_taken_once() {
        let mut b = DirtyBitmap::new(130).unwrap();
        b.cover(130);
        assert_eq!(b.len(), 3);
        b.mark(0);
        b.mark(63);
        b.mark(129);
        assert_eq!(
            [0, 1, 2, 3].map(|at| b.word_at(at)),
            [0x8000_0000_0000_0001, 0, 2, 0]
        );
        assert_eq!(b.take_word(0), 0x8000_0000_0000_0001);
        assert_eq!(b.take_word(0), 0);
        assert_eq!(b.take_word(2), 2);
    }

    #[test]
    fn pages_and_words_outside_are_ignored() {
        let mut b = DirtyBitmap::new(65).unwrap();
        b.cover(u64::MAX);
        b.mark(65);
        b.mark(127);
        b.mark(u64::MAX);
        assert_eq!((b.take_word(0), b.take_word(1), b.take_word(9)), (0, 0, 0));
        assert!(!b.is_empty());
        assert!(DirtyBitmap::new(0).unwrap().is_empty());
    }

    #[test]
    fn what_is_not_covered_yet_is_ignored_and_clean_when_it_comes() {
        let mut b = DirtyBitmap::new(200).unwrap();
        b.mark(0);
        b.cover(3);
        b.mark(63);
        b.mark(64);
        assert_eq!((b.len(), b.word_at(0), b.word_at(1)), (1, 1 << 63, 0));
        b.cover(200);
        b.cover(3);
        b.mark(199);
        assert_eq!((b.len(), b.word_at(0)), (4, 1 << 63));
        assert_eq!((b.word_at(1), b.word_at(3)), (0, 1 << 7));
    }

    // Miri ends the program instead of failing such an allocation.
    #[cfg(not(miri))]
    #[test]
    fn an_impossible_size_is_refused() {
        assert_eq!(DirtyBitmap::new(u64::MAX).unwrap_err(), Error::OutOfMemory);
    }
}
