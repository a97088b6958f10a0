//! System registers that EL2 reads or writes outside a context switch, as safe functions.

use aarch64_cpu::registers::{
    CNTFRQ_EL0, CNTPCT_EL0, CurrentEL, ELR_EL2, ESR_EL2, FAR_EL2, HPFAR_EL2, ID_AA64DFR0_EL1,
    ID_AA64ISAR0_EL1, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1, ID_AA64MMFR2_EL1, ID_AA64PFR0_EL1,
    ID_AA64PFR1_EL1, MIDR_EL1, MPIDR_EL1, Readable, SCTLR_EL1, SCTLR_EL2, SPSR_EL2, VBAR_EL1,
};
use aarch64_cpu::registers::{ELR_EL1, ESR_EL1, FAR_EL1, SPSR_EL1, Writeable};
use el2::features::IdRegisters;
use el2::guest::sysreg::VmRegister;
use el2::inject::{Entry, Interrupted};

/// Reads a system register by name.
macro_rules! mrs {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading this register has no side effect.
        unsafe {
            core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value,
                options(nomem, nostack, preserves_flags));
        }
        value
    }};
}
/// Writes a system register by name. The caller says why that is sound.
macro_rules! msr {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) value,
            options(nostack, preserves_flags));
    }};
}
pub(crate) use {mrs, msr};

/// Affinity fields of MPIDR_EL1.
pub(crate) fn mpidr() -> u64 {
    MPIDR_EL1.get() & 0xff_00ff_ffff
}

/// Whether this core runs at EL2.
pub(crate) fn at_el2() -> bool {
    CurrentEL.get() == 2 << 2
}

/// The physical counter.
pub(crate) fn ticks() -> u64 {
    CNTPCT_EL0.get()
}

/// Counter ticks per second; never 0.
pub(crate) fn ticks_per_second() -> u64 {
    CNTFRQ_EL0.get().max(1)
}

/// Whether the MMU is on. Before that, exclusive accesses and with them locks must not be used.
pub(crate) fn mmu_is_on() -> bool {
    at_el2() && SCTLR_EL2.get() & 1 != 0
}

/// This core's identification registers.
pub(crate) fn id_registers() -> IdRegisters {
    IdRegisters {
        midr: MIDR_EL1.get(),
        pfr0: ID_AA64PFR0_EL1.get(),
        pfr1: ID_AA64PFR1_EL1.get(),
        dfr0: ID_AA64DFR0_EL1.get(),
        isar0: ID_AA64ISAR0_EL1.get(),
        isar1: mrs!("id_aa64isar1_el1"),
        isar2: mrs!("s3_0_c0_c6_2"), // ID_AA64ISAR2_EL1; reads as zero where it is not defined
        mmfr0: ID_AA64MMFR0_EL1.get(),
        mmfr1: ID_AA64MMFR1_EL1.get(),
        mmfr2: ID_AA64MMFR2_EL1.get(),
        mmfr3: mrs!("s3_0_c0_c7_3"), // ID_AA64MMFR3_EL1; reads as zero where it is not defined
        ctr: mrs!("ctr_el0"),
    }
}

/// The syndrome registers of the exception that was just taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Syndrome {
    pub(crate) esr: u64,
    pub(crate) far: u64,
    pub(crate) hpfar: u64,
    pub(crate) elr: u64,
    pub(crate) spsr: u64,
}

/// Reads them; they hold until the next exception to EL2.
pub(crate) fn syndrome() -> Syndrome {
    Syndrome {
        esr: ESR_EL2.get(),
        far: FAR_EL2.get(),
        hpfar: HPFAR_EL2.get(),
        elr: ELR_EL2.get(),
        spsr: SPSR_EL2.get(),
    }
}

/// ESR_EL2 alone: most exceptions need no more.
pub(crate) fn esr() -> u64 {
    ESR_EL2.get()
}

/// Steps the interrupted code over the instruction that trapped: all of A64's have four bytes.
pub(crate) fn skip_instruction() {
    ELR_EL2.set(ELR_EL2.get().wrapping_add(4));
}

/// Makes the interrupted code repeat its HVC, behind which ELR_EL2 stands.
pub(crate) fn repeat_call() {
    ELR_EL2.set(ELR_EL2.get().wrapping_sub(4));
}

