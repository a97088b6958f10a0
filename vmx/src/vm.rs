//! A VM: memory on the shared crates, mailboxes of its vCPUs, counters.

use core::sync::atomic::{AtomicU64, Ordering};

use memslot::policy::EptPolicy;
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use stage2::{Ept, Platform, Stage2};

use crate::apic::{Mailbox, Message};
use crate::cpuid::GuestCpu;
use crate::exit::Exit;
use crate::frames::Backing;

/// vCPUs that a VM may have.
pub const MAX_VCPUS: usize = 4;
/// Slots that a VM may have.
const MAX_SLOTS: u16 = 32;
/// Guest frames are below this: 48 bits of address.
const GFN_LIMIT: u64 = 1 << 36;

/// A VM's memory: the shared core, with the EPT format and the x86 policy.
pub type Memory<P> = GuestMemory<Stage2<Ept, P>, EptPolicy, Backing>;

/// What a VM is created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmSettings {
    /// Which memory-type rules hold.
    pub policy: EptPolicy,
    /// Whether the guest has MTRRs.
    pub mtrrs: bool,
    /// Whether the guest has local APICs.
    pub apic: bool,
    /// Width of guest-physical addresses that MTRRs describe, in bits: the machine's.
    pub physical_bits: u8,
    /// Frequency of the time-stamp counter in Hz.
    pub tsc_hz: u32,
    /// Pages that may be locked.
    pub locked_limit: u64,
}

/// Exits by what caused them.
#[derive(Debug, Default)]
pub struct ExitCounters {
    counts: [AtomicU64; KINDS.len()],
}

/// What is counted, in the order of [`ExitCounters`].
const KINDS: [&str; 17] = [
    "cpuid",
    "hypercall",
    "hlt",
    "rdmsr",
    "wrmsr",
    "control register",
    "i/o",
    "memory fault",
    "misconfiguration",
    "timer",
    "kick",
    "interrupt",
    "interrupt window",
    "wbinvd",
    "string i/o",
    "triple fault",
    "other",
];

impl ExitCounters {
    /// Counts an exit.
    pub fn count(&self, exit: &Exit) {
        let name = exit.name();
        let at = KINDS.iter().position(|kind| *kind == name);
        let at = at.unwrap_or(KINDS.len() - 1);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
    }

    /// Exits with this name ([`Exit::name`]) so far.
    pub fn of(&self, name: &str) -> u64 {
        let at = KINDS.iter().position(|kind| *kind == name);
        at.map_or(0, |at| self.counts[at].load(Ordering::Relaxed))
    }

    /// Names and counts of those that happened.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = KINDS.iter().copied().zip(&self.counts);
        counts
            .map(|(kind, count)| (kind, count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count != 0)
    }
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm<P: Platform> {
    /// Its memory.
    pub memory: Memory<P>,
    /// What it was created with.
    pub settings: VmSettings,
    /// What its vCPUs send each other.
    pub mail: [Mailbox; MAX_VCPUS],
    /// What has happened.
    pub exits: ExitCounters,
}

impl<P: Platform> Vm<P> {
    /// A VM without slots over an empty table.
    pub fn new(settings: VmSettings, table: Stage2<Ept, P>) -> Self {
        let config = VmConfig {
            max_slots: MAX_SLOTS,
            gfn_limit: GFN_LIMIT,
            kind: VmKind::Unprotected,
        };
        let backing = Backing::new(settings.locked_limit);
        Self {
            memory: GuestMemory::new(config, settings.policy, backing, table),
            settings,
            mail: Default::default(),
            exits: ExitCounters::default(),
        }
    }

    /// What CPUID depends on for one vCPU.
    pub const fn cpu(&self, number: u8) -> GuestCpu {
        GuestCpu {
            number,
            tsc_hz: self.settings.tsc_hz,
            mtrrs: self.settings.mtrrs,
            apic: self.settings.apic,
        }
    }

    /// Delivers a message to the mailboxes it names; vCPUs that do not exist get nothing.
    pub fn post(&self, message: Message) {
        for (number, mailbox) in self.mail.iter().enumerate() {
            if message.to >> number & 1 == 1 {
                mailbox.post(message.kind);
            }
        }
    }
}
