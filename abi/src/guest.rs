//! The words that calls about VMs take and give.

/// Highest number of vCPUs of a VM.
pub const MAX_VCPUS: u8 = 8;

/// INTID of the physical software-generated interrupt with which EL2 wakes a CPU: "a vCPU that you
/// hold may have become runnable". The host enables it, acknowledges it, and does nothing else of
/// its own with it.
pub const KICK_SGI: u32 = 7;

/// INTID of the EL1 virtual timer's interrupt, which is the guests'. The host enables it on each
/// CPU that runs vCPUs, keeps its own time by the physical timer, and never sees it fire.
pub const GUEST_TIMER_PPI: u32 = 27;

/// A guest's call, not a host's: function id with which a guest asks how an address is accessed.
/// `x1`: a virtual address; gives the combined memory attribute of both stages in `x1` (encoded as
/// a byte of MAIR_EL1) and its shareability in `x2` (2 outer, 3 inner). `x0` is negative where it
/// has no translation. It tells nothing of what is behind the guest's memory but its type.
pub const GUEST_MEMORY_ATTRIBUTES: u32 = 0xc600_0180;

/// A protected guest's call: function id with which it asks for its own measurement. `x1`: 0 for the
/// first 16 bytes, 1 for the others; gives two words of 64 bits in `x1` and `x2`, in the order of the
/// bytes, little-endian each.
pub const GUEST_MEASUREMENT: u32 = 0xc600_0181;

/// What [`crate::Call::MemoryDonate`] does with the pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
#[non_exhaustive]
pub enum DonationKind {
    /// The guest finds zeros; at most 512 pages at once.
    Zeros = 0,
    /// The guest finds what the host had there, and the measurement covers it; at most 64 pages at
    /// once, and only before the VM is sealed.
    Contents = 1,
}

impl DonationKind {
    /// From `x4`.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Zeros),
            1 => Some(Self::Contents),
            _ => None,
        }
    }

    /// Most pages of one call.
    #[must_use]
    pub const fn max_pages(self) -> u64 {
        match self {
            Self::Zeros => 512,
            Self::Contents => 64,
        }
    }
}

/// Fixed properties of a VM, as [`crate::Call::VmCreate`] takes them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VmConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`]: bits 7:0.
    pub vcpus: u8,
    /// The host can't see its memory and registers: bit 8.
    pub protected: bool,
    /// Devices may be attached to it: bit 9. It runs without forced write-back where the IOMMU has none.
    pub devices: bool,
}

impl VmConfig {
    /// From `x4`; `None` for unknown bits, a number of vCPUs out of range, or devices in a protected VM,
    /// which may have none.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        let vcpus = bits.to_le_bytes()[0];
        let both = 3 << 8;
        if bits & !0x3ff != 0 || bits & both == both || vcpus == 0 || vcpus > MAX_VCPUS {
            return None;
        }
        Some(Self {
            vcpus,
            protected: bits & 1 << 8 != 0,
            devices: bits & 1 << 9 != 0,
        })
    }

    /// For `x4`.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.vcpus as u64 | (self.protected as u64) << 8 | (self.devices as u64) << 9
    }
}

/// Number, kind and flags of a slot in one word.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SlotWord {
    /// Number: bits 15:0.
    pub id: u16,
    /// Device memory instead of RAM: bit 16.
    pub device: bool,
    /// Flags, the numbers of `memslot::slot::SlotFlags`, in bits 63:32: 0 dirty log, 1 read-only,
    /// 3 non-coherent DMA, 4 write combining.
    pub flags: u32,
}

impl SlotWord {
    /// From `x2`; `None` for unknown bits (the flags are checked by who knows them).
    #[must_use]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits & 0xfffe_0000 != 0 {
            return None;
        }
        let [a, b, _, _, e, f, g, h] = bits.to_le_bytes();
        Some(Self {
            id: u16::from_le_bytes([a, b]),
            device: bits & 1 << 16 != 0,
            flags: u32::from_le_bytes([e, f, g, h]),
        })
    }

    /// For `x2`.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.id as u64 | (self.device as u64) << 16 | (self.flags as u64) << 32
    }
}

