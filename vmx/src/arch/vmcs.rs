//! A VMCS region and the instructions that work on the current one.

use core::arch::asm;

use vmx::field::{Field, Vmcs};

use super::cpu::{cr0, cr3, cr4, rdmsr};
use super::tables::{CODE, DATA, TASK, bases};
use super::{Frames, power, root};

const EFER: u32 = 0xc000_0080;
const PAT: u32 = 0x277;

/// A VMCS of this CPU. Reads and writes go to the CPU's current VMCS, so a CPU that has several
/// makes the right one current first.
#[derive(Debug)]
pub(crate) struct LoadedVmcs {
    region: Frames,
    /// VMRESUME from now on.
    pub(crate) launched: bool,
}

impl LoadedVmcs {
    /// A clear VMCS with this CPU's host state; it is current.
    pub(crate) fn new(revision: u32) -> Self {
        let mut vmcs = Self {
            region: root::vmcs_region(revision),
            launched: false,
        };
        vmcs.clear();
        vmcs.make_current();
        vmcs.write_host();
        vmcs
    }

    /// Makes this the CPU's current VMCS.
    pub(crate) fn make_current(&self) {
        let at = self.region.at().get();
        let failed: u8;
        // SAFETY: the CPU is in VMX root operation, and the region is a cleared VMCS of its own.
        unsafe { asm!("vmptrld [{}]", "setbe {}", in(reg) &raw const at, out(reg_byte) failed) };
        if failed != 0 {
            power::fatal(format_args!("VMPTRLD failed"));
        }
    }

    fn clear(&mut self) {
        let at = self.region.at().get();
        let failed: u8;
        // SAFETY: as above; the region's data is written back and the CPU lets go of it.
        unsafe { asm!("vmclear [{}]", "setbe {}", in(reg) &raw const at, out(reg_byte) failed) };
        debug_assert!(failed == 0, "the region is valid");
        self.launched = false;
    }

    /// What the CPU returns to at an exit, less RSP and RIP, which the world switch writes.
    fn write_host(&mut self) {
        let tables = bases();
        // SAFETY: every 64-bit CPU has it.
        let pat = unsafe { rdmsr(PAT) };
        // SAFETY: as above.
        let efer = unsafe { rdmsr(EFER) };
        let fields = [
            (Field::HOST_CR0, cr0()),
            (Field::HOST_CR3, cr3()),
            (Field::HOST_CR4, cr4()),
            (Field::HOST_CS_SELECTOR, CODE),
            (Field::HOST_SS_SELECTOR, DATA),
            (Field::HOST_DS_SELECTOR, DATA),
            (Field::HOST_ES_SELECTOR, DATA),
            (Field::HOST_FS_SELECTOR, 0),
            (Field::HOST_GS_SELECTOR, 0),
            (Field::HOST_TR_SELECTOR, TASK),
            (Field::HOST_TR_BASE, tables.task),
            (Field::HOST_GDTR_BASE, tables.gdt),
            (Field::HOST_IDTR_BASE, tables.idt),
            (Field::HOST_SYSENTER_CS, 0),
            (Field::HOST_PAT, pat),
            (Field::HOST_EFER, efer),
        ];
        for (field, value) in fields {
            self.write(field, value);
        }
    }
}

impl Drop for LoadedVmcs {
    /// The CPU must not write to the region after somebody else has it.
    fn drop(&mut self) {
        self.clear();
    }
}

impl Vmcs for LoadedVmcs {
    fn read(&self, field: Field) -> u64 {
        let value: u64;
        let failed: u8;
        // SAFETY: the CPU is in VMX root operation; at worst the field does not exist.
        unsafe {
            asm!(
                "vmread {}, {}", "setbe {}",
                out(reg) value, in(reg) u64::from(field.encoding()), out(reg_byte) failed,
                options(nostack),
            );
        }
        debug_assert!(failed == 0, "field {field:?}");
        if failed == 0 { value } else { 0 }
    }

    fn write(&mut self, field: Field, value: u64) {
        let failed: u8;
        // SAFETY: the CPU is in VMX root operation; what a field means is checked at VM entry.
        unsafe {
            asm!(
                "vmwrite {}, {}", "setbe {}",
                in(reg) u64::from(field.encoding()), in(reg) value, out(reg_byte) failed,
                options(nostack),
            );
        }
        debug_assert!(failed == 0, "field {field:?}");
    }
}
