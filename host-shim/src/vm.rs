//! Calls about VMs, typed.

use abi::{
    Call, DmaFault, DonationKind, ErrorCode, Exit, LeafInfo, SMCCC_SUCCESS, SlotState, SlotWord,
    VmConfig, VmCounter,
};
use board::{AddrRange, PAGE_SIZE};
use smccc::Hvc;

/// Why a call failed, and for [`ErrorCode::NoMemory`] how many pages would be enough.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Refused {
    pub(crate) code: ErrorCode,
    pub(crate) pages: u64,
}

/// Makes one call; `x1` to `x4` of the answer.
pub(crate) fn call(call: Call, args: [u64; 6]) -> Result<[u64; 4], Refused> {
    use smccc::Call as _;
    let mut wide = [0; 17];
    wide[..6].copy_from_slice(&args);
    let answer = Hvc::call64(call as u32, wide);
    let code = if answer[0] == SMCCC_SUCCESS {
        match abi::from_register(answer[1]) {
            Ok(_) => return Ok([answer[1], answer[2], answer[3], answer[4]]),
            Err(code) => code,
        }
    } else {
        ErrorCode::NotFound
    };
    Err(Refused {
        code,
        pages: answer[2],
    })
}

/// A call with up to six arguments, the rest zero.
macro_rules! vm_call {
    ($call:expr $(, $arg:expr)*) => {{
        let given: &[u64] = &[$($arg),*];
        let mut args = [0; 6];
        args[..given.len()].copy_from_slice(given);
        call($call, args)
    }};
}

/// Repeats a call that EL2 does in steps until it is done.
fn in_steps(mut step: impl FnMut() -> Result<[u64; 4], Refused>) -> Result<(), Refused> {
    loop {
        match step() {
            Err(refused) if refused.code == ErrorCode::Again => {}
            other => return other.map(drop),
        }
    }
}

/// Gives EL2 memory for its own bookkeeping, for good.
pub(crate) fn donate_heap(donated: AddrRange) -> Result<(), Refused> {
    let pages = donated.size() / PAGE_SIZE;
    vm_call!(Call::DonateHeap, donated.start(), pages).map(drop)
}

/// Takes a page from the living protected guest that owns it.
pub(crate) fn reclaim_page(address: u64) -> Result<(), Refused> {
    vm_call!(Call::MemoryReclaim, address).map(drop)
}

/// Takes a PCI function, by its requester ID, from ourselves: its DMA aborts.
pub(crate) fn take_device(function: u16) -> Result<(), Refused> {
    vm_call!(Call::DeviceTake, u64::from(function)).map(drop)
}

/// Takes back a function that no VM has: its DMA reaches our memory.
pub(crate) fn give_device(function: u16) -> Result<(), Refused> {
    vm_call!(Call::DeviceGive, u64::from(function)).map(drop)
}

/// How many of a function's DMA accesses were refused, the address of the last one, and what is known
/// of it.
pub(crate) fn device_faults(function: u16) -> Result<(u64, u64, DmaFault), Refused> {
    let [_, count, address, fault] = vm_call!(Call::DeviceFaults, u64::from(function))?;
    Ok((count, address, DmaFault::from_bits(fault)))
}

/// A VM, by its handle.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vm {
    handle: u64,
}

impl Vm {
    /// Reserves a handle and creates a VM out of donated memory.
    pub(crate) fn create(config: VmConfig, donated: AddrRange) -> Result<Self, Refused> {
        let vm = Self::reserve()?;
        match vm.create_reserved(config, donated) {
            Ok(()) => Ok(vm),
            Err(refused) => {
                vm.destroy()?;
                while vm.reclaim()?.is_some() {}
                Err(refused)
            }
        }
    }

    /// The VM with this handle, if there is one.
    pub(crate) const fn from_handle(handle: u64) -> Self {
        Self { handle }
    }

    /// Reserves a handle.
    pub(crate) fn reserve() -> Result<Self, Refused> {
        let [handle, ..] = vm_call!(Call::VmReserve)?;
        Ok(Self { handle })
    }

    /// Creates the VM of a reserved handle.
    pub(crate) fn create_reserved(
        self,
        config: VmConfig,
        donated: AddrRange,
    ) -> Result<(), Refused> {
        let pages = donated.size() / PAGE_SIZE;
        let start = donated.start();
        vm_call!(Call::VmCreate, self.handle, start, pages, config.bits()).map(drop)
    }

    /// The handle.
    pub(crate) const fn handle(self) -> u64 {
        self.handle
    }

    /// Donates more pages.
    pub(crate) fn top_up(self, donated: AddrRange) -> Result<(), Refused> {
        let pages = donated.size() / PAGE_SIZE;
        vm_call!(Call::VmTopUp, self.handle, donated.start(), pages).map(drop)
    }