/// State of a slot, as [`crate::Call::SlotState`] gives it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
#[non_exhaustive]
pub enum SlotState {
    /// Mapped on demand.
    Unlocked = 0,
    /// Mapped and pinned; data maintenance is pending until the first run.
    LockedDirty = 1,
    /// Mapped and pinned; nothing is pending.
    LockedClean = 2,
    /// Mapped and pinned, kept across a reset; maintenance is pending.
    LockedReset = 3,
    /// Locked or unlocked in part: [`crate::Call::SlotLock`] gave [`crate::ErrorCode::Again`] and has
    /// to be repeated. No vCPU runs before.
    Unfinished = 4,
}

impl SlotState {
    /// The state with this number.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        [
            Self::Unlocked,
            Self::LockedDirty,
            Self::LockedClean,
            Self::LockedReset,
            Self::Unfinished,
        ]
        .into_iter()
        .find(|state| *state as u64 == number)
    }
}

/// Why a vCPU came back, in `x1` of [`crate::Call::VcpuRun`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
#[repr(u64)]
pub enum Exit {
    /// 0: the host has an interrupt, or should let others run.
    Interrupted,
    /// 1: the guest waits for an interrupt. `x2`: when its timer fires, in ticks of CNTPCT_EL0;
    /// `u64::MAX` if it is off.
    WaitForInterrupt {
        /// See above.
        until: u64,
    },
    /// 2: a read of a device that EL2 does not have. `x2`: IPA, `x3`: bytes (1, 2, 4, 8). The
    /// value goes into `x3` of the next run.
    MmioRead {
        /// Address.
        ipa: u64,
        /// Width in bytes.
        size: u8,
    },
    /// 3: a write. `x2`: IPA, `x3`: bytes, `x4`: the value, masked to the width.
    MmioWrite {
        /// Address.
        ipa: u64,
        /// Width in bytes.
        size: u8,
        /// Value.
        value: u64,
    },
    /// 4: the guest touched memory of a slot that the host must supply ([`crate::Call::MemoryDonate`]
    /// for a protected VM), or asked for something with it. `x2`: IPA of the page.
    MemoryMissing {
        /// Address of the page.
        ipa: u64,
    },
    /// 5: table pages are missing: top the VM up and run again. `x2`: how many are enough.
    NeedPages {
        /// Pages.
        pages: u64,
    },
    /// 6: this vCPU has turned another one on. `x2`: its index.
    VcpuOn {
        /// Index.
        index: u8,
    },
    /// 7: this vCPU is off.
    VcpuOff,
    /// 8: the guest has turned the machine off.
    SystemOff,
    /// 9: the guest wants a reset. `x2`: 0 for SYSTEM_RESET, 1 for a warm reset by SYSTEM_RESET2.
    SystemReset {
        /// Kind.
        warm: bool,
    },
    /// 10: EL2 can't go on with this vCPU. `x2`: ESR_EL2 (0 for a protected VM), `x3`: a reason
    /// for the log.
    Broken {
        /// Syndrome.
        esr: u64,
    },
    /// 11: EL2's own heap is used up: give it pages by [`crate::Call::DonateHeap`] and run again.
    /// `x2`: how many are enough.
    NeedHeap {
        /// Pages.
        pages: u64,
    },
    /// 12: the guest has ended an interrupt whose line [`crate::Call::IrqLine`] had set until then.
    /// `x2`: its INTID.
    IrqDone {
        /// Number.
        intid: u32,
    },
}

impl Exit {
    /// For `x1` to `x4`.
    #[must_use]
    pub const fn to_registers(self) -> [u64; 4] {
        match self {
            Self::Interrupted => [0, 0, 0, 0],
            Self::WaitForInterrupt { until } => [1, until, 0, 0],
            Self::MmioRead { ipa, size } => [2, ipa, size as u64, 0],
            Self::MmioWrite { ipa, size, value } => [3, ipa, size as u64, value],
            Self::MemoryMissing { ipa } => [4, ipa, 0, 0],
            Self::NeedPages { pages } => [5, pages, 0, 0],
            Self::VcpuOn { index } => [6, index as u64, 0, 0],
            Self::VcpuOff => [7, 0, 0, 0],
            Self::SystemOff => [8, 0, 0, 0],
            Self::SystemReset { warm } => [9, warm as u64, 0, 0],
            Self::Broken { esr } => [10, esr, 0, 0],
            Self::NeedHeap { pages } => [11, pages, 0, 0],
            Self::IrqDone { intid } => [12, intid as u64, 0, 0],
        }
    }

