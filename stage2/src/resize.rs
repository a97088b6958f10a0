//! Splitting blocks into smaller leaves, and joining leaves into a block.

use crate::addr::{Ipa, IpaRange, Pa};
use crate::bbm::Flush;
use crate::entry::SoftWord;
use crate::error::{EncodeError, MapError};
use crate::format::{TableFormat, WordKind};
use crate::job::{Background, Span};
use crate::level::Level;
use crate::platform::Platform;
use crate::reserve::Reserve;
use crate::space::Stage2;
use crate::table::Table;

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Turns every leaf that lies in the range, even in part, and is coarser than `to` into
    /// leaves of level `to`, with one invalidation for all. The tables are complete before the
    /// first block is broken. Memory and attributes stay, so no cache maintenance is due.
    /// Returns how many blocks were split.
    ///
    /// # Errors
    /// Nothing has changed after an error; [`MapError::NoMemory`] names the tables needed.
    pub fn split(&mut self, range: IpaRange, to: Level) -> Result<usize, MapError> {
        self.check_range(&range)?;
        if !self.format.supports_leaf(to) {
            return Err(EncodeError::NoLeafAt(to).into());
        }
        let mut needed = 0;
        self.visit_leaves(&range, &mut |found| {
            needed += self.count_split(found.level, to)
        });
        let mut reserve = self.reserve(needed)?;
        let (mut flush, mut split) = (Flush::NOTHING, 0);
        self.visit_leaves(&range, &mut |found| {
            if found.level.height() <= to.height() {
                return;
            }
            let attrs = self.format.attrs_word(found.raw, found.level);
            let pa = self.format.output(found.raw, found.level).get();
            let built = self.build_split(attrs, pa, found.level.finer(), to, &mut reserve);
            let Some(table) = built else { return };
            self.make(found.entry, SoftWord::ReadyTable(table).encode());
            flush.leaf(
                found.slot,
                self.geometry().slot_size(found.level),
                found.level,
            );
            split += 1;
        });
        self.invalidate(&flush);
        if split > 0 {
            let span = Span::of(&range);
            self.link_ready(&self.root_table(), self.geometry().start_level(), span);
            self.platform.publish();
        }
        self.give_back(reserve);
        Ok(split)
    }

    /// Tables below a leaf of `level` that becomes leaves of `to`.
    fn count_split(&self, level: Level, to: Level) -> usize {
        let (mut count, mut tables, mut level) = (0, 1, level);
        while level.height() > to.height() {
            count += tables;
            tables *= self.geometry().entries();
            level = level.finer();
        }
        count
    }

    fn build_split(
        &self,
        attrs: u64,
        pa: u64,
        level: Level,
        to: Level,
        reserve: &mut Reserve,
    ) -> Option<Pa> {
        let here = self.take(reserve)?;
        let table = self.table(here);
        if level == to {
            self.init_background(
                &table,
                level,
                Background::Leaf { attrs, pa },
                0,
                table.entries(),
            );
            return Some(here);
        }
        for index in 0..table.entries() {
            let pa = pa + ((index as u64) << self.geometry().shift(level));
            let child = self.build_split(attrs, pa, level.finer(), to, reserve)?;
            table.init(index, self.format.table_word(child));
        }
        Some(here)
    }

    /// Links the tables that stand ready in a span.
    fn link_ready(&self, table: &Table<'_, P>, level: Level, span: Span) {
        let size = self.geometry().slot_size(level);
        for part in span.slots(size) {
            let index = self.index(table, part.start, level);
            let raw = table.load(index);
            match self.format.kind(raw, level) {
                WordKind::Table => self.link_ready(&self.child(raw, level), level.finer(), part),
                WordKind::Leaf => {}
                WordKind::Invalid => {
                    if let SoftWord::ReadyTable(child) = SoftWord::decode(raw) {
                        self.make(table.entry(index), self.format.table_word(child));
                    }
                }
            }
        }
    }

    /// Joins everything below the slot of `level` around `ipa` into one block, if it is full of
    /// leaves that say the same and whose memory is contiguous and aligned. A block that is
    /// there already is success.
    ///
    /// # Errors
    /// Nothing has changed after an error: [`MapError::NotUniform`], or
    /// [`EncodeError::NoLeafAt`] for a level without blocks.
    pub fn collapse(&mut self, ipa: Ipa, level: Level) -> Result<(), MapError> {
        let page = ipa.get() & !(self.geometry().page_size() - 1);
        self.check_input(&IpaRange::new(Ipa::new(page), self.geometry().page_size())?)?;
        if !self.format.supports_leaf(level) {
            return Err(EncodeError::NoLeafAt(level).into());
        }
        let mut table = self.root_table();
        let mut at = self.geometry().start_level();
        loop {
            let index = self.index(&table, page, at);
            let raw = table.load(index);
            match self.format.kind(raw, at) {
                WordKind::Invalid => return Err(MapError::NotUniform(ipa)),
                WordKind::Leaf => return Ok(()), // of this level or coarser
                WordKind::Table if at == level => {
                    return self.collapse_table(&table, index, level, ipa);
                }
                WordKind::Table => (table, at) = (self.child(raw, at), at.finer()),
            }
        }
    }

    fn collapse_table(
        &self,
        parent: &Table<'_, P>,
        index: usize,
        level: Level,
        ipa: Ipa,
    ) -> Result<(), MapError> {
        let old = parent.load(index);
        let (attrs, pa) = self
            .first_leaf(old, level)
            .ok_or(MapError::NotUniform(ipa))?;
        let aligned = pa & (self.geometry().slot_size(level) - 1) == 0;
        if !aligned || !self.is_uniform(&self.child(old, level), level.finer(), attrs, pa) {
            return Err(MapError::NotUniform(ipa));
        }
        let slot = self.geometry().slot(ipa, level);
        let entry = parent.entry(index);
        let mut flush = Flush::NOTHING;
        self.break_table(entry, old, level);
        flush.table(slot.start().get(), slot.len());
        self.invalidate(&flush);
        self.make(entry, self.format.leaf_word(attrs, Pa::new(pa), level));
        self.platform.publish();
        self.free_tables(self.format.output(old, level), level.finer());
        Ok(())
    }

    /// Attributes and address of the leaf that the first entries lead to.
    fn first_leaf(&self, raw: u64, level: Level) -> Option<(u64, u64)> {
        let (mut raw, mut level) = (raw, level);
        loop {
            match self.format.kind(raw, level) {
                WordKind::Invalid => return None,
                WordKind::Table => (raw, level) = (self.child(raw, level).load(0), level.finer()),
                WordKind::Leaf => {
                    let pa = self.format.output(raw, level).get();
                    return Some((self.format.attrs_word(raw, level), pa));
                }
            }
        }
    }

    /// Whether the table maps contiguous memory from `pa`, everywhere with `attrs`.
    fn is_uniform(&self, table: &Table<'_, P>, level: Level, attrs: u64, pa: u64) -> bool {
        (0..table.entries()).all(|index| {
            let raw = table.load(index);
            let pa = pa + ((index as u64) << self.geometry().shift(level));
            match self.format.kind(raw, level) {
                WordKind::Invalid => false,
                WordKind::Table => {
                    self.is_uniform(&self.child(raw, level), level.finer(), attrs, pa)
                }
                WordKind::Leaf => raw == self.format.leaf_word(attrs, Pa::new(pa), level),
            }
        })
    }

    /// Frees tables whose leaves live on in a block.
    fn free_tables(&self, pa: Pa, level: Level) {
        let table = self.table(pa);
        if !level.is_page() {
            for index in 0..table.entries() {
                let raw = table.load(index);
                if self.format.kind(raw, level) == WordKind::Table {
                    self.free_tables(self.format.output(raw, level), level.finer());
                }
            }
        }
        self.free_table(pa);
    }
}
