//! What the machine's steps do to memory, TLBs and caches.

use std::format;
use std::panic::Location;
use std::prelude::rust_2024::*;
use std::thread;

use super::machine::{Event, FakeMachine, State};
use super::mutation::{Mutation, Op, Site};
use super::tlb::Cached;
use super::walker::{Arch, Found, RawEntry, Tables};
use crate::addr::PaRange;
use crate::level::Level;
use crate::sync::Ordering;

/// Every input address.
const ALL: (u64, u64) = (0, u64::MAX);

impl FakeMachine {
    /// Lets a step happen, unless a mutation drops or delays it. What it does to memory, TLB and
    /// caches is one step for every other thread, too.
    pub(super) fn step(&self, op: Op, event: Event, at: &'static Location<'static>) {
        self.step_in(&mut self.state(), op, event, at);
    }

    pub(super) fn step_in(
        &self,
        state: &mut State,
        op: Op,
        event: Event,
        at: &'static Location<'static>,
    ) {
        let site = Site::new(op, at);
        state.sites.insert(site);
        let mutation = state.mutation.filter(|mutation| *mutation.site() == site);
        if mutation.is_none() {
            self.perform(state, event);
        }
        if !matches!(mutation, Some(Mutation::Drop(_)))
            && let Some(delayed) = state.delayed.take()
        {
            self.perform(state, delayed);
        }
        if matches!(mutation, Some(Mutation::Delay(_))) {
            state.delayed = Some(event);
        }
    }

    fn perform(&self, state: &mut State, event: Event) {
        match event {
            Event::Store {
                table, index, new, ..
            } => {
                self.write(state, table, index, new);
                return; // logged where the old word is known
            }
            Event::Publish => {
                state.unpublished.remove(&thread::current().id());
            }
            Event::TlbRange(..) | Event::TlbAll => self.invalidate_tlb(state, event),
            Event::Data(range) => state.clean(range),
            Event::Fetch(range) => {
                let (start, end) = (range.start().get(), range.end().get());
                state.caches.invalidate_fetch(start, end);
            }
            Event::Notify(range) => {
                let (start, end) = (range.start().get(), range.end().get());
                if let Some(importer) = &mut state.importer {
                    importer.invalidate(start, end, None);
                }
            }
            Event::Alloc(_) | Event::Free(_) => {}
        }
        state.events.push(event);
    }

    fn invalidate_tlb(&self, state: &mut State, event: Event) {
        if state.unpublished.contains(&thread::current().id()) {
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
        self.refill(state, within);
    }

    /// Walkers go on caching whatever is valid in the range.
    fn refill(&self, state: &mut State, within: (u64, u64)) {
        let arch = state.arch;
        let Some(root) = state.root else { return };
        for index in 0..arch.root_entries() {
            let at = (index as u64) << arch.shift(arch.start);
            if at >= within.1 || at + (1 << arch.shift(arch.start)) <= within.0 {
                continue;
            }
            let raw = self.word(root, index);
            let (leaves, tables) = self.below(arch, raw, (at, arch.start), within);
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
        arch: Arch,
        raw: u64,
        (at, level): (u64, i8),
        within: (u64, u64),
    ) -> (Vec<Cached>, Vec<(u64, u64, i8)>) {
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

    fn write(&self, state: &mut State, table: u64, index: usize, new: u64) {
        let word = self.entry(table, index);
        let old = word.load(Ordering::Relaxed);
        word.store(new, Ordering::Release);
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
            state.unpublished.insert(thread::current().id());
        }
        state.check_replaced(was, is, at, level);
        state.check_emptied(old, level);
        self.check_removed(state, was, old, (at, level));
        self.check_added(state, is, new, (at, level));
    }

    /// Memory below an entry that is gone owes its cleaning.
    fn check_removed(&self, state: &mut State, was: RawEntry, old: u64, at: (u64, i8)) {
        if was == RawEntry::Invalid {
            return;
        }
        let arch = state.arch;
        let (gone, tables) = self.below(arch, old, at, ALL);
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
    fn check_added(&self, state: &mut State, is: RawEntry, new: u64, at: (u64, i8)) {
        if is == RawEntry::Invalid {
            return;
        }
        let (leaves, tables) = self.below(state.arch, new, at, ALL);
        for (pa, at, level) in tables {
            state.link(pa, at, level);
        }
        for leaf in leaves {
            state.expose(leaf);
        }
    }
}

impl State {
    /// A frame that something can still write does not stay clean.
    fn clean(&mut self, range: PaRange) {
        let (start, end) = (range.start().get(), range.end().get());
        let importer = self.importer.as_ref();
        let reached =
            self.tlb.reaches(start, end) || importer.is_some_and(|i| i.reaches(start, end));
        if !reached || self.deferred {
            self.caches.clean(start, end);
        }
    }
}
