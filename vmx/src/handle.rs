//! What happens at an exit. Everything that needs no register of the machine is decided here;
//! what is left goes to the VM's owner as a [`Request`], or ends the vCPU.

use memslot::fault::{FaultOutcome, Stage2Fault};
use stage2::{Ipa, Platform};

use crate::apic::Message;
use crate::cpuid::{self, Answer};
use crate::cr::{self, Cr0Change};
use crate::exit::{CrAccess, Direction, Exit, Width};
use crate::field::{Field, Vmcs};
use crate::msr;
use crate::vcpu::{Exception, Vcpu};
use crate::vm::Vm;

/// What the machine under the hypervisor answers.
pub trait Machine {
    /// CPUID.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Answer;
    /// The time-stamp counter.
    fn now(&self) -> u64;
    /// Eight bytes of the guest's memory, if there is any at this address.
    fn guest_word(&self, at: Ipa) -> Option<u64>;
}

/// What the owner of the VM is asked for. The instruction has been stepped over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// VMCALL: number and arguments are in RAX, RBX, RCX, RDX; the result goes to RAX.
    Hypercall,
    /// A byte, word or double word goes to a port.
    Output {
        /// Port.
        port: u16,
        /// Bytes.
        width: Width,
        /// What was written.
        value: u32,
    },
    /// The guest reads a port; the answer goes into RAX by [`Vcpu::set_input`].
    Input {
        /// Port.
        port: u16,
        /// Bytes.
        width: Width,
    },
    /// The vCPU waits for an interrupt.
    Halt,
    /// Other vCPUs have mail.
    Message(Message),
    /// The owner wanted the vCPU out, or its time is over.
    Pause,
}

/// Why a vCPU does not run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest destroyed itself.
    TripleFault,
    /// The hardware refused to enter.
    EntryFailed(&'static str),
    /// An EPT entry is malformed: the hypervisor's defect.
    Misconfigured(Ipa),
    /// An access where there is no memory, and no device that this hypervisor emulates.
    NoDevice(Stage2Fault),
    /// The owner has not supplied memory, or tables are exhausted.
    NoMemory(Ipa),
    /// INS or OUTS to this port.
    StringIo(u16),
    /// An exit that no guest of ours can cause.
    Unexpected(Exit),
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// Enter the guest again.
    Resume,
    /// Ask the owner, then enter again.
    Ask(Request),
    /// The vCPU has ended.
    End(End),
}

impl<V: Vmcs> Vcpu<V> {
    /// Gives the guest the answer to [`Request::Input`]. A double word clears the upper half of
    /// RAX, as on the machine.
    pub fn set_input(&mut self, width: Width, value: u32) {
        let rax = self.registers.rax;
        self.registers.rax = match width {
            1 => rax & !0xff | u64::from(value & 0xff),
            2 => rax & !0xffff | u64::from(value & 0xffff),
            _ => u64::from(value),
        };
    }
}

/// Handles the exit that the vCPU's VMCS describes.
pub fn handle<V: Vmcs, P: Platform>(
    vcpu: &mut Vcpu<V>,
    vm: &Vm<P>,
    machine: &impl Machine,
) -> Next {
    let exit = Exit::read(&vcpu.vmcs);
    vm.exits.count(&exit);
    vcpu.redeliver();
    match exit {
        Exit::Memory(fault) => memory(vcpu, vm, &fault),
        Exit::Kick => {
            vcpu.allow_kicks();
            Next::Ask(Request::Pause)
        }
        Exit::Interrupt(_) | Exit::Timer => Next::Ask(Request::Pause),
        Exit::InterruptWindow => Next::Resume,
        Exit::Control(access) => control(vcpu, vm, machine, access),
        Exit::ReadMsr | Exit::WriteMsr => model_specific(vcpu, vm, machine, exit),
        Exit::Undefined(_) => raise(vcpu, Exception::Undefined),
        Exit::Misconfigured(at) => Next::End(End::Misconfigured(at)),
        Exit::TripleFault => Next::End(End::TripleFault),
        Exit::EntryFailed(why) => Next::End(End::EntryFailed(why)),
        Exit::StringIo(port) => Next::End(End::StringIo(port)),
        Exit::Exception(_) | Exit::Other { .. } => Next::End(End::Unexpected(exit)),
        Exit::Cpuid | Exit::Hypercall | Exit::Halt | Exit::CacheFlush | Exit::Io { .. } => {
            vcpu.advance();
            instruction(vcpu, vm, machine, exit)
        }
    }
}

/// Instructions that always succeed; stepped over already.
fn instruction<V: Vmcs, P: Platform>(
    vcpu: &mut Vcpu<V>,
    vm: &Vm<P>,
    machine: &impl Machine,
    exit: Exit,
) -> Next {
    match exit {
        Exit::Cpuid => answer_cpuid(vcpu, vm, machine),
        Exit::Hypercall => return Next::Ask(Request::Hypercall),
        Exit::Halt => {
            vcpu.halted = true;
            return Next::Ask(Request::Halt);
        }
        Exit::Io {
            port,
            width,
            direction,
        } => return Next::Ask(port_access(vcpu, port, width, direction)),
        // WBINVD: the guest's memory is coherent for everyone who can see it, or its type
        // honours the guest's own uncached mappings.
        _ => {}
    }
    Next::Resume
}

