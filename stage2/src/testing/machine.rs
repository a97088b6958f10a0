//! The machine: memory, TLB, caches and event log in one, and what a test asks of it. What its
//! steps do is in [`effects`](super::effects), what they must not do in [`rules`](super::rules).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::format;
use std::panic::Location;
use std::prelude::rust_2024::*;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use super::caches::Caches;
use super::mutation::{Mutation, Op, Site};
use super::ranges::RangeSet;
use super::tlb::{Cached, FakeTlb};
use super::walker::{Arch, Tables};
use crate::addr::{IpaRange, Pa, PaRange};
use crate::level::Level;
use crate::platform::{RangeOps, TlbCaps};
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

pub(super) struct State {
    pub(super) arch: Arch,
    pub(super) root: Option<u64>,
    /// Tables the hardware can reach: what they span and the level of their entries.
    pub(super) linked: BTreeMap<u64, (u64, i8)>,
    pub(super) free: Vec<u64>,
    pub(super) live: BTreeSet<u64>,
    /// Threads, each standing for a CPU, whose stores to reachable tables walkers may not see yet.
    pub(super) unpublished: HashSet<ThreadId>,
    pub(super) tlb: FakeTlb,
    pub(super) importer: Option<FakeTlb>,
    pub(super) caches: Caches,
    /// Leaves that were taken away: the same memory may come back at the same place with the
    /// same type, in other sizes or with other permissions, and owes nothing then.
    pub(super) taken: BTreeMap<(u64, u8), RangeSet>,
    pub(super) deferred: bool,
    pub(super) events: Vec<Event>,
    pub(super) violations: Vec<String>,
    pub(super) sites: BTreeSet<Site>,
    pub(super) mutation: Option<Mutation>,
    pub(super) delayed: Option<Event>,
    pub(super) allocations_left: Option<usize>,
    pub(super) caps: TlbCaps,
}

/// The machine. Addresses of its table memory start at [`FakeMachine::BASE`].
pub struct FakeMachine {
    pub(super) words: Box<[AtomicEntry]>,
    /// Entries looked at; no step of a model.
    pub(super) visits: core::sync::atomic::AtomicUsize,
    state: Mutex<State>,
}

/// A valid-looking word: memory that is given out or taken back is full of it.
pub(super) const POISON: u64 = 0xdead_0000_0bad_0fff;

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
            unpublished: HashSet::new(),
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
            visits: core::sync::atomic::AtomicUsize::new(0),
            state: Mutex::new(state),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn entry(&self, table: u64, index: usize) -> &AtomicEntry {
        &self.words[((table - Self::BASE) / 8) as usize + index]
    }

    /// Hands the root to the hardware: from here on everything is checked.
    pub fn attach(&self, root: Pa) {
        let mut state = self.state();
        state.root = Some(root.get());
        if !state.unpublished.is_empty() {
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

    /// Entries that the core has looked at since the last call.
    #[must_use]
    pub fn take_visits(&self) -> usize {
        self.visits.swap(0, Ordering::Relaxed)
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
        if !state.unpublished.is_empty() {
            state
                .violations
                .push("operation ended with unpublished stores".into());
            state.unpublished.clear();
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
}

impl std::fmt::Debug for FakeMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeMachine").finish_non_exhaustive()
    }
}
