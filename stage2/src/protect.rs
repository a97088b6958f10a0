//! Permissions, age and caches of leaves that stay where they are.

use crate::addr::IpaRange;
use crate::attr::{Age, Maintenance};
use crate::bbm::Flush;
use crate::error::MapError;
use crate::format::{TableFormat, WordKind};
use crate::gather::Gathered;
use crate::job::Span;
use crate::level::Level;
use crate::platform::{EntryRef, Platform};
use crate::space::Stage2;
use crate::sync::Ordering;
use crate::table::Table;

/// What to do with young leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aging {
    /// Only say whether there are any.
    Test,
    /// Make them old.
    Clear,
}

/// Running state of one write-protect.
struct Protect {
    flush: Flush,
    changed: usize,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Takes write permission from every leaf that lies in the range, even in part, with one
    /// invalidation; when it returns no write goes through any of them. Returns how many leaves
    /// lost it.
    ///
    /// # Errors
    /// Only for a range that is not whole pages of the input.
    pub fn write_protect(&mut self, range: IpaRange) -> Result<usize, MapError> {
        self.check_range(&range)?;
        let mut run = Protect {
            flush: Flush::NOTHING,
            changed: 0,
        };
        let (root, level) = (self.root_table(), self.geometry().start_level());
        self.protect_table(&root, level, Span::of(&range), &mut run);
        self.invalidate(&run.flush);
        Ok(run.changed)
    }

    fn protect_table(&self, table: &Table<'_, P>, level: Level, span: Span, run: &mut Protect) {
        let shift = self.geometry().shift(level);
        let base = span.start >> shift << shift;
        let first = self.index(table, span.start, level);
        let count = self.index(table, span.end - 1, level) + 1 - first;
        let mut hit: Option<(usize, usize)> = None;
        for (n, (entry, raw)) in table.load_run(first, count).enumerate() {
            match self.format.kind(raw, level) {
                WordKind::Invalid => {}
                WordKind::Leaf => {
                    if self.format.without_write(raw) != raw {
                        self.take_write(entry, raw);
                        run.changed += 1;
                        hit = Some((hit.map_or(n, |(from, _)| from), n));
                    }
                }
                WordKind::Table => {
                    let slot = base + ((n as u64) << shift);
                    let part = span.within(slot, 1 << shift);
                    self.protect_table(&self.child(raw, level), level.finer(), part, run);
                }
            }
        }
        if let Some((from, to)) = hit {
            let size = ((to + 1 - from) as u64) << shift;
            run.flush.leaf(base + ((from as u64) << shift), size, level);
        }
    }

    /// One leaf loses write permission. Where the hardware sets bits of its own, a plain store
    /// would lose one.
    #[inline]
    #[track_caller]
    fn take_write(&self, entry: EntryRef<'_>, raw: u64) {
        if self.format.hardware_bits() == 0 {
            return self.make(entry, self.format.without_write(raw));
        }
        let mut raw = raw;
        while !self
            .platform
            .compare_exchange(entry, raw, self.format.without_write(raw))
        {
            raw = entry.word.load(Ordering::Relaxed);
        }
    }

    /// How many bytes of the range lie in leaves that were used since they were last made old; makes
    /// these old if asked, all of each. When it returns no CPU and no importer uses an old leaf
    /// unnoticed. May run beside faults and zaps.
    ///
    /// # Errors
    /// [`EncodeError::NoAccessFlag`](crate::EncodeError::NoAccessFlag) when there is none to
    /// clear, or for a range that is not whole pages of the input.
    pub fn test_and_clear_young(&self, range: IpaRange, aging: Aging) -> Result<u64, MapError> {
        self.check_range(&range)?;
        let (mut young, mut refused) = (0, Ok(()));
        let mut flush = Flush::NOTHING;
        self.visit_leaves(&range, &mut |found| {
            if self.format.decode_attrs(found.raw).age == Age::Old {
                return;
            }
            let size = self.geometry().slot_size(found.level);
            young += Span::of(&range).within(found.slot, size).len();
            if aging == Aging::Clear {
                match self.format.with_age(found.raw, Age::Old) {
                    // A lost race means that the leaf is in use or gone: either is an answer.
                    Ok(old) => {
                        if self.platform.compare_exchange(found.entry, found.raw, old) {
                            flush.leaf(found.slot, size, found.level);
                        }
                    }
                    Err(error) => refused = Err(error),
                }
            }
        });
        // What is cached is used without a look at the table (Arm ARM D8.5.1).
        self.invalidate(&flush);
        refused?;
        Ok(young)
    }

    /// Cleans and invalidates the data cache for every leaf of the range that owes it, and the
    /// instruction cache for those that may be executed: what a deferred map left out, and what
    /// a guest that turns its caches on or off needs. Neighbours are done together.
    ///
    /// # Errors
    /// Only for a range that is not whole pages of the input.
    pub fn flush(&self, range: IpaRange) -> Result<(), MapError> {
        self.check_range(&range)?;
        let mut data = Gathered::default();
        let mut fetch = Gathered::default();
        let clean = |range| self.platform.clean_invalidate_data(range);
        let invalidate = |range| self.platform.invalidate_fetch(range);
        // All data first: an instruction cache refills from where the data was cleaned to.
        self.visit_owing(&range, &mut |owed, frames| {
            if owed.data {
                data.add(frames, clean);
            }
        });
        data.finish(clean);
        self.visit_owing(&range, &mut |owed, frames| {
            if owed.fetch {
                fetch.add(frames, invalidate);
            }
        });
        fetch.finish(invalidate);
        Ok(())
    }

    fn visit_owing(&self, range: &IpaRange, visit: &mut dyn FnMut(Maintenance, (u64, u64))) {
        self.visit_leaves(range, &mut |found| {
            let pa = self.format.output(found.raw, found.level).get();
            let size = self.geometry().slot_size(found.level);
            visit(self.format.maintenance(found.raw), (pa, pa + size));
        });
    }
}
