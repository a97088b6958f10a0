//! VM exits in neutral words: what the guest did, without a bit of the VMCS.
//!
//! | exit (SDM vol. 3D appendix C) | becomes |
//! |---|---|
//! | 48, EPT violation | [`Exit::Memory`]: the same [`Stage2Fault`] that an arm64 data abort becomes |
//! | 49, EPT misconfiguration | [`Exit::Misconfigured`]: a defect of the hypervisor, never resumed |
//! | 18 VMCALL; 10, 12, 28, 30, 31, 32 | hypercall, CPUID, HLT, control registers, I/O, MSRs |
//! | 0, 1, 7, 52 | interrupt of the host, interrupt window, preemption timer |
//! | 2, and 33 to 34 with bit 31 | triple fault, entry refused: the vCPU ends, by name |
//! | anything else | [`Exit::Other`] with its number and name |

use memslot::fault::{Access, FaultKind, Stage2Fault};
use stage2::Ipa;

use crate::field::{Field, Vmcs};

/// Width of an I/O access in bytes: 1, 2 or 4.
pub type Width = u8;

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    In,
    /// From the guest.
    Out,
}

/// What a guest did to a control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// `mov crN, register`.
    Write {
        /// N.
        cr: u8,
        /// General register, in the instruction's numbering.
        register: u8,
    },
    /// `mov register, crN`.
    Read {
        /// N.
        cr: u8,
        /// General register.
        register: u8,
    },
    /// `clts`.
    Clts,
    /// `lmsw` of these 16 bits.
    Lmsw(u16),
}

/// Why a guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An interrupt of the host, with its vector.
    Interrupt(u8),
    /// A non-maskable interrupt: another CPU wants this one out of the guest.
    Kick,
    /// The guest can take an interrupt now.
    InterruptWindow,
    /// The time that the vCPU was given is over.
    Timer,
    /// CPUID.
    Cpuid,
    /// VMCALL.
    Hypercall,
    /// HLT.
    Halt,
    /// WBINVD or INVD.
    CacheFlush,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// A control register.
    Control(CrAccess),
    /// IN or OUT.
    Io {
        /// Port.
        port: u16,
        /// Bytes.
        width: Width,
        /// Which way.
        direction: Direction,
    },
    /// INS or OUTS, which nothing here emulates.
    StringIo(u16),
    /// A second-stage fault.
    Memory(Stage2Fault),
    /// An EPT entry with reserved bits or types, and the address that led to it.
    Misconfigured(Ipa),
    /// A fault while a double fault was delivered.
    TripleFault,
    /// An exception that the hypervisor asked to see: vector.
    Exception(u8),
    /// The entry was refused: the basic reason's name.
    EntryFailed(&'static str),
    /// Instructions of VMX and others that a guest does not have: they raise #UD.
    Undefined(&'static str),
    /// Nothing that a guest of ours is expected to cause.
    Other {
        /// Basic exit reason.
        basic: u16,
        /// Its name.
        name: &'static str,
    },
}

impl Exit {
    /// Reads the reason from the VMCS of a vCPU that has just exited.
    #[must_use]
    pub fn read(vmcs: &impl Vmcs) -> Self {
        let reason = vmcs.read(Field::EXIT_REASON);
        let [low, high, _, top, ..] = reason.to_le_bytes();
        let basic = u16::from_le_bytes([low, high]);
        if top & 0x80 != 0 {
            return Self::EntryFailed(entry_failure(basic));
        }
        match basic {
            0 => exception(vmcs.read(Field::EXIT_EVENT)),
            1 => Self::Interrupt(low_byte(vmcs.read(Field::EXIT_EVENT))),
            2 => Self::TripleFault,
            7 => Self::InterruptWindow,
            10 => Self::Cpuid,
            12 => Self::Halt,
            13 | 54 => Self::CacheFlush,
            18 => Self::Hypercall,
            28 => Self::Control(control(vmcs.read(Field::QUALIFICATION))),
            30 => io(vmcs.read(Field::QUALIFICATION)),
            31 => Self::ReadMsr,
            32 => Self::WriteMsr,
            48 => Self::Memory(memory(vmcs)),
            49 => Self::Misconfigured(Ipa::new(vmcs.read(Field::GUEST_PHYSICAL))),
            52 => Self::Timer,
            basic => undefined(basic).map_or(
                Self::Other {
                    basic,
                    name: unexpected(basic),
                },
                Self::Undefined,
            ),
        }
    }

    /// A short name, for counters and reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Interrupt(_) => "interrupt",
            Self::Kick => "kick",
            Self::InterruptWindow => "interrupt window",
            Self::Timer => "timer",
            Self::Cpuid => "cpuid",
            Self::Hypercall => "hypercall",
            Self::Halt => "hlt",
            Self::CacheFlush => "wbinvd",
            Self::ReadMsr => "rdmsr",
            Self::WriteMsr => "wrmsr",
            Self::Control(_) => "control register",
            Self::Io { .. } => "i/o",
            Self::StringIo(_) => "string i/o",
            Self::Memory(_) => "memory fault",
            Self::Misconfigured(_) => "misconfiguration",
            Self::TripleFault => "triple fault",
            Self::Exception(_) => "exception",
            Self::EntryFailed(name) | Self::Undefined(name) | Self::Other { name, .. } => name,
        }
    }
}

