//! What leaves with the tables that are freed: memory to clean and to hand out, and tables below.

use crate::addr::{Ipa, Pa, PaRange};
use crate::entry::SoftWord;
use crate::format::{TableFormat, WordKind};
use crate::level::Level;
use crate::platform::Platform;
use crate::space::Stage2;
use crate::sync::Ordering;
use crate::table::Table;

/// Memory that left a table: no CPU and no importer can reach it through the space any more, and
/// its cache maintenance is done.
#[derive(Debug, PartialEq, Eq)]
pub struct DetachedLeaf {
    ipa: Ipa,
    frames: PaRange,
}

impl DetachedLeaf {
    /// Where it was mapped.
    #[must_use]
    pub const fn ipa(&self) -> Ipa {
        self.ipa
    }

    /// The memory.
    #[must_use]
    pub const fn frames(&self) -> PaRange {
        self.frames
    }
}

/// Who is told of the memory that leaves.
pub(crate) type Sink<'s> = &'s mut dyn FnMut(DetachedLeaf);

/// Running state of the second pass.
pub(crate) struct Sweep<'s> {
    sink: Option<Sink<'s>>,
    /// Memory to clean that is not yet cleaned: neighbours are cleaned together.
    dirty: Option<(u64, u64)>,
}

impl<'s> Sweep<'s> {
    /// Tells nobody.
    pub(crate) const fn quiet() -> Self {
        Self {
            sink: None,
            dirty: None,
        }
    }

    pub(crate) const fn telling(sink: Option<Sink<'s>>) -> Self {
        Self { sink, dirty: None }
    }

    /// Whether anybody is told.
    pub(crate) const fn tells(&self) -> bool {
        self.sink.is_some()
    }
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Frees a table that was broken and invalidated, and everything below it.
    pub(crate) fn release_table(&self, pa: Pa, level: Level, base: u64, sweep: &mut Sweep<'_>) {
        let table = self.table(pa);
        let leaves_matter = sweep.tells() || self.owes_data.load(Ordering::Relaxed);
        if leaves_matter || !level.is_page() {
            let (mut index, shift) = (0, self.geometry().shift(level));
            while index < table.entries() {
                let at = base + ((index as u64) << shift);
                index += self.release_run(&table, index, level, at, sweep);
            }
        }
        self.free_table(pa);
    }

    /// Releases the entry and those behind it that say nothing else. Says how many.
    fn release_run(
        &self,
        table: &Table<'_, P>,
        index: usize,
        level: Level,
        at: u64,
        sweep: &mut Sweep<'_>,
    ) -> usize {
        let (raw, left) = (table.load(index), table.entries() - index);
        if raw == SoftWord::EMPTY {
            return 1 + table.zero_run(index + 1, left - 1);
        }
        if sweep.tells() || self.format.kind(raw, level) != WordKind::Leaf {
            self.release_entry(raw, level, at, sweep);
            return 1;
        }
        let count = self.leaf_run(table, (index, left), raw, level);
        let bytes = (count as u64) << self.geometry().shift(level);
        let owes = self.format.maintenance(raw).data;
        let pa = self.format.output(raw, level).get();
        self.detach(at, (pa, bytes), owes, sweep);
        count
    }

    /// Releases what an entry leads to, valid or broken.
    pub(crate) fn release_entry(&self, raw: u64, level: Level, at: u64, sweep: &mut Sweep<'_>) {
        let size = self.geometry().slot_size(level);
        match self.format.kind(raw, level) {
            WordKind::Table => {
                self.release_table(self.format.output(raw, level), level.finer(), at, sweep);
            }
            WordKind::Leaf => {
                let owes = self.format.maintenance(raw).data;
                self.detach(
                    at,
                    (self.format.output(raw, level).get(), size),
                    owes,
                    sweep,
                );
            }
            WordKind::Invalid => match SoftWord::decode(raw) {
                SoftWord::BrokenLeaf { pa, owes_data, .. } => {
                    self.detach(at, (pa.get(), size), owes_data, sweep);
                }
                SoftWord::BrokenTable(pa) | SoftWord::ReadyTable(pa) => {
                    self.release_table(pa, level.finer(), at, sweep);
                }
                SoftWord::Empty | SoftWord::Annotation(_) => {}
            },
        }
    }

    /// Step 5 for memory that left; with a sink it is cleaned before the sink hears of it.
    pub(crate) fn detach(
        &self,
        ipa: u64,
        (pa, size): (u64, u64),
        owes_data: bool,
        sweep: &mut Sweep<'_>,
    ) {
        if owes_data {
            match sweep.dirty {
                Some((start, end)) if end == pa => sweep.dirty = Some((start, pa + size)),
                _ => {
                    self.finish_sweep(sweep);
                    sweep.dirty = Some((pa, pa + size));
                }
            }
        }
        if sweep.tells() {
            self.finish_sweep(sweep);
        }
        if let Some(sink) = &mut sweep.sink {
            let frames = PaRange::from_bounds(pa, pa + size);
            sink(DetachedLeaf {
                ipa: Ipa::new(ipa),
                frames,
            });
        }
    }

    /// Cleans what is gathered.
    pub(crate) fn finish_sweep(&self, sweep: &mut Sweep<'_>) {
        if let Some((start, end)) = sweep.dirty.take() {
            self.clean_data(PaRange::from_bounds(start, end));
        }
    }

    /// Frees everything below the root, which nothing uses any more.
    pub(crate) fn release_root(&self) {
        let (root, level) = (self.root_table(), self.geometry().start_level());
        let mut sweep = Sweep::quiet();
        for index in 0..root.entries() {
            let raw = root.load(index);
            if raw != SoftWord::EMPTY {
                let at = (index as u64) << self.geometry().shift(level);
                self.release_entry(raw, level, at, &mut sweep);
            }
        }
        self.finish_sweep(&mut sweep);
    }
}
