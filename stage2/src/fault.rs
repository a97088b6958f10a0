//! Installing one leaf for a fault, beside other faults and zaps.
//!
//! A fault only ever turns an empty entry into a leaf or a table, or adds permissions to a leaf,
//! and does each by compare-and-swap. It frees no table that was linked. Losing a race is an
//! outcome: whoever won has changed the entry, so the walk looks again.

use crate::addr::{Ipa, IpaRange, Pa, PaRange};
use crate::attr::{Age, LeafAttrs, Perms};
use crate::bbm::Flush;
use crate::entry::{Annotation, Entry, SoftWord};
use crate::error::MapError;
use crate::format::{TableFormat, WordKind};
use crate::job::{Background, Job, Leaves, Span};
use crate::level::Level;
use crate::platform::{DetachedTable, Platform};
use crate::request::FaultRequest;
use crate::space::{Position, Stage2};

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// A leaf of this level was installed.
    Mapped(Level),
    /// A leaf with this output and at least these permissions is there: another vCPU was
    /// faster, or the TLB was behind. Success.
    AlreadyMapped,
    /// The leaf was there and got permissions or its access flag. Success.
    Relaxed,
    /// The entry is being zapped: let the guest fault again.
    Retry,
    /// A note stands here; nothing was changed.
    Annotated(Annotation),
    /// Another leaf stands here, of other memory or another type: only [`Stage2::map`] may
    /// replace it.
    Conflict(Entry),
}

/// What a fault met where it wants a leaf.
enum Meeting {
    /// An answer.
    Done(FaultOutcome),
    /// Something that changed meanwhile.
    Lost,
    /// Nothing after all.
    Nothing,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Resolves a fault with the largest leaf that lies in the window, is aligned, and meets no
    /// table that exists already.
    ///
    /// # Errors
    /// Nothing has changed after an error. [`MapError::NoMemory`] names the tables needed.
    #[inline]
    pub fn fault(&self, request: &FaultRequest) -> Result<FaultOutcome, MapError> {
        if self.fault_page(request) {
            return Ok(FaultOutcome::Mapped(Level::PAGE));
        }
        self.fault_anywhere(request)
    }

    #[cold]
    fn fault_anywhere(&self, request: &FaultRequest) -> Result<FaultOutcome, MapError> {
        let out = self.check_fault(request)?;
        let window = request.window;
        let leaves = self.leaves(&request.attrs, (window, out), request.blocks, request.cmo)?;
        let at = request.ipa.get() & !(self.geometry().page_size() - 1);
        loop {
            let here = self.descend(at);
            match self.meet(&leaves, at, &here, &request.attrs) {
                Meeting::Done(outcome) => return Ok(outcome),
                Meeting::Lost => continue,
                Meeting::Nothing => {}
            }
            let (leaf, level) = self.largest_leaf(&leaves, at, here.level, &window);
            let won = if level == here.level {
                self.install_leaf(&leaves, &here, leaf)
            } else {
                self.install_chain(&leaves, &here, leaf, level)?
            };
            if won {
                self.platform.publish();
                return Ok(FaultOutcome::Mapped(level));
            }
        }
    }

    /// The output of the window, if the request makes sense.
    #[inline]
    fn check_fault(&self, request: &FaultRequest) -> Result<PaRange, MapError> {
        let (ipa, window, pa) = (request.ipa, request.window, request.pa);
        if !window.contains(ipa) {
            return Err(MapError::OutsideWindow(ipa));
        }
        self.check_aligned(window.start().get() | window.end().get() | pa.get())?;
        self.check_input(&window)?;
        Ok(PaRange::new(pa, window.len())?)
    }

    /// The coarsest leaf around `at`, at `coarsest` or finer.
    #[inline]
    fn largest_leaf(
        &self,
        leaves: &Leaves,
        at: u64,
        coarsest: Level,
        window: &IpaRange,
    ) -> (Span, Level) {
        let mut level = coarsest;
        loop {
            let size = self.geometry().slot_size(level);
            let start = at & !(size - 1);
            let span = Span {
                start,
                end: start + size,
            };
            let inside = window.contains_range(&IpaRange::from_bounds(start, span.end));
            if level.is_page() || (inside && leaves.fit(span, level, size)) {
                return (span, level);
            }
            level = level.finer();
        }
    }

    /// Makes a leaf in an entry that was empty. Says whether it still was.
    #[inline]
    fn install_leaf(&self, leaves: &Leaves, here: &Position<'_, P>, leaf: Span) -> bool {
        self.clean_for(leaves, leaf);
        let pa = Pa::new(leaves.output(leaf.start));
        let new = self.format.leaf_word(leaves.attrs, pa, here.level);
        self.platform
            .compare_exchange(here.table.entry(here.index), here.raw, new)
    }

    /// Links a fresh table chain with the leaf at its end into an entry that was empty. Says
    /// whether it still was.
    fn install_chain(
        &self,
        leaves: &Leaves,
        here: &Position<'_, P>,
        leaf: Span,
        level: Level,
    ) -> Result<bool, MapError> {
        let top = here.level.finer();
        let mut reserve =
            self.reserve((level.number() - here.level.number()).unsigned_abs().into())?;
        let job = Job::Leaves(*leaves);
        let built = self.build(&job, top, leaf, Background::EMPTY, &mut reserve);
        let Some(table) = built else { return Ok(false) };
        self.clean_for(leaves, leaf);
        let word = self.format.table_word(table);
        let entry = here.table.entry(here.index);
        let won = self.platform.compare_exchange(entry, here.raw, word);
        if !won {
            self.discard(table, top, level, leaf.start);
        }
        Ok(won)
    }

