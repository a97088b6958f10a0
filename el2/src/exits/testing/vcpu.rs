//! The vCPU, and the core under it.

use core::cell::RefCell;
use std::vec::Vec;

use abi::{Exit, VmCounter};
use memslot::arm::VcpuCaches;
use memslot::policy::ArmPolicy;
use memslot::toggle::CacheWatch;
use memslot::vm::GuestMemory;
use stage2::testing::FakeMachine;
use stage2::{ArmStage2, Stage2};

use super::vm::FakeVm;
use crate::esr;
use crate::exits::{Core, Guest, Interrupts, Next, Oddity, PendingLoad, Registers};
use crate::guest::PHYSICAL_TIMER_PPI;
use crate::guest::idregs::GuestIds;
use crate::guest::protected::MemoryCall;
use crate::guest::psci::Power;
use crate::guest::smccc::Caller;
use crate::guest::sysreg::VmRegister;
use crate::guest::timer::EmulatedTimer;
use crate::guest_frames::GuestFrames;
use crate::guest_memory::Moved;
use crate::inject::{Entry, Interrupted};
use crate::protection::Protection;
use crate::psci::StartOrder;
use crate::vgic::{CpuInterface, GicVersion, Vgic};

/// Something that an exit did besides changing values that can be looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Did {
    /// Stepped over the instruction.
    Skip,
    /// Stepped back to the HVC.
    Repeat,
    /// Entered the guest's handler.
    Inject(Entry),
    /// Asked stage 1 about an address.
    Translate(u64),
    /// Wrote a register for the guest.
    Write(VmRegister, u64),
    /// Made the trap of SCTLR_EL1 what the watch says.
    Watch(CacheWatch),
    /// Made a virtual SError pending.
    SError,
    /// Gave the guest its FP registers.
    LendFp,
    /// Called firmware.
    Firmware(u32),
    /// Kicked a vCPU.
    Kick(usize),
    /// Interrupted the host of this core.
    KickHost,
    /// Waited for an interrupt.
    Wait,
    /// Made the vCPU start over.
    Restart(StartOrder),
    /// Told the console.
    Report(Oddity),
}

/// The guest's registers of EL1 that exits touch.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct El1 {
    /// VBAR_EL1.
    pub vbar: u64,
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1.
    pub far: u64,
    /// ELR_EL1.
    pub elr: u64,
    /// SPSR_EL1.
    pub spsr: u64,
}

/// What the core's interrupt controller shows.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Lines {
    /// The virtual interface wants maintenance.
    pub maintenance: bool,
    /// The virtual timer asserts its interrupt.
    pub virtual_timer: bool,
    /// The virtual timer's physical interrupt is marked active.
    pub timer_active: bool,
    /// EL2's SGI is pending.
    pub kick: bool,
    /// That one is the host's.
    pub host_kick: bool,
    /// Any other interrupt is pending.
    pub pending: bool,
}

/// A vCPU that is loaded on a core.
#[derive(Debug)]
pub struct FakeVcpu<'v, 'a> {
    /// Its VM.
    pub vm: &'v FakeVm<'a>,
    /// Its number.
    pub index: u8,
    /// x0 to x30.
    pub registers: Registers,
    /// ELR_EL2.
    pub pc: u64,
    /// SPSR_EL2.
    pub pstate: u64,
    /// ESR_EL2.
    pub esr: u64,
    /// FAR_EL2.
    pub far: u64,
    /// HPFAR_EL2.
    pub hpfar: u64,
    /// EL1's registers.
    pub el1: El1,
    /// What AT S1E1R answers: the IPA of a page.
    pub stage1: Option<u64>,
    /// What AT S12E1R answers.
    pub attributes: Option<(u64, u64)>,
    /// CNTPCT_EL0.
    pub now: u64,
    /// When the virtual timer fires.
    pub virtual_deadline: u64,
    /// What interrupts.
    pub lines: Lines,
    /// The host has nothing else to run.
    pub waits_here: bool,
    /// What it is watched for.
    pub caches: VcpuCaches,
    /// Its physical timer.
    pub timer: EmulatedTimer,
    /// The load that the host completes.
    pub load: Option<PendingLoad>,
    /// What the host is told.
    pub exit: Option<Exit>,
    /// Its virtual CPU interface.
    pub interface: CpuInterface,
    /// The list registers hold what the virtual GIC gave.
    pub lists_loaded: bool,
    did: RefCell<Vec<Did>>,
}

