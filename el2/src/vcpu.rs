//! Virtual CPUs: running one until something needs the host.

use abi::{ErrorCode, Exit, VmCounter};
use core::sync::atomic::{AtomicU32, Ordering, fence};
use el2::psci::{PowerSlot, StartOrder};
use el2::vgic::CpuInterface;
use el2::vm_error::Refusal;
use memslot::toggle::CacheWatch;
use spin::Mutex;

use crate::arch::cpu::CpuData;
use crate::arch::world::{self, Context, HostWorld, hcr};
use crate::arch::{cpu, regs};
use crate::exits;
use crate::hypervisor::Hypervisor;
use crate::vm::Vm;

/// Where a vCPU is: [`NOWHERE`], or the number of the CPU that runs it, plus one.
const NOWHERE: u32 = 0;

/// A virtual CPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    /// Its power state.
    pub(crate) power: PowerSlot,
    running_on: AtomicU32,
    /// The CPU that ran it last, plus one: there the host looks after it.
    last_on: AtomicU32,
    state: Mutex<VcpuState>,
}

/// What only the CPU that runs it touches.
#[derive(Debug)]
pub(crate) struct VcpuState {
    pub(crate) context: Context,
    pub(crate) gic: CpuInterface,
    pub(crate) watch: CacheWatch,
    /// The load that the host is asked to complete.
    pub(crate) load: Option<exits::PendingLoad>,
    /// The virtual timer's interrupt is pending or active in the virtual GIC.
    pub(crate) timer_in_flight: bool,
    /// Counts of this run, added to the VM's when it ends.
    pub(crate) counts: Counts,
}

/// Counts that one run collects without atomics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts([u32; VmCounter::COUNT]);

impl Counts {
    /// Adds one.
    #[inline]
    pub(crate) fn count(&mut self, counter: VmCounter) {
        if let Some(value) = self.0.get_mut(counter as usize) {
            *value = value.wrapping_add(1);
        }
    }

    fn hand_over(&mut self, vm: &Vm) {
        for (counter, _) in VmCounter::ALL {
            let value = self.0.get_mut(counter as usize).map(core::mem::take);
            if let Some(value @ 1..) = value {
                vm.counters().add(counter, u64::from(value));
            }
        }
    }
}

/// How the guest goes on after an exception.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Next {
    /// At once.
    Resume,
    /// After its interrupts have been looked at again.
    Refresh,
    /// Not before the host has done something.
    Leave(Exit),
}

/// A vCPU that is loaded on this CPU.
pub(crate) struct Running<'a> {
    pub(crate) hypervisor: &'static Hypervisor,
    pub(crate) vm: &'a Vm,
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) state: &'a mut VcpuState,
    pub(crate) host: HostWorld,
    pub(crate) cpu: &'static CpuData,
}

impl Vcpu {
    /// A vCPU that is off.
    pub(crate) fn new(hypervisor: &Hypervisor, index: u8) -> Self {
        let power = PowerSlot::new();
        power.park();
        Self {
            index,
            power,
            running_on: AtomicU32::new(NOWHERE),
            last_on: AtomicU32::new(NOWHERE),
            state: Mutex::new(VcpuState {
                context: Context::new(&hypervisor.features),
                gic: hypervisor.gic.new_interface(),
                watch: CacheWatch::default(),
                load: None,
                timer_in_flight: false,
                counts: Counts::default(),
            }),
        }
    }

    /// Turns it on: it starts at `order` when the host runs it next.
    pub(crate) fn turn_on(&self, order: StartOrder) -> Result<(), el2::psci::PsciError> {
        self.power.order(order)
    }

    /// Off and empty, for a reset of the VM; `Busy` if it runs.
    pub(crate) fn reset(&self, hypervisor: &Hypervisor) -> Result<(), ErrorCode> {
        let mut state = self.state.try_lock().ok_or(ErrorCode::Busy)?;
        self.power.park();
        state.context = Context::new(&hypervisor.features);
        state.gic = hypervisor.gic.new_interface();
        state.watch = CacheWatch::default();
        state.load = None;
        state.timer_in_flight = false;
        Ok(())
    }

    /// Makes the vCPU look at its interrupts: it leaves the guest where it runs; where it does not,
    /// the host of the CPU that ran it last is told to look after it.
    pub(crate) fn kick(&self, hypervisor: &Hypervisor) {
        // Pairs with the fence in `block`: either we see it out, or it sees the new interrupt.
        fence(Ordering::SeqCst);
        let running = self.running_on.load(Ordering::Relaxed);
        let target = if running == NOWHERE {
            self.last_on.load(Ordering::Relaxed)
        } else {
            running
        };
        let me = cpu::this_cpu().map_or(NOWHERE, |cpu| cpu.index as u32 + 1);
        let Some(cpu) = target
            .checked_sub(1)
            .and_then(|n| hypervisor.cpus.get(n as usize))
        else {
            return; // It has never run: nobody waits for it.
        };
        if running == NOWHERE {
            cpu.host_kick.store(true, Ordering::Release);
        } else if target == me {
            return; // It is us.
        }
        hypervisor.gic.kick(cpu.mpidr);
    }

