//! Trapped system registers and system instructions of a guest (exception class 0x18).
//!
//! The traps that lead here: HCR_EL2.{TSW, TIDCP, TACR, TLOR, TID1, TID3, TERR, TVM}, CPTR_EL2.{TTA,
//! TAM}, MDCR_EL2.{TPM, TPMCR, TDRA, TDOSA, TDA, TPMS, TTRF, TDCC}, CNTHCTL_EL2.EL1PCEN = 0, GIC
//! SGI registers under IMO and FMO, and fine-grained traps left at zero.
//!
//! Invariant: a register that is on no list is undefined. What the guest's identification
//! registers ([`super::idregs`]) hide is undefined here too, so a guest that believes them never
//! meets a trap that surprises it; the exceptions read as zero and ignore writes, each with its
//! reason below.
//!
//! Source: Arm ARM (DDI 0487) D24.2.40 "ISS encoding for an exception from MSR, MRS, or System
//! instruction execution in AArch64 state", C5.1.2 (encodings), D24.2 (registers).

use super::idregs::GuestIds;
use super::timer::TimerRegister;

/// Encoding of a register or system instruction.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct SysReg(u16);

impl SysReg {
    /// The register `S<op0>_<op1>_C<crn>_C<crm>_<op2>`; each part is cut to its width.
    #[must_use]
    pub const fn new(op0: u8, op1: u8, crn: u8, crm: u8, op2: u8) -> Self {
        let (high, low) = ((op0 & 3) as u16, (op1 & 7) as u16);
        let (crn, crm) = ((crn & 15) as u16, (crm & 15) as u16);
        Self(high << 14 | low << 11 | crn << 7 | crm << 3 | (op2 & 7) as u16)
    }

    /// op0, op1, CRn, CRm, op2.
    #[must_use]
    pub const fn parts(self) -> (u8, u8, u8, u8, u8) {
        (
            self.bits(14, 3),
            self.bits(11, 7),
            self.bits(7, 15),
            self.bits(3, 15),
            self.bits(0, 7),
        )
    }

    const fn bits(self, shift: u32, mask: u8) -> u8 {
        (self.0 >> shift).to_le_bytes()[0] & mask
    }
}

impl core::fmt::Debug for SysReg {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (op0, op1, crn, crm, op2) = self.parts();
        write!(f, "S{op0}_{op1}_C{crn}_C{crm}_{op2}")
    }
}

/// What the instruction does with the register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// MRS or SYSL: into the general register.
    Read,
    /// MSR or SYS: from the general register.
    Write,
}

/// A decoded trap.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Trapped {
    /// The register.
    pub register: SysReg,
    /// The general register, 0 to 31; 31 is the zero register.
    pub rt: u8,
    /// Read or write.
    pub direction: Direction,
}

impl Trapped {
    /// Decodes the ISS of exception class 0x18. Bits above the encoding are ignored.
    #[must_use]
    pub fn decode(iss: u32) -> Self {
        let part = |shift: u32, mask: u8| (iss >> shift).to_le_bytes()[0] & mask;
        Self {
            register: SysReg::new(
                part(20, 3),
                part(14, 7),
                part(10, 15),
                part(1, 15),
                part(17, 7),
            ),
            rt: part(5, 31),
            direction: if iss & 1 != 0 {
                Direction::Read
            } else {
                Direction::Write
            },
        }
    }
}

/// Group of a software-generated interrupt as a guest without security states sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SgiGroup {
    /// ICC_SGI0R_EL1, and ICC_ASGI1R_EL1, which with GICD_CTLR.DS set is the same (Arm GIC
    /// architecture, IHI 0069, 12.2.1).
    Zero,
    /// ICC_SGI1R_EL1.
    One,
}

/// EL1 registers whose writes HCR_EL2.TVM traps.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum VmRegister {
    /// SCTLR_EL1.
    Sctlr,
    /// TTBR0_EL1.
    Ttbr0,
    /// TTBR1_EL1.
    Ttbr1,
    /// TCR_EL1.
    Tcr,
    /// ESR_EL1.
    Esr,
    /// FAR_EL1.
    Far,
    /// AFSR0_EL1.
    Afsr0,
    /// AFSR1_EL1.
    Afsr1,
    /// MAIR_EL1.
    Mair,
    /// AMAIR_EL1.
    Amair,
    /// CONTEXTIDR_EL1.
    ContextIdr,
}

