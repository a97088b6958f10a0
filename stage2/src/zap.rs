//! Zapping: leaves go, tables stay, the next access faults and computes its leaf anew.
//!
//! A zap may run beside faults and other zaps. It breaks each leaf by compare-and-swap, with its
//! own *claim* in the word it leaves behind; invalidates once; cleans caches; and then empties
//! the words that bear its claim. A fault that meets a broken word retries, so nothing is
//! installed before the invalidation is complete. A zap that meets another's broken word covers
//! it with its own invalidation and cleaning, so that nothing of its range is left when it
//! returns, but leaves the word to its owner, who may not have got that far.

use crate::addr::{IpaRange, PaRange};
use crate::bbm::Flush;
use crate::entry::{Claim, SoftWord};
use crate::error::MapError;
use crate::format::{TableFormat, WordKind};
use crate::gather::{Backlog, Gathered};
use crate::job::Span;
use crate::level::Level;
use crate::platform::Platform;
use crate::space::Stage2;
use crate::sync::{Ordering, relax};
use crate::table::Table;

/// Running state of one zap.
struct Zap {
    claim: Claim,
    flush: Flush,
    /// What to clean behind the invalidation.
    backlog: Backlog,
    /// Whether words were left behind that say so, too.
    second_pass: bool,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Removes every leaf that lies in the range, even in part; notes and tables stay. May run
    /// beside faults: one that comes later finds the entry empty.
    ///
    /// # Errors
    /// Only for a range that is not whole pages of the input.
    pub fn zap(&self, range: IpaRange) -> Result<(), MapError> {
        self.check_range(&range)?;
        let claim = self.take_claim();
        self.run_zap(range, claim);
        self.release_claim(claim);
        Ok(())
    }

    /// [`Stage2::zap`] with nobody beside it: plain stores, and one pass where no leaf owes
    /// cache maintenance.
    ///
    /// # Errors
    /// As [`Stage2::zap`].
    pub fn zap_exclusive(&mut self, range: IpaRange) -> Result<(), MapError> {
        self.check_range(&range)?;
        self.run_zap(range, Claim::EXCLUSIVE);
        Ok(())
    }

    /// [`Stage2::zap_exclusive`] of everything.
    pub fn zap_all(&mut self) {
        self.run_zap(
            IpaRange::from_bounds(0, self.geometry().input_end()),
            Claim::EXCLUSIVE,
        );
    }

    fn run_zap(&self, range: IpaRange, claim: Claim) {
        let span = Span::of(&range);
        let (root, level) = (self.root_table(), self.geometry().start_level());
        let mut zap = Zap {
            claim,
            flush: Flush::NOTHING,
            backlog: Backlog::EMPTY,
            second_pass: false,
        };
        if claim == Claim::EXCLUSIVE {
            self.zap_empty_leaves(&root, level, span, &mut zap);
        } else {
            self.zap_break(&root, level, span, &mut zap);
        }
        self.invalidate(&zap.flush);
        for frames in zap.backlog.iter() {
            self.clean_data(frames);
        }
        if zap.second_pass {
            let mut dirty = Gathered::default();
            self.zap_clean(&root, level, span, &mut dirty);
            dirty.finish(|frames| self.clean_zapped(frames));
            // Invalid before and after: walkers see no difference, nothing to publish.
            self.zap_empty(&root, level, span, claim);
        }
    }

    /// Empties the leaves of a span at once, with nobody beside who could install anything
    /// before the invalidation is complete.
    fn zap_empty_leaves(&self, table: &Table<'_, P>, level: Level, span: Span, zap: &mut Zap) {
        let shift = self.geometry().shift(level);
        let base = span.start >> shift << shift;
        let first = self.index(table, span.start, level);
        let behind = self.index(table, span.end - 1, level) + 1;
        let mut index = first;
        while index < behind {
            let (raw, left) = (table.load(index), behind - index);
            let slot = base + (((index - first) as u64) << shift);
            index += match self.format.kind(raw, level) {
                WordKind::Invalid => 1 + table.zero_run(index + 1, left - 1),
                WordKind::Leaf => self.zap_run(table, (index, left), (raw, level), slot, zap),
                WordKind::Table => {
                    let part = span.within(slot, 1 << shift);
                    self.zap_empty_leaves(&self.child(raw, level), level.finer(), part, zap);
                    1
                }
            };
        }
    }

    /// Takes a leaf away, and those behind it that continue it. Says how many. When the backlog
    /// is full, their words remember what is to be cleaned.
    fn zap_run(
        &self,
        table: &Table<'_, P>,
        (index, left): (usize, usize),
        (raw, level): (u64, Level),
        slot: u64,
        zap: &mut Zap,
    ) -> usize {
        let count = self.leaf_run(table, (index, left), raw, level);
        let size = self.geometry().slot_size(level);
        let pa = self.format.output(raw, level).get();
        zap.flush.leaf(slot, count as u64 * size, level);
        let owes = self.format.maintenance(raw).data;
        if !owes || zap.backlog.add(pa, pa + count as u64 * size) {
            for entry in table.entry_run(index, count) {
                self.make(entry, SoftWord::EMPTY);
            }
        } else {
            let mut raw = raw;
            for entry in table.entry_run(index, count) {
                self.break_leaf(entry, raw, level);
                raw += size;
            }
            zap.second_pass = true;
        }
        count
    }

