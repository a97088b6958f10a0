//! Virtual CPUs: running one until something needs the host.

use abi::{ErrorCode, Exit, VmCounter};
use core::sync::atomic::{AtomicU64, Ordering};
use el2::exits::{self, Next, PendingLoad};
use el2::features::Features;
use el2::guest::PHYSICAL_TIMER_PPI;
use el2::guest::psci::Turn;
use el2::guest::timer::EmulatedTimer;
use el2::kick::{Kick, Whereabouts};
use el2::psci::StartOrder;
use el2::slice::Slice;
use el2::sync::SpinLock;
use el2::vgic::{CpuInterface, Kicks};
use el2::vm_error::Refusal;
use memslot::arm::VcpuCaches;
use memslot::error::Error;
use spin::MutexGuard;

use crate::arch::controls::HostControls;
use crate::arch::cpu::CpuData;
use crate::arch::world::{self, Context, HostWorld, hcr};
use crate::arch::{cpu, firmware, regs, windows};
use crate::hypervisor::Hypervisor;
use crate::vm::Vm;

/// A virtual CPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    place: Whereabouts,
    pub(crate) counts: Counts,
    state: SpinLock<VcpuState>,
}

/// What only the CPU that runs it touches.
#[derive(Debug)]
pub(crate) struct VcpuState {
    /// The host's registers while this vCPU is loaded.
    pub(crate) host: HostWorld,
    pub(crate) context: Context,
    pub(crate) gic: CpuInterface,
    pub(crate) caches: VcpuCaches,
    /// The load that the host is asked to complete.
    pub(crate) load: Option<PendingLoad>,
    /// The physical timer that the guest sees.
    pub(crate) physical_timer: EmulatedTimer,
    /// The list registers hold what the virtual GIC gave.
    lists_loaded: bool,
    /// Line of the physical timer's interrupt.
    physical_line: bool,
    /// It has turned itself off: it runs again only from an order.
    off: bool,
}

/// A vCPU's share of the VM's counters. Only the CPU that runs it writes, so that a count is a load
/// and a store; anybody reads.
#[derive(Debug, Default)]
pub(crate) struct Counts([AtomicU64; VmCounter::COUNT]);

impl Counts {
    /// Adds one.
    #[inline]
    pub(crate) fn count(&self, counter: VmCounter) {
        self.add(counter, 1);
    }

    /// Adds `n`.
    #[inline]
    pub(crate) fn add(&self, counter: VmCounter, n: u64) {
        if let Some(value) = self.0.get(counter as usize) {
            value.store(value.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        }
    }

    /// The present value.
    pub(crate) fn get(&self, counter: VmCounter) -> u64 {
        self.0
            .get(counter as usize)
            .map_or(0, |value| value.load(Ordering::Relaxed))
    }
}

/// A vCPU that is loaded on this CPU.
pub(crate) struct Running<'a> {
    pub(crate) hypervisor: &'static Hypervisor,
    pub(crate) vm: &'a Vm,
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) state: &'a mut VcpuState,
    pub(crate) cpu: &'static CpuData,
    /// The host has nothing else to run here.
    pub(crate) wait_here: bool,
    /// What the host is told with [`Next::Leave`].
    exit: Exit,
}

impl Vcpu {
    /// A vCPU that is off.
    pub(crate) fn new(hypervisor: &Hypervisor, features: &Features, index: u8) -> Self {
        Self {
            index,
            place: Whereabouts::new(),
            counts: Counts::default(),
            state: SpinLock::new(VcpuState::new(hypervisor, features)),
        }
    }