    /// Runs it.
    pub(crate) fn run(
        &self,
        hypervisor: &'static Hypervisor,
        vm: &Vm,
        loaded: u64,
    ) -> Result<Exit, Refusal> {
        let mut state = self.state.try_lock().ok_or(ErrorCode::Busy)?;
        let cpu = cpu::this_cpu().ok_or(ErrorCode::Invalid)?;
        if let Some(order) = self.power.take_order() {
            let features = &hypervisor.features;
            state.context.restart(features, order.entry, order.context);
            state.watch = CacheWatch::default();
            state.context.hcr |= hcr::TVM;
        } else if self.power.is_off() {
            return Ok(Exit::VcpuOff);
        }
        if let Some(load) = state.load.take() {
            load.complete(&mut state.context.regs, loaded);
        }
        let pass = vm.memory.enter().map_err(|_| ErrorCode::Again)?;
        let me = cpu.index as u32 + 1;
        self.last_on.store(me, Ordering::Relaxed);
        self.running_on.store(me, Ordering::SeqCst);
        let exit = self.run_loaded(hypervisor, vm, &mut state, cpu);
        drop(pass);
        state.counts.hand_over(vm);
        Ok(exit)
    }

    fn run_loaded(
        &self,
        hypervisor: &'static Hypervisor,
        vm: &Vm,
        state: &mut VcpuState,
        cpu: &'static CpuData,
    ) -> Exit {
        let features = &hypervisor.features;
        let host = HostWorld::load_guest(features, &vm.world, self.index, &state.context);
        state.counts.count(VmCounter::Runs);
        let mut running = Running {
            hypervisor,
            vm,
            vcpu: self,
            state,
            host,
            cpu,
        };
        let exit = running.until_exit();
        let Running { state, host, .. } = running;
        host.load_host(features, &mut state.context);
        self.running_on.store(NOWHERE, Ordering::Relaxed);
        self.block(hypervisor, vm, exit)
    }

    /// A vCPU that goes to sleep looks once more for interrupts, now that who sends it one knows
    /// that it is out.
    fn block(&self, hypervisor: &Hypervisor, vm: &Vm, exit: Exit) -> Exit {
        let _: &Hypervisor = hypervisor;
        fence(Ordering::SeqCst);
        match exit {
            Exit::WaitForInterrupt { .. } if vm.vgic.has_pending(usize::from(self.index)) => {
                Exit::Interrupted
            }
            other => other,
        }
    }
}

impl Running<'_> {
    /// Number of the vCPU.
    pub(crate) fn index(&self) -> usize {
        usize::from(self.vcpu.index)
    }

    fn until_exit(&mut self) -> Exit {
        self.hypervisor.gic.prepare_cpu(self.cpu);
        self.refresh_timer();
        self.load_interrupts();
        loop {
            let vector = world::enter(&mut self.state.context);
            self.state.counts.count(VmCounter::Exits);
            match exits::handle(self, vector) {
                Next::Resume => {}
                Next::Refresh => {
                    self.save_interrupts();
                    self.refresh_timer();
                    self.load_interrupts();
                }
                Next::Leave(exit) => {
                    self.save_interrupts();
                    self.hypervisor.gic.set_timer_active(false);
                    return exit;
                }
            }
        }
    }

    /// Fills the core's list registers.
    fn load_interrupts(&mut self) {
        let index = self.index();
        self.vm.vgic.load(index, &mut self.state.gic);
        self.hypervisor.gic.enter(&self.state.gic);
        self.hypervisor
            .gic
            .set_timer_active(self.state.timer_in_flight);
    }

    /// Takes the core's list registers back.
    pub(crate) fn save_interrupts(&mut self) {
        let index = self.index();
        self.hypervisor.gic.leave(&mut self.state.gic);
        self.vm.vgic.save(index, &self.state.gic);
        self.state.timer_in_flight = self.vm.vgic.timer_in_flight(index);
    }

    /// Makes the line of the virtual timer's interrupt what the timer says.
    fn refresh_timer(&mut self) {
        let fired = regs::virtual_timer_fired();
        if fired || self.state.timer_in_flight {
            let kicks = self
                .vm
                .vgic
                .set_ppi(self.index(), abi::GUEST_TIMER_PPI, fired);
            // The only vCPU that it concerns is this one, which is about to load its interrupts.
            let _: el2::vgic::Kicks = kicks;
            self.state.timer_in_flight = self.vm.vgic.timer_in_flight(self.index());
        }
    }
}
