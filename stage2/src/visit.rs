//! Walking leaves and reading them as runs.

use crate::addr::{Ipa, IpaRange, Pa};
use crate::attr::LeafAttrs;
use crate::entry::{Annotation, Entry};
use crate::format::{TableFormat, WordKind};
use crate::job::Span;
use crate::level::Level;
use crate::platform::{EntryRef, Platform};
use crate::space::Stage2;
use crate::table::Table;

/// A leaf met on a walk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found<'a> {
    pub(crate) entry: EntryRef<'a>,
    pub(crate) raw: u64,
    pub(crate) level: Level,
    /// First input address of the leaf's slot.
    pub(crate) slot: u64,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Calls back for every leaf that lies in the range, even in part.
    #[inline]
    pub(crate) fn visit_leaves<V: FnMut(Found<'_>)>(&self, range: &IpaRange, visit: &mut V) {
        let span = Span::of(range);
        self.visit_table(
            &self.root_table(),
            self.geometry().start_level(),
            span,
            visit,
        );
    }

    fn visit_table<V: FnMut(Found<'_>)>(
        &self,
        table: &Table<'_, P>,
        level: Level,
        span: Span,
        visit: &mut V,
    ) {
        let shift = self.geometry().shift(level);
        let base = span.start >> shift << shift;
        let first = self.index(table, span.start, level);
        let last = self.index(table, span.end - 1, level);
        for index in first..=last {
            let raw = table.load(index);
            let slot = base + (((index - first) as u64) << shift);
            match self.format.kind(raw, level) {
                WordKind::Invalid => {}
                WordKind::Leaf => visit(Found {
                    entry: table.entry(index),
                    raw,
                    level,
                    slot,
                }),
                WordKind::Table => {
                    let part = span.within(slot, 1 << shift);
                    self.visit_table(&self.child(raw, level), level.finer(), part, visit);
                }
            }
        }
    }

    /// The mappings and notes of a range as runs of equal entries, in order. Runs are whole
    /// slots: the first and the last may reach out of the range.
    ///
    /// # Errors
    /// [`MapError::OutOfInput`](crate::MapError::OutOfInput) past the input size.
    pub fn runs(&self, range: IpaRange) -> Result<Runs<'_, F, P>, crate::MapError> {
        self.check_input(&range)?;
        Ok(Runs {
            space: self,
            next: range.start().get(),
            end: range.end().get(),
            left: usize::MAX,
        })
    }

    /// Where the first leaf of a range is, notes left aside; the range's end if there is none.
    ///
    /// # Errors
    /// As [`Stage2::runs`].
    pub fn empty_to(&self, range: IpaRange) -> Result<Ipa, crate::MapError> {
        self.check_input(&range)?;
        let span = Span::of(&range);
        let leaf = self.leaf_in(&self.root_table(), self.geometry().start_level(), span);
        Ok(Ipa::new(leaf.unwrap_or(span.end).max(span.start)))
    }

    fn leaf_in(&self, table: &Table<'_, P>, level: Level, span: Span) -> Option<u64> {
        let shift = self.geometry().shift(level);
        let base = span.start >> shift << shift;
        let first = self.index(table, span.start, level);
        let behind = self.index(table, span.end - 1, level) + 1;
        let mut index = first;
        while index < behind {
            let raw = table.load(index);
            let slot = base + (((index - first) as u64) << shift);
            let leaf = match self.format.kind(raw, level) {
                WordKind::Invalid => {
                    index += table.zero_run(index + 1, behind - index - 1);
                    None
                }
                WordKind::Leaf => Some(slot),
                WordKind::Table => {
                    let part = span.within(slot, 1 << shift);
                    self.leaf_in(&self.child(raw, level), level.finer(), part)
                }
            };
            if leaf.is_some() {
                return leaf;
            }
            index += 1;
        }
        None
    }
}

/// What the slots of a run have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Memory, contiguous from `pa`.
    Mapped {
        /// Output address of the run's first byte.
        pa: Pa,
        /// What every leaf says.
        attrs: LeafAttrs,
    },
    /// A note.
    Annotated(Annotation),
}

/// Neighbouring slots of one level that say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Input addresses.
    pub range: IpaRange,
    /// Level of every slot.
    pub level: Level,
    /// What they say.
    pub kind: RunKind,
}

impl Run {
    /// Whether `next` goes on where this run ends.
    fn continues_with(&self, next: &Self) -> bool {
        let follows = self.range.end() == next.range.start() && self.level == next.level;
        follows
            && match (self.kind, next.kind) {
                (RunKind::Annotated(note), RunKind::Annotated(other)) => note == other,
                (
                    RunKind::Mapped { pa, attrs },
                    RunKind::Mapped {
                        pa: other,
                        attrs: same,
                    },
                ) => attrs == same && pa.checked_add(self.range.len()) == Some(other),
                _ => false,
            }
    }
}

/// Iterator over [`Run`]s; see [`Stage2::runs`].
#[derive(Debug)]
pub struct Runs<'a, F: TableFormat, P: Platform> {
    space: &'a Stage2<F, P>,
    next: u64,
    end: u64,
    /// Slots that are still looked at.
    left: usize,
}

impl<F: TableFormat, P: Platform> Runs<'_, F, P> {
    /// Ends when it has looked at so many slots, if only in the middle of a run.
    #[must_use]
    pub const fn limited(mut self, slots: usize) -> Self {
        self.left = slots;
        self
    }

    /// Where it goes on: it has seen everything before, and given it out.
    #[must_use]
    pub const fn position(&self) -> Ipa {
        Ipa::new(self.next)
    }

    /// The slot at `next`; nothing stands for an empty or broken one.
    fn slot(&self) -> (Option<Run>, u64) {
        let at = self.space.descend(self.next);
        let range = self.space.geometry().slot(Ipa::new(self.next), at.level);
        let kind = match self.space.format.decode(at.raw, at.level) {
            Entry::Leaf { pa, attrs } => Some(RunKind::Mapped { pa, attrs }),
            Entry::Annotated(note) => Some(RunKind::Annotated(note)),
            Entry::Invalid | Entry::Broken | Entry::Table(_) => None,
        };
        (
            kind.map(|kind| Run {
                range,
                level: at.level,
                kind,
            }),
            range.end().get(),
        )
    }
}

impl<F: TableFormat, P: Platform> Iterator for Runs<'_, F, P> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let mut run: Option<Run> = None;
        while self.next < self.end && self.left > 0 {
            self.left -= 1;
            let (slot, behind) = self.slot();
            match (&mut run, slot) {
                (None, None) => {}
                (None, found) => run = found,
                (Some(run), Some(next)) if run.continues_with(&next) => {
                    run.range =
                        IpaRange::from_bounds(run.range.start().get(), next.range.end().get());
                }
                (Some(_), _) => return run,
            }
            self.next = behind;
        }
        run
    }
}
