//! A VM of this machine and its vCPUs: creation, and the loop that runs one.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use memslot::addr::Gfn;
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use spin::Mutex;
use stage2::{Ept, Ipa, Stage2};
use vmx::capability::Capabilities;
use vmx::controls::PRIMARY_INTERRUPT_WINDOW;
use vmx::cpuid::Answer;
use vmx::exit::Exit;
use vmx::field::{Field, Vmcs as _};
use vmx::handle::{self, End, Next, Request};
use vmx::ports::Ports;
use vmx::shootdown::Shootdown;
use vmx::start::{self, Start};
use vmx::vcpu::Vcpu;
use vmx::vm::{Vm, VmSettings};

use crate::arch::{
    self, Cpu, DebugRegisters, EptMachine, FRAME, FpuState, GuestRam, LoadedVmcs, MsrBitmap,
    SwappedMsrs,
};

/// Longest stay in a guest, in microseconds: the bound on everything that waits for a vCPU.
const SLICE: u64 = 10_000;

/// A VM and the memory that its owner has given it.
#[derive(Debug)]
pub(crate) struct GuestVm {
    /// The VM.
    pub(crate) vm: Vm<EptMachine>,
    shootdown: Arc<Shootdown>,
    pointer: u64,
    /// Slots' memory with the guest-physical address at which each begins. It outlives the
    /// table: fields are dropped in this order.
    ram: Mutex<Vec<(u64, GuestRam)>>,
}

/// What keeps a VM from being created or given memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Refused {
    /// The machine has no memory left.
    NoMemory,
    /// The slot was refused.
    #[expect(dead_code, reason = "read by its Debug form, on the console")]
    Slot(memslot::error::Error),
}

impl From<memslot::error::Error> for Refused {
    fn from(error: memslot::error::Error) -> Self {
        Self::Slot(error)
    }
}

impl GuestVm {
    /// A VM without memory.
    pub(crate) fn new(c: &Capabilities, settings: VmSettings) -> Result<Arc<Self>, Refused> {
        let shootdown = Arc::new(Shootdown::new());
        let machine = EptMachine::new(c, Arc::clone(&shootdown)).ok_or(Refused::NoMemory)?;
        let format = Ept::new(&c.ept).map_err(|_| Refused::NoMemory)?;
        let pointer = format.pointer(machine.root());
        let table = Stage2::new(format, machine, pointer).map_err(|_| Refused::NoMemory)?;
        Ok(Arc::new(Self {
            vm: Vm::new(settings, table),
            shootdown,
            pointer,
            ram: Mutex::new(Vec::new()),
        }))
    }

    /// Gives the VM zeroed memory of `bytes` bytes at guest-physical `at`, both whole pages.
    pub(crate) fn add_memory(
        &self,
        id: u16,
        at: u64,
        bytes: u64,
        flags: SlotFlags,
        kind: SlotKind,
    ) -> Result<(), Refused> {
        let ram = GuestRam::new(bytes).ok_or(Refused::NoMemory)?;
        let base = Gfn::try_new(at / FRAME).ok_or(Refused::NoMemory)?;
        let slot = Memslot::new(SlotId(id), base, bytes / FRAME, ram.at().get(), flags, kind)?;
        self.vm.memory.create_slot(slot)?;
        self.ram.lock().push((at, ram));
        Ok(())
    }

    /// Copies bytes into the guest's memory; says whether they fit into one slot.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> bool {
        self.with_ram(at, |ram, offset| ram.write(offset, bytes)) == Some(true)
    }

    /// Writes eight bytes.
    pub(crate) fn set_word(&self, at: u64, value: u64) -> bool {
        self.write(at, &value.to_le_bytes())
    }

    /// Reads eight bytes.
    pub(crate) fn word(&self, at: u64) -> Option<u64> {
        self.with_ram(at, |ram, offset| ram.word(offset))?
    }

    fn with_ram<R>(&self, at: u64, f: impl FnOnce(&GuestRam, u64) -> R) -> Option<R> {
        let ram = self.ram.lock();
        let (base, ram) = ram
            .iter()
            .find(|(base, ram)| (*base..*base + ram.bytes()).contains(&at))?;
        Some(f(ram, at - base))
    }

    /// Host-physical address of the table's root.
    pub(crate) const fn root(&self) -> u64 {
        self.pointer & 0x000f_ffff_ffff_f000
    }

    /// The raw EPT entry that decides about an address, and its level: as the hardware reads it.
    pub(crate) fn ept_entry(&self, at: u64) -> (u64, u8) {
        let mut table = self.pointer & 0x000f_ffff_ffff_f000;
        for level in 0..4 {
            let index = at >> (39 - 9 * level) & 0x1ff;
            let entry = arch::read_table(table + 8 * index);
            let leaf = level == 3 || entry & 7 == 0 || entry & 0x80 != 0;
            if leaf {
                return (entry, level);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        (0, 0)
    }

    /// Gives the leaf of an address the reserved memory type 2, for the scenario that needs a
    /// malformed entry.
    pub(crate) fn spoil_entry(&self, at: u64) {
        let mut table = self.pointer & 0x000f_ffff_ffff_f000;
        for level in 0..4 {
            let entry_at = table + 8 * (at >> (39 - 9 * level) & 0x1ff);
            let entry = arch::read_table(entry_at);
            if level == 3 || entry & 0x80 != 0 {
                arch::spoil_type(entry_at);
                return;
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
    }
}

/// Answers for the exit handlers.
struct Host<'a>(&'a GuestVm);

impl handle::Machine for Host<'_> {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Answer {
        arch::cpu::cpuid(leaf, subleaf)
    }

    fn now(&self) -> u64 {
        arch::cpu::timestamp()
    }

    fn guest_word(&self, at: Ipa) -> Option<u64> {
        self.0.word(at.get())
    }
}

