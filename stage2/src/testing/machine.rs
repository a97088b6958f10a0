//! The machine: memory, TLB, caches, event log and checker in one.
#![expect(unsafe_code, reason = "implements the memory trait")]

use std::collections::{BTreeMap, BTreeSet};
use std::format;
use std::panic::Location;
use std::prelude::rust_2024::*;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::caches::Caches;
use super::mutation::{Mutation, Op, Site};
use super::ranges::RangeSet;
use super::tlb::{Cached, FakeTlb};
use super::walker::{Arch, RawEntry, Tables};
use crate::addr::{IpaRange, Pa, PaRange};
use crate::level::Level;
use crate::platform::{
    CacheMaintenance, DetachedTable, EntryRef, RangeOps, TableMemory, TlbCaps, TlbInvalidate,
};
use crate::sync::{AtomicEntry, Ordering};

/// What happened, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An entry of a table changed.
    Store {
        /// The table.
        table: u64,
        /// The entry.
        index: usize,
        /// Before.
        old: u64,
        /// After.
        new: u64,
    },
    /// Stores became visible.
    Publish,
    /// A range was invalidated.
    TlbRange(IpaRange, Option<Level>),
    /// Everything was invalidated.
    TlbAll,
    /// Data was cleaned.
    Data(PaRange),
    /// Instruction caches were invalidated.
    Fetch(PaRange),
    /// An importer was told.
    Notify(IpaRange),
    /// A table was given out.
    Alloc(u64),
    /// A table came back.
    Free(u64),
}

struct State {
    arch: Arch,
    root: Option<u64>,
    /// Tables the hardware can reach: what they span and the level of their entries.
    linked: BTreeMap<u64, (u64, i8)>,
    free: Vec<u64>,
    live: BTreeSet<u64>,
    unpublished: bool,
    tlb: FakeTlb,
    importer: Option<FakeTlb>,
    caches: Caches,
    /// Leaves that were taken away: the same memory may come back at the same place with the
    /// same type, in other sizes or with other permissions, and owes nothing then.
    taken: BTreeMap<(u64, u8), RangeSet>,
    deferred: bool,
    events: Vec<Event>,
    violations: Vec<String>,
    sites: BTreeSet<Site>,
    mutation: Option<Mutation>,
    delayed: Option<Event>,
    allocations_left: Option<usize>,
    caps: TlbCaps,
}

/// The machine. Addresses of its table memory start at [`FakeMachine::BASE`].
pub struct FakeMachine {
    words: Box<[AtomicEntry]>,
    state: Mutex<State>,
}

/// A valid-looking word: memory that is given out or taken back is full of it.
const POISON: u64 = 0xdead_0000_0bad_0fff;

impl FakeMachine {
    /// First address of table memory.
    pub const BASE: u64 = 0x7_0000_0000;

