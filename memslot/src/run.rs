//! Entering the guest, the work that must be done before, and reset.

use crate::addr::GfnRange;
use crate::error::Error;
use crate::frames::FrameSource;
use crate::gate::RunPass;
use crate::pending::Work;
use crate::policy::{MemTypePolicy, TypeQuery};
use crate::slot::SlotKind;
use crate::steps::{Cost, Extent, Progress};
use crate::table::GuestTable;
use crate::vm::{GuestMemory, Locked, SlotTable, slot_bytes};

impl<T: GuestTable, P: MemTypePolicy, S: FrameSource> GuestMemory<T, P, S> {
    /// Lets a vCPU into the guest, after all pending work.
    ///
    /// A second vCPU that sees the work pending waits for the slots lock and looks again, so
    /// nobody enters before the first has done it. The vCPU's own ISB, which makes it see
    /// invalidated instructions, is the world switch.
    ///
    /// # Errors
    /// [`Error::InUse`] while slots are being locked or rewritten: try again. [`Error::Unfinished`]
    /// while a slot is locked in part: repeat that call first.
    pub fn enter(&self) -> Result<RunPass<'_>, Error> {
        self.enter_in_steps(|| true)?.ok_or(Error::InUse(0))
    }

    /// [`GuestMemory::enter`] that does pending work in steps, for as long as `go_on` allows; `None`
    /// if some is left, for this vCPU or another to continue.
    ///
    /// # Errors
    /// As [`GuestMemory::enter`].
    #[inline]
    pub fn enter_in_steps(
        &self,
        go_on: impl FnMut() -> bool,
    ) -> Result<Option<RunPass<'_>>, Error> {
        let pass = self.gate.enter()?;
        if self.pending.load().is_empty() {
            return Ok(Some(pass));
        }
        self.after_pending(pass, go_on)
    }

    /// Work is pending: a vCPU may enter behind it.
    #[cold]
    fn after_pending<'a>(
        &'a self,
        pass: RunPass<'a>,
        go_on: impl FnMut() -> bool,
    ) -> Result<Option<RunPass<'a>>, Error> {
        let progress = self.perform_pending(&mut self.slots.write(), go_on)?;
        Ok((progress == Progress::Done).then_some(pass))
    }

    /// Does what is pending; now a vCPU may enter.
    fn perform_pending(
        &self,
        slots: &mut SlotTable,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Progress, Error> {
        slots.finished()?;
        if slots.work().is_empty() {
            return Ok(Progress::Done);
        }
        let mut flushed = 0;
        let mut urgent = false;
        for locked in slots.locked.iter_mut().filter(|l| !l.work.is_empty()) {
            while let Some(rest) = GfnRange::new(locked.done_to, locked.range.end()) {
                if urgent {
                    return Ok(Progress::More);
                }
                let part = Extent::Step.first(rest, Cost::Maintenance);
                self.maintain(part, locked.work);
                locked.done_to = part.end();
                urgent = !go_on();
            }
            flushed += u64::from(locked.work.contains(Work::FLUSH_DCACHE));
            locked.work = Work::empty();
        }
        // The maintenance has completed (its trait says so); now others may pass.
        self.pending.replace(Work::empty());
        self.count(|c| {
            c.pending_runs += 1;
            c.slots_flushed += flushed;
        });
        Ok(Progress::Done)
    }

    /// Cleans what is pending before a device or an importer may access memory: maintenance that
    /// waits for the first run of a vCPU would come too late for it. It stays pending, because
    /// the host may go on writing until that run.
    pub(crate) fn clean_for_device(&self, slots: &SlotTable) {
        let dirty = |l: &&Locked| l.work.contains(Work::FLUSH_DCACHE);
        let mut flushed = 0;
        for locked in slots.locked.iter().filter(dirty) {
            self.maintain(locked.range, Work::FLUSH_DCACHE);
            flushed += 1;
        }
        if flushed > 0 {
            self.count(|c| {
                c.pending_runs += 1;
                c.slots_flushed += flushed;
            });
        }
    }

    /// Does work of some frames.
    fn maintain(&self, part: GfnRange, work: Work) {
        let Ok(range) = slot_bytes(part) else { return };
        if work.contains(Work::FLUSH_DCACHE) {
            self.flush_data(range);
        }
        if work.contains(Work::INVAL_ICACHE) {
            self.flush_fetch(range);
        }
    }

    /// Resets the VM's memory: on-demand slots lose their leaves, so that faults redo the
    /// maintenance; locked slots keep theirs, and the maintenance is pending.
    ///
    /// Not for a single vCPU that is turned off and on again: that resets registers only.
    ///
    /// # Errors
    /// [`Error::VcpuRunning`]; [`Error::Unfinished`] while a slot is locked in part; or the page
    /// table's, which emptying whole slots does not meet.
    pub fn reset(&self) -> Result<(), Error> {
        let _closed = self.gate.close()?;
        let mut slots = self.slots.write();
        slots.finished()?;
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
            locked.owe(flush | Work::INVAL_ICACHE);
        }
        self.pending.publish(slots.work());
        Ok(())
    }
}
