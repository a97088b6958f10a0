//! What scenarios share: a 64-bit guest that does what it is told, and words to check it with.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;

use memslot::policy::EptPolicy;
use memslot::slot::{SlotFlags, SlotKind};
use vmx::ports::{NoPorts, Ports};
use vmx::start::Start;
use vmx::vm::VmSettings;

use crate::arch::{self, Cpu, guests};
use crate::guest::{GuestCpu, GuestVm, Stop};

/// Why a scenario failed.
pub(super) type Check<T = ()> = Result<T, String>;

/// Fails the scenario unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($why:tt)*) => {
        if !$condition {
            return Err(alloc::format!($($why)*));
        }
    };
}
pub(super) use ensure;

/// One mebibyte.
pub(super) const MIB: u64 = 1 << 20;
/// The low slot of every driven guest: number and size.
pub(super) const LOW_SLOT: u16 = 0;
const LOW_BYTES: u64 = 2 * MIB;
/// Longest that a guest may take for an operation, in microseconds.
const OPERATION: u64 = 200_000;

/// Guest-physical places of the driven guest.
const GDT: u64 = 0x500;
const IDT_POINTER: u64 = 0x600;
const COUNT: u64 = 0x700;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const DIRECTORY: u64 = 0x4000;
const IDT: u64 = 0x5000;
const CODE: u64 = 0x8000;

/// What the guest can be told, in the order of guests.S.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Op {
    Load,
    Store,
    Call,
    ReadMsr,
    WriteMsr,
    Cr0,
    Cr4,
    Cr8,
    Cpuid,
    In,
    Out,
    Vmxoff,
    Wait,
    Halt,
    Count,
    Nothing,
    TripleFault,
    Touch,
    Wbinvd,
    Spin,
    Rounds,
    Debug,
    Outs,
    Lmsw,
    Clts,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is done; its result.
    Done(u64),
    /// It raised this exception.
    Raised(u64),
    /// The guest did not come back.
    Stopped(Stop),
}

/// Settings of a VM with the machine's clock, MTRRs and local APICs.
pub(super) fn settings(cpu: &Cpu, policy: EptPolicy) -> VmSettings {
    VmSettings {
        policy,
        mtrrs: true,
        apic: true,
        physical_bits: cpu.capabilities.ept.output_bits,
        tsc_hz: arch::time::hz() as u32,
        locked_limit: 1 << 16,
    }
}

/// A VM with the low slot and the driven program in it, in 64-bit mode.
pub(super) fn driven_vm(cpu: &Cpu, policy: EptPolicy) -> Check<Arc<GuestVm>> {
    let vm = GuestVm::new(&cpu.capabilities, settings(cpu, policy)).map_err(refused)?;
    let (flags, kind) = (SlotFlags::empty(), SlotKind::Ram);
    vm.add_memory(LOW_SLOT, 0, LOW_BYTES, flags, kind)
        .map_err(refused)?;
    // Flat segments: code at 0x10, data at 0x18.
    let gdt = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    write_words(&vm, GDT, &gdt)?;
    write_words(&vm, PML4, &[PDPT | 7])?;
    write_words(&vm, PDPT, &[DIRECTORY | 7])?;
    for n in 0..512 {
        write_words(&vm, DIRECTORY + 8 * n, &[n << 21 | 0x87])?;
    }
    for (vector, offset) in [(13, 0x80), (6, 0x90), (14, 0xa0), (0x50, 0xb0)] {
        let gate = (CODE + offset) | 0x10 << 16 | 0x8e00 << 32;
        write_words(&vm, IDT + 16 * vector, &[gate, 0])?;
    }
    // LIDT's operands: the table above, and none at all.
    ensure!(
        vm.write(IDT_POINTER, &pointer(0xfff, IDT)) && vm.write(IDT_POINTER + 0x10, &pointer(0, 0)),
        "no room for the guest's tables"
    );
    ensure!(vm.write(CODE, guests::driven()), "no room for the guest");
    Ok(vm)
}

fn pointer(limit: u16, base: u64) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&limit.to_le_bytes());
    bytes[2..].copy_from_slice(&base.to_le_bytes());
    bytes
}

