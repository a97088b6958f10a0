//! A vCPU: its VMCS, the registers that the VMCS does not hold, and its memory-type state.

use memslot::policy::VcpuTypes;

use crate::apic::LocalApic;
use crate::cr::PE;
use crate::field::{Field, Vmcs};

/// General registers and CR2, in the order in which the world switch stores them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct GuestRegisters {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RBP.
    pub rbp: u64,
    /// R8 to R15.
    pub r8_to_r15: [u64; 8],
    /// CR2.
    pub cr2: u64,
}

// The assembly knows these places.
const _: () = assert!(core::mem::offset_of!(GuestRegisters, rdi) == 0x28);
const _: () = assert!(core::mem::offset_of!(GuestRegisters, r8_to_r15) == 0x38);
const _: () = assert!(core::mem::offset_of!(GuestRegisters, cr2) == 0x78);
const _: () = assert!(core::mem::size_of::<GuestRegisters>() == 0x80);

/// One virtual CPU.
#[derive(Debug)]
pub struct Vcpu<V> {
    /// Its number in the VM, which is its APIC identifier.
    pub number: u8,
    /// Its VMCS, which is current on the CPU that the vCPU runs on.
    pub vmcs: V,
    /// General registers.
    pub registers: GuestRegisters,
    /// MTRRs, PAT, CR0.CD.
    pub types: VcpuTypes,
    /// Local interrupt controller.
    pub apic: LocalApic,
    /// Cached translations of the guest's own tables must go before the next entry.
    pub flush: bool,
    /// The vCPU has executed HLT and nothing has woken it.
    pub halted: bool,
}

/// Exceptions that are injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exception {
    /// #UD.
    Undefined = 6,
    /// #GP(0).
    Protection = 13,
}

/// Interruption word: valid; with error code; type hardware exception.
const VALID: u64 = 1 << 31;
const WITH_ERROR: u64 = 1 << 11;
const HARDWARE_EXCEPTION: u64 = 3 << 8;
/// Bits that an entry takes over from an interrupted delivery; bit 12 is undefined there.
const EVENT: u64 = VALID | 0xfff;
/// Interruptibility: STI, MOV SS.
const SHADOW: u64 = 0b11;
/// Interruptibility: non-maskable interrupts.
const NMI_BLOCKED: u64 = 1 << 3;
/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

impl<V: Vmcs> Vcpu<V> {
    /// A vCPU around a VMCS, with MTRRs of `physical_bits` if the VM has any.
    pub fn new(number: u8, vmcs: V, physical_bits: u8, mtrrs: bool) -> Self {
        Self {
            number,
            vmcs,
            registers: GuestRegisters::default(),
            types: VcpuTypes::new(physical_bits, mtrrs),
            apic: LocalApic::new(number),
            flush: true,
            halted: false,
        }
    }

    /// A general register by its number in instructions.
    pub fn register(&self, number: u8) -> u64 {
        let r = &self.registers;
        match number & 0xf {
            0 => r.rax,
            1 => r.rcx,
            2 => r.rdx,
            3 => r.rbx,
            4 => self.vmcs.read(Field::RSP),
            5 => r.rbp,
            6 => r.rsi,
            7 => r.rdi,
            n => r.r8_to_r15[usize::from(n - 8)],
        }
    }

    /// Writes a general register.
    pub fn set_register(&mut self, number: u8, value: u64) {
        let r = &mut self.registers;
        match number & 0xf {
            0 => r.rax = value,
            1 => r.rcx = value,
            2 => r.rdx = value,
            3 => r.rbx = value,
            4 => self.vmcs.write(Field::RSP, value),
            5 => r.rbp = value,
            6 => r.rsi = value,
            7 => r.rdi = value,
            n => r.r8_to_r15[usize::from(n - 8)] = value,
        }
    }

    /// EDX:EAX, as RDMSR and WRMSR have it.
    pub fn edx_eax(&self) -> u64 {
        self.registers.rdx << 32 | self.registers.rax & 0xffff_ffff
    }

    /// Sets EDX and EAX.
    pub fn set_edx_eax(&mut self, value: u64) {
        self.registers.rax = value & 0xffff_ffff;
        self.registers.rdx = value >> 32;
    }

    /// Steps over the instruction that exited.
    pub fn advance(&mut self) {
        let rip = self.vmcs.read(Field::RIP);
        let length = self.vmcs.read(Field::INSTRUCTION_LENGTH);
        self.vmcs.write(Field::RIP, rip.wrapping_add(length));
        let shadow = self.vmcs.read(Field::INTERRUPTIBILITY);
        self.vmcs.write(Field::INTERRUPTIBILITY, shadow & !SHADOW);
    }

