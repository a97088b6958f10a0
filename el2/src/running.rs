//! The machine under `el2::exits`: a vCPU that runs on this core.

use abi::{Exit, VmCounter};
use el2::exits::{self, Core, Guest, Interrupts, Next, Oddity, PendingLoad, Registers};
use el2::guest::entropy::EntropySource;
use el2::guest::idregs::GuestIds;
use el2::guest::protected::{MemoryCall, MmioGuard};
use el2::guest::psci::Power;
use el2::guest::smccc::{Caller, Mitigations};
use el2::guest::sysreg::VmRegister;
use el2::guest::timer::EmulatedTimer;
use el2::guest_frames::GuestFrames;
use el2::guest_memory::Moved;
use el2::inject::{Entry, Interrupted};
use el2::protection::Protection;
use el2::psci::StartOrder;
use el2::vgic::Vgic;
use memslot::arm::VcpuCaches;
use memslot::policy::ArmPolicy;
use memslot::toggle::CacheWatch;
use memslot::vm::GuestMemory;
use stage2::{ArmStage2, Stage2};

use crate::arch::tables::Tables;
use crate::arch::{cpu, firmware, regs, windows, world};
use crate::console::say;
use crate::hypervisor::Hypervisor;
use crate::vcpu::{Running, VcpuState};
use crate::vm::Vm;

/// The VM of a vCPU that makes a call.
struct Calling<'a>(&'static Hypervisor, &'a Vm);

impl Caller for Calling<'_> {
    #[inline]
    fn power(&self) -> &Power {
        &self.1.state.power
    }

    fn ids(&self) -> &GuestIds {
        &self.1.ids
    }

    fn mitigations(&self) -> &Mitigations {
        &self.0.mitigations
    }

    fn entropy(&self) -> Option<&dyn EntropySource> {
        let source = self.0.entropy.as_ref()?;
        Some(source)
    }

    fn guard(&self) -> Option<&MmioGuard> {
        self.1.state.protection.as_ref().map(|p| &p.guard)
    }

    fn is_memory(&self, ipa: u64) -> bool {
        exits::is_memory(&self.1.state.memory, ipa)
    }
}

impl Core for Running<'_> {
    #[inline]
    fn esr(&self) -> u64 {
        regs::esr()
    }

    #[inline]
    fn fault_addresses(&self) -> (u64, u64) {
        regs::fault_addresses()
    }

    #[inline]
    fn skip_instruction(&mut self) {
        regs::skip_instruction();
    }

    fn repeat_call(&mut self) {
        regs::repeat_call();
    }

    fn interrupted(&self) -> Interrupted {
        let features = &self.hypervisor.features;
        regs::interrupted(features.pan, features.mte)
    }

    fn inject(&mut self, entry: &Entry) {
        regs::inject(entry);
    }

    fn translate_stage1(&mut self, address: u64) -> Option<u64> {
        windows::translate_stage1(address)
    }

    fn memory_attributes(&mut self, address: u64) -> Option<(u64, u64)> {
        windows::memory_attributes(address)
    }

    #[inline]
    fn ticks(&self) -> u64 {
        regs::ticks()
    }

    fn sctlr(&self) -> u64 {
        regs::sctlr_el1()
    }

    fn write_vm_register(&mut self, register: VmRegister, value: u64) {
        regs::write_vm_register(register, value);
    }

    fn watch_caches(&mut self, watch: CacheWatch) {
        world::trap_vm_registers(&mut self.state.context, watch == CacheWatch::Watching);
    }

    fn pend_serror(&mut self) {
        world::pend_serror(&mut self.state.context);
    }

    #[inline]
    fn lend_fp(&mut self) {
        let VcpuState { host, context, .. } = &mut *self.state;
        host.lend_fp(context);
    }

    fn call_firmware(&self, id: u32) {
        firmware::call(u64::from(id), [0; 7]);
    }
}