/// What to do. Unless it is [`Outcome::Undefined`], the instruction is stepped over afterwards.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Put this into the general register.
    Read(u64),
    /// The write has no effect.
    WriteIgnored,
    /// Send an SGI: the general register says which, and to whom (`crate::vgic`).
    Sgi(SgiGroup),
    /// ICC_DIR_EL1, trapped by ICH_HCR_EL2.TDIR: deactivate the interrupt in the general register.
    Deactivate,
    /// Cache maintenance by set and way: clean and invalidate the guest's memory, and set
    /// HCR_EL2.TVM until its caches are on (spec: arm.md 2.12).
    SetWay,
    /// Write the general register's value into this EL1 register, and look at SCTLR_EL1.{M, C}.
    VmControl(VmRegister),
    /// Access the emulated EL1 physical timer, [`super::timer::EmulatedTimer`].
    PhysicalTimer(TimerRegister),
    /// Read CNTPCT_EL0 for the guest; only if CNTHCTL_EL2.EL1PCTEN is clear.
    PhysicalCounter,
    /// Inject an undefined-instruction exception; nothing is stepped over.
    Undefined,
}

/// The general register, 0 to 31, that an access with this syndrome writes into ICC_SGI1R_EL1, if it does:
/// [`Outcome::Sgi`] without a look at all others.
#[must_use]
#[inline]
pub const fn sgi_written(iss: u32) -> Option<u8> {
    /// op0 3, op1 0, CRn 12, CRm 11, op2 5, and a write.
    const SGI1R: u32 = 3 << 20 | 5 << 17 | 12 << 10 | 11 << 1;
    /// All of the encoding but Rt.
    const LOOKED_AT: u32 = 0x3f_ffff & !(31 << 5);
    if iss & LOOKED_AT == SGI1R {
        Some((iss >> 5).to_le_bytes()[0] & 31)
    } else {
        None
    }
}

/// Decides about an access. `ids` is what the guest's identification registers read as.
#[must_use]
pub fn decide(trapped: Trapped, ids: &GuestIds) -> Outcome {
    let (register, direction) = (trapped.register, trapped.direction);
    match register.parts() {
        (3, 0, 0, crm @ 1..=7, op2) => read_only(direction, ids.read(crm, op2)),
        (3, 0, 12, ..) | (3, 4, 12, ..) => interrupt_controller(register, direction, ids),
        (3, 3, 14, ..) => timer(register, direction),
        (2, 0 | 3, 0..=7, ..) => debug(register, direction),
        (1, 0, 7, 6 | 10 | 14, 2) => set_way(direction),
        (3, 0, 5, 3..=5, _) => error_record(register, direction),
        // ACTLR_EL1: IMPLEMENTATION DEFINED controls stay EL2's; Linux and UEFI read it.
        (3, 0, 1, 0, 1) => zero(direction),
        // REVIDR_EL1 and AIDR_EL1 tell one of a maker's chips from another; a guest's kernel reads them.
        (3, 0, 0, 0, 6) | (3, 1, 0, 0, 7) => read_only(direction, 0),
        _ => vm_control(register, direction),
    }
}

/// A register that can only be read: a write is undefined (Arm ARM D24.2, the ID registers).
const fn read_only(direction: Direction, value: u64) -> Outcome {
    match direction {
        Direction::Read => Outcome::Read(value),
        Direction::Write => Outcome::Undefined,
    }
}

/// A register that can only be written.
const fn write_only(direction: Direction, outcome: Outcome) -> Outcome {
    match direction {
        Direction::Read => Outcome::Undefined,
        Direction::Write => outcome,
    }
}

/// Reads as zero, ignores writes.
const fn zero(direction: Direction) -> Outcome {
    fixed(direction, 0)
}

const fn fixed(direction: Direction, value: u64) -> Outcome {
    match direction {
        Direction::Read => Outcome::Read(value),
        Direction::Write => Outcome::WriteIgnored,
    }
}

/// DC ISW, CSW and CISW. The forms for tags (op2 4 and 6) need MTE, which is hidden.
const fn set_way(direction: Direction) -> Outcome {
    write_only(direction, Outcome::SetWay)
}

/// Group `ICC_*`: only with a GICv3. The rest of them, ICV_* at EL1, do not trap.
fn interrupt_controller(register: SysReg, direction: Direction, ids: &GuestIds) -> Outcome {
    /// SRE, DFB and DIB: the system registers are all there is (IHI 0069 12.2.22).
    const SRE_ONLY: u64 = 0b111;
    if !ids.has_gic_registers() {
        return Outcome::Undefined;
    }
    match register.parts() {
        (3, 0, 12, 11, 5) => write_only(direction, Outcome::Sgi(SgiGroup::One)),
        (3, 0, 12, 11, 6 | 7) => write_only(direction, Outcome::Sgi(SgiGroup::Zero)),
        (3, 0, 12, 11, 1) => write_only(direction, Outcome::Deactivate),
        (3, 0, 12, 12, 5) => fixed(direction, SRE_ONLY),
        _ => Outcome::Undefined,
    }
}

