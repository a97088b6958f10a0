//! What the handling of exits asks of the machine, and of the vCPU and the VM that it is about.
//!
//! The binary implements these with registers; `testing` does with plain values.

use abi::{ErrorCode, Exit, VmCounter};
use memslot::arm::VcpuCaches;
use memslot::frames::FrameSource;
use memslot::policy::ArmPolicy;
use memslot::table::GuestTable;
use memslot::toggle::CacheWatch;
use memslot::vm::GuestMemory;

use super::{Next, PendingLoad};
use crate::guest::idregs::GuestIds;
use crate::guest::protected::MemoryCall;
use crate::guest::psci::Power;
use crate::guest::smccc::Caller;
use crate::guest::sysreg::VmRegister;
use crate::guest::timer::EmulatedTimer;
use crate::guest_memory::Moved;
use crate::inject::{Entry, Interrupted};
use crate::protection::Protection;
use crate::psci::StartOrder;
use crate::vgic::Vgic;

/// x0 to x30 of a vCPU.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct Registers(pub [u64; 31]);

impl Registers {
    /// Register `number` as an instruction names it: 31 is the zero register.
    #[inline]
    #[must_use]
    pub fn get(&self, number: u8) -> u64 {
        self.0.get(usize::from(number)).copied().unwrap_or(0)
    }

    /// Writes it.
    #[inline]
    pub fn set(&mut self, number: u8, value: u64) {
        if let Some(register) = self.0.get_mut(usize::from(number)) {
            *register = value;
        }
    }

    /// Puts the answer of a call into x0 to x3.
    #[inline]
    pub fn answer(&mut self, values: [u64; 4]) {
        let [x0, x1, x2, x3, ..] = &mut self.0;
        [*x0, *x1, *x2, *x3] = values;
    }
}

/// What happened that somebody should read of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Oddity {
    /// An asynchronous error while the guest ran.
    SError,
    /// A fault that EL2 can't handle, and why.
    Fault(ErrorCode),
}

/// The core that has taken the exception, and EL1's registers in it, which are the guest's.
pub trait Core {
    /// ESR_EL2.
    fn esr(&self) -> u64;
    /// FAR_EL2 and HPFAR_EL2; they hold until the next exception to EL2.
    fn fault_addresses(&self) -> (u64, u64);
    /// Steps the guest over the instruction that trapped.
    fn skip_instruction(&mut self);
    /// Makes the guest repeat its HVC, behind which it stands.
    fn repeat_call(&mut self);
    /// What an injection reads.
    fn interrupted(&self) -> Interrupted;
    /// Makes the guest continue in its own exception handler.
    fn inject(&mut self, entry: &Entry);
    /// The IPA of the page that the guest's stage 1 has at a virtual address, as AT S1E1R finds it.
    fn translate_stage1(&mut self, address: u64) -> Option<u64>;
    /// Attribute (PAR_EL1 63:56) and shareability (8:7) of a virtual address, by both stages.
    fn memory_attributes(&mut self, address: u64) -> Option<(u64, u64)>;
    /// CNTPCT_EL0.
    fn ticks(&self) -> u64;
    /// SCTLR_EL1.
    fn sctlr(&self) -> u64;
    /// Writes a register of EL1 for the guest, whose own write was trapped.
    fn write_vm_register(&mut self, register: VmRegister, value: u64);
    /// Makes writes of SCTLR_EL1 and its like trap, or not.
    fn watch_caches(&mut self, watch: CacheWatch);
    /// Makes a virtual SError pending.
    fn pend_serror(&mut self);
    /// Gives the guest its FP registers, for the rest of its run.
    fn lend_fp(&mut self);
    /// Makes a call of firmware without arguments.
    fn call_firmware(&self, id: u32);
}