impl<'v, 'a> FakeVcpu<'v, 'a> {
    /// A vCPU at its first instruction, EL1 with its own stack pointer.
    #[must_use]
    pub fn new(vm: &'v FakeVm<'a>, index: u8) -> Self {
        Self {
            vm,
            index,
            registers: Registers(core::array::from_fn(|n| 0x1111_2222_3333_0000 + n as u64)),
            pc: super::RAM,
            pstate: 0b0101,
            esr: 0,
            far: 0,
            hpfar: 0,
            el1: El1::default(),
            stage1: None,
            attributes: None,
            now: 0,
            virtual_deadline: u64::MAX,
            lines: Lines::default(),
            waits_here: false,
            caches: VcpuCaches::default(),
            timer: EmulatedTimer::new(),
            load: None,
            exit: None,
            interface: CpuInterface::new(4),
            lists_loaded: false,
            did: RefCell::default(),
        }
    }

    /// What was done since this was asked last, in order.
    pub fn take_did(&self) -> Vec<Did> {
        self.did.take()
    }

    /// The value of a counter.
    #[must_use]
    pub fn counter(&self, counter: VmCounter) -> u64 {
        self.vm.counters.get(counter)
    }

    /// Completes a load with the host's value, as the next run does.
    pub fn complete(&mut self, value: u64) {
        if let Some(load) = self.load.take() {
            let at = (self.pc, self.pstate);
            (self.pc, self.pstate) = load.complete(&mut self.registers, at, value);
        }
    }

    fn note(&self, did: Did) {
        self.did.borrow_mut().push(did);
    }
}

impl Core for FakeVcpu<'_, '_> {
    fn esr(&self) -> u64 {
        self.esr
    }

    fn fault_addresses(&self) -> (u64, u64) {
        (self.far, self.hpfar)
    }

    fn skip_instruction(&mut self) {
        self.note(Did::Skip);
        (self.pc, self.pstate) = esr::behind(self.pc, self.pstate, self.esr);
    }

    fn repeat_call(&mut self) {
        self.note(Did::Repeat);
        self.pc = self.pc.wrapping_sub(4);
    }

    fn interrupted(&self) -> Interrupted {
        Interrupted {
            spsr: self.pstate,
            vbar: self.el1.vbar,
            sctlr: self.el1.sctlr,
            pan: true,
            mte: false,
        }
    }

    fn inject(&mut self, entry: &Entry) {
        self.note(Did::Inject(*entry));
        self.el1.esr = entry.esr;
        if entry.is_abort() {
            self.el1.far = self.far;
        }
        (self.el1.elr, self.el1.spsr) = (self.pc, self.pstate);
        (self.pc, self.pstate) = (entry.pc, entry.spsr);
    }

    fn translate_stage1(&mut self, address: u64) -> Option<u64> {
        self.note(Did::Translate(address));
        self.stage1
    }

    fn memory_attributes(&mut self, _: u64) -> Option<(u64, u64)> {
        self.attributes
    }

    fn ticks(&self) -> u64 {
        self.now
    }

    fn sctlr(&self) -> u64 {
        self.el1.sctlr
    }

    fn write_vm_register(&mut self, register: VmRegister, value: u64) {
        self.note(Did::Write(register, value));
        if register == VmRegister::Sctlr {
            self.el1.sctlr = value;
        }
    }

    fn watch_caches(&mut self, watch: CacheWatch) {
        self.note(Did::Watch(watch));
    }

    fn pend_serror(&mut self) {
        self.note(Did::SError);
    }

    fn lend_fp(&mut self) {
        self.note(Did::LendFp);
    }

    fn call_firmware(&self, id: u32) {
        self.note(Did::Firmware(id));
    }
}