const fn low_byte(word: u64) -> u8 {
    word.to_le_bytes()[0]
}

/// Bits 10:8 of an interruption word: 2 is an NMI.
fn exception(event: u64) -> Exit {
    if event >> 8 & 7 == 2 {
        Exit::Kick
    } else {
        Exit::Exception(low_byte(event))
    }
}

/// SDM vol. 3C 27.8, table 28-3: exit qualification for control-register accesses.
fn control(qualification: u64) -> CrAccess {
    let cr = low_byte(qualification) & 0xf;
    let register = low_byte(qualification >> 8) & 0xf;
    match qualification >> 4 & 3 {
        0 => CrAccess::Write { cr, register },
        1 => CrAccess::Read { cr, register },
        2 => CrAccess::Clts,
        _ => {
            let [_, _, low, high, ..] = (qualification).to_le_bytes();
            CrAccess::Lmsw(u16::from_le_bytes([low, high]))
        }
    }
}

/// SDM vol. 3C table 28-5: exit qualification for I/O instructions.
fn io(qualification: u64) -> Exit {
    let [_, _, low, high, ..] = qualification.to_le_bytes();
    let port = u16::from_le_bytes([low, high]);
    if qualification & 1 << 4 != 0 {
        return Exit::StringIo(port);
    }
    Exit::Io {
        port,
        width: low_byte(qualification & 7) + 1,
        direction: if qualification & 1 << 3 == 0 {
            Direction::Out
        } else {
            Direction::In
        },
    }
}

/// SDM vol. 3C table 28-7: exit qualification for EPT violations. The walk of the guest's own
/// tables counts as a write when EPT keeps accessed and dirty flags.
fn memory(vmcs: &impl Vmcs) -> Stage2Fault {
    let qualification = vmcs.read(Field::QUALIFICATION);
    let access = if qualification & 1 << 2 != 0 {
        Access::Fetch
    } else if qualification & 1 << 1 != 0 {
        Access::Write
    } else {
        Access::Read
    };
    let kind = if qualification & 0b11_1000 == 0 {
        FaultKind::Translation
    } else {
        FaultKind::Permission
    };
    Stage2Fault {
        ipa: Ipa::new(vmcs.read(Field::GUEST_PHYSICAL)),
        access,
        kind,
    }
}

const fn entry_failure(basic: u16) -> &'static str {
    match basic {
        33 => "entry refused: invalid guest state",
        34 => "entry refused: MSR loading",
        41 => "entry refused: machine check",
        _ => "entry refused",
    }
}

/// Instructions that exit whatever the controls say and that CPUID does not offer the guest.
const fn undefined(basic: u16) -> Option<&'static str> {
    Some(match basic {
        11 => "getsec",
        19..=27 | 50 | 53 => "vmx instruction",
        55 => "xsetbv",
        _ => return None,
    })
}