/// What an injection into EL1 reads.
pub(crate) fn interrupted(pan: bool, mte: bool) -> Interrupted {
    Interrupted {
        spsr: SPSR_EL2.get(),
        vbar: VBAR_EL1.get(),
        sctlr: SCTLR_EL1.get(),
        pan,
        mte,
    }
}

/// Makes the host, or the guest that is loaded, continue in its own exception handler.
pub(crate) fn inject(entry: &Entry) {
    ESR_EL1.set(entry.esr);
    pass_fault_address(entry);
    ELR_EL1.set(ELR_EL2.get());
    SPSR_EL1.set(SPSR_EL2.get());
    ELR_EL2.set(entry.pc);
    SPSR_EL2.set(entry.spsr);
}

fn pass_fault_address(entry: &Entry) {
    if entry.is_abort() {
        FAR_EL1.set(FAR_EL2.get());
    }
}

/// Whether the virtual timer of the guest that is loaded asserts its interrupt.
pub(crate) fn virtual_timer_fired() -> bool {
    mrs!("cntv_ctl_el0") & 0b111 == 0b101
}

/// When it will, in ticks of CNTPCT_EL0: the virtual counter is `offset` behind. `u64::MAX` if it
/// is off or masked.
pub(crate) fn virtual_timer_deadline(offset: u64) -> u64 {
    if mrs!("cntv_ctl_el0") & 0b11 == 0b01 {
        mrs!("cntv_cval_el0").saturating_add(offset)
    } else {
        u64::MAX
    }
}

/// Whether a physical interrupt waits for this core, masked or not (Arm ARM D24.2.71, ISR_EL1: at EL2
/// it shows physical ones).
pub(crate) fn interrupt_pending() -> bool {
    const F: u64 = 1 << 6;
    const I: u64 = 1 << 7;
    mrs!("isr_el1") & (I | F) != 0
}

/// Lets EL2's own timer end the guest's run at `deadline`.
pub(crate) fn start_el2_timer(deadline: u64) {
    // SAFETY: EL2's timer, whose interrupt EL2 masks; it ends a WFI or a guest's run at most.
    unsafe { msr!("cnthp_cval_el2", deadline) };
    // SAFETY: as above.
    unsafe { msr!("cnthp_ctl_el2", 1) };
}

/// Stops it.
pub(crate) fn stop_el2_timer() {
    // SAFETY: as above.
    unsafe { msr!("cnthp_ctl_el2", 0) };
}

/// SCTLR_EL1 of the guest that is loaded.
pub(crate) fn sctlr_el1() -> u64 {
    SCTLR_EL1.get()
}

/// Writes a register of EL1 for the guest that is loaded, whose own write was trapped.
pub(crate) fn write_vm_register(register: VmRegister, value: u64) {
    macro_rules! write {
        ($name:literal) => {
            // SAFETY: governs EL1 and EL0 only.
            unsafe { msr!($name, value) }
        };
    }
    match register {
        VmRegister::Sctlr => write!("sctlr_el1"),
        VmRegister::Ttbr0 => write!("ttbr0_el1"),
        VmRegister::Ttbr1 => write!("ttbr1_el1"),
        VmRegister::Tcr => write!("tcr_el1"),
        VmRegister::Esr => write!("esr_el1"),
        VmRegister::Far => write!("far_el1"),
        VmRegister::Afsr0 => write!("afsr0_el1"),
        VmRegister::Afsr1 => write!("afsr1_el1"),
        VmRegister::Mair => write!("mair_el1"),
        VmRegister::Amair => write!("amair_el1"),
        VmRegister::ContextIdr => write!("contextidr_el1"),
    }
}

/// Random numbers of the RNDR instruction (Arm ARM D24.2.143): zero flag set when it has none.
pub(crate) fn random() -> Option<u64> {
    let (value, failed): (u64, u64);
    // SAFETY: only called where ID_AA64ISAR0_EL1.RNDR says that the register is there.
    unsafe {
        core::arch::asm!("mrs {}, s3_3_c2_c4_0", "cset {}, eq", out(reg) value, out(reg) failed,
            options(nomem, nostack));
    }
    (failed == 0).then_some(value)
}
