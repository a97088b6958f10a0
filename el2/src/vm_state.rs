//! What every VM consists of, whatever machine it runs on: its memory, its power, its protection.
//!
//! Lock order: stage of the protection → the VM's memory (see `memslot::vm`) → ownership → the host's
//! stage 2.

use abi::{DonationKind, ErrorCode, LeafInfo, SlotState, SlotWord, VmConfig};
use board::{AddrRange, PAGE_SIZE};
use memslot::addr::Gfn;
use memslot::flush::OwedFlush;
use memslot::lock::LockState;
use memslot::pending::Work;
use memslot::policy::{ArmCaches, ArmPolicy};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::steps::Progress;
use memslot::toggle::Flush;
use memslot::vm::{GuestMemory, VmConfig as MemoryConfig, VmKind};
use stage2::{ArmStage2, Ipa, IpaRange, Platform, RunKind, Stage2, TableFormat};

use crate::devices::Devices;
use crate::guest::psci::Power;
use crate::guest_frames::GuestFrames;
use crate::guest_memory::{Contents, GuestPages, HOST_SLOTS, VmMemory};
use crate::host_map::HostReach;
use crate::measure::Start;
use crate::page_state::PageStates;
use crate::protection::Protection;
use crate::psci::StartOrder;
use crate::slice::done;
use crate::smmu::Walk;
use crate::vm_error::Refusal;
use crate::vm_table::Estate;

/// Most slots of a VM: the host's, and EL2's own for the guest's CPU interface.
const MAX_SLOTS: u16 = HOST_SLOTS + 1;
/// Entries of a VM's tables that one call looks at.
const LOOKED_AT: usize = 16_384;

/// A VM's parts. Its devices and tables are dropped before what they come from, which is the machine's.
pub struct VmState<'s, P: Platform> {
    /// Its index in the VM table.
    pub index: u8,
    /// As the host created it.
    pub config: VmConfig,
    /// Devices that are counted.
    pub devices: Devices,
    /// Slots and tables.
    pub memory: VmMemory<'s, P>,
    /// Which vCPUs are on.
    pub power: Power,
    /// Of a protected VM.
    pub protection: Option<Protection>,
    /// The tables as an IOMMU walks them.
    pub walk: Walk,
}

