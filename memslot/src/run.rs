//! Entering the guest, the work that must be done before, and reset.

use stage2::{IpaRange, PaRange};

use crate::addr::GfnRange;
use crate::error::Error;
use crate::frames::FrameSource;
use crate::gate::RunPass;
use crate::pending::Work;
use crate::policy::{MemTypePolicy, TypeQuery};
use crate::slot::SlotKind;
use crate::table::{GuestTable, LeafRun, behind};
use crate::vm::{GuestMemory, SlotTable, slot_bytes};

/// Bytes that are maintained before the page-table lock is let go of and taken again.
const CHUNK: u64 = 2 << 20;

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Lets a vCPU into the guest, after all pending work.
    ///
    /// A second vCPU that sees the work pending waits for the slots lock and looks again, so
    /// nobody enters before the first has done it. The vCPU's own ISB, which makes it see
    /// invalidated instructions, is the world switch.
    ///
    /// # Errors
    /// [`Error::InUse`] while slots are being locked or rewritten: try again.
    pub fn enter(&self) -> Result<RunPass<'_>, Error> {
        let pass = self.gate.enter()?;
        if !self.pending.load().is_empty() {
            self.perform_pending(&mut self.slots.write());
        }
        Ok(pass)
    }

    /// Does what is pending; now a vCPU may enter.
    fn perform_pending(&self, slots: &mut SlotTable) {
        if slots.work().is_empty() {
            return;
        }
        self.maintain_locked(slots, Work::all());
        slots.locked.iter_mut().for_each(|l| l.work = Work::empty());
        // The maintenance has completed (its trait says so); now others may pass.
        self.pending.replace(Work::empty());
    }

    /// Cleans what is pending before a device or an importer may access memory: maintenance that
    /// waits for the first run of a vCPU would come too late for it. It stays pending, because
    /// the host may go on writing until that run.
    pub(crate) fn clean_for_device(&self, slots: &SlotTable) {
        if slots.work().contains(Work::FLUSH_DCACHE) {
            self.maintain_locked(slots, Work::FLUSH_DCACHE);
        }
    }

    /// Does the part of the locked slots' work that is in `which`.
    fn maintain_locked(&self, slots: &SlotTable, which: Work) {
        let mut flushed = 0;
        for locked in &slots.locked {
            let slot = slots.set.get(locked.id);
            let Some(range) = slot.and_then(|s| slot_bytes(s.range).ok()) else {
                continue;
            };
            let work = locked.work & which;
            if work.contains(Work::FLUSH_DCACHE) {
                self.flush_data(range);
                flushed += 1;
            }
            if work.contains(Work::INVAL_ICACHE) {
                self.flush_fetch(range);
            }
        }
        self.count(|c| {
            c.pending_runs += 1;
            c.slots_flushed += flushed;
        });
    }

    /// Cleans and invalidates every page of the guest that needs it: for a trapped set/way
    /// operation, or when the guest turns its caches on or off.
    ///
    /// The slots are let go of before each is walked, which may take long: a slot that is made
    /// or locked meanwhile has its own maintenance.
    pub fn flush_all(&self) {
        let mut from = 0;
        while let Some(range) = self.first_ram(from) {
            from = range.end();
            if let Ok(range) = slot_bytes(range) {
                self.flush_data(range);
            }
        }
    }

    /// The first slot of RAM that starts at or behind frame `from`.
    fn first_ram(&self, from: u64) -> Option<GfnRange> {
        let slots = self.slots.read();
        let ram = slots.set.iter().filter(|s| s.kind == SlotKind::Ram);
        ram.map(|s| s.range).find(|r| r.start().get() >= from)
    }

    /// Resets the VM's memory: on-demand slots lose their leaves, so that faults redo the
    /// maintenance; locked slots keep theirs, and the maintenance is pending.
    ///
    /// Not for a single vCPU that is turned off and on again: that resets registers only.
    ///
    /// # Errors
    /// [`Error::VcpuRunning`]; or the page table's, which emptying whole slots does not meet.
    pub fn reset(&self) -> Result<(), Error> {
        let _closed = self.gate.close()?;
        let mut slots = self.slots.write();
        let mmu = self.mmu.write();
        for slot in slots.set.iter().filter(|s| s.lock.is_none()) {
            mmu.zap(slot.range)?;
        }
        let noncoherent = mmu.noncoherent.any();
        let SlotTable { set, locked } = &mut *slots;
        for locked in locked {
            let Some(slot) = set.get(locked.id).filter(|s| s.kind == SlotKind::Ram) else {
                continue;
            };
            let query = TypeQuery::of(slot, slot.range.start(), noncoherent);
            let flush = self
                .policy
                .slot_type(&query)
                .map_or(Work::FLUSH_DCACHE, |t| self.flush_work(t));
            locked.work |= flush | Work::INVAL_ICACHE;
        }
        self.pending.publish(slots.work());
        Ok(())
    }

    /// Data maintenance of the leaves that need it, by their attribute.
    fn flush_data(&self, range: IpaRange) {
        self.for_memory(range, |table, run, memory| {
            if run.attrs.maintenance().data {
                table.clean_invalidate_data(memory);
            }
        });
    }

    /// Instruction maintenance of the leaves that can be executed.
    fn flush_fetch(&self, range: IpaRange) {
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