    /// Keeps every CPU from running it, for a reset of the VM.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Busy`] while it runs.
    pub(crate) fn stop(&self) -> Result<Stopped<'_>, ErrorCode> {
        let state = self.state.try_lock().ok_or(ErrorCode::Busy)?;
        Ok(Stopped(state))
    }

    /// Makes the vCPU look at its interrupts: it leaves the guest where it runs; where it does not,
    /// the host of the CPU that ran it last is told to look after it.
    pub(crate) fn kick(&self, hypervisor: &Hypervisor) {
        let me = cpu::running().map(|cpu| cpu.index as u32);
        let (number, for_host) = match self.place.kick(me) {
            Kick::Nobody => return,
            Kick::Guest(number) => (number, false),
            Kick::Host(number) => (number, true),
        };
        let Some(cpu) = hypervisor.cpus.get(number as usize) else {
            return;
        };
        if for_host {
            cpu.host_kick.announce();
        }
        hypervisor.gic.kick(cpu);
    }

    /// Runs it; its VM may run.
    pub(crate) fn run(
        &self,
        hypervisor: &'static Hypervisor,
        vm: &Vm,
        loaded: u64,
        wait_here: bool,
    ) -> Result<Exit, Refusal> {
        let mut state = self.state.try_lock().ok_or(ErrorCode::Busy)?;
        let cpu = cpu::running().ok_or(ErrorCode::Invalid)?;
        match vm.state.power.turn(self.index) {
            Turn::GoesOn if !state.off => {}
            Turn::Starts(order) => {
                vm.world.start_time();
                state.restart(&vm.features, order);
                state.gic.restart();
            }
            Turn::GoesOn | Turn::IsOff => return Ok(Exit::VcpuOff),
        }
        if let Some(load) = state.load.take() {
            state.context.regs.complete(load, loaded);
        }
        // Seen too late by the run before.
        if let Some(intid) = vm.vgic.take_ended() {
            return Ok(Exit::IrqDone { intid });
        }
        let mut slice = Slice::new(regs::interrupt_pending);
        let pass = match vm.state.memory.enter_in_steps(|| slice.go_on()) {
            Ok(Some(pass)) => pass,
            Ok(None) => return Ok(Exit::Interrupted),
            Err(Error::InUse(_)) => return Err(ErrorCode::Again.into()),
            Err(error) => return Err(error.into()),
        };
        // Whoever finds it here can interrupt this CPU.
        hypervisor.gic.prepare_cpu(cpu);
        self.place.enter(cpu.index as u32);
        let exit = self.run_loaded(hypervisor, vm, &mut state, cpu, wait_here);
        // From here on no other CPU runs what comes behind the guest's CPU_OFF.
        state.off = exit == Exit::VcpuOff;
        drop(pass);
        drop(state);
        if exit == Exit::VcpuOff {
            // Only now: whoever turns it on again may run it elsewhere at once.
            vm.state.power.off(self.index);
        }
        Ok(exit)
    }

    fn run_loaded(
        &self,
        hypervisor: &'static Hypervisor,
        vm: &Vm,
        state: &mut VcpuState,
        cpu: &'static CpuData,
        wait_here: bool,
    ) -> Exit {
        let features = &hypervisor.features;
        self.counts.count(VmCounter::Runs);
        let mut running = Running {
            hypervisor,
            vm,
            vcpu: self,
            state,
            cpu,
            wait_here,
            exit: Exit::Interrupted,
        };
        let controls = cpu.host_controls.call_once(|| HostControls::read(features));
        running.state.host.save(features, controls.parts);
        let VcpuState { host, context, .. } = &mut *running.state;
        host.load_guest(controls, &vm.world, self.index, context);
        if vm.changes_vcpu(cpu.index, self.index) {
            world::forget_other_vcpu();
        }
        let exit = running.until_exit();
        let VcpuState { host, context, .. } = &mut *running.state;
        windows::settle_errors(context);
        host.save_guest(controls.parts, context);
        host.load_host(features, controls);
        if let Some(id) = hypervisor.mitigations.between_worlds() {
            firmware::call(u64::from(id), [0; 7]);
        }
        self.place.leave();
        self.block(vm, exit)
    }

    /// A vCPU that goes to sleep looks once more for interrupts, now that who sends it one knows
    /// that it is out.
    fn block(&self, vm: &Vm, exit: Exit) -> Exit {
        // Only with what loses nothing if the host hears of an interrupt's end instead.
        if matches!(exit, Exit::WaitForInterrupt { .. } | Exit::Interrupted)
            && let Some(intid) = vm.vgic.take_ended()
        {
            return Exit::IrqDone { intid };
        }
        match exit {
            Exit::WaitForInterrupt { .. } if vm.vgic.has_pending(usize::from(self.index)) => {
                Exit::Interrupted
            }
            other => other,
        }
    }
}

/// A vCPU that nobody can run meanwhile.
pub(crate) struct Stopped<'a>(MutexGuard<'a, VcpuState>);

impl Stopped<'_> {
    /// Makes it as it was when it was created.
    pub(crate) fn empty(&mut self, hypervisor: &Hypervisor, features: &Features) {
        *self.0 = VcpuState::new(hypervisor, features);
    }
}

impl VcpuState {
    fn new(hypervisor: &Hypervisor, features: &Features) -> Self {
        Self {
            host: HostWorld::default(),
            context: Context::new(features),
            gic: hypervisor.gic.new_interface(),
            caches: VcpuCaches::default(),
            load: None,
            physical_timer: EmulatedTimer::new(),
            lists_loaded: false,
            physical_line: false,
            off: false,
        }
    }

    /// Starts over with an order, as CPU_ON says; its caches are off, and watched.
    fn restart(&mut self, features: &Features, order: StartOrder) {
        self.context.restart(features, order.entry, order.context);
        self.context.hcr |= hcr::TVM;
        self.caches = VcpuCaches::default();
        self.load = None;
        self.physical_timer = EmulatedTimer::new();
        self.off = false;
    }

    /// The same for a vCPU that is loaded: CPU_SUSPEND into a state that loses its registers. Its
    /// interrupts and timers stay, they are what wakes it.
    pub(crate) fn restart_when_woken(&mut self, features: &Features, order: StartOrder) {
        // The host's are kept in the context that goes.
        self.host.end_loan(&mut self.context);
        let (timer, physical) = (self.context.timer, self.physical_timer);
        self.restart(features, order);
        self.context.timer = timer;
        self.physical_timer = physical;
        world::reload(features, &self.context);
    }
}

