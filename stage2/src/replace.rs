//! Mapping over what stands there already: leaves, tables, and parts of blocks.

use crate::addr::PaRange;
use crate::bbm::Flush;
use crate::erase::Sweep;
use crate::format::{TableFormat, WordKind};
use crate::job::{Job, Leaves, Span};
use crate::level::Level;
use crate::map::Progress;
use crate::platform::Platform;
use crate::space::Stage2;
use crate::table::Table;

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    pub(crate) fn leaf_over_leaf(
        &self,
        leaves: &Leaves,
        table: &Table<'_>,
        level: Level,
        part: Span,
        new: u64,
    ) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let mut flush = Flush::NOTHING;
        self.break_leaf(table.entry(index), old, level);
        flush.leaf(part.start, part.len(), level);
        self.invalidate(&flush);
        self.clean_removed(
            old,
            level,
            Span {
                start: 0,
                end: part.len(),
            },
        );
        self.clean_for(leaves, part);
        self.make(table.entry(index), new);
    }

    pub(crate) fn block_over_table(
        &self,
        leaves: &Leaves,
        table: &Table<'_>,
        level: Level,
        part: Span,
        new: u64,
    ) {
        let index = self.index(table, part.start, level);
        let old = table.load(index);
        let mut flush = Flush::NOTHING;
        self.break_table(table.entry(index), old, level);
        flush.table(part.start, part.len());
        self.invalidate(&flush);
        let mut sweep = Sweep::quiet();
        self.release_table(
            self.format.output(old, level),
            level.finer(),
            part.start,
            &mut sweep,
        );
        self.finish_sweep(&mut sweep);
        self.clean_for(leaves, part);
        self.make(table.entry(index), new);
    }

    /// Maps part of a slot through a table, existing or new.
    pub(crate) fn map_below(
        &self,
        leaves: &Leaves,
        table: &Table<'_>,
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
        table: &Table<'_>,
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