    /// Gives back a chain of tables that was never linked.
    fn discard(&self, top: Pa, level: Level, last: Level, at: u64) {
        let (mut pa, mut level) = (top, level);
        while level != last {
            let table = self.table(pa);
            let raw = table.load(self.index(&table, at, level));
            let below = self.format.output(raw, level);
            self.platform.free_table(DetachedTable::new(pa));
            pa = below;
            level = level.finer();
        }
        self.platform.free_table(DetachedTable::new(pa));
    }

    /// Something stands where a leaf is wanted.
    fn meet(
        &self,
        leaves: &Leaves,
        at: u64,
        here: &Position<'_, P>,
        wanted: &LeafAttrs,
    ) -> Meeting {
        if self.format.kind(here.raw, here.level) == WordKind::Leaf {
            return self
                .meet_leaf(leaves, at, here, here.raw, wanted)
                .map_or(Meeting::Lost, Meeting::Done);
        }
        match SoftWord::decode(here.raw) {
            SoftWord::Empty => Meeting::Nothing,
            SoftWord::Annotation(note) => Meeting::Done(FaultOutcome::Annotated(note)),
            _ => Meeting::Done(FaultOutcome::Retry),
        }
    }

    /// A leaf is there already: the same memory gets what permissions it lacks. Nothing on a
    /// lost race.
    fn meet_leaf(
        &self,
        leaves: &Leaves,
        at: u64,
        here: &Position<'_, P>,
        old: u64,
        wanted: &LeafAttrs,
    ) -> Option<FaultOutcome> {
        let size = self.geometry().slot_size(here.level);
        let pa = self.format.output(old, here.level);
        let has = self.format.decode_attrs(old);
        let same_memory = leaves.output(at & !(size - 1)) == pa.get();
        if !same_memory || has.mem != wanted.mem || has.combine != wanted.combine {
            return Some(FaultOutcome::Conflict(Entry::Leaf { pa, attrs: has }));
        }
        if has.perms.contains(wanted.perms) && has.age == Age::Young {
            return Some(FaultOutcome::AlreadyMapped);
        }
        let attrs = LeafAttrs {
            perms: has.perms | wanted.perms,
            age: Age::Young,
            ..has
        };
        let Ok(word) = self.format.encode_attrs(&attrs) else {
            return Some(FaultOutcome::Conflict(Entry::Leaf { pa, attrs: has }));
        };
        let new = self.format.leaf_word(word, pa, here.level);
        self.rewrite_leaf(here, old, new, at & !(size - 1))
            .then_some(FaultOutcome::Relaxed)
    }

    /// Changes permissions or age of a leaf by compare-and-swap, with the invalidation that
    /// takes. Says whether the leaf was still there.
    pub(crate) fn rewrite_leaf(
        &self,
        here: &Position<'_, P>,
        old: u64,
        new: u64,
        slot: u64,
    ) -> bool {
        let size = self.geometry().slot_size(here.level);
        self.clean_fetch_if_added(
            old,
            new,
            Span {
                start: slot,
                end: slot + size,
            },
        );
        if !self
            .platform
            .compare_exchange(here.table.entry(here.index), old, new)
        {
            return false;
        }
        let (had, has) = (self.format.decode_attrs(old), self.format.decode_attrs(new));
        let mut flush = Flush::NOTHING;
        if had.perms != has.perms || has.age == Age::Old {
            flush.leaf(slot, size, here.level);
        }
        if flush.range().is_some() {
            self.invalidate(&flush);
        } else {
            self.platform.publish();
        }
        true
    }

    /// Adds permissions to the leaf at `ipa`, and makes it young.
    ///
    /// # Errors
    /// [`MapError::NotMapped`] without a leaf; an encoding error when the format cannot say the
    /// sum of the permissions. Nothing has changed after an error.
    pub fn relax_perms(&self, ipa: Ipa, add: Perms) -> Result<FaultOutcome, MapError> {
        self.update_leaf(ipa, |has| LeafAttrs {
            perms: has.perms | add,
            age: Age::Young,
            ..has
        })
    }

    /// Sets the access flag of the leaf at `ipa`. Needs no invalidation: what is old is not
    /// cached.
    ///
    /// # Errors
    /// [`MapError::NotMapped`] without a leaf.
    pub fn make_young(&self, ipa: Ipa) -> Result<FaultOutcome, MapError> {
        self.update_leaf(ipa, |has| LeafAttrs {
            age: Age::Young,
            ..has
        })
    }

    fn update_leaf(
        &self,
        ipa: Ipa,
        change: impl Fn(LeafAttrs) -> LeafAttrs,
    ) -> Result<FaultOutcome, MapError> {
        let page = ipa.get() & !(self.geometry().page_size() - 1);
        self.check_input(&IpaRange::new(Ipa::new(page), self.geometry().page_size())?)?;
        loop {
            let here = self.descend(page);
            let old = here.raw;
            if self.format.kind(old, here.level) != WordKind::Leaf {
                return match self.format.decode(old, here.level) {
                    Entry::Broken => Ok(FaultOutcome::Retry),
                    _ => Err(MapError::NotMapped(ipa)),
                };
            }
            let has = self.format.decode_attrs(old);
            let wants = change(has);
            if wants == has {
                return Ok(FaultOutcome::AlreadyMapped);
            }
            let pa = self.format.output(old, here.level);
            let size = self.geometry().slot_size(here.level);
            let word = self.format.encode_attrs(&wants)?;
            self.check_leaves(
                word,
                self.last_page(&PaRange::from_bounds(pa.get(), pa.get() + size)),
            )?;
            let new = self.format.leaf_word(word, pa, here.level);
            if self.rewrite_leaf(&here, old, new, page & !(size - 1)) {
                return Ok(FaultOutcome::Relaxed);
            }
        }
    }
}
