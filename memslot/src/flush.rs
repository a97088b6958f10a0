//! Cache maintenance of what is mapped: all of it, for a guest that moves data between its caches and
//! memory, and parts of it, for pending work.

use stage2::{IpaRange, PaRange};

use crate::addr::GfnRange;
use crate::frames::FrameSource;
use crate::policy::MemTypePolicy;
use crate::slot::{Memslot, SlotKind};
use crate::steps::{Cost, Extent, Progress};
use crate::table::{GuestTable, LeafRun, behind};
use crate::toggle::Flush;
use crate::vm::{GuestMemory, slot_bytes};

/// Bytes that are maintained before the page-table lock is let go of and taken again.
const CHUNK: u64 = 2 << 20;

/// A flush of all memory that somebody waits for, and how far it is.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct OwedFlush(Option<u64>);

impl OwedFlush {
    /// A flush from the start.
    pub fn owe(&mut self, flush: Flush) {
        if flush == Flush::All {
            self.0 = Some(0);
        }
    }

    /// Whether something is left to flush.
    #[inline]
    #[must_use]
    pub const fn is_owed(&self) -> bool {
        self.0.is_some()
    }
}

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Cleans and invalidates every page of the guest that needs it, in steps, for as long as `go_on`
    /// allows: for a trapped set/way operation, when the guest turns its caches on or off, or before
    /// the VM ends.
    ///
    /// The slots are let go of before each step: a slot that is made or locked meanwhile has its own
    /// maintenance.
    pub fn flush_in_steps(
        &self,
        owed: &mut OwedFlush,
        mut go_on: impl FnMut() -> bool,
    ) -> Progress {
        if !self.with_table(T::owes_data) {
            owed.0 = None;
        }
        while let Some(from) = owed.0 {
            let Some(rest) = self.first_ram(from) else {
                owed.0 = None;
                break;
            };
            let part = Extent::Step.first(rest, Cost::Maintenance);
            if let Ok(range) = slot_bytes(part) {
                self.flush_data(range);
            }
            owed.0 = Some(part.end());
            if !go_on() {
                return Progress::More;
            }
        }
        Progress::Done
    }

    /// [`GuestMemory::flush_in_steps`] without a pause.
    pub fn flush_all(&self) {
        let mut owed = OwedFlush::default();
        owed.owe(Flush::All);
        let _: Progress = self.flush_in_steps(&mut owed, || true);
    }

    /// Forgets all translations for good. Nobody runs or will run, and all memory has been flushed
    /// since somebody did, or is wiped before it is anybody's; and the memory that tables are made of
    /// goes as a whole. So this takes no longer for a large VM than for a small one.
    pub fn retire(&self) {
        self.mmu.write().table.abandon();
    }

    /// The first RAM in a slot at or behind frame `from`.
    fn first_ram(&self, from: u64) -> Option<GfnRange> {
        let slots = self.slots.read();
        // What a slot leaves behind is mapped until it is taken away.
        let all = slots.set.iter().chain(slots.leaving());
        let ram = all.filter(|s| s.kind == SlotKind::Ram);
        let behind = |s: &Memslot| GfnRange::new(s.range.start().get().max(from), s.range.end());
        ram.filter_map(behind)
            .min_by_key(|range| range.start().get())
    }

    /// Data maintenance of the leaves that need it, by their attribute.
    pub(crate) fn flush_data(&self, range: IpaRange) {
        self.for_memory(range, |table, run, memory| {
            if run.attrs.maintenance().data {
                table.clean_invalidate_data(memory);
            }
        });
    }

    /// Instruction maintenance of the leaves that can be executed.
    pub(crate) fn flush_fetch(&self, range: IpaRange) {
        self.for_memory(range, |table, run, memory| {
            if run.attrs.perms.may_execute() {
                table.invalidate_fetch(memory);
            }
        });
    }

    /// Visits the leaves of a range under the page-table lock, chunk by chunk.
    fn for_memory(&self, range: IpaRange, f: impl Fn(&T, &LeafRun, PaRange)) {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let size = range.len().min(CHUNK);
            let Ok(chunk) = IpaRange::new(range.start(), size) else {
                return;
            };
            let mmu = self.mmu.read();
            let mut part = Some(chunk);
            while let Some(run) = part.and_then(|p| mmu.table.next_run(p)) {
                part = behind(chunk, run.range.end());
                if let Some(memory) = run.memory() {
                    f(&mmu.table, &run, memory);
                }
            }
            rest = behind(range, chunk.end());
        }
    }
}
