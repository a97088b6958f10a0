//! System registers that EL2 reads or writes outside a context switch, as safe functions.

use aarch64_cpu::asm::random::ArmRng;
use aarch64_cpu::registers::{
    CNTFRQ_EL0, CNTPCT_EL0, CurrentEL, ELR_EL2, ESR_EL2, FAR_EL2, HCR_EL2, HPFAR_EL2,
    ID_AA64DFR0_EL1, ID_AA64ISAR0_EL1, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1, ID_AA64MMFR2_EL1,
    ID_AA64PFR0_EL1, ID_AA64PFR1_EL1, MIDR_EL1, MPIDR_EL1, Readable, SCTLR_EL1, SCTLR_EL2,
    SPSR_EL2, VBAR_EL1, VBAR_EL2,
};
use aarch64_cpu::registers::{ELR_EL1, ESR_EL1, FAR_EL1, SPSR_EL1, Writeable};
use el2::esr;
use el2::features::IdRegisters;
use el2::guest::sysreg::VmRegister;
use el2::inject::{Entry, Interrupted};

use super::instructions::isb;

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
/// Writes a system register by name, one on which EL2's own execution does not depend.
macro_rules! msr {
    ($name:literal, $value:expr) => {{
        const { assert!($crate::arch::regs::is_for_lower_levels($name)) };
        let value: u64 = $value;
        // SAFETY: the register only governs EL1 and EL0, or what they are returned to (just
        // asserted): EL2 runs on its own stage 1, vectors, stacks and masks, without VHE.
        unsafe {
            core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) value,
                options(nostack, preserves_flags));
        }
    }};
}
pub(crate) use {mrs, msr};

/// Registers of EL2, and such without a name for all assemblers, that any value may be written to.
///
/// What a wrong one breaks is the isolation of EL1's worlds, which no type guards, not EL2's own
/// memory. Not here, for that reason: what holds EL2's tables, its stack, its vectors, its masks.
#[rustfmt::skip]
const FOR_LOWER_LEVELS: [&str; 89] = [
    // Stage 2, traps and identity.
    "vtcr_el2", "vttbr_el2", "cptr_el2", "hstr_el2", "hacr_el2", "mdcr_el2", "vpidr_el2",
    "vmpidr_el2",
    // Where an exception to EL2 returns to: not to EL2, see `return_as`.
    "elr_el2",
    // The core's own controls, EL2's trace, streaming mode, FPMR.
    "actlr_el2", "s3_4_c1_c2_1", "s3_3_c4_c2_2", "s3_3_c4_c4_2",
    // Timers, CNTHV_CTL_EL2 the last one; EL2 masks the interrupts of its own.
    "cnthctl_el2", "cntvoff_el2", "cnthp_cval_el2", "cnthp_ctl_el2", "s3_4_c14_c3_1",
    // Pointer authentication keys, low and high.
    "s3_0_c2_c1_0", "s3_0_c2_c1_1", "s3_0_c2_c1_2", "s3_0_c2_c1_3", "s3_0_c2_c2_0", "s3_0_c2_c2_1",
    "s3_0_c2_c2_2", "s3_0_c2_c2_3", "s3_0_c2_c3_0", "s3_0_c2_c3_1",
    // SCXTNUM_EL0, SCXTNUM_EL1.
    "s3_3_c13_c0_7", "s3_0_c13_c0_7",
    // PMSCR_EL1, PMBLIMITR_EL1, TRFCR_EL1, TRBLIMITR_EL1.
    "s3_0_c9_c9_0", "s3_0_c9_c10_0", "s3_0_c1_c2_1", "s3_0_c9_c11_0",
    "pmcr_el0",
    // BRBCR_EL1, BRBCR_EL2, PMSCR_EL2.
    "s2_1_c9_c0_0", "s2_4_c9_c0_0", "s3_4_c9_c9_0",
    // ZCR_EL2, SMCR_EL2, HCRX_EL2.
    "s3_4_c1_c2_0", "s3_4_c1_c2_6", "s3_4_c1_c2_2",
    // TCR2_EL1, SCTLR2_EL1, GCSCR_EL1, GCSCRE0_EL1.
    "s3_0_c2_c0_3", "s3_0_c1_c0_3", "s3_0_c2_c5_0", "s3_0_c2_c5_2",
    // LORC_EL1, MPAMHCR_EL2, MPAM2_EL2.
    "s3_0_c10_c4_3", "s3_4_c10_c4_0", "s3_4_c10_c5_0",
    // VDISR_EL2, VSESR_EL2.
    "s3_4_c12_c1_1", "s3_4_c5_c2_3",
    // Fine-grained traps: HFGRTR, HFGWTR, HFGITR, HDFGRTR, HDFGWTR, HAFGRTR, and the second ones.
    "s3_4_c1_c1_4", "s3_4_c1_c1_5", "s3_4_c1_c1_6", "s3_4_c3_c1_4", "s3_4_c3_c1_5", "s3_4_c3_c1_6",
    "s3_4_c3_c1_2", "s3_4_c3_c1_3", "s3_4_c3_c1_7", "s3_4_c3_c1_0", "s3_4_c3_c1_1",
    // ICC_SRE_EL2, ICC_SGI1R_EL1, ICH_HCR_EL2, ICH_VMCR_EL2.
    "s3_4_c12_c9_5", "s3_0_c12_c11_5", "s3_4_c12_c11_0", "s3_4_c12_c11_7",
    // ICH_AP0R<n>_EL2, ICH_AP1R<n>_EL2.
    "s3_4_c12_c8_0", "s3_4_c12_c8_1", "s3_4_c12_c8_2", "s3_4_c12_c8_3", "s3_4_c12_c9_0",
    "s3_4_c12_c9_1", "s3_4_c12_c9_2", "s3_4_c12_c9_3",
    // ICH_LR<n>_EL2.
    "s3_4_c12_c12_0", "s3_4_c12_c12_1", "s3_4_c12_c12_2", "s3_4_c12_c12_3", "s3_4_c12_c12_4",
    "s3_4_c12_c12_5", "s3_4_c12_c12_6", "s3_4_c12_c12_7", "s3_4_c12_c13_0", "s3_4_c12_c13_1",
    "s3_4_c12_c13_2", "s3_4_c12_c13_3", "s3_4_c12_c13_4", "s3_4_c12_c13_5", "s3_4_c12_c13_6",
    "s3_4_c12_c13_7",
];