impl<P: Platform> core::fmt::Debug for VmState<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("VmState")
            .field("index", &self.index)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl<'s, P: Platform> VmState<'s, P> {
    /// A VM without slots, all of whose vCPUs are off, over empty tables.
    #[inline]
    #[must_use]
    pub fn new(
        (index, config): (u8, VmConfig),
        states: &'s PageStates<'s>,
        table: Stage2<ArmStage2, P>,
        walk: Walk,
    ) -> Self {
        let caches = if walk.fwb {
            ArmCaches::ForcedWriteBack
        } else {
            ArmCaches::Maintenance
        };
        let (kind, frames) = if config.protected {
            (VmKind::Protected, GuestFrames::owned(states, index))
        } else {
            (VmKind::Unprotected, GuestFrames::leased(states))
        };
        let memory_config = MemoryConfig {
            max_slots: MAX_SLOTS,
            gfn_limit: table.geometry().input_end() / PAGE_SIZE,
            kind,
        };
        Self {
            index,
            config,
            devices: Devices::new(),
            memory: GuestMemory::new(memory_config, ArmPolicy { caches }, frames, table),
            power: Power::new(config.vcpus),
            protection: config.protected.then(Protection::new),
            walk,
        }
    }

    /// The protection of a VM that has one.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotPermitted`].
    pub fn protection(&self) -> Result<&Protection, ErrorCode> {
        self.protection.as_ref().ok_or(ErrorCode::NotPermitted)
    }

    /// Whether its vCPUs may run: a protected VM's only behind its seal.
    #[inline]
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.protection.as_ref().is_none_or(Protection::is_sealed)
    }

    /// Its memory, for transitions.
    pub fn pages<'a, H, C>(
        &'a self,
        estate: &Estate<'a, 's, H, C>,
    ) -> GuestPages<'a, 's, Stage2<ArmStage2, P>, H, C> {
        GuestPages {
            memory: &self.memory,
            ownership: estate.ownership,
            host: estate.host,
            contents: estate.contents,
            index: self.index,
        }
    }

    /// The slots that the host has created.
    pub fn host_slots(&self) -> impl Iterator<Item = Memslot> {
        (0..HOST_SLOTS).filter_map(|id| self.memory.slot(SlotId(id)))
    }

    /// What is to be cleaned before the VM goes: the host's memory that it has used. A protected
    /// guest's is wiped, to the point of coherency, when it goes back.
    #[must_use]
    pub fn flush_at_end(&self) -> OwedFlush {
        let mut owed = OwedFlush::default();
        if !self.config.protected {
            owed.owe(Flush::All);
        }
        owed
    }

    /// Gives the guest of a protected VM pages of the host; the memory that has moved.
    ///
    /// # Errors
    ///
    /// As [`GuestPages::donate`]; [`ErrorCode::NotPermitted`] for an unprotected VM.
    pub fn donate(
        &self,
        estate: &Estate<'_, 's, impl HostReach, impl Contents>,
        ipa: u64,
        pages: u64,
        kind: DonationKind,
    ) -> Result<AddrRange, Refusal> {
        let mut stage = self.protection()?.stage();
        self.pages(estate).donate(&mut stage, ipa, pages, kind)
    }

    /// Completes the measurement and makes vCPU 0, which exists, runnable.
    ///
    /// # Errors
    ///
    /// As [`Protection::seal`]; [`ErrorCode::NotPermitted`] for an unprotected VM, [`ErrorCode::Busy`]
    /// while a slot is locked in part.
    pub fn seal(&self, entry: u64, context: u64) -> Result<u64, Refusal> {
        let protection = self.protection()?;
        if self.memory.pending().contains(Work::UNFINISHED) {
            // Behind the seal nobody could complete the lock.
            return Err(ErrorCode::Busy.into());
        }
        let start = Start {
            vcpus: self.config.vcpus,
            entry,
            context,
        };
        protection.seal(&start, || {
            let ordered = self.power.order(0, StartOrder { entry, context });
            ordered.map_err(|_| ErrorCode::Invalid)
        })
    }

    /// Creates a slot of the host's memory, or of a device if the machine says that it is free.
    ///
    /// # Errors
    ///
    /// As [`abi::Call::SlotCreate`].
    pub fn create_slot(
        &self,
        estate: &Estate<'_, 's, impl HostReach, impl Contents>,
        slot: Memslot,
        is_free_device: impl FnOnce(AddrRange) -> bool,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<u64, Refusal> {
        if self.memory.slot(slot.id) == Some(slot)
            && self.memory.lock_state(slot.id) == Some(LockState::Unfinished)
        {
            // It was created by this call, and its log begins.
            let log = self
                .memory
                .set_flags_in_steps(slot.id, slot.flags, &mut go_on);
            return done(log?);
        }
        let memory = backing(&slot).ok_or(ErrorCode::Invalid)?;
        let lease = slot.kind == SlotKind::Ram && !self.config.protected;
        if self.config.protected {
            let is_memory = estate.ownership.pages().is_memory(memory);
            let is_ram = slot.kind == SlotKind::Ram && is_memory;
            if !is_ram || !self.pages(estate).is_new_backing(memory) {
                return Err(ErrorCode::NotPermitted.into());
            }
        }
        if slot.kind == SlotKind::Mmio && !is_free_device(memory) {
            return Err(ErrorCode::NotPermitted.into());
        }
        while lease && estate.ownership.lease(memory, self.index)? == Progress::More {
            if !go_on() {
                return Err(ErrorCode::Again.into());
            }
        }
        let created = self.memory.create_in_steps(slot, &mut go_on);
        if created.is_err() && lease {
            estate.ownership.end_lease(memory, self.index)?;
        }
        done(created?)
    }

    /// Deletes a slot, in steps; its memory is only the host's again when this returns a value.
    ///
    /// # Errors
    ///
    /// As [`abi::Call::SlotDelete`].
    pub fn delete_slot<H, C>(
        &self,
        estate: &Estate<'_, 's, H, C>,
        id: SlotId,
        go_on: impl FnMut() -> bool,
    ) -> Result<u64, Refusal> {
        // The lease that ends must be that of the slot that went, whatever other CPUs do meanwhile
        // with this number: a slot without a lease would reach memory that the host can give away.
        let gone = self.memory.delete_in_steps(id, go_on)?;
        let slot = gone.ok_or(ErrorCode::Again)?;
        if let Some(memory) = GuestFrames::backing(&slot) {
            estate.ownership.end_lease(memory, self.index)?;
        }
        Ok(0)
    }

    /// State of a slot.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotFound`].
    pub fn slot_state(&self, id: SlotId) -> Result<SlotState, ErrorCode> {
        match self.memory.lock_state(id) {
            None => Err(ErrorCode::NotFound),
            Some(LockState::Unlocked) => Ok(SlotState::Unlocked),
            Some(LockState::LockedDirty) => Ok(SlotState::LockedDirty),
            Some(LockState::LockedClean) => Ok(SlotState::LockedClean),
            Some(LockState::LockedReset) => Ok(SlotState::LockedReset),
            Some(LockState::Unfinished) => Ok(SlotState::Unfinished),
        }
    }

    /// The first run of equal leaves that ends behind an address, as far as one call looks: a part of
    /// it, or a run of no pages where all that is known is that nothing is mapped before it.
    ///
    /// # Errors
    ///
    /// As [`abi::Call::VmMapping`].
    pub fn mapping(&self, ipa: u64) -> Result<[u64; 4], Refusal> {
        if self.config.protected {
            // Permissions would tell where its guest has fetched from.
            return Err(ErrorCode::NotPermitted.into());
        }
        self.memory.with_table(|table| {
            let end = table.geometry().input_end();
            let size = end.checked_sub(ipa).ok_or(ErrorCode::Invalid)?;
            let start = Ipa::new(ipa - ipa % PAGE_SIZE);
            let size = size + ipa % PAGE_SIZE;
            let range = IpaRange::new(start, size).map_err(|_| ErrorCode::Invalid)?;
            let runs = table.runs(range).map_err(|_| ErrorCode::Invalid)?;
            let mut runs = runs.limited(LOOKED_AT);
            for run in runs.by_ref() {
                let RunKind::Mapped { pa, attrs } = run.kind else {
                    continue;
                };
                // MemAttr is bits 5:2 of a descriptor, encoded again by the table's own format.
                let raw = table.format().encode_attrs(&attrs).unwrap_or(0);
                let mem_attr = (raw >> 2).to_le_bytes()[0] & 0xf;
                let info = LeafInfo {
                    pages: run.range.len() / PAGE_SIZE,
                    level: 3 - run.level.height().to_le_bytes()[0],
                    permissions: attrs.perms.bits() & 0xf,
                    mem_attr,
                };
                return Ok([run.range.start().get(), pa.get(), info.bits(), 0]);
            }
            match runs.position().get() {
                behind if behind < end => Ok([behind, 0, 0, 0]),
                _ => Err(ErrorCode::NotFound.into()),
            }
        })
    }
}

/// What is behind a slot, memory or device.
fn backing(slot: &Memslot) -> Option<AddrRange> {
    let start = slot.backing.checked_mul(PAGE_SIZE)?;
    AddrRange::with_size(start, slot.range.npages().checked_mul(PAGE_SIZE)?)
}

/// The slot that the host describes by a word, its address in the guest, and what is behind it.
///
/// # Errors
///
/// [`ErrorCode::Invalid`], or as [`Memslot::new`].
pub fn described_slot(word: SlotWord, ipa: u64, memory: AddrRange) -> Result<Memslot, Refusal> {
    let kind = if word.device {
        SlotKind::Mmio
    } else {
        SlotKind::Ram
    };
    Ok(Memslot::new(
        SlotId(word.id),
        Gfn::try_new(ipa / PAGE_SIZE).ok_or(ErrorCode::Invalid)?,
        memory.size() / PAGE_SIZE,
        memory.start() / PAGE_SIZE,
        SlotFlags::from_word(word.flags)?,
        kind,
    )?)
}