    /// A machine with memory for `tables` tables of `arch`'s page size.
    #[must_use]
    pub fn new(arch: Arch, tables: usize) -> Self {
        let words = tables << (arch.page_shift - 3);
        let page = 1u64 << arch.page_shift;
        let free = (0..tables as u64)
            .rev()
            .map(|n| Self::BASE + n * page)
            .collect();
        let state = State {
            arch,
            root: None,
            linked: BTreeMap::new(),
            free,
            live: BTreeSet::new(),
            unpublished: false,
            tlb: FakeTlb::default(),
            importer: None,
            caches: Caches::default(),
            taken: BTreeMap::new(),
            deferred: false,
            events: Vec::new(),
            violations: Vec::new(),
            sites: BTreeSet::new(),
            mutation: None,
            delayed: None,
            allocations_left: None,
            caps: TlbCaps {
                range_ops: RangeOps::Offered,
                whole_beyond: 512,
            },
        };
        Self {
            words: (0..words).map(|_| AtomicEntry::new(POISON)).collect(),
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, table: u64, index: usize) -> &AtomicEntry {
        &self.words[((table - Self::BASE) / 8) as usize + index]
    }

    /// Hands the root to the hardware: from here on everything is checked.
    pub fn attach(&self, root: Pa) {
        let mut state = self.state();
        state.root = Some(root.get());
        if state.unpublished {
            state.violations.push("the root is not published".into());
        }
        let start = state.arch.start;
        state.linked.insert(root.get(), (0, start));
    }

    /// Takes the root away from the hardware: nothing walks it any more, but what is cached
    /// stays.
    pub fn detach(&self) {
        let mut state = self.state();
        state.root = None;
        state.linked.clear();
    }

    /// An importer starts to walk the root.
    pub fn import(&self) {
        let mut state = self.state();
        let copy = state.tlb.clone();
        state.importer = Some(copy);
    }

    /// The importer stops to walk the root; whatever it still caches is wrong.
    pub fn stop_importing(&self, wrong: &mut Vec<String>) {
        let importer = self.state().importer.take();
        let left = importer.iter().flat_map(FakeTlb::iter);
        wrong.extend(left.map(|cached| format!("importer left with {cached:x?}")));
    }

    /// The importer is told of an invalidation.
    #[track_caller]
    pub fn told(&self, range: IpaRange) {
        self.step(Op::Notify, Event::Notify(range), Location::caller());
    }

    /// Makes one step go wrong.
    pub fn mutate(&self, mutation: Mutation) {
        self.state().mutation = Some(mutation);
    }

    /// Lets only so many more allocations succeed.
    pub fn allow_allocations(&self, left: Option<usize>) {
        self.state().allocations_left = left;
    }

    /// What the TLB says it can do.
    pub fn set_caps(&self, caps: TlbCaps) {
        self.state().caps = caps;
    }

    /// Maps may leave their cache maintenance to a later flush.
    pub fn expect_deferred(&self, deferred: bool) {
        self.state().deferred = deferred;
    }

    /// The host writes memory through its own cacheable mapping.
    pub fn host_writes(&self, start: u64, size: u64) {
        self.state().caches.write(start, start + size);
    }

    /// Whether memory is clean to the point of coherency.
    #[must_use]
    pub fn is_clean(&self, start: u64, size: u64) -> bool {
        self.state().caches.is_clean(start, start + size)
    }

    /// Whether memory may be executed.
    #[must_use]
    pub fn is_fetchable(&self, start: u64, size: u64) -> bool {
        self.state().caches.is_fetchable(start, start + size)
    }

    /// Everything that happened since the last call.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.state().events)
    }

    /// Every step seen so far.
    #[must_use]
    pub fn sites(&self) -> BTreeSet<Site> {
        self.state().sites.clone()
    }

    /// Tables given out and not taken back, roots counted by their pages.
    #[must_use]
    pub fn tables_in_use(&self) -> usize {
        self.state().live.len()
    }

    /// Every leaf, read from raw memory.
    #[must_use]
    pub fn leaves(&self) -> Vec<(u64, i8, super::RawLeaf)> {
        let (arch, root) = {
            let state = self.state();
            (state.arch, state.root)
        };
        root.map_or_else(Vec::new, |root| arch.leaves(self, root))
    }