    /// A claim that no other zap holds. There are more than a machine of this size has CPUs;
    /// beyond them a zap waits for another to finish.
    fn take_claim(&self) -> Claim {
        loop {
            let taken = self.claims.load(Ordering::Relaxed);
            let slot = taken.trailing_ones();
            if slot < Claim::SHARED {
                let with = taken | 1 << slot;
                let (won, lost) = (Ordering::Acquire, Ordering::Relaxed);
                if self.claims.compare_exchange(taken, with, won, lost).is_ok() {
                    return Claim::from_slot(slot);
                }
            } else {
                relax();
            }
        }
    }

    fn release_claim(&self, claim: Claim) {
        self.claims
            .fetch_and(!(1 << claim.slot()), Ordering::Release);
    }

    /// Breaks the leaves of a span.
    fn zap_break(&self, table: &Table<'_, P>, level: Level, span: Span, zap: &mut Zap) {
        let size = self.geometry().slot_size(level);
        for part in span.slots(size) {
            let index = self.index(table, part.start, level);
            let raw = table.load(index);
            if raw == SoftWord::EMPTY {
                continue;
            }
            match self.format.kind(raw, level) {
                WordKind::Table => {
                    self.zap_break(&self.child(raw, level), level.finer(), part, zap);
                }
                _ => self.zap_entry(table, index, level, part.start & !(size - 1), zap),
            }
        }
    }

    /// Breaks one leaf, whatever others do to it meanwhile.
    fn zap_entry(
        &self,
        table: &Table<'_, P>,
        index: usize,
        level: Level,
        slot: u64,
        zap: &mut Zap,
    ) {
        let size = self.geometry().slot_size(level);
        let entry = table.entry(index);
        loop {
            let raw = table.load(index);
            let word = match self.format.kind(raw, level) {
                WordKind::Leaf => {
                    let pa = self.format.output(raw, level);
                    let owes_data = self.format.maintenance(raw).data;
                    SoftWord::BrokenLeaf {
                        pa,
                        owes_data,
                        claim: zap.claim,
                    }
                }
                // A fault may have linked a table where there was a note's or nothing's place
                // only after the load above; what it installs came after this zap began.
                WordKind::Table => return,
                WordKind::Invalid => match SoftWord::decode(raw) {
                    SoftWord::BrokenLeaf { .. } => {
                        zap.flush.leaf(slot, size, level);
                        zap.second_pass = true;
                        return;
                    }
                    _ => return,
                },
            };
            zap.second_pass = true;
            if self.platform.compare_exchange(entry, raw, word.encode()) {
                zap.flush.leaf(slot, size, level);
                return;
            }
        }
    }

    /// Step 5 for every broken leaf of the span, whoever broke it.
    fn zap_clean(&self, table: &Table<'_, P>, level: Level, span: Span, dirty: &mut Gathered) {
        let size = self.geometry().slot_size(level);
        for part in span.slots(size) {
            let raw = table.load(self.index(table, part.start, level));
            if self.format.kind(raw, level) == WordKind::Table {
                self.zap_clean(&self.child(raw, level), level.finer(), part, dirty);
            } else if let SoftWord::BrokenLeaf {
                pa,
                owes_data: true,
                ..
            } = SoftWord::decode(raw)
            {
                dirty.add((pa.get(), pa.get() + size), |frames| {
                    self.clean_zapped(frames)
                });
            }
        }
    }

    fn clean_zapped(&self, frames: PaRange) {
        self.clean_data(frames);
    }

    /// Empties the words that bear our claim.
    fn zap_empty(&self, table: &Table<'_, P>, level: Level, span: Span, claim: Claim) {
        let size = self.geometry().slot_size(level);
        for part in span.slots(size) {
            let index = self.index(table, part.start, level);
            let raw = table.load(index);
            if self.format.kind(raw, level) == WordKind::Table {
                self.zap_empty(&self.child(raw, level), level.finer(), part, claim);
                continue;
            }
            match SoftWord::decode(raw) {
                SoftWord::BrokenLeaf { claim: whose, .. } if whose == claim => {
                    self.make(table.entry(index), SoftWord::EMPTY);
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ArmConfig, ArmFeatures, ArmStage2, Granule};
    use crate::testing::{Arch, FakeMachine};

    #[test]
    fn zaps_beside_each_other_hold_claims_of_their_own() {
        let machine = FakeMachine::new(Arch::arm_4k(1, 39, false), 2);
        let config = ArmConfig {
            granule: Granule::K4,
            input_bits: 39,
            output_bits: 40,
            features: ArmFeatures::V8_0,
            start: Some(Level::L1),
        };
        let format = ArmStage2::new(&config).unwrap();
        let space = Stage2::new(format, &machine, 5).unwrap();
        let [one, two, three] = [(); 3].map(|()| space.take_claim());
        assert!(one != two && two != three && one != three);
        assert!(![one, two, three].contains(&Claim::EXCLUSIVE));
        space.release_claim(two);
        assert_eq!(space.take_claim(), two);
    }
}
