//! What the core asks of a machine, answered by this one.
#![expect(unsafe_code, reason = "implements the memory trait")]

use std::format;
use std::panic::Location;
use std::prelude::rust_2024::*;
use std::ptr::NonNull;
use std::thread;

use super::machine::{Event, FakeMachine, POISON, State};
use super::mutation::Op;
use super::walker::Tables;
use crate::addr::{IpaRange, Pa, PaRange};
use crate::level::Level;
use crate::platform::{
    CacheMaintenance, DetachedTable, EntryRef, TableMemory, TlbCaps, TlbInvalidate,
};
use crate::sync::{AtomicEntry, Ordering};

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
            let entries = 1 << (state.arch.page_shift - 3);
            (0..entries).for_each(|i| self.entry(pa, i).store(POISON, Ordering::Relaxed));
            state.free.push(pa);
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
        state.unpublished.insert(thread::current().id());
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

    fn visited(&self, entries: usize) {
        self.visits.fetch_add(entries, Ordering::Relaxed);
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
        // Compared and swapped under one lock: nobody comes in between.
        let mut state = self.state();
        if self.word(table, index) != old {
            return false;
        }
        let event = Event::Store {
            table,
            index,
            old,
            new,
        };
        self.step_in(&mut state, Op::Swap, event, Location::caller());
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