    /// From `x1` to `x4`; `None` if it is none that this version knows.
    #[must_use]
    pub const fn from_registers([kind, a, b, c]: [u64; 4]) -> Option<Self> {
        let size = b.to_le_bytes()[0];
        Some(match kind {
            0 => Self::Interrupted,
            1 => Self::WaitForInterrupt { until: a },
            2 => Self::MmioRead { ipa: a, size },
            3 => Self::MmioWrite {
                ipa: a,
                size,
                value: c,
            },
            4 => Self::MemoryMissing { ipa: a },
            5 => Self::NeedPages { pages: a },
            6 => Self::VcpuOn {
                index: a.to_le_bytes()[0],
            },
            7 => Self::VcpuOff,
            8 => Self::SystemOff,
            9 => Self::SystemReset { warm: a != 0 },
            10 => Self::Broken { esr: a },
            11 => Self::NeedHeap { pages: a },
            12 => Self::IrqDone {
                intid: u16::from_le_bytes([a.to_le_bytes()[0], a.to_le_bytes()[1] & 3]) as u32,
            },
            _ => return None,
        })
    }
}

/// What is known of a device's last refused access, in `x4` of [`crate::Call::DeviceFaults`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DmaFault {
    /// It was a write: bit 0.
    pub write: bool,
    /// Number of the event (IHI 0070 7.3; 0x10 is a translation fault): bits 15:8.
    pub event: u8,
    /// VMID of the tables that refused, 0 for the host's: bits 31:16.
    pub vmid: u16,
}

impl DmaFault {
    /// From `x4`.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        let [a, event, low, high, ..] = bits.to_le_bytes();
        Self {
            write: a & 1 != 0,
            event,
            vmid: u16::from_le_bytes([low, high]),
        }
    }

    /// For `x4`.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.write as u64 | (self.event as u64) << 8 | (self.vmid as u64) << 16
    }
}

/// A counter of a VM, summed over its vCPUs.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
#[repr(u64)]
#[non_exhaustive]
pub enum VmCounter {
    /// Times that a vCPU was entered by the host.
    Runs = 0,
    /// Exceptions from the guest that EL2 took, whoever handled them.
    Exits = 1,
    /// Exits for physical interrupts.
    Interrupts = 2,
    /// WFI and WFE.
    Waits = 3,
    /// HVC and SMC.
    Calls = 4,
    /// Trapped system registers.
    SystemRegisters = 5,
    /// Accesses to devices that EL2 has.
    MmioInEl2 = 6,
    /// Accesses to devices of the host.
    MmioInHost = 7,
    /// Stage-2 faults that a mapping answered.
    Faults = 8,
    /// Exceptions that EL2 injected into the guest.
    Injected = 9,
    /// First uses of FP and SIMD in a run.
    FpSwitches = 10,
    /// Interrupts given to list registers.
    InterruptsDelivered = 11,
    /// Data cache lines cleaned and invalidated for this VM.
    LinesFlushed = 12,
    /// Times that pending maintenance of locked slots was done before a run.
    PendingRuns = 13,
    /// Removals of leaves: slot changes, resets, edges of the non-coherent count.
    Zaps = 14,
    /// Stage-2 table pages in use.
    Tables = 15,
}

impl VmCounter {
    /// How many there are.
    pub const COUNT: usize = 16;

    /// All, with the names that consoles show.
    pub const ALL: [(Self, &'static str); Self::COUNT] = [
        (Self::Runs, "runs"),
        (Self::Exits, "exits"),
        (Self::Interrupts, "interrupts"),
        (Self::Waits, "waits"),
        (Self::Calls, "calls"),
        (Self::SystemRegisters, "system registers"),
        (Self::MmioInEl2, "MMIO in EL2"),
        (Self::MmioInHost, "MMIO in host"),
        (Self::Faults, "faults"),
        (Self::Injected, "injected exceptions"),
        (Self::FpSwitches, "FP switches"),
        (Self::InterruptsDelivered, "interrupts delivered"),
        (Self::LinesFlushed, "cache lines flushed"),
        (Self::PendingRuns, "maintenance before a run"),
        (Self::Zaps, "zaps"),
        (Self::Tables, "table pages"),
    ];

    /// The counter with this number.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .map(|(counter, _)| counter)
            .find(|counter| *counter as u64 == number)
    }
}

