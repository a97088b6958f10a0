//! What EL2 decides about a guest's exceptions, without touching a register.
//!
//! The exit handler reads the syndrome, asks one of these, and does what the answer says:
//!
//! | exception | ask | then |
//! | --- | --- | --- |
//! | HVC | [`smccc::call`] | `Return`: write `x0` to `x3`; power actions as [`psci::Action`] says; `Firmware`: an SMC |
//! | SMC | nobody | undefined-instruction exception |
//! | MSR, MRS, SYS (0x18) | [`sysreg::decide`] | [`sysreg::Outcome`]; all but `Undefined` step over the instruction |
//! | data abort without memory | [`mmio::decode`] | emulate, then [`mmio::MmioAccess::loaded`]; or an external abort |
//! | class that [`is_undefined`] names | – | undefined-instruction exception |
//!
//! A VM has one [`idregs::GuestIds`], one [`psci::Power`]; a vCPU has one
//! [`timer::EmulatedTimer`], whose interrupt is PPI 30. Nothing here allocates, blocks or panics.

pub mod entropy;
pub mod idregs;
pub mod mmio;
pub mod protected;
pub mod psci;
pub mod smccc;
pub mod sysreg;
pub mod timer;

/// INTID of the emulated EL1 physical timer (Arm BSA, DEN 0094, "Recommended PPI assignments").
pub const PHYSICAL_TIMER_PPI: u32 = 30;

/// Whether an exception class from a guest means an instruction that its identification registers
/// hide: pointer authentication (where the core's keys are not the guest's), SVE, SME, LS64, ERET
/// and TSTART traps, memory copy instructions, SMC (Arm ARM D24.2.40, table of classes).
///
/// Of the others, WFI (0x01), FP (0x07), HVC (0x16), system registers (0x18) and aborts (0x20,
/// 0x24) have a meaning of their own; 0x0e (illegal state), 0x22 and 0x26 (alignment) and debug
/// exceptions do not reach EL2 with the traps that guests run under.
#[must_use]
pub const fn is_undefined(class: u8) -> bool {
    matches!(
        class,
        0x00 | 0x09 | 0x0a | 0x14 | 0x17 | 0x19 | 0x1a | 0x1b | 0x1d | 0x27
    )
}
