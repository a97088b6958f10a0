//! Permissions, age and caches of leaves that stay where they are.

use crate::addr::{IpaRange, PaRange};
use crate::attr::{Age, Maintenance};
use crate::bbm::Flush;
use crate::error::MapError;
use crate::format::TableFormat;
use crate::platform::Platform;
use crate::space::Stage2;
use crate::visit::Found;

/// What to do with young leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aging {
    /// Only say whether there are any.
    Test,
    /// Make them old.
    Clear,
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
        let (mut flush, mut changed) = (Flush::NOTHING, 0);
        self.visit_leaves(&range, &mut |found| {
            if self.format.without_write(found.raw) != found.raw {
                self.take_write(&found);
                flush.leaf(
                    found.slot,
                    self.geometry().slot_size(found.level),
                    found.level,
                );
                changed += 1;
            }
        });
        self.invalidate(&flush);
        Ok(changed)
    }

    /// One leaf loses write permission. Where the hardware sets bits of its own, a plain store
    /// would lose one.
    #[inline]
    #[track_caller]
    fn take_write(&self, found: &Found<'_>) {
        if self.format.hardware_bits() == 0 {
            return self.make(found.entry, self.format.without_write(found.raw));
        }
        let mut raw = found.raw;
        while !self
            .platform
            .compare_exchange(found.entry, raw, self.format.without_write(raw))
        {
            raw = found.entry.word.load(crate::sync::Ordering::Relaxed);
        }
    }

    /// Whether any leaf in the range was used since it was last made old; makes them old if
    /// asked. No invalidation: a CPU may go on using what it has cached without being noticed,
    /// which costs accuracy and nothing else, so the caller decides what that is worth.
    ///
    /// # Errors
    /// [`EncodeError::NoAccessFlag`](crate::EncodeError::NoAccessFlag) when there is none to
    /// clear, or for a range that is not whole pages of the input.
    pub fn test_and_clear_young(&self, range: IpaRange, aging: Aging) -> Result<bool, MapError> {
        self.check_range(&range)?;
        let (mut young, mut refused) = (false, Ok(()));
        self.visit_leaves(&range, &mut |found| {
            if self.format.decode_attrs(found.raw).age == Age::Old {
                return;
            }
            young = true;
            if aging == Aging::Clear {
                match self.format.with_age(found.raw, Age::Old) {
                    // A lost race means that the leaf is in use or gone: either is an answer.
                    Ok(old) => drop(self.platform.compare_exchange(found.entry, found.raw, old)),
                    Err(error) => refused = Err(error),
                }
            }
        });
        refused?;
        if young && aging == Aging::Clear {
            self.platform.publish();
        }
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

/// Memory gathered for one cache operation.
#[derive(Debug, Default)]
pub(crate) struct Gathered(Option<(u64, u64)>);

impl Gathered {
    /// Adds memory; hands out what was gathered if it does not continue there.
    pub(crate) fn add(&mut self, (start, end): (u64, u64), operation: impl FnOnce(PaRange)) {
        match self.0 {
            Some((from, to)) if to == start => self.0 = Some((from, end)),
            _ => {
                self.finish(operation);
                self.0 = Some((start, end));
            }
        }
    }

    /// Hands out the rest.
    pub(crate) fn finish(&mut self, operation: impl FnOnce(PaRange)) {
        if let Some((start, end)) = self.0.take() {
            operation(PaRange::from_bounds(start, end));
        }
    }
}