fn port_access<V: Vmcs>(vcpu: &Vcpu<V>, port: u16, width: Width, direction: Direction) -> Request {
    if direction == Direction::In {
        return Request::Input { port, width };
    }
    let [a, b, c, d, ..] = vcpu.registers.rax.to_le_bytes();
    let value = match width {
        1 => u32::from(a),
        2 => u32::from_le_bytes([a, b, 0, 0]),
        _ => u32::from_le_bytes([a, b, c, d]),
    };
    Request::Output { port, width, value }
}

fn answer_cpuid<V: Vmcs, P: Platform>(vcpu: &mut Vcpu<V>, vm: &Vm<P>, machine: &impl Machine) {
    let (leaf, subleaf) = (low_half(vcpu.registers.rax), low_half(vcpu.registers.rcx));
    let cpu = vm.cpu(vcpu.number);
    let [a, b, c, d] = cpuid::answer(leaf, subleaf, &cpu, |l, s| machine.cpuid(l, s));
    let r = &mut vcpu.registers;
    (r.rax, r.rbx, r.rcx, r.rdx) = (a.into(), b.into(), c.into(), d.into());
}

fn memory<V: Vmcs, P: Platform>(vcpu: &Vcpu<V>, vm: &Vm<P>, fault: &Stage2Fault) -> Next {
    match vm.memory.handle_fault(fault, &vcpu.types) {
        Ok(FaultOutcome::Resolved | FaultOutcome::Retry) => Next::Resume,
        Ok(FaultOutcome::Mmio | FaultOutcome::Abort) => Next::End(End::NoDevice(*fault)),
        Ok(FaultOutcome::NoFrame(_)) | Err(_) => Next::End(End::NoMemory(fault.ipa)),
    }
}

fn model_specific<V: Vmcs, P: Platform>(
    vcpu: &mut Vcpu<V>,
    vm: &Vm<P>,
    machine: &impl Machine,
    exit: Exit,
) -> Next {
    let (register, now) = (low_half(vcpu.registers.rcx), machine.now());
    let done = if exit == Exit::ReadMsr {
        msr::read(vcpu, vm, register, now).map(|value| {
            vcpu.set_edx_eax(value);
            None
        })
    } else {
        msr::write(vcpu, vm, register, vcpu.edx_eax(), now)
    };
    match done {
        Ok(message) => {
            vcpu.advance();
            if let Some(message) = message {
                vm.post(message);
            }
            message.map_or(Next::Resume, |m| Next::Ask(Request::Message(m)))
        }
        Err(_) => raise(vcpu, Exception::Protection),
    }
}

fn control<V: Vmcs, P: Platform>(
    vcpu: &mut Vcpu<V>,
    vm: &Vm<P>,
    machine: &impl Machine,
    access: CrAccess,
) -> Next {
    let done = match access {
        CrAccess::Write { cr: 0, register } => {
            let value = vcpu.register(register);
            write_cr0(vcpu, vm, machine, value)
        }
        CrAccess::Lmsw(word) => {
            // Bits 3:0 only; PE is set, never cleared.
            let old = cr::cr0(&vcpu.vmcs);
            let value = old & !0xe | u64::from(word & 0xf);
            write_cr0(vcpu, vm, machine, value)
        }
        CrAccess::Write { cr: 4, register } => {
            let value = vcpu.register(register);
            vcpu.flush = true;
            cr::write_cr4(&mut vcpu.vmcs, value)
        }
        CrAccess::Write { cr: 8, register } => write_cr8(vcpu, register),
        CrAccess::Read { cr: 8, register } => {
            vcpu.set_register(register, vcpu.apic.task_class().into());
            Ok(())
        }
        // CLTS and the other registers are the guest's own.
        _ => return Next::End(End::Unexpected(Exit::Control(access))),
    };
    match done {
        Ok(()) => {
            vcpu.advance();
            Next::Resume
        }
        Err(cr::Fault) => raise(vcpu, Exception::Protection),
    }
}

/// The types change before the guest runs again, and no leaf that they make stale is left.
fn write_cr0<V: Vmcs, P: Platform>(
    vcpu: &mut Vcpu<V>,
    vm: &Vm<P>,
    machine: &impl Machine,
    value: u64,
) -> Result<(), cr::Fault> {
    let Cr0Change {
        cd,
        load_pdptes,
        flush,
    } = cr::write_cr0(&mut vcpu.vmcs, value)?;
    vcpu.flush |= flush;
    if load_pdptes {
        let table = vcpu.vmcs.read(Field::CR3) & 0xffff_ffe0;
        for (n, field) in (0u64..).zip(Field::PDPTES) {
            let word = machine.guest_word(Ipa::new(table + 8 * n)).unwrap_or(0);
            vcpu.vmcs.write(field, word);
        }
    }
    if cd != vcpu.types.cd {
        vm.memory
            .write_cd(&mut vcpu.types, cd, core::hint::spin_loop);
    }
    Ok(())
}

fn write_cr8<V: Vmcs>(vcpu: &mut Vcpu<V>, register: u8) -> Result<(), cr::Fault> {
    match u8::try_from(vcpu.register(register)) {
        Ok(class @ 0..=15) => {
            vcpu.apic.set_task_class(class);
            Ok(())
        }
        _ => Err(cr::Fault),
    }
}

fn raise<V: Vmcs>(vcpu: &mut Vcpu<V>, exception: Exception) -> Next {
    vcpu.raise(exception);
    Next::Resume
}

const fn low_half(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
pub(crate) mod tests;