fn write_words(vm: &GuestVm, at: u64, words: &[u64]) -> Check {
    for (n, word) in (0..).zip(words) {
        ensure!(vm.set_word(at + 8 * n, *word), "no guest memory at {at:#x}");
    }
    Ok(())
}

/// A refusal in words.
pub(super) fn refused(why: impl core::fmt::Debug) -> String {
    format!("refused: {why:?}")
}

/// A guest that waits for orders, on this CPU.
pub(super) struct Driven<'a> {
    pub(super) vm: Arc<GuestVm>,
    pub(super) cpu: GuestCpu<'a>,
}

impl<'a> Driven<'a> {
    /// A VM of its own.
    pub(super) fn new(cpu: &'a Cpu, policy: EptPolicy) -> Check<Self> {
        let vm = driven_vm(cpu, policy)?;
        Self::in_vm(cpu, vm, 0)
    }

    /// The boot vCPU of a VM that [`driven_vm`] has made.
    pub(super) fn in_vm(cpu: &'a Cpu, vm: Arc<GuestVm>, vm_number: u16) -> Check<Self> {
        let mut guest = GuestCpu::new(cpu, &vm, vm_number, 0);
        guest.start(Start::LongMode {
            rip: CODE,
            cr3: PML4,
            rsp: 0x7000,
            gdt: GDT,
        });
        let mut driven = Self { vm, cpu: guest };
        match driven.wait(&mut NoPorts) {
            Answer::Done(_) => Ok(driven),
            other => Err(format!("the guest did not start: {other:?}")),
        }
    }

    /// Gives the VM memory.
    pub(super) fn add(
        &self,
        id: u16,
        at: u64,
        bytes: u64,
        flags: SlotFlags,
        kind: SlotKind,
    ) -> Check {
        self.vm
            .add_memory(id, at, bytes, flags, kind)
            .map_err(refused)
    }

    /// Gives an order.
    pub(super) fn order(&mut self, op: Op, b: u64, c: u64) {
        let r = &mut self.cpu.vcpu.registers;
        (r.rax, r.rbx, r.rcx) = (op as u64, b, c);
    }

    /// Waits until an order is done.
    pub(super) fn wait(&mut self, ports: &mut dyn Ports) -> Answer {
        match self.cpu.run(ports, OPERATION) {
            Stop::Hypercall => {
                let r = &self.cpu.vcpu.registers;
                if r.rax == 0 {
                    Answer::Done(r.rdx)
                } else {
                    Answer::Raised(r.rax)
                }
            }
            stop => Answer::Stopped(stop),
        }
    }

    /// Gives an order and waits.
    pub(super) fn does(&mut self, op: Op, b: u64, c: u64) -> Answer {
        self.order(op, b, c);
        self.wait(&mut NoPorts)
    }

    /// An order that must succeed; its result.
    pub(super) fn must(&mut self, op: Op, b: u64, c: u64) -> Check<u64> {
        match self.does(op, b, c) {
            Answer::Done(result) => Ok(result),
            other => Err(format!("{op:?} {b:#x} {c:#x}: {other:?}")),
        }
    }

    /// A register write that must succeed.
    pub(super) fn wrmsr(&mut self, register: u32, value: u64) -> Check {
        self.must(Op::WriteMsr, value, register.into()).map(drop)
    }

    /// Touches an address and gives the low byte of its EPT leaf less the permissions: type in
    /// bits 5:3, ignore-PAT in bit 6.
    pub(super) fn type_at(&mut self, at: u64) -> Check<u64> {
        self.must(Op::Load, at, 0)?;
        let (entry, _) = self.vm.ept_entry(at);
        ensure!(entry & 7 != 0, "no leaf at {at:#x}");
        Ok(entry & 0x78)
    }

    /// The leaf at an address has this type now, without touching it first.
    pub(super) fn has_leaf(&self, at: u64) -> bool {
        self.vm.ept_entry(at).0 & 7 != 0
    }

    /// Interrupts that the guest's handler of vector 0x50 has counted.
    pub(super) fn interrupts(&self) -> u64 {
        self.vm.word(COUNT).unwrap_or(0)
    }
}