    /// Raw words of the tables in use, to compare before and after.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<u64, Vec<u64>> {
        let (live, entries) = {
            let state = self.state();
            (state.live.clone(), 1usize << (state.arch.page_shift - 3))
        };
        let words = |pa| (0..entries).map(|index| self.word(pa, index)).collect();
        live.into_iter().map(|pa| (pa, words(pa))).collect()
    }

    /// An operation is complete: nothing may be pending. Returns everything wrong so far.
    #[must_use]
    pub fn finish(&self) -> Vec<String> {
        let mut state = self.state();
        if let Some(event) = state.delayed.take() {
            state
                .violations
                .push(format!("operation ended before {event:x?}"));
        }
        if state.unpublished {
            state
                .violations
                .push("operation ended with unpublished stores".into());
            state.unpublished = false;
        }
        for (start, end) in state.caches.owed() {
            state
                .violations
                .push(format!("{start:#x}..{end:#x} left without cleaning"));
            state.caches.clean(start, end);
        }
        state.taken.clear();
        let (arch, root) = (state.arch, state.root);
        let mut cached: Vec<Cached> = state.tlb.iter().copied().collect();
        if let Some(importer) = &state.importer {
            cached.extend(importer.iter().copied());
        }
        drop(state);
        let stale = |c: &&Cached| root.is_some_and(|root| !self.grants(arch, root, c));
        let stale: Vec<String> = cached
            .iter()
            .filter(stale)
            .map(|c| format!("stale translation {c:x?}"))
            .collect();
        let mut state = self.state();
        state.violations.extend(stale);
        std::mem::take(&mut state.violations)
    }

    /// Whether the tables say what a cached translation does. One that grants less is stale, too:
    /// the guest would fault on it for ever.
    fn grants(&self, arch: Arch, root: u64, cached: &Cached) -> bool {
        let Some((pa, leaf)) = arch.walk(self, root, cached.at) else {
            return false;
        };
        let had = &cached.leaf;
        pa == had.pa
            && leaf.mem == had.mem
            && leaf.write == had.write
            && leaf.read == had.read
            && leaf.exec_kernel == had.exec_kernel
            && leaf.exec_user == had.exec_user
    }

    /// Lets a step happen, unless a mutation drops or delays it.
    fn step(&self, op: Op, event: Event, at: &'static Location<'static>) -> bool {
        let site = Site::new(op, at);
        let mutation = {
            let mut state = self.state();
            state.sites.insert(site);
            state.mutation.filter(|mutation| *mutation.site() == site)
        };
        match mutation {
            Some(Mutation::Drop(_)) => return false,
            Some(Mutation::Delay(_)) => {
                self.run_delayed();
                self.state().delayed = Some(event);
                return false;
            }
            None => {}
        }
        self.perform(event);
        self.run_delayed();
        true
    }

    fn run_delayed(&self) {
        let delayed = self.state().delayed.take();
        if let Some(event) = delayed {
            self.perform(event);
        }
    }

    fn perform(&self, event: Event) {
        match event {
            Event::Store {
                table, index, new, ..
            } => self.write(table, index, new),
            Event::Publish => self.state().unpublished = false,
            Event::TlbRange(..) | Event::TlbAll => self.invalidate_tlb(event),
            Event::Data(range) => self.clean(range),
            Event::Fetch(range) => {
                let (start, end) = (range.start().get(), range.end().get());
                self.state().caches.invalidate_fetch(start, end);
            }
            Event::Notify(range) => {
                let (start, end) = (range.start().get(), range.end().get());
                if let Some(importer) = &mut self.state().importer {
                    importer.invalidate(start, end, None);
                }
            }
            Event::Alloc(_) | Event::Free(_) => {}
        }
        let mut state = self.state();
        match event {
            Event::Store { .. } => {} // logged where the old word is known
            event => state.events.push(event),
        }
    }

    fn invalidate_tlb(&self, event: Event) {
        let mut state = self.state();
        if state.unpublished {
            state
                .violations
                .push(format!("{event:?} before the stores are published"));
        }
        match event {
            Event::TlbRange(range, level) => {
                let (start, end) = (range.start().get(), range.end().get());
                state.tlb.invalidate(start, end, level.map(Level::number));
            }
            _ => state.tlb.invalidate_all(),
        }
        drop(state);
        self.refill();
    }

    /// Walkers go on caching whatever is valid.
    fn refill(&self) {
        let (arch, root) = {
            let state = self.state();
            (state.arch, state.root)
        };
        let Some(root) = root else { return };
        for index in 0..arch.root_entries() {
            let at = (index as u64) << arch.shift(arch.start);
            let raw = self.word(root, index);
            let (leaves, tables) = self.below(raw, at, arch.start);
            let mut state = self.state();
            for (pa, at, level) in tables {
                state.link(pa, at, level);
            }
            for leaf in leaves {
                state.tlb.fill(leaf);
            }
        }
    }

    /// Everything below an entry: leaves, and tables with what they span.
    fn below(&self, raw: u64, at: u64, level: i8) -> (Vec<Cached>, Vec<(u64, u64, i8)>) {
        let arch = self.state().arch;
        let (mut leaves, mut tables) = (Vec::new(), Vec::new());
        let mut leaf = |at, level, leaf| {
            leaves.push(Cached {
                at,
                size: 1 << arch.shift(level),
                level,
                leaf,
            });
        };
        let mut table = |pa, at, level| tables.push((pa, at, level));
        arch.enumerate(self, raw, at, level, &mut leaf, &mut table);
        (leaves, tables)
    }

    /// A frame that something can still write does not stay clean.
    fn clean(&self, range: PaRange) {
        let (start, end) = (range.start().get(), range.end().get());
        let mut state = self.state();
        let importer = state.importer.as_ref();
        let reached =
            state.tlb.reaches(start, end) || importer.is_some_and(|i| i.reaches(start, end));
        if !reached || state.deferred {
            state.caches.clean(start, end);
        }
    }

    fn write(&self, table: u64, index: usize, new: u64) {
        let word = self.entry(table, index);
        let old = word.load(Ordering::Relaxed);
        word.store(new, Ordering::Release);
        let mut state = self.state();
        state.events.push(Event::Store {
            table,
            index,
            old,
            new,
        });
        let Some(&(base, level)) = state.linked.get(&table) else {
            return;
        };
        let at = base + ((index as u64) << state.arch.shift(level));
        let (was, is) = (state.arch.decode(old, level), state.arch.decode(new, level));
        if was != RawEntry::Invalid || is != RawEntry::Invalid {
            state.unpublished = true;
        }
        state.check_replaced(was, is, at, level);
        state.check_emptied(old, level);
        drop(state);
        self.check_removed(was, old, at, level);
        self.check_added(is, new, at, level);
    }

    /// Memory below an entry that is gone owes its cleaning.
    fn check_removed(&self, was: RawEntry, old: u64, at: u64, level: i8) {
        if was == RawEntry::Invalid {
            return;
        }
        let (gone, tables) = self.below(old, at, level);
        let mut state = self.state();
        let arch = state.arch;
        for old in gone {
            if arch.owes_data(&old.leaf) {
                state.caches.owe(old.leaf.pa, old.leaf.pa + old.size);
                let taken = state
                    .taken
                    .entry((old.at.wrapping_sub(old.leaf.pa), old.leaf.mem));
                taken.or_default().insert(old.at, old.at + old.size);
            }
        }
        for (table, _, _) in tables {
            state.linked.remove(&table);
        }
    }

    /// Whatever became reachable is cached at once, and must fit to be seen.
    fn check_added(&self, is: RawEntry, new: u64, at: u64, level: i8) {
        if is == RawEntry::Invalid {
            return;
        }
        let (leaves, tables) = self.below(new, at, level);
        let mut state = self.state();
        for (pa, at, level) in tables {
            state.link(pa, at, level);
        }
        for leaf in leaves {
            state.expose(leaf);
        }
    }
}