/// Why a vCPU's loop came back to its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// VMCALL; the result goes to RAX.
    Hypercall,
    /// Nothing can wake the vCPU.
    Halted,
    /// The owner's deadline is over.
    Deadline,
    /// The guest has asked for a reset of its machine.
    Reset,
    /// The vCPU has ended.
    End(End),
}

/// A vCPU of one VM, on the CPU that created it.
#[derive(Debug)]
pub(crate) struct GuestCpu<'a> {
    cpu: &'a Cpu,
    guest: Arc<GuestVm>,
    /// The vCPU.
    pub(crate) vcpu: Vcpu<LoadedVmcs>,
    fpu: Box<FpuState>,
    msrs: SwappedMsrs,
    debug: DebugRegisters,
    vpid: u16,
}

impl<'a> GuestCpu<'a> {
    /// vCPU `number`, ready to start. `vm_number` tells VMs apart that exist at one time.
    pub(crate) fn new(cpu: &'a Cpu, guest: &Arc<GuestVm>, vm_number: u16, number: u8) -> Self {
        let settings = &guest.vm.settings;
        let vmcs = LoadedVmcs::new(cpu.capabilities.revision);
        // Translations are tagged by vCPU: two of one VM have different tables of their own.
        let vpid = 1 + vm_number * 16 + u16::from(number);
        let mut vcpu = Vcpu::new(number, vmcs, settings.physical_bits, settings.mtrrs);
        start::write_constants(
            &mut vcpu.vmcs,
            &cpu.capabilities,
            vpid,
            guest.pointer,
            MsrBitmap::address(),
        );
        Self {
            cpu,
            guest: Arc::clone(guest),
            vcpu,
            fpu: Box::new(FpuState::new()),
            msrs: SwappedMsrs::default(),
            debug: DebugRegisters::default(),
            vpid,
        }
    }

    /// Sets the vCPU's registers for a start. Its MTRRs and PAT are as after power-on.
    pub(crate) fn start(&mut self, start: Start) {
        self.vcpu.vmcs.make_current();
        let cd = start::write_start(&mut self.vcpu.vmcs, start);
        let relax = core::hint::spin_loop;
        self.guest
            .vm
            .memory
            .write_cd(&mut self.vcpu.types, cd, relax);
        self.vcpu.flush = true;
        self.vcpu.halted = false;
    }

    /// Runs until the owner is needed, at most `microseconds` long.
    pub(crate) fn run(&mut self, ports: &mut dyn Ports, microseconds: u64) -> Stop {
        let limit = microseconds.saturating_mul(arch::time::hz()) / 1_000_000;
        let end = arch::cpu::timestamp().saturating_add(limit);
        self.vcpu.vmcs.make_current();
        self.fpu.load();
        self.msrs.load();
        self.debug.load();
        let stop = loop {
            if let Some(stop) = self.step(ports, end) {
                break stop;
            }
        };
        self.debug.save();
        self.msrs.save();
        self.fpu.save();
        stop
    }

    /// One stay in the guest and what follows from its exit.
    fn step(&mut self, ports: &mut dyn Ports, end: u64) -> Option<Stop> {
        let now = arch::cpu::timestamp();
        if now >= end {
            return Some(Stop::Deadline);
        }
        ports.poll(now);
        if ports.wants_reset() {
            return Some(Stop::Reset);
        }
        self.prepare_interrupts(ports, now);
        if self.vcpu.halted {
            return self
                .can_wake(ports)
                .then_some(())
                .map_or(Some(Stop::Halted), |()| None);
        }
        self.set_timer(ports, now, end);
        if let Err(end) = self.enter() {
            return Some(Stop::End(end));
        }
        if let Exit::Interrupt(_) = Exit::read(&self.vcpu.vmcs) {
            arch::smp::end_of_interrupt();
        }
        match handle::handle(&mut self.vcpu, &self.guest.vm, &Host(&self.guest)) {
            Next::Resume => None,
            Next::End(end) => Some(Stop::End(end)),
            Next::Ask(request) => self.serve(ports, request),
        }
    }