/// Names of the basic reasons that nothing else here decodes (SDM vol. 3D appendix C). Only a task switch exits
/// whatever the controls say; the others need one that is off.
const fn unexpected(basic: u16) -> &'static str {
    match basic {
        3 => "init",
        4 => "start-up message",
        5 | 6 => "system-management interrupt",
        8 => "nmi window",
        9 => "task switch",
        14 => "invlpg",
        15 => "rdpmc",
        16 | 51 => "rdtsc",
        17 => "rsm",
        29 => "debug register",
        36 => "mwait",
        37 => "monitor trap flag",
        39 => "monitor",
        40 => "pause",
        43 => "task priority below threshold",
        44 | 45 | 56 => "virtual apic",
        46 | 47 => "descriptor table",
        57 | 61 => "random number",
        58 => "invpcid",
        59 => "vmfunc",
        60 => "encls",
        62 => "page-modification log full",
        63 | 64 => "xsaves or xrstors",
        66 => "sub-page permission",
        67 | 68 => "umwait or tpause",
        _ => "unknown exit",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::FakeVmcs;

    fn exit(fields: &[(Field, u64)]) -> Exit {
        Exit::read(&FakeVmcs(fields.iter().copied().collect()))
    }

    fn fault(qualification: u64) -> Stage2Fault {
        let words = [
            (Field::EXIT_REASON, 48),
            (Field::QUALIFICATION, qualification),
            (Field::GUEST_PHYSICAL, 0x1234),
        ];
        match exit(&words) {
            Exit::Memory(fault) => fault,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ept_violations_become_second_stage_faults() {
        // 0x182 was seen for a store to an unmapped address.
        let store = fault(0x182);
        assert_eq!(
            (store.access, store.kind),
            (Access::Write, FaultKind::Translation)
        );
        assert_eq!(store.ipa, Ipa::new(0x1234));
        assert_eq!(fault(0x181).access, Access::Read);
        assert_eq!(fault(0x184).access, Access::Fetch);
        assert_eq!(fault(0x18a).kind, FaultKind::Permission);
        // A walk that reads and sets a flag.
        assert_eq!(fault(0x83).access, Access::Write);
    }

    #[test]
    fn io_is_decoded() {
        let out = [(Field::EXIT_REASON, 30), (Field::QUALIFICATION, 0x10_0040)];
        assert_eq!(
            exit(&out),
            Exit::Io {
                port: 0x10,
                width: 1,
                direction: Direction::Out
            }
        );
        let input = [(Field::EXIT_REASON, 30), (Field::QUALIFICATION, 0xcfc_000b)];
        assert_eq!(
            exit(&input),
            Exit::Io {
                port: 0xcfc,
                width: 4,
                direction: Direction::In
            }
        );
        let string = [(Field::EXIT_REASON, 30), (Field::QUALIFICATION, 0x3f8_0010)];
        assert_eq!(exit(&string), Exit::StringIo(0x3f8));
    }

    #[test]
    fn control_register_accesses_are_decoded() {
        let cr = |q| exit(&[(Field::EXIT_REASON, 28), (Field::QUALIFICATION, q)]);
        let write = CrAccess::Write { cr: 0, register: 3 };
        assert_eq!(cr(0x300), Exit::Control(write));
        let read = CrAccess::Read { cr: 8, register: 0 };
        assert_eq!(cr(0x18), Exit::Control(read));
        assert_eq!(cr(0x20), Exit::Control(CrAccess::Clts));
        assert_eq!(cr(0x1_0030), Exit::Control(CrAccess::Lmsw(1)));
    }

    #[test]
    fn a_refused_entry_is_never_an_ordinary_exit() {
        let refused = exit(&[(Field::EXIT_REASON, 0x8000_0021)]);
        assert_eq!(
            refused,
            Exit::EntryFailed("entry refused: invalid guest state")
        );
        for basic in 0..=64 {
            let exit = exit(&[(Field::EXIT_REASON, 1 << 31 | basic)]);
            assert!(matches!(exit, Exit::EntryFailed(_)));
        }
    }

    #[test]
    fn an_nmi_is_a_kick_and_other_exceptions_keep_their_vector() {
        let event = |e| exit(&[(Field::EXIT_REASON, 0), (Field::EXIT_EVENT, e)]);
        assert_eq!(event(0x8000_0202), Exit::Kick);
        assert_eq!(event(0x8000_0b0e), Exit::Exception(14));
    }

    #[test]
    fn what_a_guest_does_not_have_is_undefined_and_the_rest_has_number_and_name() {
        for basic in 19..=27 {
            assert_eq!(
                exit(&[(Field::EXIT_REASON, basic)]),
                Exit::Undefined("vmx instruction")
            );
        }
        let switch = exit(&[(Field::EXIT_REASON, 9)]);
        assert_eq!(
            switch,
            Exit::Other {
                basic: 9,
                name: "task switch"
            }
        );
        assert_eq!(switch.name(), "task switch");
        // What SDM vol. 3D appendix C lists, less the numbers that it leaves out.
        for basic in (0..=64).filter(|n| ![35, 38, 42].contains(n)) {
            let exit = exit(&[(Field::EXIT_REASON, basic)]);
            let named = basic == 33 || basic == 34 || basic == 41 || exit.name() != "unknown exit";
            assert!(named, "{basic}");
        }
    }
}