impl State {
    fn check_replaced(&mut self, was: RawEntry, is: RawEntry, at: u64, level: i8) {
        let fine = match (was, is) {
            (RawEntry::Invalid, _) | (_, RawEntry::Invalid) => true,
            (RawEntry::Leaf(a), RawEntry::Leaf(b)) => a.pa == b.pa && a.mem == b.mem,
            _ => false,
        };
        if !fine {
            let text = format!("valid to valid at {at:#x} level {level}: {was:x?} to {is:x?}");
            self.violations.push(text);
        }
    }

    /// A word that a concurrent zap claimed may only go when the memory behind it is clean: the
    /// next fault takes it for granted. (Exclusive operations keep faults out until they return.)
    fn check_emptied(&mut self, old: u64, level: i8) {
        let (kind, owes, claim) = (old >> 60, old >> 59 & 1, old >> 4 & 0x1f);
        if kind == 1 && owes == 1 && claim != 0 {
            let pa = old & 0xf_ffff_ffff_f000;
            let size = 1 << self.arch.shift(level);
            if !self.caches.is_clean(pa, pa + size) {
                self.violations
                    .push(format!("{pa:#x} given up before it is clean"));
            }
        }
    }

    /// Whether a leaf continues what stood there before; it then owes again when it goes.
    fn comes_back(&mut self, new: &Cached) -> bool {
        let key = (new.at.wrapping_sub(new.leaf.pa), new.leaf.mem);
        let taken = self.taken.get(&key);
        let found = taken.is_some_and(|set| set.contains(new.at, new.at + new.size));
        if found {
            self.caches.forgive(new.leaf.pa, new.leaf.pa + new.size);
        }
        found
    }

    fn check_clean(&mut self, start: u64, end: u64) {
        if !self.caches.is_clean(start, end) {
            self.violations
                .push(format!("{start:#x}..{end:#x} mapped while dirty"));
        }
    }

    fn link(&mut self, pa: u64, at: u64, level: i8) {
        self.linked.insert(pa, (at, level));
        let size = 1u64 << (self.arch.shift(level) + self.arch.index_bits);
        self.tlb.fill_walk(pa, at, size);
        if let Some(importer) = &mut self.importer {
            importer.fill_walk(pa, at, size);
        }
        if !self.live.contains(&pa) {
            self.violations
                .push(format!("table {pa:#x} linked but not allocated"));
        }
    }

    fn expose(&mut self, new: Cached) {
        let clash = self.tlb.fill(new);
        let importer = self
            .importer
            .as_mut()
            .and_then(|importer| importer.fill(new));
        for old in clash.into_iter().chain(importer) {
            self.violations
                .push(format!("{new:x?} made while {old:x?} is cached"));
        }
        let (start, end) = (new.leaf.pa, new.leaf.pa + new.size);
        if self.deferred {
            return;
        }
        if self.arch.owes_data(&new.leaf) {
            if !self.comes_back(&new) {
                self.check_clean(start, end);
            }
        } else if self.caches.is_owed(start, end) {
            self.violations
                .push(format!("{start:#x}..{end:#x} mapped while owed"));
        }
        if self.arch.executable(&new.leaf) && !self.caches.is_fetchable(start, end) {
            self.violations.push(format!(
                "{start:#x}..{end:#x} executable with stale fetches"
            ));
        }
    }
}

