//! A set of bytes, kept as ranges.

use std::collections::BTreeMap;
use std::prelude::rust_2024::*;

/// A set of 64-bit numbers that is mostly runs.
#[derive(Clone, Debug, Default)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds `start..end`.
    pub fn insert(&mut self, start: u64, end: u64) {
        let (mut low, mut high) = (start, end);
        let touching: Vec<(u64, u64)> = self
            .0
            .range(..=end)
            .rev()
            .take_while(|(_, to)| **to >= start)
            .map(|(from, to)| (*from, *to))
            .collect();
        for (from, to) in touching {
            self.0.remove(&from);
            (low, high) = (low.min(from), high.max(to));
        }
        self.0.insert(low, high);
    }

    /// Removes `start..end`.
    pub fn remove(&mut self, start: u64, end: u64) {
        let hit: Vec<(u64, u64)> = self
            .0
            .range(..end)
            .rev()
            .take_while(|(_, to)| **to > start)
            .map(|(from, to)| (*from, *to))
            .collect();
        for (from, to) in hit {
            self.0.remove(&from);
            if from < start {
                self.0.insert(from, start);
            }
            if to > end {
                self.0.insert(end, to);
            }
        }
    }

    /// Whether all of `start..end` is in the set.
    #[must_use]
    pub fn contains(&self, start: u64, end: u64) -> bool {
        self.0
            .range(..=start)
            .next_back()
            .is_some_and(|(_, to)| *to >= end)
    }

    /// The runs.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(from, to)| (*from, *to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inserting_merges_and_removing_splits() {
        let mut set = RangeSet::default();
        set.insert(10, 20);
        set.insert(30, 40);
        set.insert(20, 30);
        assert!(set.contains(10, 40));
        set.remove(15, 35);
        assert_eq!(set.iter().collect::<Vec<_>>(), [(10, 15), (35, 40)]);
        assert!(!set.contains(10, 16));
    }
}
