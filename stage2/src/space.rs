//! A stage-2 address space: a root, its format, its machine.

use core::fmt;

use crate::addr::{Ipa, IpaRange, Pa, PaRange};
use crate::entry::{Entry, Lookup, SoftWord};
use crate::error::{EncodeError, MapError};
use crate::export::Exports;
use crate::format::{TableFormat, WordKind};
use crate::job::LeafLevels;
use crate::level::{Geometry, Level};
use crate::platform::{DetachedTable, Platform};
use crate::short::Short;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::table::Table;

/// One guest's (or the host's) second-stage address space.
///
/// Access is the lock: everything that may run beside other vCPUs' faults takes `&self` and
/// changes entries by compare-and-swap; everything that frees or replaces a table takes
/// `&mut self`. A reader-writer lock around the space is therefore used as its guards suggest.
pub struct Stage2<F: TableFormat, P: Platform> {
    pub(crate) format: F,
    pub(crate) platform: P,
    pub(crate) context: P::Context,
    pub(crate) root: Pa,
    pub(crate) exports: Exports,
    /// Which claims concurrent zaps hold, one bit each.
    pub(crate) claims: AtomicU32,
    /// Where the format has leaves.
    pub(crate) leaf_levels: LeafLevels,
    /// Whether any leaf so far owes data-cache maintenance; spares whole passes when none does.
    pub(crate) owes_data: AtomicBool,
    pub(crate) short: Short,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// An empty space. `context` is what its translations are tagged with; nothing tagged so may
    /// be cached when the root is handed to the hardware.
    ///
    /// # Errors
    /// [`MapError::NoMemory`] when there is no root-sized memory; `needed` counts pages.
    pub fn new(format: F, platform: P, context: P::Context) -> Result<Self, MapError> {
        let geometry = *format.geometry();
        let needed = geometry.root_tables();
        let root = platform
            .alloc_root(geometry.root_size())
            .ok_or(MapError::NoMemory { needed })?;
        let (claims, owes_data) = (AtomicU32::new(0), AtomicBool::new(false));
        let exports = Exports::new();
        let leaf_levels = LeafLevels::of(&format);
        let short = Short::of(&format);
        let space = Self {
            format,
            platform,
            context,
            root,
            exports,
            claims,
            leaf_levels,
            owes_data,
            short,
        };
        space
            .root_table()
            .init_run(0, geometry.root_entries(), SoftWord::EMPTY, 0);
        space.platform.publish();
        Ok(space)
    }

    /// Address of the root, aligned to [`Geometry::root_size`].
    #[must_use]
    pub const fn root(&self) -> Pa {
        self.root
    }

    /// The format, for what the hardware's registers must say.
    #[must_use]
    pub const fn format(&self) -> &F {
        &self.format
    }

    /// The machine underneath.
    #[must_use]
    pub const fn platform(&self) -> &P {
        &self.platform
    }

    /// What translations are tagged with.
    #[must_use]
    pub const fn context(&self) -> P::Context {
        self.context
    }

