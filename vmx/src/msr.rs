//! RDMSR and WRMSR of a guest.
//!
//! | registers | what happens |
//! |---|---|
//! | MTRRs, PAT | `memslot` keeps them, checks writes, and removes leaves whose type changes |
//! | EFER | checked; LMA follows paging |
//! | x2APIC | the vCPU's controller, if the VM has one |
//! | FS.base, GS.base, SYSENTER, SYSCALL | the guest's own: they do not exit |
//! | a few that every system reads | constants |
//! | all others | #GP |

use memslot::mtrr::Msr;
use stage2::Platform;

use crate::apic::{self, Message, Refused};
use crate::cr;
use crate::field::{Field, Vmcs};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const APIC_BASE: u32 = 0x1b;
const FEATURE_CONTROL: u32 = 0x3a;
const MICROCODE: u32 = 0x8b;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUGCTL: u32 = 0x1d9;
const EFER: u32 = 0xc000_0080;

/// Locked, VMX off.
const VMX_OFF: u64 = 1;
/// Fast string operations; no performance monitoring.
const FAST_STRINGS: u64 = 1;
/// The usual address, x2APIC mode, on.
const APIC_ON: u64 = 0xfee0_0000 | 1 << 10 | 1 << 11;
const BOOT_CPU: u64 = 1 << 8;

/// Registers that a guest uses without an exit: their values live in the VMCS or are swapped
/// with the vCPU.
pub const GUEST_OWNED: [u32; 10] = [
    0x174,
    0x175,
    0x176, // SYSENTER
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084, // STAR, LSTAR, CSTAR, FMASK
    0xc000_0100,
    0xc000_0101,
    0xc000_0102, // FS.base, GS.base, KernelGSbase
];

/// Registers of [`GUEST_OWNED`] that the VMCS does not hold.
pub const SWAPPED: [u32; 5] = [
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
];

/// The MSR bitmaps (SDM vol. 3C 25.6.9): every register exits but [`GUEST_OWNED`] and reads of
/// the time-stamp counter. 512 words of 64 bits: reads low, reads high, writes low, writes high.
#[must_use]
pub fn bitmap() -> [u64; 512] {
    let mut words = [u64::MAX; 512];
    let mut clear = |quarter: usize, register: u32| {
        let bit = (register & 0x1fff) as usize;
        words[quarter * 128 + bit / 64] &= !(1 << (bit % 64));
    };
    for register in GUEST_OWNED {
        let high = usize::from(register >= 0xc000_0000);
        clear(high, register);
        clear(2 + high, register);
    }
    clear(0, TSC);
    words
}

/// The guest reads `register`; `now` is the time-stamp counter.
///
/// # Errors
/// [`Refused`]: raise #GP.
pub fn read<V: Vmcs, P: Platform>(
    vcpu: &Vcpu<V>,
    vm: &Vm<P>,
    register: u32,
    now: u64,
) -> Result<u64, Refused> {
    if let Some(msr) = Msr::from_number(register) {
        return vcpu.types.mtrrs.read(msr).map_err(|_| Refused);
    }
    Ok(match register {
        EFER => vcpu.vmcs.read(Field::EFER),
        apic::FIRST..=apic::LAST if vm.settings.apic => return vcpu.apic.read(register, now),
        APIC_BASE if vm.settings.apic => APIC_ON | if vcpu.number == 0 { BOOT_CPU } else { 0 },
        APIC_BASE | PLATFORM_ID | MICROCODE | DEBUGCTL => 0,
        FEATURE_CONTROL => VMX_OFF,
        MISC_ENABLE => FAST_STRINGS,
        TSC => now,
        _ => return Err(Refused),
    })
}

/// The guest writes `register`. A change of a memory type is complete on all CPUs when this
/// returns; `relax` is called while another vCPU removes leaves. The message is for other vCPUs.
///
/// # Errors
/// [`Refused`]: raise #GP; nothing has changed.
pub fn write<V: Vmcs, P: Platform>(
    vcpu: &mut Vcpu<V>,
    vm: &Vm<P>,
    register: u32,
    value: u64,
    now: u64,
) -> Result<Option<Message>, Refused> {
    if let Some(msr) = Msr::from_number(register) {
        write_memory_type(vcpu, vm, msr, value)?;
        return Ok(None);
    }
    match register {
        EFER => cr::write_efer(&mut vcpu.vmcs, value).map_err(|_| Refused)?,
        apic::FIRST..=apic::LAST if vm.settings.apic => {
            return vcpu.apic.write(register, value, now);
        }
        APIC_BASE if Ok(value) == read(vcpu, vm, register, now) => {}
        MICROCODE | MISC_ENABLE => {}
        DEBUGCTL if value == 0 => {}
        _ => return Err(Refused),
    }
    Ok(None)
}

fn write_memory_type<V: Vmcs, P: Platform>(
    vcpu: &mut Vcpu<V>,
    vm: &Vm<P>,
    msr: Msr,
    value: u64,
) -> Result<(), Refused> {
    vm.memory
        .write_memory_type_msr(&mut vcpu.types, msr, value, core::hint::spin_loop)
        .map_err(|_| Refused)?;
    if msr == Msr::Pat {
        vcpu.vmcs.write(Field::PAT, value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::tests::{vcpu, vm};

    #[test]
    fn the_bitmaps_let_only_the_guests_own_registers_through() {
        let words = bitmap();
        let exits =
            |quarter: usize, bit: usize| words[quarter * 128 + bit / 64] >> (bit % 64) & 1 == 1;
        assert!(!exits(0, 0x10) && exits(2, 0x10));
        assert!(!exits(1, 0x100) && !exits(3, 0x100));
        assert!(exits(1, 0x80) && exits(3, 0x80), "EFER");
        assert!(exits(0, 0x277) && exits(2, 0x277), "PAT");
        let open: u32 = words.iter().map(|w| w.count_zeros()).sum();
        assert_eq!(open, 2 * 10 + 1);
    }

    #[test]
    fn bad_memory_types_fault_and_change_nothing() {
        let (vm, mut v) = (vm(), vcpu());
        for (register, value) in [
            (0x277, 0x0200),
            (0x2ff, 0x802),
            (0x200, 0x700),
            (0xfe, 0),
            (0x250, 3),
        ] {
            let before = v.types.clone();
            assert_eq!(
                write(&mut v, &vm, register, value, 0),
                Err(Refused),
                "{register:#x}"
            );
            assert_eq!(v.types, before);
            assert_eq!(v.vmcs.read(Field::PAT), 0, "PAT in the VMCS is untouched");
        }
    }

    #[test]
    fn pat_reaches_the_vmcs() {
        let (vm, mut v) = (vm(), vcpu());
        write(&mut v, &vm, 0x277, 0x0606_0606, 0).unwrap();
        assert_eq!(v.vmcs.read(Field::PAT), 0x0606_0606);
        assert_eq!(read(&v, &vm, 0x277, 0), Ok(0x0606_0606));
    }

    #[test]
    fn unknown_registers_fault() {
        let (vm, mut v) = (vm(), vcpu());
        for register in [0x480, 0x3a1, 0xc001_0015, 0xe1, 0x4000_0000] {
            assert_eq!(read(&v, &vm, register, 0), Err(Refused));
            assert_eq!(write(&mut v, &vm, register, 0, 0), Err(Refused));
        }
        assert_eq!(read(&v, &vm, FEATURE_CONTROL, 0), Ok(1));
        assert_eq!(write(&mut v, &vm, FEATURE_CONTROL, 5, 0), Err(Refused));
    }
}