    /// Raises an exception at the instruction that exited. In real mode there are no error
    /// codes.
    pub fn raise(&mut self, exception: Exception) {
        let protected = self.vmcs.read(Field::CR0) & PE != 0;
        let mut event = VALID | HARDWARE_EXCEPTION | u64::from(exception as u8);
        if exception == Exception::Protection && protected {
            event |= WITH_ERROR;
        }
        self.vmcs.write(Field::ENTRY_EVENT, event);
        self.vmcs.write(Field::ENTRY_EVENT_ERROR, 0);
    }

    /// Delivers again what an exit interrupted (SDM vol. 3C 28.2.4).
    pub fn redeliver(&mut self) {
        let event = self.vmcs.read(Field::VECTORING_EVENT);
        if event & VALID == 0 {
            return;
        }
        let error = self.vmcs.read(Field::VECTORING_ERROR);
        let length = self.vmcs.read(Field::INSTRUCTION_LENGTH);
        self.vmcs.write(Field::ENTRY_EVENT, event & EVENT);
        self.vmcs.write(Field::ENTRY_EVENT_ERROR, error);
        self.vmcs.write(Field::ENTRY_INSTRUCTION_LENGTH, length);
    }

    /// Ends blocking of non-maskable interrupts, which an exit by one may leave in the state that
    /// is entered again (Bochs 2.7 does). None is ever delivered to a guest, so it blocks none.
    pub fn allow_kicks(&mut self) {
        let state = self.vmcs.read(Field::INTERRUPTIBILITY);
        self.vmcs
            .write(Field::INTERRUPTIBILITY, state & !NMI_BLOCKED);
    }

    /// Whether the guest has interrupts enabled.
    pub fn interrupts_enabled(&self) -> bool {
        self.vmcs.read(Field::RFLAGS) & INTERRUPT_FLAG != 0
    }

    /// Whether an interrupt can be delivered with the next entry.
    pub fn takes_interrupts(&self) -> bool {
        self.interrupts_enabled()
            && self.vmcs.read(Field::INTERRUPTIBILITY) & SHADOW == 0
            && self.vmcs.read(Field::ENTRY_EVENT) & VALID == 0
    }

    /// Delivers an external interrupt with the next entry; the guest takes interrupts.
    pub fn interrupt(&mut self, vector: u8) {
        self.vmcs
            .write(Field::ENTRY_EVENT, VALID | u64::from(vector));
        self.halted = false;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::field::FakeVmcs;

    pub(crate) fn vcpu() -> Vcpu<FakeVmcs> {
        Vcpu::new(0, FakeVmcs::default(), 40, true)
    }

    #[test]
    fn register_numbers_are_those_of_instructions() {
        let mut v = vcpu();
        for n in 0..16 {
            v.set_register(n, 100 + u64::from(n));
        }
        assert_eq!(v.registers.rcx, 101);
        assert_eq!(v.registers.rbx, 103);
        assert_eq!(v.vmcs.read(Field::RSP), 104);
        assert_eq!(v.registers.r8_to_r15[7], 115);
        for n in 0..16 {
            assert_eq!(v.register(n), 100 + u64::from(n));
        }
    }

    #[test]
    fn real_mode_has_no_error_codes() {
        let mut v = vcpu();
        v.raise(Exception::Protection);
        assert_eq!(v.vmcs.read(Field::ENTRY_EVENT), 0x8000_030d);
        v.vmcs.write(Field::CR0, PE);
        v.raise(Exception::Protection);
        assert_eq!(v.vmcs.read(Field::ENTRY_EVENT), 0x8000_0b0d);
        v.raise(Exception::Undefined);
        assert_eq!(v.vmcs.read(Field::ENTRY_EVENT), 0x8000_0306);
    }

    #[test]
    fn an_interrupted_delivery_is_repeated() {
        let mut v = vcpu();
        v.redeliver();
        assert_eq!(v.vmcs.read(Field::ENTRY_EVENT), 0);
        v.vmcs.write(Field::VECTORING_EVENT, 0x8000_1b0e);
        v.vmcs.write(Field::VECTORING_ERROR, 2);
        v.redeliver();
        assert_eq!(v.vmcs.read(Field::ENTRY_EVENT), 0x8000_0b0e);
        assert_eq!(v.vmcs.read(Field::ENTRY_EVENT_ERROR), 2);
    }

    #[test]
    fn interrupts_wait_for_if_and_for_shadows() {
        let mut v = vcpu();
        assert!(!v.takes_interrupts());
        v.vmcs.write(Field::RFLAGS, 0x202);
        assert!(v.takes_interrupts());
        v.vmcs.write(Field::INTERRUPTIBILITY, 1);
        assert!(!v.takes_interrupts());
        v.advance();
        assert!(v.takes_interrupts());
        v.interrupt(0x20);
        assert!(!v.takes_interrupts());
    }
}
