//! Entering the guest, the work that must be done before, and reset.

use crate::addr::GfnRange;
use crate::error::Error;
use crate::frames::FrameSource;
use crate::gate::RunPass;
use crate::pending::Work;
use crate::policy::{MemTypePolicy, TypeQuery};
use crate::slot::{Memslot, SlotKind};
use crate::steps::{Cost, Extent, Progress, repeat};
use crate::table::GuestTable;
use crate::unfinished::{Change, Unfinished};
use crate::vm::{GuestMemory, SlotTable, slot_bytes};

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
        slots.may_enter()?;
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
        let mut at = 0;
        while let Some(next) = self.clean_part(slots, at, Extent::Whole) {
            at = next;
        }
    }

    /// The next part of that; how far it is now.
    pub(crate) fn clean_part(&self, slots: &SlotTable, at: u64, extent: Extent) -> Option<u64> {
        let is_dirty = |slot: &Memslot| {
            let locked = slots.locked(slot.id);
            locked.is_some_and(|l| l.work.contains(Work::FLUSH_DCACHE))
        };
        let (slot, rest) = slots.next_of(at, is_dirty)?;
        let part = extent.first(rest, Cost::Maintenance);
        self.maintain(part, Work::FLUSH_DCACHE);
        self.count(|c| {
            c.pending_runs += u64::from(at == 0);
            c.slots_flushed += u64::from(part.end() == slot.range.end());
        });
        Some(part.end())
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
    /// [`Error::VcpuRunning`]; [`Error::Unfinished`] while a slot is locked in part, and
    /// [`Error::ChangeUnfinished`] during another change.
    pub fn reset(&self) -> Result<(), Error> {
        self.reset_part(Extent::Whole).map(|_| ())
    }

    /// [`GuestMemory::reset`] in steps, for as long as `go_on` allows; the same call continues it. No
    /// vCPU enters before it is done.
    ///
    /// # Errors
    /// As [`GuestMemory::reset`], and [`Error::NeedTables`] to cut a block of 1 GiB.
    pub fn reset_in_steps(&self, go_on: impl FnMut() -> bool) -> Result<Progress, Error> {
        repeat(go_on, || self.reset_part(Extent::Step))
    }

    fn reset_part(&self, extent: Extent) -> Result<Progress, Error> {
        let _closed = self.gate.close()?;
        let mut slots = self.slots.write();
        let mut at = match slots.resumes(|change| *change == Change::Reset)? {
            Some(at) => at,
            None => slots.finished().map(|()| 0)?,
        };
        let mut mmu = self.mmu.write();
        while let Some((_, rest)) = slots.next_of(at, |slot| slot.lock.is_none()) {
            let part = mmu.first(rest, mmu.table.owes_data(), extent);
            mmu.zap_first(part)?;
            at = part.end();
            if extent == Extent::Step {
                let change = Change::Reset;
                slots.unfinished = Some(Unfinished { change, at });
                self.pending.replace(slots.work());
                return Ok(Progress::More);
            }
        }
        let noncoherent = mmu.noncoherent.any();
        self.owe_after_reset(&mut slots, noncoherent);
        slots.unfinished = None;
        self.pending.replace(slots.work());
        Ok(Progress::Done)
    }

    fn owe_after_reset(&self, slots: &mut SlotTable, noncoherent: bool) {
        let SlotTable { set, locked, .. } = slots;
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
    }
}