/// CNTP_*_EL0 is emulated. The virtual timer is the guest's own and does not trap.
fn timer(register: SysReg, direction: Direction) -> Outcome {
    match register.parts() {
        (_, _, _, 2, 0) => Outcome::PhysicalTimer(TimerRegister::Tval),
        (_, _, _, 2, 1) => Outcome::PhysicalTimer(TimerRegister::Ctl),
        (_, _, _, 2, 2) => Outcome::PhysicalTimer(TimerRegister::Cval),
        // CNTPCT_EL0 and, with FEAT_ECV, CNTPCTSS_EL0.
        (_, _, _, 0, 1 | 5) => match direction {
            Direction::Read => Outcome::PhysicalCounter,
            Direction::Write => Outcome::Undefined,
        },
        // PMEV* (CRm 8 to 15): no PMU. Everything else is nobody's.
        _ => Outcome::Undefined,
    }
}

/// Self-hosted debug: present, because the architecture has no way to say it is not, but without
/// effect. Breakpoints and watchpoints read as disabled and stay so.
fn debug(register: SysReg, direction: Direction) -> Outcome {
    /// OSLSR_EL1.OSLM = 0b10: the OS lock is implemented; OSLK clear: it is not locked.
    const OS_LOCK_OPEN: u64 = 1 << 3;
    match register.parts() {
        // DBGBVR, DBGBCR, DBGWVR, DBGWCR <n>.
        (2, 0, 0, _, 4..=7) => zero(direction),
        // OSDTRRX, MDCCINT, MDSCR, OSDTRTX, OSECCR.
        (2, 0, 0, 0 | 3 | 6, 2) | (2, 0, 0, 2, 0 | 2) => zero(direction),
        // MDRAR, OSLAR, OSLSR, OSDLR, DBGPRCR.
        (2, 0, 1, 0, 0) => read_only(direction, 0),
        (2, 0, 1, 0, 4) => write_only(direction, Outcome::WriteIgnored),
        (2, 0, 1, 1, 4) => read_only(direction, OS_LOCK_OPEN),
        (2, 0, 1, 3 | 4, 4) => zero(direction),
        // DBGCLAIMSET, DBGCLAIMCLR, DBGAUTHSTATUS.
        (2, 0, 7, 8 | 9, 6) => zero(direction),
        (2, 0, 7, 14, 6) => read_only(direction, 0),
        // MDCCSR_EL0, DBGDTR_EL0, DBGDTRRX/TX_EL0: nobody is at the other end.
        (2, 3, 0, 1, 0) => read_only(direction, 0),
        (2, 3, 0, 4 | 5, 0) => zero(direction),
        _ => Outcome::Undefined,
    }
}

/// RAS error records: the guest sees none (ERRIDR_EL1.NUM = 0). They read as zero although RAS is
/// hidden, because firmware written for one core touches them without asking (as KVM answers).
fn error_record(register: SysReg, direction: Direction) -> Outcome {
    match register.parts() {
        // ERRIDR_EL1, ERXFR_EL1.
        (_, _, _, 3, 0) | (_, _, _, 4, 0) => read_only(direction, 0),
        // ERRSELR, ERXCTLR, ERXSTATUS, ERXADDR, ERXPFG*, ERXMISC0 to 3.
        (_, _, _, 3, 1) | (_, _, _, 4, 1..=3 | 5 | 6) | (_, _, _, 5, 0..=3) => zero(direction),
        // ERXPFGF_EL1.
        (_, _, _, 4, 4) => read_only(direction, 0),
        _ => Outcome::Undefined,
    }
}

/// Writes under HCR_EL2.TVM; reads of them do not trap.
fn vm_control(register: SysReg, direction: Direction) -> Outcome {
    let target = match register.parts() {
        (3, 0, 1, 0, 0) => VmRegister::Sctlr,
        (3, 0, 2, 0, 0) => VmRegister::Ttbr0,
        (3, 0, 2, 0, 1) => VmRegister::Ttbr1,
        (3, 0, 2, 0, 2) => VmRegister::Tcr,
        (3, 0, 5, 1, 0) => VmRegister::Afsr0,
        (3, 0, 5, 1, 1) => VmRegister::Afsr1,
        (3, 0, 5, 2, 0) => VmRegister::Esr,
        (3, 0, 6, 0, 0) => VmRegister::Far,
        (3, 0, 10, 2, 0) => VmRegister::Mair,
        (3, 0, 10, 3, 0) => VmRegister::Amair,
        (3, 0, 13, 0, 1) => VmRegister::ContextIdr,
        _ => return Outcome::Undefined,
    };
    write_only(direction, Outcome::VmControl(target))
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "sysreg_tests.rs"]
mod tests;
