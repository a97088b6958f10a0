//! Mapping over what stands there already: leaves, tables, and parts of blocks.

use crate::addr::PaRange;
use crate::bbm::Flush;
use crate::format::{TableFormat, WordKind};
use crate::job::{Job, Leaves, Span};
use crate::level::Level;
use crate::map::{Change, Progress};
use crate::platform::{EntryRef, Platform};
use crate::space::Stage2;
use crate::sweep::Sweep;
use crate::table::Table;

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Replaces the leaf or table `old` in the slot at `at`, and what stands behind it in the
    /// `full` slots as far as it has to be broken, too, with one invalidation. Says how many.
    pub(crate) fn replace_run(
        &self,
        leaves: &Leaves,
        table: &Table<'_, P>,
        (old, level): (u64, Level),
        at: u64,
        full: usize,
        run: &mut Progress,
    ) -> usize {
        let (first, shift) = (self.index(table, at, level), self.geometry().shift(level));
        let mut flush = Flush::NOTHING;
        let slot = |n: usize| at + ((n as u64) << shift);
        let (mut count, mut raw) = (0, old);
        loop {
            self.break_entry(
                table.entry(first + count),
                raw,
                level,
                slot(count),
                &mut flush,
            );
            count += 1;
            if count == full {
                break;
            }
            raw = table.load(first + count);
            let new = self.wanted(leaves, slot(count), level);
            if self.change(raw, new, level) != Change::Replace {
                break;
            }
        }
        self.invalidate(&flush);
        let mut sweep = Sweep::quiet();
        for n in 0..count {
            self.release_entry(table.load(first + n), level, slot(n), &mut sweep);
        }
        self.finish_sweep(&mut sweep);
        self.fill_empty(leaves, table, level, at, count, run);
        count
    }

    /// Breaks a leaf or a table.
    fn break_entry(&self, entry: EntryRef<'_>, raw: u64, level: Level, at: u64, flush: &mut Flush) {
        let size = self.geometry().slot_size(level);
        if self.format.kind(raw, level) == WordKind::Table {
            self.break_table(entry, raw, level);
            flush.table(at, size);
        } else {
            self.break_leaf(entry, raw, level);
            flush.leaf(at, size, level);
        }
    }

    /// Maps part of a slot through a table, existing or new.
    pub(crate) fn map_below(
        &self,
        leaves: &Leaves,
        table: &Table<'_, P>,
        level: Level,
        part: Span,
        run: &mut Progress,
    ) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let Some(background) = self.background(old, level) else {
            let child = self.child(old, level);
            return self.map_table(leaves, &child, level.finer(), part, run);
        };
        if self.format.kind(old, level) == WordKind::Leaf {
            if self.agrees(leaves, old, level, part) {
                return;
            }
            return self.map_into_block(leaves, table, level, part, run);
        }
        let built = self.build(
            &Job::Leaves(*leaves),
            level.finer(),
            part,
            background,
            &mut run.reserve,
        );
        let Some(child) = built else { return };
        self.clean_for(leaves, part);
        self.make(table.entry(index), self.format.table_word(child));
        run.stored = true;
    }

    /// Replaces a block by a table that keeps the rest of it.
    fn map_into_block(
        &self,
        leaves: &Leaves,
        table: &Table<'_, P>,
        level: Level,
        part: Span,
        run: &mut Progress,
    ) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let Some(background) = self.background(old, level) else {
            return;
        };
        let built = self.build(
            &Job::Leaves(*leaves),
            level.finer(),
            part,
            background,
            &mut run.reserve,
        );
        let Some(child) = built else { return };
        let size = self.geometry().slot_size(level);
        let within = part.start & (size - 1);
        let mut flush = Flush::NOTHING;
        self.break_leaf(table.entry(index), old, level);
        flush.leaf(part.start - within, size, level);
        self.invalidate(&flush);
        self.clean_removed(
            old,
            level,
            Span {
                start: within,
                end: within + part.len(),
            },
        );
        self.clean_for(leaves, part);
        self.make(table.entry(index), self.format.table_word(child));
        run.stored = true;
    }

    /// Step 5 for the bytes `part` of a leaf that was taken away.
    #[track_caller]
    pub(crate) fn clean_removed(&self, raw: u64, level: Level, part: Span) {
        if self.format.maintenance(raw).data {
            let pa = self.format.output(raw, level).get();
            self.clean_data(PaRange::from_bounds(pa + part.start, pa + part.end));
        }
    }
}
