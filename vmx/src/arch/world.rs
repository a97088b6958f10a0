//! The world switch, and what it leaves to software: FPU registers and a few MSRs.

use core::arch::asm;

use vmx::msr::SWAPPED;
use vmx::vcpu::GuestRegisters;

use super::LoadedVmcs;
use super::cpu::{rdmsr, wrmsr};

unsafe extern "C" {
    /// See world.S.
    fn vmx_enter(registers: *mut GuestRegisters, launched: u64) -> u64;
}

/// Enters the guest of the current VMCS and comes back at its next exit; `false` if the CPU
/// refused the instruction itself.
pub(crate) fn enter(vmcs: &mut LoadedVmcs, registers: &mut GuestRegisters) -> bool {
    // SAFETY: `vmcs` is current (its owner's duty) with this CPU's host state; world.S restores
    // everything that the ABI wants kept. Guest code reaches only memory that its EPT maps.
    let failed = unsafe { vmx_enter(registers, vmcs.launched.into()) };
    vmcs.launched |= failed == 0;
    failed == 0
}

/// After an exit by a non-maskable interrupt others are blocked until an IRET: the handler of
/// vector 2 is one.
pub(crate) fn unblock_nmi() {
    // SAFETY: the handler only returns.
    unsafe { asm!("int 2") };
}

/// FPU and SSE registers of one vCPU. The hypervisor itself uses none (soft-float target), so
/// they are swapped only when a CPU changes vCPUs.
#[derive(Debug)]
#[repr(C, align(16))]
pub(crate) struct FpuState([u8; 512]);

impl FpuState {
    /// After reset (SDM vol. 1 table 8-6, 10.2.3): FCW 0x37f, MXCSR 0x1f80.
    pub(crate) fn new() -> Self {
        let mut state = [0; 512];
        state[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        state[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Self(state)
    }

    /// Loads the registers.
    pub(crate) fn load(&self) {
        // SAFETY: 512 bytes, aligned, saved by FXSAVE or as after reset; CR4.OSFXSR is set.
        unsafe { asm!("fxrstor64 [{}]", in(reg) &raw const self.0, options(nostack)) };
    }

    /// Saves the registers.
    pub(crate) fn save(&mut self) {
        // SAFETY: 512 bytes, aligned.
        unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut self.0, options(nostack)) };
    }
}

/// The guest's values of MSRs that neither exit nor live in the VMCS. The hypervisor uses none
/// of them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SwappedMsrs([u64; SWAPPED.len()]);

impl SwappedMsrs {
    /// Loads the guest's values.
    pub(crate) fn load(&self) {
        for (register, value) in SWAPPED.into_iter().zip(self.0) {
            // SAFETY: registers of 64-bit mode; the values are zero or were read from them.
            unsafe { wrmsr(register, value) };
        }
    }

    /// Saves the guest's values.
    pub(crate) fn save(&mut self) {
        for (register, value) in SWAPPED.into_iter().zip(&mut self.0) {
            // SAFETY: registers of 64-bit mode.
            *value = unsafe { rdmsr(register) };
        }
    }
}

/// DR0 to DR3 and DR6 of one vCPU; DR7 is in the VMCS, and an exit clears the machine's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DebugRegisters([u64; 5]);

impl DebugRegisters {
    /// Loads the guest's values.
    pub(crate) fn load(&self) {
        let [d0, d1, d2, d3, d6] = self.0;
        // SAFETY: DR7 is clear outside guests, so no breakpoint is armed by this; DR6 was zero or
        // read from the register.
        unsafe {
            asm!(
                "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov dr6, {}",
                in(reg) d0, in(reg) d1, in(reg) d2, in(reg) d3, in(reg) d6,
                options(nomem, nostack, preserves_flags),
            );
        }
    }

    /// Saves the guest's values.
    pub(crate) fn save(&mut self) {
        let (d0, d1, d2, d3, d6): (u64, u64, u64, u64, u64);
        // SAFETY: reading them has no effect.
        unsafe {
            asm!(
                "mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3", "mov {}, dr6",
                out(reg) d0, out(reg) d1, out(reg) d2, out(reg) d3, out(reg) d6,
                options(nomem, nostack, preserves_flags),
            );
        }
        self.0 = [d0, d1, d2, d3, d6];
    }
}
