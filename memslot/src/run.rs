//! Entering the guest, the work that must be done before, and reset.

use stage2::IpaRange;

use crate::error::Error;
use crate::frames::FrameSource;
use crate::gate::RunPass;
use crate::pending::Work;
use crate::policy::{MemTypePolicy, TypeQuery};
use crate::slot::SlotKind;
use crate::table::{GuestTable, behind};
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

    /// Does what is pending. Also called before a device or an importer may access memory:
    /// maintenance that waits for the first run of a vCPU would come too late for them.
    pub(crate) fn perform_pending(&self, slots: &mut SlotTable) {
        if slots.work().is_empty() {
            return;
        }
        let mut flushed = 0u64;
        for locked in &mut slots.locked {
            let Some(range) = slots
                .set
                .get(locked.id)
                .and_then(|s| slot_bytes(s.range).ok())
            else {
                continue;
            };
            flushed += u64::from(locked.work.contains(Work::FLUSH_DCACHE));
            if !locked.work.is_empty() {
                self.flush(range);
            }
            locked.work = Work::empty();
        }
        // The maintenance has completed (its trait says so); now others may pass.
        self.pending.replace(Work::empty());
        self.count(|c| {
            c.pending_runs += 1;
            c.slots_flushed += flushed;
        });
    }

    /// Cleans and invalidates every page of the guest that needs it: for a trapped set/way
    /// operation, or when the guest turns its caches on or off.
    pub fn flush_all(&self) {
        let slots = self.slots.read();
        for slot in slots.set.iter().filter(|s| s.kind == SlotKind::Ram) {
            if let Ok(range) = slot_bytes(slot.range) {
                self.flush(range);
            }
        }
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
        let mut mmu = self.mmu.write();
        for slot in slots.set.iter().filter(|s| s.lock.is_none()) {
            mmu.unmap(slot.range)?;
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

    /// Maintenance of what is mapped in a range, decided by each leaf: data to the point of
    /// coherency unless the leaf forces write-back, instructions where it may be executed. The
    /// page-table lock is let go of between chunks.
    fn flush(&self, range: IpaRange) {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let Ok(chunk) = IpaRange::new(range.start(), range.len().min(CHUNK)) else {
                return;
            };
            let flushed = self.mmu.read().table.flush(chunk);
            debug_assert!(flushed.is_ok(), "slots lie inside the table's input");
            rest = behind(range, chunk.end());
        }
    }
}
