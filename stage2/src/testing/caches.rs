//! Which memory is clean to the point of coherency, and fit to be fetched.

use super::ranges::RangeSet;
use std::prelude::rust_2024::*;

/// State of the caches. Everything starts dirty: the host has just written it.
#[derive(Clone, Debug, Default)]
pub struct Caches {
    clean: RangeSet,
    fetchable: RangeSet,
    /// Memory a guest could have dirtied and that has not been cleaned since it was taken away.
    owed: RangeSet,
}

impl Caches {
    /// A clean and invalidate that nothing could undo.
    ///
    /// Instruction caches may have refilled from below the dirty data until now, so what was
    /// invalidated before is stale again: data first, then fetches.
    pub fn clean(&mut self, start: u64, end: u64) {
        if !self.clean.contains(start, end) {
            self.fetchable.remove(start, end);
        }
        self.clean.insert(start, end);
        self.owed.remove(start, end);
    }

    /// An instruction-cache invalidation.
    pub fn invalidate_fetch(&mut self, start: u64, end: u64) {
        self.fetchable.insert(start, end);
    }

    /// Something wrote the memory.
    pub fn write(&mut self, start: u64, end: u64) {
        self.clean.remove(start, end);
        self.fetchable.remove(start, end);
    }

    /// A leaf that owes maintenance was taken away.
    pub fn owe(&mut self, start: u64, end: u64) {
        self.owed.insert(start, end);
        self.clean.remove(start, end);
    }

    /// The memory is mapped again as it was: it owes when it goes the next time.
    pub fn forgive(&mut self, start: u64, end: u64) {
        self.owed.remove(start, end);
    }

    /// Whether the memory may be seen uncached.
    #[must_use]
    pub fn is_clean(&self, start: u64, end: u64) -> bool {
        self.clean.contains(start, end)
    }

    /// Whether the memory may be executed.
    #[must_use]
    pub fn is_fetchable(&self, start: u64, end: u64) -> bool {
        self.fetchable.contains(start, end)
    }

    /// Whether any of the memory is still owed.
    #[must_use]
    pub fn is_owed(&self, start: u64, end: u64) -> bool {
        self.owed.iter().any(|(from, to)| from < end && to > start)
    }

    /// What is still owed.
    #[must_use]
    pub fn owed(&self) -> Vec<(u64, u64)> {
        self.owed.iter().collect()
    }
}
