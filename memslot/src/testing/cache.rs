//! A software model of caches, in which missing maintenance is seen.
//!
//! Emulators model no caches, so that a forgotten clean never fails on them. Here each line of
//! memory has a value at the point of coherency (what a device and an uncached access see), at
//! most one copy at the point of unification (level 2) and at most one above it (level 1), each
//! clean or dirty, and a copy in the instruction cache. Values are version numbers; a test
//! writes through one observer and reads through another.
//!
//! | access | reads | writes |
//! |---|---|---|
//! | cacheable | level 1, else level 2, else memory; fills level 1 | level 1, dirty |
//! | uncached, device | memory, past every copy | memory, past every copy |
//! | fetch | instruction cache, else level 2 (level 1 with IDC), else memory | – |
//!
//! CPUs are coherent among themselves, so one data cache stands for all of them. What real
//! caches do on their own is up to the test: [`CacheModel::speculate`] fetches a line that
//! nobody asked for, [`CacheModel::evict`] writes one back.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use stage2::{CacheMaintenance, Combine, MemType, Pa, PaRange};

/// Bytes of a line.
const LINE: u64 = 64;

/// How an observer accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Through the data caches: the host, a guest with its caches on, a snooping device.
    Cacheable,
    /// Past them: a guest with its MMU off or a non-cacheable mapping, a device that does not
    /// snoop.
    Uncached,
}

/// What the guest's own tables say about a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage1 {
    /// Normal, write-back.
    WriteBack,
    /// Normal, non-cacheable.
    NonCacheable,
    /// Device, which is also what data accesses are with the MMU off.
    Device,
}

/// The view that results from both stages (Arm ARM D8.6, "Combining stage 1 and stage 2 memory
/// type attributes"; write-through counts as uncached, as most CPUs implement it).
#[must_use]
pub fn guest_view(stage1: Stage1, mem: MemType, combine: Combine) -> View {
    match (mem, combine, stage1) {
        (MemType::WriteBack, Combine::ForceStage2, _)
        | (MemType::WriteBack, Combine::HonourGuest, Stage1::WriteBack) => View::Cacheable,
        _ => View::Uncached,
    }
}

#[derive(Clone, Copy, Debug)]
struct Copy {
    value: u64,
    dirty: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Line {
    memory: u64,
    level2: Option<Copy>,
    level1: Option<Copy>,
    fetch: Option<u64>,
}

/// Maintenance that was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Data lines cleaned and invalidated.
    pub data_lines: u64,
    /// Instruction lines invalidated.
    pub fetch_lines: u64,
}

/// The caches and the memory behind them.
#[derive(Debug, Default)]
pub struct CacheModel {
    lines: Mutex<BTreeMap<u64, Line>>,
    traffic: Mutex<Traffic>,
    /// Whether fetches see data without a clean (CTR_EL0.IDC).
    idc: bool,
}

impl CacheModel {
    /// Memory full of zeroes, nothing cached, no IDC.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with instruction fetches that see the data cache.
    #[must_use]
    pub fn with_idc() -> Self {
        Self {
            idc: true,
            ..Self::default()
        }
    }

    fn line<R>(&self, at: Pa, f: impl FnOnce(&mut Line) -> R) -> R {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        f(lines.entry(at.get() / LINE).or_default())
    }

    /// Reads the line at `at`.
    pub fn read(&self, at: Pa, view: View) -> u64 {
        self.line(at, |l| match view {
            View::Cacheable => l.fill().value,
            View::Uncached => l.memory,
        })
    }

    /// Writes the line at `at`.
    pub fn write(&self, at: Pa, view: View, value: u64) {
        self.line(at, |l| match view {
            View::Cacheable => l.level1 = Some(Copy { value, dirty: true }),
            View::Uncached => l.memory = value,
        });
    }

    /// Fetches instructions from the line at `at`.
    pub fn fetch(&self, at: Pa) -> u64 {
        let above = self.idc;
        self.line(at, |l| {
            let data = if above {
                l.level1.or(l.level2)
            } else {
                l.level2
            };
            *l.fetch.get_or_insert(data.map_or(l.memory, |c| c.value))
        })
    }

    /// A fill that nobody asked for, through any cacheable mapping of the line, also the host's.
    pub fn speculate(&self, at: Pa) {
        self.line(at, |l| {
            l.fill();
        });
    }

    /// Both levels drop the line, writing it back if it is dirty.
    pub fn evict(&self, at: Pa) {
        self.line(at, |l| {
            l.clean_to_unification();
            l.level1 = None;
            l.clean_to_coherency();
            l.level2 = None;
        });
    }

    /// Cleans to the point of unification only. Not enough for an observer behind it; here so
    /// that tests can show it.
    pub fn clean_to_unification(&self, range: PaRange) {
        self.each(range, Line::clean_to_unification);
    }

    /// Invalidates without cleaning: loses dirty data. Here so that tests can show it.
    pub fn invalidate_only(&self, range: PaRange) {
        self.each(range, |l| {
            l.level1 = None;
            l.level2 = None;
        });
    }