impl Interrupts for Running<'_> {
    #[inline]
    fn maintenance_pending(&self) -> bool {
        self.hypervisor.gic.maintenance_pending()
    }

    #[inline]
    fn timer_may_fire(&self) -> bool {
        self.hypervisor.gic.timer_may_fire(self.cpu)
    }

    #[inline]
    fn virtual_timer_fired(&self) -> bool {
        regs::virtual_timer_fired()
    }

    #[inline]
    fn physical_timer_fired(&self) -> bool {
        Running::physical_timer_fired(self)
    }

    #[inline]
    fn virtual_timer_deadline(&self) -> u64 {
        regs::virtual_timer_deadline(self.vm.world.time_offset())
    }

    #[inline]
    fn take_kick(&mut self) -> bool {
        self.hypervisor.gic.take_kick(self.cpu)
    }

    #[inline]
    fn take_host_kick(&mut self) -> bool {
        self.cpu.host_kick.take()
    }

    #[inline]
    fn kick_host(&mut self) {
        self.hypervisor.gic.kick(self.cpu);
    }

    #[inline]
    fn interrupt_pending(&self) -> bool {
        regs::interrupt_pending()
    }

    #[inline]
    fn save_interrupts(&mut self) {
        Running::save_interrupts(self);
    }

    #[inline]
    fn refresh_timers(&mut self) {
        Running::refresh_timers(self);
    }

    #[inline]
    fn refresh_interrupts(&mut self) {
        Running::refresh_interrupts(self);
    }

    #[inline]
    fn waits_here(&self) -> bool {
        self.wait_here
    }

    #[inline]
    fn wait_for_interrupt(&mut self) {
        // A timer whose line has fallen since must be able to wake it.
        let in_flight = self.state.gic.timer_in_flight;
        self.hypervisor.gic.set_timer_active(self.cpu, in_flight);
        cpu::wait_as_guest();
    }

    #[inline]
    fn kick(&self, vcpu: usize) {
        if let Ok(vcpu) = self.vm.vcpu(vcpu as u64) {
            vcpu.kick(self.hypervisor);
        }
    }
}

impl Guest for Running<'_> {
    type Table = Stage2<ArmStage2, Tables>;
    type Frames = GuestFrames<'static>;

    #[inline]
    fn index(&self) -> usize {
        Running::index(self)
    }

    #[inline]
    fn vcpus(&self) -> u8 {
        self.vm.state.config.vcpus
    }

    #[inline]
    fn memory(&self) -> &GuestMemory<Self::Table, ArmPolicy, Self::Frames> {
        &self.vm.state.memory
    }

    #[inline]
    fn vgic(&self) -> &Vgic {
        &self.vm.vgic
    }

    #[inline]
    fn has_redistributors(&self) -> bool {
        self.hypervisor.gic.version() == 3
    }

    #[inline]
    fn ids(&self) -> &GuestIds {
        &self.vm.ids
    }

    #[inline]
    fn power(&self) -> &Power {
        &self.vm.state.power
    }

    #[inline]
    fn protection(&self) -> Option<&Protection> {
        self.vm.state.protection.as_ref()
    }

    #[inline]
    fn caller(&self) -> impl Caller {
        Calling(self.hypervisor, self.vm)
    }

    fn move_pages(&self, call: MemoryCall, ipa: u64, pages: u64) -> Moved {
        self.vm.pages(self.hypervisor).call(call, ipa, pages)
    }

    fn is_poisoned(&self, ipa: u64) -> bool {
        self.vm.pages(self.hypervisor).is_poisoned(ipa)
    }

    #[inline]
    fn registers(&mut self) -> &mut Registers {
        &mut self.state.context.regs.x
    }

    #[inline]
    fn caches(&mut self) -> &mut VcpuCaches {
        &mut self.state.caches
    }

    #[inline]
    fn physical_timer(&mut self) -> &mut EmulatedTimer {
        &mut self.state.physical_timer
    }

    #[inline]
    fn keep_load(&mut self, load: PendingLoad) {
        self.state.load = Some(load);
    }

    fn restart_when_woken(&mut self, order: StartOrder) {
        self.state.restart_when_woken(&self.vm.features, order);
    }

    #[inline]
    fn count(&self, counter: VmCounter) {
        self.vcpu.counts.count(counter);
    }

    #[inline]
    fn leave(&mut self, exit: Exit) -> Next {
        Running::leave(self, exit)
    }

    fn report(&self, oddity: Oddity) {
        let vm = self.vm.state.index;
        match oddity {
            Oddity::SError => say!(Warn, "VM {vm}: SError, ESR {:#x}", regs::esr()),
            Oddity::Fault(code) => {
                let number = code.to_register().cast_signed();
                say!(Error, "VM {vm}: a fault can't be handled: error {number}");
            }
        }
    }
}