impl Tables for FakeMachine {
    fn word(&self, table: u64, index: usize) -> u64 {
        self.entry(table, index).load(Ordering::Relaxed)
    }
}

// SAFETY: every table is a distinct part of `words`, which lives as long as the machine; stores
// and swaps do what the defaults do (a mutation breaks that on purpose, but never memory safety:
// a dropped or delayed store leaves an older word of the same table in place, and frames are not
// given back to the allocator for reuse while a mutation is active).
unsafe impl TableMemory for FakeMachine {
    fn alloc_table(&self) -> Option<Pa> {
        let mut state = self.state();
        if let Some(left) = &mut state.allocations_left {
            *left = left.checked_sub(1)?;
        }
        let pa = state.free.pop()?;
        state.live.insert(pa);
        state.events.push(Event::Alloc(pa));
        Some(Pa::new(pa))
    }

    fn free_table(&self, table: DetachedTable) {
        let pa = table.pa().get();
        let mut state = self.state();
        let importer = state.importer.as_ref().is_some_and(|i| i.holds_table(pa));
        if state.tlb.holds_table(pa) || importer {
            state
                .violations
                .push(format!("table {pa:#x} freed while a walk step is cached"));
        }
        if state.linked.contains_key(&pa) {
            state
                .violations
                .push(format!("table {pa:#x} freed while linked"));
        }
        if !state.live.remove(&pa) {
            state.violations.push(format!("table {pa:#x} freed twice"));
            return;
        }
        state.events.push(Event::Free(pa));
        if state.mutation.is_none() {
            state.free.push(pa);
            let entries = 1 << (state.arch.page_shift - 3);
            drop(state);
            (0..entries).for_each(|i| self.entry(pa, i).store(POISON, Ordering::Relaxed));
        }
    }

    fn alloc_root(&self, size: u64) -> Option<Pa> {
        let mut state = self.state();
        let page = 1u64 << state.arch.page_shift;
        let is_free = |state: &State, pa: u64| state.free.contains(&pa);
        let aligned = |pa: u64| pa.is_multiple_of(size);
        let mut starts: Vec<u64> = state
            .free
            .iter()
            .copied()
            .filter(|pa| aligned(*pa))
            .collect();
        starts.sort_unstable();
        let pages = |start: u64| (0..size / page).map(move |n| start + n * page);
        let start = starts
            .into_iter()
            .find(|s| pages(*s).all(|pa| is_free(&state, pa)))?;
        state.free.retain(|pa| !(start..start + size).contains(pa));
        state.live.extend(pages(start));
        state.unpublished = true;
        Some(Pa::new(start))
    }

    fn free_root(&self, root: DetachedTable, size: u64) {
        let mut state = self.state();
        let page = 1u64 << state.arch.page_shift;
        for n in 0..size / page {
            let pa = root.pa().get() + n * page;
            state.live.remove(&pa);
            state.free.push(pa);
        }
    }

    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        let first = ((table.get() - Self::BASE) / 8) as usize;
        NonNull::from(&self.words[first..]).cast()
    }

    fn store(&self, entry: EntryRef<'_>, raw: u64) {
        let (table, index) = (entry.table.get(), entry.index);
        let event = Event::Store {
            table,
            index,
            old: 0,
            new: raw,
        };
        self.step(Op::Store, event, Location::caller());
    }

    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        let (table, index) = (entry.table.get(), entry.index);
        if self.word(table, index) != old {
            return false;
        }
        self.step(
            Op::Swap,
            Event::Store {
                table,
                index,
                old,
                new,
            },
            Location::caller(),
        );
        true
    }
}

impl TlbInvalidate for FakeMachine {
    type Context = u16;

    fn invalidate_range(&self, _context: u16, range: IpaRange, level: Option<Level>) {
        self.step(
            Op::TlbRange,
            Event::TlbRange(range, level),
            Location::caller(),
        );
    }

    fn invalidate_all(&self, _context: u16) {
        self.step(Op::TlbAll, Event::TlbAll, Location::caller());
    }

    fn caps(&self) -> TlbCaps {
        self.state().caps
    }
}

impl CacheMaintenance for FakeMachine {
    fn clean_invalidate_data(&self, range: PaRange) {
        self.step(Op::Data, Event::Data(range), Location::caller());
    }

    fn invalidate_fetch(&self, range: PaRange) {
        self.step(Op::Fetch, Event::Fetch(range), Location::caller());
    }

    fn publish(&self) {
        self.step(Op::Publish, Event::Publish, Location::caller());
    }
}

impl std::fmt::Debug for FakeMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeMachine").finish_non_exhaustive()
    }
}