impl Interrupts for FakeVcpu<'_, '_> {
    fn maintenance_pending(&self) -> bool {
        self.lines.maintenance
    }

    fn timer_may_fire(&self) -> bool {
        !self.lines.timer_active
    }

    fn virtual_timer_fired(&self) -> bool {
        self.lines.virtual_timer
    }

    fn physical_timer_fired(&self) -> bool {
        self.timer.asserted(self.now)
    }

    fn virtual_timer_deadline(&self) -> u64 {
        self.virtual_deadline
    }

    fn take_kick(&mut self) -> bool {
        core::mem::take(&mut self.lines.kick)
    }

    fn take_host_kick(&mut self) -> bool {
        core::mem::take(&mut self.lines.host_kick)
    }

    fn kick_host(&mut self) {
        self.note(Did::KickHost);
    }

    fn interrupt_pending(&self) -> bool {
        self.lines.pending || self.lines.kick
    }

    fn save_interrupts(&mut self) {
        if core::mem::take(&mut self.lists_loaded) {
            let kicks = self.vm.vgic.save(self.index(), &mut self.interface);
            kicks.iter().for_each(|vcpu| Interrupts::kick(self, vcpu));
        }
    }

    fn refresh_timers(&mut self) {
        let (vgic, index) = (&self.vm.vgic, self.index());
        self.interface.timer_in_flight = vgic.set_timer(index, self.lines.virtual_timer);
        let level = self.timer.asserted(self.now);
        let _kicks = vgic.set_ppi(index, PHYSICAL_TIMER_PPI, level);
    }

    fn refresh_interrupts(&mut self) {
        self.save_interrupts();
        self.refresh_timers();
        self.vm.vgic.load(self.index(), &mut self.interface);
        self.lists_loaded = true;
    }

    fn waits_here(&self) -> bool {
        self.waits_here
    }

    fn wait_for_interrupt(&mut self) {
        self.note(Did::Wait);
    }

    fn kick(&self, vcpu: usize) {
        self.note(Did::Kick(vcpu));
    }
}

impl<'a> Guest for FakeVcpu<'_, 'a> {
    type Table = Stage2<ArmStage2, &'a FakeMachine>;
    type Frames = GuestFrames<'a>;

    fn index(&self) -> usize {
        self.index.into()
    }

    fn vcpus(&self) -> u8 {
        self.vm.shape.vcpus
    }

    fn memory(&self) -> &GuestMemory<Self::Table, ArmPolicy, Self::Frames> {
        &self.vm.memory
    }

    fn vgic(&self) -> &Vgic {
        &self.vm.vgic
    }

    fn has_redistributors(&self) -> bool {
        self.vm.shape.gic == GicVersion::V3
    }

    fn ids(&self) -> &GuestIds {
        &self.vm.ids
    }

    fn power(&self) -> &Power {
        &self.vm.power
    }

    fn protection(&self) -> Option<&Protection> {
        self.vm.protection.as_ref()
    }

    fn caller(&self) -> impl Caller {
        self.vm
    }

    fn move_pages(&self, call: MemoryCall, ipa: u64, pages: u64) -> Moved {
        self.vm.pages().call(call, ipa, pages)
    }

    fn is_poisoned(&self, ipa: u64) -> bool {
        self.vm.pages().is_poisoned(ipa)
    }

    fn registers(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn caches(&mut self) -> &mut VcpuCaches {
        &mut self.caches
    }

    fn physical_timer(&mut self) -> &mut EmulatedTimer {
        &mut self.timer
    }

    fn keep_load(&mut self, load: PendingLoad) {
        self.load = Some(load);
    }

    fn restart_when_woken(&mut self, order: StartOrder) {
        self.note(Did::Restart(order));
        self.registers = Registers::default();
        self.registers.set(0, order.context);
        self.pc = order.entry;
    }

    fn count(&self, counter: VmCounter) {
        self.vm.counters.count(counter);
    }

    fn leave(&mut self, exit: Exit) -> Next {
        self.exit = Some(exit);
        Next::Leave
    }

    fn report(&self, oddity: Oddity) {
        self.note(Did::Report(oddity));
    }
}