/// Interrupts: the core's physical ones, and the virtual ones in its list registers.
pub trait Interrupts {
    /// Whether the virtual interface asks for maintenance.
    fn maintenance_pending(&self) -> bool;
    /// Whether the virtual timer's physical interrupt can be what has interrupted: it is not marked active.
    fn timer_may_fire(&self) -> bool;
    /// Whether the virtual timer asserts its interrupt.
    fn virtual_timer_fired(&self) -> bool;
    /// Whether the guest's physical timer is what has interrupted.
    fn physical_timer_fired(&self) -> bool;
    /// When the virtual timer fires, in ticks of CNTPCT_EL0; `u64::MAX` if it is off or masked.
    fn virtual_timer_deadline(&self) -> u64;
    /// Takes back EL2's own SGI, if it is what is pending.
    fn take_kick(&mut self) -> bool;
    /// Takes the mark that a kick of this core is its host's.
    fn take_host_kick(&mut self) -> bool;
    /// Interrupts this core, once it is its host's again.
    fn kick_host(&mut self);
    /// Whether a physical interrupt waits for this core.
    fn interrupt_pending(&self) -> bool;
    /// Takes the list registers back, if they are loaded.
    fn save_interrupts(&mut self);
    /// Makes the lines of the timers' interrupts what the timers say.
    fn refresh_timers(&mut self);
    /// Makes the list registers what the timers and the virtual GIC say now.
    fn refresh_interrupts(&mut self);
    /// Whether the host has nothing else to run here.
    fn waits_here(&self) -> bool;
    /// Waits for any physical interrupt, in the place of the guest.
    fn wait_for_interrupt(&mut self);
    /// Makes another vCPU of the VM look at its interrupts.
    fn kick(&self, vcpu: usize);
}

/// The vCPU and its VM.
pub trait Guest {
    /// The VM's tables.
    type Table: GuestTable;
    /// What is behind its slots.
    type Frames: FrameSource;

    /// Number of the vCPU.
    fn index(&self) -> usize;
    /// How many vCPUs the VM has.
    fn vcpus(&self) -> u8;
    /// The VM's memory.
    fn memory(&self) -> &GuestMemory<Self::Table, ArmPolicy, Self::Frames>;
    /// Its interrupt controller.
    fn vgic(&self) -> &Vgic;
    /// That one is a GICv3.
    fn has_redistributors(&self) -> bool;
    /// What its identification registers read as.
    fn ids(&self) -> &GuestIds;
    /// Power states of its vCPUs.
    fn power(&self) -> &Power;
    /// Of a protected VM.
    fn protection(&self) -> Option<&Protection>;
    /// What its calls read. Not this object itself: whoever gets that, for all that the compiler knows,
    /// may keep it, and it is read anew behind each exit.
    fn caller(&self) -> impl Caller;
    /// A protected guest's call about its pages.
    fn move_pages(&self, call: MemoryCall, ipa: u64, pages: u64) -> Moved;
    /// Whether the host has taken the page at `ipa` from the guest.
    fn is_poisoned(&self, ipa: u64) -> bool;

    /// The vCPU's registers.
    fn registers(&mut self) -> &mut Registers;
    /// What it is watched for, and waits for.
    fn caches(&mut self) -> &mut VcpuCaches;
    /// The physical timer that it sees.
    fn physical_timer(&mut self) -> &mut EmulatedTimer;
    /// Keeps a load until the host completes it.
    fn keep_load(&mut self, load: PendingLoad);
    /// The vCPU starts over with this order when something wakes it.
    fn restart_when_woken(&mut self, order: StartOrder);
    /// Adds one to a counter.
    fn count(&self, counter: VmCounter);
    /// Makes the guest wait for the host, which is told why.
    fn leave(&mut self, exit: Exit) -> Next;
    /// Tells the board's console.
    fn report(&self, oddity: Oddity);
}

/// A vCPU that is loaded on this core, and has left its guest.
pub trait Loaded: Core + Interrupts + Guest {}

impl<T: Core + Interrupts + Guest> Loaded for T {}