    /// Ends it.
    pub(crate) fn destroy(self) -> Result<(), Refused> {
        in_steps(|| self.destroy_step())
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn destroy_step(self) -> Result<[u64; 4], Refused> {
        vm_call!(Call::VmDestroy, self.handle)
    }

    /// Takes back one donated range; `None` when nothing is left and the handle is gone.
    pub(crate) fn reclaim(self) -> Result<Option<AddrRange>, Refused> {
        loop {
            match vm_call!(Call::VmReclaim, self.handle) {
                Err(refused) if refused.code == ErrorCode::Again => {}
                answer => {
                    let [start, pages, ..] = answer?;
                    return Ok(AddrRange::with_size(start, pages * PAGE_SIZE));
                }
            }
        }
    }

    /// Resets it.
    pub(crate) fn reset(self) -> Result<(), Refused> {
        in_steps(|| self.reset_step())
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn reset_step(self) -> Result<[u64; 4], Refused> {
        vm_call!(Call::VmReset, self.handle)
    }

    /// Gives it a slot.
    pub(crate) fn create_slot(
        self,
        word: SlotWord,
        ipa: u64,
        memory: AddrRange,
    ) -> Result<(), Refused> {
        in_steps(|| self.create_slot_step(word, ipa, memory))
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn create_slot_step(
        self,
        word: SlotWord,
        ipa: u64,
        memory: AddrRange,
    ) -> Result<[u64; 4], Refused> {
        let (start, pages) = (memory.start(), memory.size() / PAGE_SIZE);
        let word = word.bits();
        vm_call!(Call::SlotCreate, self.handle, word, ipa, pages, start)
    }

    /// Removes a slot.
    pub(crate) fn delete_slot(self, id: u16) -> Result<(), Refused> {
        in_steps(|| self.delete_step(id))
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn delete_step(self, id: u16) -> Result<[u64; 4], Refused> {
        vm_call!(Call::SlotDelete, self.handle, u64::from(id))
    }

    /// Moves a slot.
    pub(crate) fn move_slot(self, id: u16, ipa: u64) -> Result<(), Refused> {
        in_steps(|| self.move_step(id, ipa))
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn move_step(self, id: u16, ipa: u64) -> Result<[u64; 4], Refused> {
        vm_call!(Call::SlotMove, self.handle, u64::from(id), ipa)
    }

    /// Changes a slot's flags.
    pub(crate) fn set_slot_flags(self, word: SlotWord) -> Result<(), Refused> {
        in_steps(|| self.flags_step(word))
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn flags_step(self, word: SlotWord) -> Result<[u64; 4], Refused> {
        vm_call!(Call::SlotFlags, self.handle, word.bits())
    }

    /// Locks a slot for reading and writing, with blocks where that is possible.
    pub(crate) fn lock_slot(self, id: u16) -> Result<(), Refused> {
        self.lock_slot_as(id, true)
    }

    /// The same by blocks where that is possible, or by single pages.
    pub(crate) fn lock_slot_as(self, id: u16, blocks: bool) -> Result<(), Refused> {
        in_steps(|| self.lock_step(id, blocks))
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn lock_step(self, id: u16, blocks: bool) -> Result<[u64; 4], Refused> {
        let flags = 0b11 | u64::from(blocks) << 8;
        vm_call!(Call::SlotLock, self.handle, 1, u64::from(id), flags)
    }

    /// Unlocks a slot.
    pub(crate) fn unlock_slot(self, id: u16) -> Result<(), Refused> {
        in_steps(|| self.unlock_step(id))
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn unlock_step(self, id: u16) -> Result<[u64; 4], Refused> {
        vm_call!(Call::SlotLock, self.handle, 2, u64::from(id))
    }

    /// State of a slot.
    pub(crate) fn slot_state(self, id: u16) -> Result<Option<SlotState>, Refused> {
        let [state, ..] = vm_call!(Call::SlotState, self.handle, u64::from(id))?;
        Ok(SlotState::from_number(state))
    }

    /// Takes pages back from the guest, counted from the slot's start.
    pub(crate) fn unshare(self, id: u16, page: u64, pages: u64) -> Result<(), Refused> {
        vm_call!(Call::SlotUnshare, self.handle, u64::from(id), page, pages).map(drop)
    }

    /// Lends them again.
    pub(crate) fn share(self, id: u16, page: u64, pages: u64) -> Result<(), Refused> {
        vm_call!(Call::SlotShare, self.handle, u64::from(id), page, pages).map(drop)
    }

    /// How many pages were used since their mappings were last made old; makes them old if asked.
    pub(crate) fn young(self, id: u16, page: u64, pages: u64, clear: bool) -> Result<u64, Refused> {
        let (id, clear) = (u64::from(id), u64::from(clear));
        let [young, ..] = vm_call!(Call::SlotYoung, self.handle, id, page, pages, clear)?;
        Ok(young)
    }

    /// Lets the guest read (bit 0), write (1) or execute (2) a page that is mapped.
    pub(crate) fn relax(self, id: u16, page: u64, perms: u64) -> Result<(), Refused> {
        vm_call!(Call::SlotRelax, self.handle, u64::from(id), page, perms).map(drop)
    }

    /// 64 bits of a slot's dirty log.
    pub(crate) fn dirty(self, id: u16, word: u64) -> Result<u64, Refused> {
        let [_, bits, ..] = vm_call!(Call::SlotDirty, self.handle, u64::from(id), word)?;
        Ok(bits)
    }

    /// Registers a device whose DMA is not snooped, or takes it back.
    pub(crate) fn noncoherent_device(self, register: bool) -> Result<(), Refused> {
        in_steps(|| self.device_step(register))
    }

    /// One step of that; [`ErrorCode::Again`] if there are more.
    pub(crate) fn device_step(self, register: bool) -> Result<[u64; 4], Refused> {
        vm_call!(Call::DmaDevice, self.handle, 1, u64::from(register))
    }

    /// Says that a device whose DMA is snooped, and that was only named, is gone.
    pub(crate) fn forget_snooped_device(self) -> Result<(), Refused> {
        in_steps(|| vm_call!(Call::DmaDevice, self.handle, 0, 0))
    }

    /// Lets a function that was taken do DMA at this VM's addresses.
    pub(crate) fn attach_device(self, function: u16, snooped: bool) -> Result<(), Refused> {
        let (function, passes) = (u64::from(function), u64::from(!snooped));
        in_steps(|| vm_call!(Call::DeviceAttach, self.handle, function, passes))
    }

    /// Ends that.
    pub(crate) fn detach_device(self, function: u16) -> Result<(), Refused> {
        in_steps(|| vm_call!(Call::DeviceDetach, self.handle, u64::from(function)))
    }

    /// Takes memory behind a slot of a protected VM from ourselves and gives it to the guest.
    pub(crate) fn donate_memory(
        self,
        ipa: u64,
        pages: u64,
        kind: DonationKind,
    ) -> Result<(), Refused> {
        vm_call!(Call::MemoryDonate, self.handle, ipa, pages, kind as u64).map(drop)
    }

    /// Says what a protected VM must measure.
    pub(crate) fn expect(self, [a, b, c, d]: [u64; 4]) -> Result<(), Refused> {
        vm_call!(Call::VmExpect, self.handle, a, b, c, d).map(drop)
    }

    /// Completes a protected VM and turns its first vCPU on.
    pub(crate) fn seal(self, pc: u64, x0: u64) -> Result<(), Refused> {
        vm_call!(Call::VmSeal, self.handle, pc, x0).map(drop)
    }

    /// What it measured when it was sealed.
    pub(crate) fn measurement(self) -> Result<[u64; 4], Refused> {
        let [_, a, b, _] = vm_call!(Call::VmMeasurement, self.handle, 0)?;
        let [_, c, d, _] = vm_call!(Call::VmMeasurement, self.handle, 1)?;
        Ok([a, b, c, d])
    }

    /// Creates a vCPU.
    pub(crate) fn create_vcpu(self, index: u8) -> Result<(), Refused> {
        vm_call!(Call::VcpuCreate, self.handle, u64::from(index)).map(drop)
    }

    /// Turns a vCPU on.
    pub(crate) fn start_vcpu(self, index: u8, pc: u64, x0: u64) -> Result<(), Refused> {
        vm_call!(Call::VcpuStart, self.handle, u64::from(index), pc, x0).map(drop)
    }

    /// Runs a vCPU; `loaded` is what the last read wants; `alone` if this core has nothing else.
    pub(crate) fn run(self, index: u8, loaded: u64, alone: bool) -> Result<Exit, Refused> {
        let alone = u64::from(alone);
        let registers = vm_call!(Call::VcpuRun, self.handle, u64::from(index), loaded, alone)?;
        Exit::from_registers(registers).ok_or(Refused {
            code: ErrorCode::Invalid,
            pages: 0,
        })
    }

    /// Sets an interrupt line.
    pub(crate) fn set_line(self, intid: u32, level: bool) -> Result<(), Refused> {
        vm_call!(
            Call::IrqLine,
            self.handle,
            u64::from(intid),
            u64::from(level)
        )
        .map(drop)
    }

    /// Makes an interrupt line high until the guest has ended the interrupt; then
    /// [`Exit::IrqDone`] says so.
    pub(crate) fn raise_line(self, intid: u32) -> Result<(), Refused> {
        vm_call!(Call::IrqLine, self.handle, u64::from(intid), 2).map(drop)
    }

    /// The first run of leaves that ends behind `ipa`: where it is, what is behind, what it says.
    pub(crate) fn mapping(self, ipa: u64) -> Result<(u64, u64, LeafInfo), Refused> {
        let mut at = ipa;
        loop {
            let [start, pa, info, _] = vm_call!(Call::VmMapping, self.handle, at)?;
            let leaf = LeafInfo::from_bits(info);
            if leaf.pages != 0 {
                return Ok((start, pa, leaf));
            }
            // Nothing up to there; EL2 looks no further in one call.
            at = start;
        }
    }

    /// A counter.
    pub(crate) fn counter(self, counter: VmCounter) -> Result<u64, Refused> {
        let [value, ..] = vm_call!(Call::VmCounter, self.handle, counter as u64)?;
        Ok(value)
    }
}
