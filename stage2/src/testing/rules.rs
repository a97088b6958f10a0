//! What must never happen to a live table.

use std::format;
use std::prelude::rust_2024::*;

use super::machine::State;
use super::tlb::Cached;
use super::walker::RawEntry;

impl State {
    pub(super) fn check_replaced(&mut self, was: RawEntry, is: RawEntry, at: u64, level: i8) {
        let fine = match (was, is) {
            (RawEntry::Invalid, _) | (_, RawEntry::Invalid) => true,
            (RawEntry::Leaf(a), RawEntry::Leaf(b)) => a.pa == b.pa && a.mem == b.mem,
            _ => false,
        };
        if !fine {
            let text = format!("valid to valid at {at:#x} level {level}: {was:x?} to {is:x?}");
            self.violations.push(text);
        }
    }

    /// A word that a concurrent zap claimed may only go when the memory behind it is clean: the
    /// next fault takes it for granted. (Exclusive operations keep faults out until they return.)
    pub(super) fn check_emptied(&mut self, old: u64, level: i8) {
        let (kind, owes, claim) = (old >> 60, old >> 59 & 1, old >> 4 & 0x1f);
        if kind == 1 && owes == 1 && claim != 0 {
            let pa = old & 0xf_ffff_ffff_f000;
            let size = 1 << self.arch.shift(level);
            if !self.caches.is_clean(pa, pa + size) {
                self.violations
                    .push(format!("{pa:#x} given up before it is clean"));
            }
        }
    }

    /// Whether a leaf continues what stood there before; it then owes again when it goes.
    fn comes_back(&mut self, new: &Cached) -> bool {
        let key = (new.at.wrapping_sub(new.leaf.pa), new.leaf.mem);
        let taken = self.taken.get(&key);
        let found = taken.is_some_and(|set| set.contains(new.at, new.at + new.size));
        if found {
            self.caches.forgive(new.leaf.pa, new.leaf.pa + new.size);
        }
        found
    }

    fn check_clean(&mut self, start: u64, end: u64) {
        if !self.caches.is_clean(start, end) {
            self.violations
                .push(format!("{start:#x}..{end:#x} mapped while dirty"));
        }
    }

    pub(super) fn link(&mut self, pa: u64, at: u64, level: i8) {
        self.linked.insert(pa, (at, level));
        let size = 1u64 << (self.arch.shift(level) + self.arch.index_bits);
        self.tlb.fill_walk(pa, at, size);
        if let Some(importer) = &mut self.importer {
            importer.fill_walk(pa, at, size);
        }
        if !self.live.contains(&pa) {
            self.violations
                .push(format!("table {pa:#x} linked but not allocated"));
        }
    }

    pub(super) fn expose(&mut self, new: Cached) {
        let clash = self.tlb.fill(new);
        let importer = self
            .importer
            .as_mut()
            .and_then(|importer| importer.fill(new));
        for old in clash.into_iter().chain(importer) {
            self.violations
                .push(format!("{new:x?} made while {old:x?} is cached"));
        }
        let (start, end) = (new.leaf.pa, new.leaf.pa + new.size);
        if self.deferred {
            return;
        }
        if self.arch.owes_data(&new.leaf) {
            if !self.comes_back(&new) {
                self.check_clean(start, end);
            }
        } else if self.caches.is_owed(start, end) {
            self.violations
                .push(format!("{start:#x}..{end:#x} mapped while owed"));
        }
        if self.arch.executable(&new.leaf) && !self.caches.is_fetchable(start, end) {
            self.violations.push(format!(
                "{start:#x}..{end:#x} executable with stale fetches"
            ));
        }
    }
}