    /// Shape of the tables.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.format.geometry()
    }

    /// The entry that decides about `ipa`, its level and the addresses it stands for. For an
    /// address that is not mapped this is the largest empty (or annotated) slot around it.
    ///
    /// # Errors
    /// [`MapError::OutOfInput`] past the input size.
    #[inline(always)]
    pub fn lookup(&self, ipa: Ipa) -> Result<Lookup, MapError> {
        if ipa.get() >= self.geometry().input_end() {
            let even = ipa.get() & !1; // the last byte has no range of its own
            return Err(MapError::OutOfInput(IpaRange::from_bounds(even, even + 1)));
        }
        let found = |at: Position<'_, P>| (at.raw, at.level);
        let (raw, level) = match self.page_entry(ipa.get()) {
            Some(page) => found(page),
            None => found(self.descend(ipa.get())),
        };
        Ok(Lookup {
            entry: self.format.decode(raw, level),
            level,
            slot: self.geometry().slot(ipa, level),
        })
    }

    /// Gives every table back. The hardware and all importers must have stopped using the root.
    ///
    /// # Errors
    /// The space itself while its root is exported: an importer may still be walking it.
    #[expect(
        clippy::result_large_err,
        reason = "the error is the space, which lives on"
    )]
    pub fn destroy(mut self) -> Result<(), Self> {
        if self.exports.is_exported() {
            return Err(self);
        }
        self.tear_down();
        Ok(())
    }

    /// Whether some leaf may owe data-cache maintenance when it goes.
    #[must_use]
    pub fn owes_data(&self) -> bool {
        self.owes_data.load(Ordering::Relaxed)
    }

    /// Forgets every translation, and keeps the tables when the space is dropped: they are not given
    /// back to the machine, which takes the memory that they are made of as a whole. Nor is what
    /// they map cleaned.
    ///
    /// The hardware has stopped using the root. An exported root is forgotten only by its importer;
    /// nothing happens then, and dropping the space keeps the tables, too.
    pub fn abandon(&mut self) {
        if self.exports.may_tear_down() {
            self.platform.invalidate_all(self.context);
            self.exports.retire();
        }
    }

    fn tear_down(&mut self) {
        // Nothing was stored, so there is nothing to publish; an importer has long left.
        self.platform.invalidate_all(self.context);
        self.release_root();
        let size = self.geometry().root_size();
        self.platform.free_root(DetachedTable::new(self.root), size);
        // What is left of `self` holds no table; `Drop` must not free the root again.
        self.exports.retire();
    }

    pub(crate) fn root_table(&self) -> Table<'_, P> {
        Table::at(&self.platform, self.root, self.geometry().root_entries())
    }

    #[inline]
    pub(crate) fn table(&self, pa: Pa) -> Table<'_, P> {
        Table::at(&self.platform, pa, self.geometry().entries())
    }

    /// The table a table word points to.
    #[inline]
    pub(crate) fn child(&self, raw: u64, level: Level) -> Table<'_, P> {
        self.table(self.format.output(raw, level))
    }

    #[inline]
    pub(crate) fn index(&self, table: &Table<'_, P>, at: u64, level: Level) -> usize {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "masked to the table's entries"
        )]
        let index = (at >> self.geometry().shift(level)) as usize;
        index & (table.entries() - 1)
    }

    /// Walks to the entry that decides about `at`.
    #[inline]
    pub(crate) fn descend(&self, at: u64) -> Position<'_, P> {
        let (mut table, mut level) = (self.root_table(), self.geometry().start_level());
        loop {
            let here = Position::at(table, at, level, self.geometry().shift(level));
            if self.format.kind(here.raw, level) != WordKind::Table {
                return here;
            }
            (table, level) = (self.child(here.raw, level), level.finer());
        }
    }

    /// Refuses a range that this table cannot translate.
    #[inline]
    pub(crate) fn check_input(&self, range: &IpaRange) -> Result<(), MapError> {
        if self.geometry().admits(range) {
            Ok(())
        } else {
            Err(MapError::OutOfInput(*range))
        }
    }

    /// Refuses addresses and sizes that are not whole pages.
    #[inline]
    pub(crate) fn check_aligned(&self, values: u64) -> Result<(), MapError> {
        if values & (self.geometry().page_size() - 1) == 0 {
            Ok(())
        } else {
            Err(MapError::Unaligned(values))
        }
    }

    /// Refuses a range that is not whole pages of the input.
    pub(crate) fn check_range(&self, range: &IpaRange) -> Result<(), MapError> {
        self.check_aligned(range.start().get())?;
        self.check_aligned(range.end().get())?;
        self.check_input(range)
    }

    /// The last page of a range that is not smaller than one.
    #[inline]
    pub(crate) fn last_page(&self, out: &PaRange) -> Pa {
        Pa::new(out.end().get() - self.geometry().page_size())
    }

    /// Refuses output that does not fit, or sets a bit an importer reserves. The `last` page has
    /// the highest address bits, and blocks only differ in bits of their own.
    #[inline(always)]
    pub(crate) fn check_leaves(&self, attrs: u64, last: Pa) -> Result<(), EncodeError> {
        let bits = self.format.output_bits();
        if last.get() >> bits != 0 {
            return Err(EncodeError::OutOfRange { pa: last, bits });
        }
        let reserved = self.exports.reserved_bits();
        if reserved == 0 {
            return Ok(());
        }
        let words = self.format.leaf_word(attrs, last, Level::PAGE)
            | self.format.leaf_word(attrs, Pa::new(0), Level::L2);
        match words & reserved {
            0 => Ok(()),
            clash => Err(EncodeError::ReservedByImporter(clash)),
        }
    }

    /// Remembers that some leaf owes data-cache maintenance.
    #[inline]
    pub(crate) fn note_owed(&self, data: bool) {
        if data && !self.owes_data.load(Ordering::Relaxed) {
            self.owes_data.store(true, Ordering::Relaxed);
        }
    }
}

/// Where a walk ended.
pub(crate) struct Position<'a, P> {
    pub(crate) table: Table<'a, P>,
    pub(crate) index: usize,
    pub(crate) level: Level,
    /// The entry as the walk read it.
    pub(crate) raw: u64,
}

impl<'a, P: Platform> Position<'a, P> {
    #[inline]
    pub(crate) const fn is_empty(&self) -> bool {
        self.raw == SoftWord::EMPTY
    }

    #[inline]
    pub(crate) fn at(table: Table<'a, P>, at: u64, level: Level, shift: u32) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "masked to the table's entries"
        )]
        let index = (at >> shift) as usize & (table.entries() - 1);
        let raw = table.load(index);
        Self {
            table,
            index,
            level,
            raw,
        }
    }
}

impl<F: TableFormat, P: Platform> Drop for Stage2<F, P> {
    /// Gives the tables back, or leaks them while the root is exported: a leak is repairable, a
    /// table freed under an IOMMU is not.
    fn drop(&mut self) {
        if self.exports.may_tear_down() {
            self.tear_down();
        }
    }
}

impl<F: TableFormat, P: Platform> fmt::Debug for Stage2<F, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage2")
            .field("format", &self.format)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

/// Whether a decoded entry is a leaf, for callers that only need to know.
impl Entry {
    /// Whether the entry maps memory.
    #[must_use]
    pub const fn is_leaf(&self) -> bool {
        matches!(self, Self::Leaf { .. })
    }
}