/// What a run of leaves says, as [`crate::Call::VmMapping`] gives it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LeafInfo {
    /// Length in pages: bits 39:0.
    pub pages: u64,
    /// Level of each leaf, 1 to 3: bits 43:40.
    pub level: u8,
    /// Readable (bit 44), writable (45), executable at EL1 (46) or EL0 (47).
    pub permissions: u8,
    /// The MemAttr field of the descriptors (Arm ARM D8.6.6): bits 51:48.
    pub mem_attr: u8,
}

impl LeafInfo {
    /// From `x3`.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self {
            pages: bits & 0xff_ffff_ffff,
            level: (bits >> 40).to_le_bytes()[0] & 0xf,
            permissions: (bits >> 44).to_le_bytes()[0] & 0xf,
            mem_attr: (bits >> 48).to_le_bytes()[0] & 0xf,
        }
    }

    /// For `x3`.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.pages & 0xff_ffff_ffff
            | (self.level as u64 & 0xf) << 40
            | (self.permissions as u64 & 0xf) << 44
            | (self.mem_attr as u64 & 0xf) << 48
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_needs_one_to_eight_vcpus_and_known_bits() {
        let config = VmConfig {
            vcpus: 8,
            protected: true,
            devices: false,
        };
        assert_eq!(VmConfig::from_bits(0x108), Some(config));
        assert_eq!(config.bits(), 0x108);
        let config = VmConfig {
            vcpus: 1,
            protected: false,
            devices: true,
        };
        assert_eq!(VmConfig::from_bits(0x201), Some(config));
        assert_eq!(config.bits(), 0x201);
        for wrong in [0, 9, 0x100, 0x301, 0x401, 1 << 63 | 1] {
            assert_eq!(VmConfig::from_bits(wrong), None, "{wrong:#x}");
        }
    }

    #[test]
    fn dma_faults_survive_the_register() {
        let fault = DmaFault {
            write: true,
            event: 0x10,
            vmid: 0x1234,
        };
        assert_eq!(fault.bits(), 0x1234_1001);
        assert_eq!(DmaFault::from_bits(0x1234_1001), fault);
    }

    #[test]
    fn slot_words_keep_number_kind_and_flags() {
        let word = SlotWord {
            id: 0xfffe,
            device: true,
            flags: 0x8000_0009,
        };
        assert_eq!(word.bits(), 0x8000_0009_0001_fffe);
        assert_eq!(SlotWord::from_bits(word.bits()), Some(word));
        assert_eq!(SlotWord::from_bits(1 << 17), None);
        assert_eq!(SlotWord::from_bits(1 << 31), None);
    }

    #[test]
    fn exits_survive_the_registers() {
        let exits = [
            Exit::Interrupted,
            Exit::WaitForInterrupt { until: u64::MAX },
            Exit::MmioRead { ipa: 9, size: 8 },
            Exit::MmioWrite {
                ipa: 1,
                size: 4,
                value: 7,
            },
            Exit::MemoryMissing { ipa: 0x4000_0000 },
            Exit::NeedPages { pages: 3 },
            Exit::VcpuOn { index: 7 },
            Exit::VcpuOff,
            Exit::SystemOff,
            Exit::SystemReset { warm: true },
            Exit::Broken { esr: 0x5600_0000 },
            Exit::NeedHeap { pages: 2 },
            Exit::IrqDone { intid: 0x3fb },
        ];
        for (number, exit) in exits.into_iter().enumerate() {
            let registers = exit.to_registers();
            assert_eq!(registers[0], number as u64);
            assert_eq!(Exit::from_registers(registers), Some(exit));
        }
        assert_eq!(Exit::from_registers([13, 0, 0, 0]), None);
    }

    #[test]
    fn counters_are_numbered_without_gaps() {
        for number in 0..VmCounter::COUNT as u64 {
            assert_eq!(
                VmCounter::from_number(number).map(|c| c as u64),
                Some(number)
            );
        }
        assert_eq!(VmCounter::from_number(VmCounter::COUNT as u64), None);
    }

    #[test]
    fn slot_states_and_leaves_survive() {
        for number in 0..5 {
            assert_eq!(
                SlotState::from_number(number).map(|s| s as u64),
                Some(number)
            );
        }
        assert_eq!(SlotState::from_number(5), None);
        let leaf = LeafInfo {
            pages: 1 << 39,
            level: 2,
            permissions: 0b0111,
            mem_attr: 0xf,
        };
        assert_eq!(LeafInfo::from_bits(leaf.bits()), leaf);
        assert_eq!(leaf.bits(), 0xf_7280_0000_0000);
    }
}