    /// Maintenance done so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn each(&self, range: PaRange, f: impl FnMut(&mut Line)) {
        let (first, end) = (range.start().get() / LINE, range.end().get().div_ceil(LINE));
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.range_mut(first..end).map(|(_, l)| l).for_each(f);
    }

    fn count(&self, f: impl FnOnce(&mut Traffic)) {
        f(&mut self.traffic.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Line {
    fn fill(&mut self) -> Copy {
        let below = self.level2.map_or(self.memory, |c| c.value);
        *self.level1.get_or_insert(Copy {
            value: below,
            dirty: false,
        })
    }

    fn clean_to_unification(&mut self) {
        if let Some(copy) = self.level1.as_mut().filter(|c| c.dirty) {
            copy.dirty = false;
            self.level2 = Some(Copy {
                value: copy.value,
                dirty: true,
            });
        }
    }

    fn clean_to_coherency(&mut self) {
        self.clean_to_unification();
        if let Some(copy) = self.level2.as_mut().filter(|c| c.dirty) {
            copy.dirty = false;
            self.memory = copy.value;
        }
    }
}

impl CacheMaintenance for CacheModel {
    fn clean_invalidate_data(&self, range: PaRange) {
        self.each(range, |l| {
            l.clean_to_coherency();
            l.level1 = None;
            l.level2 = None;
        });
        self.count(|t| t.data_lines += range.len() / LINE);
    }

    fn invalidate_fetch(&self, range: PaRange) {
        self.each(range, |l| {
            l.clean_to_unification();
            l.fetch = None;
        });
        self.count(|t| t.fetch_lines += range.len() / LINE);
    }

    fn publish(&self) {}
}

#[cfg(test)]
mod tests {
    use super::View::{Cacheable, Uncached};
    use super::*;

    const AT: Pa = Pa::new(0x1040);

    fn page() -> PaRange {
        PaRange::new(Pa::new(0x1000), 0x1000).unwrap()
    }

    #[test]
    fn a_dirty_line_is_invisible_to_an_uncached_reader_until_cleaned() {
        let c = CacheModel::new();
        c.write(AT, Cacheable, 1);
        assert_eq!(c.read(AT, Uncached), 0);
        c.clean_invalidate_data(page());
        assert_eq!(c.read(AT, Uncached), 1);
        assert_eq!(c.traffic().data_lines, 64);
    }

    #[test]
    fn a_clean_line_hides_an_uncached_write_until_invalidated() {
        let c = CacheModel::new();
        c.speculate(AT);
        c.write(AT, Uncached, 2);
        assert_eq!(c.read(AT, Cacheable), 0);
        c.clean_invalidate_data(page());
        assert_eq!(c.read(AT, Cacheable), 2);
    }

    #[test]
    fn an_evicted_dirty_line_overwrites_an_uncached_write() {
        let c = CacheModel::new();
        c.write(AT, Cacheable, 1);
        c.write(AT, Uncached, 2);
        c.evict(AT);
        assert_eq!(c.read(AT, Uncached), 1);
    }

    #[test]
    fn invalidate_only_loses_dirty_data() {
        let c = CacheModel::new();
        c.write(AT, Cacheable, 1);
        c.invalidate_only(page());
        assert_eq!(c.read(AT, Cacheable), 0);
    }

    #[test]
    fn cleaning_to_unification_does_not_reach_a_device() {
        let c = CacheModel::new();
        c.write(AT, Cacheable, 1);
        c.clean_to_unification(page());
        assert_eq!(c.read(AT, Uncached), 0);
        assert_eq!(c.fetch(AT), 1);
    }

    #[test]
    fn a_fetch_misses_dirty_data_without_idc_and_sees_it_with() {
        let plain = CacheModel::new();
        plain.write(AT, Cacheable, 1);
        assert_eq!(plain.fetch(AT), 0);
        let idc = CacheModel::with_idc();
        idc.write(AT, Cacheable, 1);
        assert_eq!(idc.fetch(AT), 1);
    }

    #[test]
    fn a_fetched_line_stays_until_invalidated() {
        let c = CacheModel::new();
        assert_eq!(c.fetch(AT), 0);
        c.write(AT, Cacheable, 1);
        c.clean_invalidate_data(page());
        assert_eq!(c.fetch(AT), 0);
        c.invalidate_fetch(page());
        assert_eq!(c.fetch(AT), 1);
        assert_eq!(c.traffic().fetch_lines, 64);
    }

    #[test]
    fn maintenance_stays_within_its_range() {
        let c = CacheModel::new();
        for at in [0xfc0, 0x1000, 0x1fc0, 0x2000] {
            c.write(Pa::new(at), Cacheable, 1);
        }
        c.clean_invalidate_data(page());
        let seen = [0xfc0, 0x1000, 0x1fc0, 0x2000].map(|at| c.read(Pa::new(at), Uncached));
        assert_eq!(seen, [0, 1, 1, 0]);
    }

    #[test]
    fn views_are_those_of_the_combination_table() {
        use Combine::{ForceStage2 as Force, HonourGuest as Honour};
        use MemType::{NonCacheable as Nc, WriteBack as Wb};
        let row = |mem, combine| {
            [Stage1::WriteBack, Stage1::NonCacheable, Stage1::Device]
                .map(|s| guest_view(s, mem, combine))
        };
        assert_eq!(row(Wb, Force), [Cacheable; 3]);
        assert_eq!(row(Wb, Honour), [Cacheable, Uncached, Uncached]);
        assert_eq!(row(Nc, Honour), [Uncached; 3]);
    }
}