/// Whether EL2's own execution does not depend on the register.
pub(crate) const fn is_for_lower_levels(name: &str) -> bool {
    let name = name.as_bytes();
    if let [.., b'_', b'e', b'l', b'0' | b'1'] = name {
        return true;
    }
    let mut n = 0;
    while n < FOR_LOWER_LEVELS.len() {
        if is_same(name, FOR_LOWER_LEVELS[n].as_bytes()) {
            return true;
        }
        n += 1;
    }
    false
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    let mut n = 0;
    while n < a.len() && n < b.len() {
        if a[n] != b[n] {
            return false;
        }
        n += 1;
    }
    a.len() == b.len()
}

/// HCR_EL2.E2H, with which EL2 would have another translation regime.
const E2H: u64 = 1 << 34;
/// The bit of SPSR_EL2 that all of EL2's and EL3's modes have, and none that EL1 or EL0 uses.
const PRIVILEGED: u64 = 1 << 3;

/// Writes HCR_EL2, without VHE.
#[inline]
pub(crate) fn set_hcr(value: u64) {
    HCR_EL2.set(value & !E2H);
}

/// Writes SPSR_EL2: the level, the mode and the flags that an exception to EL2 returns to. Never
/// EL2, where the address may be anybody's.
#[inline]
pub(crate) fn return_as(pstate: u64) {
    SPSR_EL2.set(pstate & !PRIVILEGED);
}

/// Makes this core take its exceptions at EL2 by this table, one of vectors.S and guest.S.
pub(crate) fn set_vectors(table: u64) {
    VBAR_EL2.set(table);
    isb();
}

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
        pfr2: mrs!("s3_0_c0_c4_2"), // ID_AA64PFR2_EL1; reads as zero where it is not defined
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
}

/// Reads them; they hold until the next exception to EL2.
pub(crate) fn syndrome() -> Syndrome {
    Syndrome {
        esr: ESR_EL2.get(),
        far: FAR_EL2.get(),
        hpfar: HPFAR_EL2.get(),
    }
}

/// FAR_EL2 and HPFAR_EL2 alone.
pub(crate) fn fault_addresses() -> (u64, u64) {
    (FAR_EL2.get(), HPFAR_EL2.get())
}

/// Where the exception returns to, and as what: ELR_EL2 and SPSR_EL2.
pub(crate) fn return_state() -> (u64, u64) {
    (ELR_EL2.get(), SPSR_EL2.get())
}

/// ESR_EL2 alone: most exceptions need no more.
pub(crate) fn esr() -> u64 {
    ESR_EL2.get()
}

/// Steps the interrupted code over the instruction that trapped.
#[inline]
pub(crate) fn skip_instruction() {
    if SPSR_EL2.get() & esr::AARCH32 == 0 {
        ELR_EL2.set(ELR_EL2.get().wrapping_add(4));
    } else {
        skip_instruction_of_32_bit_code();
    }
}

#[cold]
fn skip_instruction_of_32_bit_code() {
    let (pc, pstate) = esr::behind(ELR_EL2.get(), SPSR_EL2.get(), ESR_EL2.get());
    ELR_EL2.set(pc);
    SPSR_EL2.set(pstate);
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
    return_as(entry.spsr);
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
    msr!("cnthp_cval_el2", deadline);
    msr!("cnthp_ctl_el2", 1);
}

/// Stops it.
pub(crate) fn stop_el2_timer() {
    msr!("cnthp_ctl_el2", 0);
}

/// SCTLR_EL1 of the guest that is loaded.
pub(crate) fn sctlr_el1() -> u64 {
    SCTLR_EL1.get()
}

/// Writes a register of EL1 for the guest that is loaded, whose own write was trapped.
pub(crate) fn write_vm_register(register: VmRegister, value: u64) {
    match register {
        VmRegister::Sctlr => msr!("sctlr_el1", value),
        VmRegister::Ttbr0 => msr!("ttbr0_el1", value),
        VmRegister::Ttbr1 => msr!("ttbr1_el1", value),
        VmRegister::Tcr => msr!("tcr_el1", value),
        VmRegister::Esr => msr!("esr_el1", value),
        VmRegister::Far => msr!("far_el1", value),
        VmRegister::Afsr0 => msr!("afsr0_el1", value),
        VmRegister::Afsr1 => msr!("afsr1_el1", value),
        VmRegister::Mair => msr!("mair_el1", value),
        VmRegister::Amair => msr!("amair_el1", value),
        VmRegister::ContextIdr => msr!("contextidr_el1", value),
    }
}

/// Random numbers of the RNDR instruction (Arm ARM D24.2.143); `None` where there is no such
/// instruction, or it has none now.
pub(crate) fn random() -> Option<u64> {
    ArmRng::new()?.rndr()
}