    fn serve(&mut self, ports: &mut dyn Ports, request: Request) -> Option<Stop> {
        let now = arch::cpu::timestamp();
        match request {
            Request::Hypercall => return Some(Stop::Hypercall),
            Request::Output { port, width, value } => ports.output(port, width, value, now),
            Request::Input { port, width } => {
                let value = ports.input(port, width, now);
                self.vcpu.set_input(width, value);
            }
            Request::Pause => arch::unblock_nmi(),
            // Others look into their mailboxes before they enter. One that is about to enter
            // misses the kick; then its slice is the bound.
            Request::Message(_) => self.guest.shootdown.inside().for_each(arch::smp::kick),
            Request::Halt => {}
        }
        None
    }

    /// Whether anything can still end a HLT.
    fn can_wake(&self, ports: &dyn Ports) -> bool {
        let timer = self.vcpu.apic.deadline().is_some() || ports.deadline().is_some();
        self.vcpu.interrupts_enabled() && (timer || self.guest.vm.settings.apic)
    }

    /// Delivers the most urgent interrupt, or asks for an exit when the guest takes one.
    fn prepare_interrupts(&mut self, ports: &mut dyn Ports, now: u64) {
        let mailbox = &self.guest.vm.mail[usize::from(self.vcpu.number)];
        self.vcpu.apic.collect(mailbox, now);
        let waiting = self.vcpu.apic.pending().is_some() || ports.interrupting();
        let takes = waiting && self.vcpu.takes_interrupts();
        if takes {
            match self.vcpu.apic.pending() {
                Some(vector) => {
                    self.vcpu.apic.accept(vector);
                    self.vcpu.interrupt(vector);
                }
                None => {
                    if let Some(vector) = ports.acknowledge() {
                        self.vcpu.interrupt(vector);
                    }
                }
            }
        }
        self.set_window(waiting && !takes);
    }

    fn set_window(&mut self, wanted: bool) {
        let controls = self.vcpu.vmcs.read(Field::PRIMARY_CONTROLS);
        let bit = u64::from(PRIMARY_INTERRUPT_WINDOW);
        let next = if wanted {
            controls | bit
        } else {
            controls & !bit
        };
        if next != controls {
            self.vcpu.vmcs.write(Field::PRIMARY_CONTROLS, next);
        }
    }

    /// The stay ends when the next timer of the guest is due, or after a slice.
    fn set_timer(&mut self, ports: &dyn Ports, now: u64, end: u64) {
        let slice = now + SLICE * arch::time::hz() / 1_000_000;
        let timers = [self.vcpu.apic.deadline(), ports.deadline(), Some(end)];
        let until = timers.into_iter().flatten().fold(slice, u64::min);
        let ticks = until.saturating_sub(now) >> self.cpu.capabilities.timer_shift;
        self.vcpu.vmcs.write(Field::PREEMPTION_TIMER, ticks.max(1));
    }

    /// One VM entry and exit.
    fn enter(&mut self) -> Result<(), End> {
        let guest = &self.guest;
        let _pass = loop {
            // The gate is closed only while slots are being locked or rewritten.
            if let Ok(pass) = guest.vm.memory.enter() {
                break pass;
            }
            core::hint::spin_loop();
        };
        if core::mem::take(&mut self.vcpu.flush) {
            arch::invvpid(self.vpid);
        }
        guest
            .shootdown
            .enter(self.cpu.number, || arch::invept(guest.pointer));
        let entered = arch::enter(&mut self.vcpu.vmcs, &mut self.vcpu.registers);
        guest.shootdown.leave(self.cpu.number);
        if entered {
            // An event that was injected has been delivered, or comes back by `redeliver`.
            return Ok(());
        }
        let why = self.vcpu.vmcs.read(Field::INSTRUCTION_ERROR);
        crate::say!("ravelin: VM entry failed, instruction error {why}");
        Err(End::EntryFailed("entry refused by the instruction"))
    }

    /// Waits for the start-up message that an application processor waits for.
    pub(crate) fn wait_for_start(&mut self, microseconds: u64) -> bool {
        let end = arch::cpu::timestamp() + microseconds * arch::time::hz() / 1_000_000;
        while arch::cpu::timestamp() < end {
            let mailbox = &self.guest.vm.mail[usize::from(self.vcpu.number)];
            if let Some(page) = mailbox.take_start() {
                self.start(Start::StartUp(page));
                return true;
            }
            core::hint::spin_loop();
        }
        false
    }
}
