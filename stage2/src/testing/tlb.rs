//! A TLB that caches everything at once and forgets only what it is told to.

use std::collections::BTreeMap;
use std::prelude::rust_2024::*;

use super::walker::RawLeaf;

/// One cached translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cached {
    /// First input address.
    pub at: u64,
    /// Bytes.
    pub size: u64,
    /// Level it came from.
    pub level: i8,
    /// What it says.
    pub leaf: RawLeaf,
}

/// Cached translations and cached steps of walks, of one CPU or one importer.
#[derive(Clone, Debug, Default)]
pub struct FakeTlb {
    leaves: BTreeMap<u64, Cached>,
    /// Table address to what it spans.
    walks: BTreeMap<u64, (u64, u64)>,
}

impl FakeTlb {
    /// A walker read a leaf. Returns a translation that contradicts it: one that overlaps with
    /// another address, size or memory type.
    pub fn fill(&mut self, new: Cached) -> Option<Cached> {
        let clash = self.overlapping(new.at, new.at + new.size).find(|old| {
            old.leaf.pa != new.leaf.pa || old.size != new.size || old.leaf.mem != new.leaf.mem
        });
        let clash = clash.copied();
        // What is cached already stays: a TLB may keep what it has.
        self.leaves.entry(new.at).or_insert(new);
        clash
    }

    /// A walker read a table.
    pub fn fill_walk(&mut self, table: u64, at: u64, size: u64) {
        self.walks.insert(table, (at, size));
    }

    fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = &Cached> {
        // Entries that break no rule are disjoint, so at most one reaches in from below.
        let below = self.leaves.range(..start).next_back();
        let below = below.filter(move |(_, c)| c.at + c.size > start);
        below
            .into_iter()
            .chain(self.leaves.range(start..end))
            .map(|(_, cached)| cached)
    }

    /// An invalidation of a range. With a level, only translations of that level go, and no walk
    /// step does.
    pub fn invalidate(&mut self, start: u64, end: u64, level: Option<i8>) {
        let hit: Vec<u64> = self
            .overlapping(start, end)
            .filter(|cached| level.is_none_or(|level| level == cached.level))
            .map(|cached| cached.at)
            .collect();
        for at in hit {
            self.leaves.remove(&at);
        }
        if level.is_none() {
            self.walks
                .retain(|_, (at, size)| !(*at < end && *at + *size > start));
        }
    }

    /// An invalidation of everything.
    pub fn invalidate_all(&mut self) {
        self.leaves.clear();
        self.walks.clear();
    }

    /// Whether a step through the table is cached.
    #[must_use]
    pub fn holds_table(&self, table: u64) -> bool {
        self.walks.contains_key(&table)
    }

    /// Whether some cached translation leads to the memory.
    #[must_use]
    pub fn reaches(&self, start: u64, end: u64) -> bool {
        self.leaves
            .values()
            .any(|c| c.leaf.pa < end && c.leaf.pa + c.size > start)
    }

    /// Every cached translation.
    pub fn iter(&self) -> impl Iterator<Item = &Cached> {
        self.leaves.values()
    }
}
