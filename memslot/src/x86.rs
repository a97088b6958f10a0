//! Events of an x86 vCPU that change memory types.

use crate::addr::GfnRange;
use crate::frames::FrameSource;
use crate::mtrr::{GeneralProtection, Msr};
use crate::policy::{EptPolicy, VcpuTypes};
use crate::slot::{SlotFlags, SlotKind};
use crate::table::{GuestTable, bytes};
use crate::vm::GuestMemory;
use crate::zap::{ZapPlan, set_cd, write_msr};

impl<T: GuestTable, S: FrameSource> GuestMemory<T, EptPolicy, S> {
    /// A guest's write to a memory-type register. When it returns, no leaf is left whose type
    /// the write has changed for this vCPU.
    ///
    /// `&mut` is the reason why removing leaves beside faults suffices: leaves of this vCPU are
    /// made by its own faults, and it cannot fault while it writes a register. `relax` is called
    /// while another vCPU does the work; see [`crate::zap::ZapList::complete`].
    ///
    /// # Errors
    /// [`GeneralProtection`]: inject it; nothing has changed.
    pub fn write_memory_type_msr(
        &self,
        vcpu: &mut VcpuTypes,
        msr: Msr,
        value: u64,
        relax: impl FnMut(),
    ) -> Result<(), GeneralProtection> {
        let plan = write_msr(&self.policy, self.noncoherent(), vcpu, msr, value)?;
        self.carry_out(&plan, relax);
        Ok(())
    }

    /// A guest's write of CR0.CD, as [`GuestMemory::write_memory_type_msr`].
    pub fn write_cd(&self, vcpu: &mut VcpuTypes, cd: bool, relax: impl FnMut()) {
        let plan = set_cd(&self.policy, self.noncoherent(), vcpu, cd);
        self.carry_out(&plan, relax);
    }

    /// An edge of the count after this is read removes every leaf itself, so the plan need not
    /// be made again.
    fn noncoherent(&self) -> bool {
        self.mmu.read().noncoherent.any()
    }

    fn carry_out(&self, plan: &ZapPlan, relax: impl FnMut()) {
        if let Some(ticket) = self.zaps.insert(plan.ranges()) {
            self.zaps
                .complete(ticket, |ranges| self.zap_ranges(ranges), relax);
        }
    }

    /// Removes the leaves of ascending ranges, cut to the slots whose types follow registers:
    /// the space between slots is never walked, and locked leaves never go.
    fn zap_ranges(&self, ranges: &[GfnRange]) {
        let slots = self.slots.read();
        for slot in slots.set.iter() {
            let fixed = slot.kind == SlotKind::Mmio
                || slot.lock.is_some()
                || slot.flags.contains(SlotFlags::NONCOHERENT_DMA);
            if fixed {
                continue;
            }
            for part in ranges.iter().filter_map(|r| r.intersection(slot.range)) {
                let zapped = bytes(part).map_or(Ok(()), |r| self.mmu.read().table.zap(r));
                debug_assert!(zapped.is_ok(), "slots lie inside the table's input");
            }
        }
        drop(slots);
        self.count(|c| c.zap_passes += 1);
    }
}
