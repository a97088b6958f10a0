//! What the machine's steps do to memory, TLBs and caches.

use std::format;
use std::panic::Location;
use std::prelude::rust_2024::*;

use super::machine::{Event, FakeMachine};
use super::mutation::{Mutation, Op, Site};
use super::tlb::Cached;
use super::walker::{Found, RawEntry, Tables};
use crate::addr::PaRange;
use crate::level::Level;
use crate::sync::Ordering;

/// Every input address.
const ALL: (u64, u64) = (0, u64::MAX);

impl FakeMachine {
    /// Lets a step happen, unless a mutation drops or delays it.
    pub(super) fn step(&self, op: Op, event: Event, at: &'static Location<'static>) -> bool {
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
        let within = match event {
            Event::TlbRange(range, level) => {
                let (start, end) = (range.start().get(), range.end().get());
                state.tlb.invalidate(start, end, level.map(Level::number));
                (start, end)
            }
            _ => {
                state.tlb.invalidate_all();
                ALL
            }
        };
        drop(state);
        self.refill(within);
    }

    /// Walkers go on caching whatever is valid in the range.
    fn refill(&self, within: (u64, u64)) {
        let (arch, root) = {
            let state = self.state();
            (state.arch, state.root)
        };
        let Some(root) = root else { return };
        for index in 0..arch.root_entries() {
            let at = (index as u64) << arch.shift(arch.start);
            if at >= within.1 || at + (1 << arch.shift(arch.start)) <= within.0 {
                continue;
            }
            let raw = self.word(root, index);
            let (leaves, tables) = self.below(raw, at, arch.start, within);
            let mut state = self.state();
            for (pa, at, level) in tables {
                state.link(pa, at, level);
            }
            for leaf in leaves {
                state.tlb.fill(leaf);
            }
        }
    }

    /// Everything below an entry that reaches into a range: leaves, and tables with what they
    /// span.
    fn below(
        &self,
        raw: u64,
        at: u64,
        level: i8,
        within: (u64, u64),
    ) -> (Vec<Cached>, Vec<(u64, u64, i8)>) {
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
        let found = Found {
            within,
            leaf: &mut leaf,
            table: &mut table,
        };
        arch.enumerate(self, raw, (at, level), found);
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
        let (gone, tables) = self.below(old, at, level, ALL);
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
        let (leaves, tables) = self.below(new, at, level, ALL);
        let mut state = self.state();
        for (pa, at, level) in tables {
            state.link(pa, at, level);
        }
        for leaf in leaves {
            state.expose(leaf);
        }
    }
}