impl Running<'_> {
    /// Number of the vCPU.
    pub(crate) fn index(&self) -> usize {
        usize::from(self.vcpu.index)
    }

    /// Makes the guest wait for the host, which is told why.
    #[inline]
    pub(crate) fn leave(&mut self, exit: Exit) -> Next {
        self.exit = exit;
        Next::Leave
    }

    fn until_exit(&mut self) -> Exit {
        let gic = &self.hypervisor.gic;
        gic.load(&self.state.gic);
        self.refresh_interrupts();
        if self.owed_flush() != Next::Leave {
            self.guest_until_exit();
        }
        self.save_interrupts();
        gic.unload(&mut self.state.gic);
        gic.set_timer_active(self.cpu, false);
        regs::stop_el2_timer();
        self.exit
    }

    /// Makes the core's list registers what the timers and the virtual GIC say now.
    #[inline(never)]
    pub(crate) fn refresh_interrupts(&mut self) {
        self.save_interrupts();
        self.refresh_timers();
        self.load_interrupts();
    }

    fn guest_until_exit(&mut self) {
        loop {
            let vector = world::enter(&mut self.state.context);
            self.vcpu.counts.count(VmCounter::Exits);
            match exits::handle(self, vector) {
                Next::Resume if self.state.lists_loaded => {}
                Next::Resume | Next::Refresh => {
                    if self.refresh_or_leave() == Next::Leave {
                        break;
                    }
                }
                Next::Leave => break,
            }
        }
    }

    /// Looks at the guest's interrupts again; leaves if it has ended one that the host waits for.
    fn refresh_or_leave(&mut self) -> Next {
        self.refresh_interrupts();
        if self.vm.vgic.has_ended() {
            return self.leave(Exit::Interrupted);
        }
        Next::Resume
    }

    /// Does what the guest waits for since its last run, before its next instruction.
    #[inline]
    fn owed_flush(&mut self) -> Next {
        if !self.state.caches.owed.is_owed() {
            return Next::Resume;
        }
        exits::flush(self)
    }

    /// Fills the core's list registers.
    fn load_interrupts(&mut self) {
        let index = self.index();
        self.vm.vgic.load(index, &mut self.state.gic);
        let used = u64::from(self.state.gic.used);
        self.vcpu.counts.add(VmCounter::InterruptsDelivered, used);
        let gic = &self.hypervisor.gic;
        gic.enter(&self.state.gic);
        gic.set_timer_active(self.cpu, self.state.gic.timer_in_flight);
        self.state.lists_loaded = true;
    }

    /// Takes the core's list registers back, if they are loaded.
    #[inline]
    pub(crate) fn save_interrupts(&mut self) {
        if core::mem::take(&mut self.state.lists_loaded) {
            self.hypervisor.gic.leave(&mut self.state.gic);
            if !self.state.gic.shows_nothing() {
                self.save_lists();
            }
        }
    }

    #[inline(never)]
    fn save_lists(&mut self) {
        let index = self.index();
        let gic = &self.hypervisor.gic;
        gic.timer_was_ended(self.cpu, &self.state.gic);
        let kicks = self.vm.vgic.save(index, &mut self.state.gic);
        for other in kicks.iter() {
            if let Ok(vcpu) = self.vm.vcpu(other as u64) {
                vcpu.kick(self.hypervisor);
            }
        }
    }

    /// Makes the lines of the timers' interrupts what the timers say.
    #[inline]
    pub(crate) fn refresh_timers(&mut self) {
        let fired = regs::virtual_timer_fired();
        if fired || self.state.gic.timer_in_flight {
            self.state.gic.timer_in_flight = self.vm.vgic.set_timer(self.index(), fired);
        }
        match self.state.physical_timer.deadline() {
            None if !self.state.physical_line => regs::stop_el2_timer(),
            deadline => self.refresh_physical_timer(deadline),
        }
    }

    /// The same for the physical timer, which hardly a guest uses.
    #[inline(never)]
    fn refresh_physical_timer(&mut self, deadline: Option<u64>) {
        let Some(deadline) = deadline else {
            self.set_physical_line(false);
            return regs::stop_el2_timer();
        };
        let asserted = self.state.physical_timer.asserted(regs::ticks());
        if asserted != self.state.physical_line {
            self.set_physical_line(asserted);
        }
        if asserted {
            regs::stop_el2_timer();
        } else {
            regs::start_el2_timer(deadline);
        }
    }

    fn set_physical_line(&mut self, level: bool) {
        self.state.physical_line = level;
        // The only vCPU that it concerns is this one, which loads its interrupts before it goes on.
        let _: Kicks = self
            .vm
            .vgic
            .set_ppi(self.index(), PHYSICAL_TIMER_PPI, level);
    }

    /// Whether the EL2 timer has ended a guest's run for the guest's physical timer.
    pub(crate) fn physical_timer_fired(&self) -> bool {
        let timer = &self.state.physical_timer;
        let due = timer.deadline().is_some_and(|at| regs::ticks() >= at);
        due && !self.state.physical_line
    }
}
