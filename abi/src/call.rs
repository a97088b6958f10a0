//! Function ids and their arguments.

/// Declares the calls: their ids, in one list and as [`Call::from_id`].
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $id:literal,)*) => {
        /// The host's calls.
        ///
        /// Ids: fast, SMC64, owner 6 (vendor-specific hypervisor service), numbers from 0x100 so
        /// that KVM's vendor calls (0x00 to 0x3f), which guests use, never meet ours.
        ///
        /// Arguments are in `x1` to `x6`; those that a call does not name must be zero. "Pages"
        /// are 4 KiB; addresses of memory are physical, addresses of a guest are IPAs; both in
        /// bytes, page-aligned.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        #[repr(u32)]
        #[non_exhaustive]
        pub enum Call {
            $($(#[$doc])* $name = $id,)*
        }

        impl Call {
            /// All of them, in the order of their ids.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The call with this function id.
            #[must_use]
            #[inline]
            pub const fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

calls! {
    /// No argument; gives [`crate::VERSION`].
    Version = 0xc600_0100,
    /// No argument; gives [`Features`].
    Features = 0xc600_0101,
    /// `x1`: a [`Counter`]; gives its value since boot, summed over all CPUs.
    HostCounter = 0xc600_0102,
    /// `x1`: address, `x2`: pages, at most 512. Gives memory to EL2 itself, for good: what the
    /// bookkeeping of VMs and the tables of the host's stage 2 are made of. Calls that lack it
    /// fail with [`crate::ErrorCode::NoHeap`].
    DonateHeap = 0xc600_0103,

    /// No argument; gives a free handle, which is the caller's until [`Call::VmDestroy`].
    /// [`crate::ErrorCode::NoSpace`] if there is none.
    VmReserve = 0xc600_0110,
    /// `x1`: handle, reserved; `x2`: address and `x3`: pages, at most 512, donated to the VM for its
    /// state and tables; `x4`: [`crate::VmConfig`]. Gives the number of pages that were used at once.
    /// [`crate::ErrorCode::NoMemory`] if they are too few: nothing was donated then. Where no VM can be made
    /// of them, and EL2 lacks the heap to give them back, they wait for [`Call::VmReclaim`].
    VmCreate = 0xc600_0111,
    /// `x1`: handle, `x2`: address, `x3`: pages, at most 512. Donates more pages to the VM.
    VmTopUp = 0xc600_0112,
    /// `x1`: handle. Ends the VM: its guests never run again, its memory loses its mappings. The
    /// handle stays until everything is reclaimed. [`crate::ErrorCode::Again`]: call again, the
    /// work is done in steps; for every other call the VM is gone from the first one on.
    /// [`crate::ErrorCode::Busy`] while a vCPU runs.
    VmDestroy = 0xc600_0113,
    /// `x1`: handle, destroyed or only reserved. Gives back one range that was donated, zeroed:
    /// its address, and in `x2` its pages. When nothing is left: 0 and 0, and the handle is free.
    /// [`crate::ErrorCode::Again`]: call again, much of what it has looked at had gone back before.
    VmReclaim = 0xc600_0114,
    /// `x1`: handle. Resets the VM's memory (on-demand leaves go, locked slots keep theirs and owe
    /// their maintenance again), interrupt controller and vCPUs; the entry must be set anew. [`crate::ErrorCode::Again`]: call
    /// again, the memory is done in steps; no vCPU runs before.
    VmReset = 0xc600_0115,
    /// `x1`: handle, `x2`: a [`crate::VmCounter`]; gives its value.
    VmCounter = 0xc600_0116,
    /// `x1`: handle, `x2`: IPA. Gives the first run of equal leaves that ends behind the IPA: its
    /// IPA, in `x2` its physical address, in `x3` a [`crate::LeafInfo`]. It looks at 16,384 entries
    /// at most: a longer run is given in parts, and one of no pages says that nothing is mapped up to
    /// its IPA, to go on with. Without one: [`crate::ErrorCode::NotFound`]. A protected VM refuses it.
    VmMapping = 0xc600_0117,
    /// `x1`: handle of a protected VM to which no memory has been donated yet; `x2` to `x5`: the
    /// measurement that it must have, words in the order of the bytes, little-endian each.
    /// [`Call::VmSeal`] refuses any other. Can be said once.
    VmExpect = 0xc600_0118,
    /// `x1`: handle of a protected VM, `x2`: PC (an IPA), `x3`: `x0` of vCPU 0. Completes the
    /// measurement and turns vCPU 0 on: from now on no content enters the VM's memory, no slot changes,
    /// and no register is the host's to set. [`crate::ErrorCode::Mismatch`] if another measurement was
    /// expected: the VM never runs then.
    VmSeal = 0xc600_0119,
    /// `x1`: handle of a sealed VM, `x2`: 0 for the first 16 bytes, 1 for the others. Gives 0, and two
    /// words of the measurement in `x2` and `x3`.
    VmMeasurement = 0xc600_011a,

    /// `x1`: handle; `x2`: a [`crate::SlotWord`]; `x3`: IPA; `x4`: pages; `x5`: physical address.
    /// Gives the guest a slot of the host's memory. Unprotected: the host keeps its access. Protected:
    /// the guest finds nothing there before [`Call::MemoryDonate`]. [`crate::ErrorCode::Again`]: call
    /// again, the work is done in steps; a logged slot is there, and its log can be read when it is done.
    SlotCreate = 0xc600_0120,
    /// `x1`: handle, `x2`: slot number. Removes it and its mappings. [`crate::ErrorCode::Again`]: call
    /// again, the work is done in steps; the guest finds nothing new there from the first one on.
    SlotDelete = 0xc600_0121,
    /// `x1`: handle, `x2`: slot number, `x3`: its new IPA. [`crate::ErrorCode::Again`]: call again, the
    /// work is done in steps; the slot is nowhere before, and no vCPU enters.
    /// [`crate::ErrorCode::Exists`] for another slot's place, and while pages of it are taken back.
    SlotMove = 0xc600_0122,
    /// `x1`: handle, `x2`: a [`crate::SlotWord`]: the new flags of an existing slot.
    /// [`crate::ErrorCode::Again`]: call again, or with the old flags, the work is done in steps; the
    /// log can be read when it is done.
    SlotFlags = 0xc600_0123,
    /// `x1`: handle, `x2`: action (bit 0 lock, bit 1 unlock), `x3`: slot number, `x4`: for lock
    /// bit 0 read, bit 1 write, bit 8 blocks where they stay one mapping; for unlock bit 0: all
    /// locked slots. [`crate::ErrorCode::Again`]: call again, the work is done in steps; no vCPU runs
    /// before it is done, or taken back by the opposite call.
    SlotLock = 0xc600_0124,
    /// `x1`: handle, `x2`: slot number; gives a [`crate::SlotState`].
    SlotState = 0xc600_0125,
    /// `x1`: handle, `x2`: slot number, `x3`: index of a 64-bit word. Gives the bitmap of the 64
    /// pages from there in `x2` (1: written since the last call) and protects them again.
    SlotDirty = 0xc600_0126,
    /// `x1`: handle, `x2`: 0 for a device whose DMA is snooped, 1 for one whose is not; `x3`: 1 to
    /// register, 0 to take back what was registered so: an attached function counts until
    /// [`Call::DeviceDetach`]. [`crate::ErrorCode::Again`]: call again, the work is done in steps; the
    /// device may access memory when it is done.
    DmaDevice = 0xc600_0127,
    /// `x1`: handle of a protected VM, `x2`: IPA in one of its slots, `x3`: pages, `x4`: a
    /// [`crate::DonationKind`]. Takes the pages behind it from the host and gives them to the guest.
    MemoryDonate = 0xc600_0128,
    /// `x1`: address of a page that a living protected VM owns. Gives it back to the host, wiped; the
    /// guest gets an abort whenever it touches it, forever.
    MemoryReclaim = 0xc600_0129,
    /// `x1`: handle, `x2`: slot number, `x3`: page, counted from the slot's start, `x4`: pages, 1 to 512.
    /// Takes pages back from an unprotected guest: no mapping, TLB entry or device refers to them any
    /// more, and what the guest wrote is in memory. The guest's next access is
    /// [`crate::Exit::MemoryMissing`], also behind a reset. They stay behind the slot and can't be
    /// donated. [`crate::ErrorCode::Exists`] if one was taken back before, [`crate::ErrorCode::Busy`]
    /// for a locked slot.
    SlotUnshare = 0xc600_012a,
    /// Arguments as for [`Call::SlotUnshare`], whose end this is: the guest finds what the host has put
    /// there. [`crate::ErrorCode::Invalid`] if one of the pages was not taken back.
    SlotShare = 0xc600_012b,
    /// `x1` to `x4` as for [`Call::SlotUnshare`], `x5`: 1 to make their mappings old, 0 only to look.
    /// Gives how many of the pages an unprotected guest has used since their mappings were last made
    /// old. A block of pages is one mapping: used, and old, as a whole. Making old is
    /// [`crate::ErrorCode::Busy`] for a locked slot and while a device is attached.
    SlotYoung = 0xc600_012c,
    /// `x1`: handle, `x2`: slot number, `x3`: page, counted from the slot's start, `x4`: bit 0 read,
    /// bit 1 write, bit 2 execute. Adds these permissions to the page's mapping, which counts as used,
    /// and as written where it may be written now. [`crate::ErrorCode::NotFound`] without one,
    /// [`crate::ErrorCode::NotPermitted`] for what the slot forbids, [`crate::ErrorCode::Busy`] for a
    /// locked slot.
    SlotRelax = 0xc600_012d,

    /// `x1`: handle, `x2`: index, below the number in the VM's [`crate::VmConfig`].
    VcpuCreate = 0xc600_0130,
    /// `x1`: handle, `x2`: index, `x3`: PC (an IPA), `x4`: `x0` of the guest. Turns on a vCPU that
    /// is off. A protected VM refuses it: see [`Call::VmSeal`].
    VcpuStart = 0xc600_0131,
    /// `x1`: handle, `x2`: index, `x3`: what an [`crate::Exit::MmioRead`] before asked for, `x4`: 1
    /// if the CPU has nothing else to do, so that EL2 may wait for the guest's interrupts itself
    /// (one of the host's ends that, as it ends a run). Runs the guest until something needs the host;
    /// what is pending before its next instruction, such as cleaning its memory, is done in steps, with
    /// [`crate::Exit::Interrupted`] between them. `x1`: an [`crate::Exit`], `x2` to `x4`: its values. The host's FP and SIMD registers survive; the higher parts of SVE's don't.
    VcpuRun = 0xc600_0132,
    /// `x1`: handle, `x2`: index; gives bit 0: on, bit 1: an interrupt is pending.
    VcpuState = 0xc600_0133,

    /// `x1`: handle, `x2`: INTID of an SPI, `x3`: 1 high or pulse, 0 low. Sets a device's line. 2: high
    /// until the guest has ended the interrupt, which [`crate::Exit::IrqDone`] tells then.
    IrqLine = 0xc600_0140,

    /// `x1`: a PCI function's requester ID (bus in bits 15:8, device in 7:3, function in 2:0). Takes it from the host:
    /// its DMA aborts from now on. [`crate::ErrorCode::NotFound`] if no IOMMU of EL2's stands before it,
    /// [`crate::ErrorCode::Exists`] if it is taken.
    DeviceTake = 0xc600_0150,
    /// `x1`: a function that was taken and that no VM has. Its DMA reaches the host's memory again,
    /// also what it was told to do meanwhile: reset it before.
    DeviceGive = 0xc600_0151,
    /// `x1`: handle, `x2`: a function that was taken, `x3`: 1 if its DMA goes past the caches, else 0.
    /// Its DMA goes through the VM's stage 2: bus addresses are IPAs. [`crate::ErrorCode::NotPermitted`]
    /// for a protected VM and while no slot is locked, [`crate::ErrorCode::Mismatch`] if the IOMMU can't
    /// read the VM's tables as CPUs do: see [`crate::VmConfig`]. [`crate::ErrorCode::Again`]: as for
    /// [`Call::DmaDevice`].
    DeviceAttach = 0xc600_0152,
    /// `x1`: handle, `x2`: a function of this VM. Its DMA aborts again; it stays taken.
    /// [`crate::ErrorCode::Again`]: call again, it aborts already, and memory types follow in steps.
    /// [`Call::VmDestroy`] does the same to all.
    DeviceDetach = 0xc600_0153,
    /// `x1`: a function. Gives 0, and how many of its accesses were refused since boot in `x2`, the
    /// address of the last one in `x3`, and a [`crate::DmaFault`] in `x4`.
    DeviceFaults = 0xc600_0154,
}

/// What this EL2 can do, as a bitmap: a host must not rely on a call whose bit is clear.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Features(u64);

impl Features {
    /// [`Call::HostCounter`] exists.
    pub const HOST_COUNTERS: Self = Self(1 << 0);
    /// Stage 2 can force write-back (FEAT_S2FWB).
    pub const FORCE_WRITE_BACK: Self = Self(1 << 1);
    /// Firmware serves the SMCs of the allow-list; without it they are not supported.
    pub const FIRMWARE_CALLS: Self = Self(1 << 2);
    /// VMs can be created: the interrupt controller has a virtual interface that EL2 knows.
    pub const GUESTS: Self = Self(1 << 3);
    /// Guests have a GICv3; without it, with [`Features::GUESTS`], a GICv2.
    pub const GUEST_GIC_V3: Self = Self(1 << 4);
    /// An IOMMU that EL2 drives stands before the machine's PCI devices: DMA reaches nothing that its
    /// owner may not. Without it, DMA is not isolated at all.
    pub const DMA_ISOLATION: Self = Self(1 << 5);

    /// From the value of [`Call::Features`].
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bitmap.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in the set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A counter of what EL2 did for the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
#[non_exhaustive]
pub enum Counter {
    /// HVCs, known or not.
    Hypercalls = 0,
    /// SMCs that were trapped.
    TrappedSmcs = 1,
    /// Stage-2 faults that were answered by a mapping.
    FaultsMapped = 2,
    /// Stage-2 faults that were refused: the host got an abort.
    FaultsRefused = 3,
    /// Times that device mappings were thrown away to get table pages back.
    TablesRecycled = 4,
}

impl Counter {
    /// How many there are.
    pub const COUNT: usize = 5;

    const ALL: [Self; Self::COUNT] = [
        Self::Hypercalls,
        Self::TrappedSmcs,
        Self::FaultsMapped,
        Self::FaultsRefused,
        Self::TablesRecycled,
    ];

    /// The counter with this number.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|counter| *counter as u64 == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_a_fast_64_bit_vendor_hypervisor_call() {
        for call in Call::ALL.iter().copied() {
            assert_eq!(call as u32 & 0xff00_0000, 0xc600_0000);
            assert_eq!(Call::from_id(call as u32), Some(call));
        }
    }

    #[test]
    fn the_documentation_lists_every_call_and_no_other() {
        let table = include_str!("../../docs/hypercalls.md");
        let rows = table.lines().filter(|line| line.contains("| `0xc600"));
        assert_eq!(rows.count(), Call::ALL.len());
        for call in Call::ALL {
            let row = std::format!("| `{call:?}` | `{:#x}` |", *call as u32);
            assert!(table.contains(&row), "{row}");
        }
    }

    #[test]
    fn unknown_ids_are_no_calls() {
        assert_eq!(Call::from_id(0xc600_00ff), None);
        assert_eq!(Call::from_id(0x8600_0100), None);
        assert_eq!(Counter::from_number(5), None);
        assert_eq!(Counter::from_number(1 << 32), None);
    }

    #[test]
    fn counters_are_numbered_without_gaps() {
        for number in 0..Counter::COUNT as u64 {
            assert_eq!(Counter::from_number(number).map(|c| c as u64), Some(number));
        }
    }
}
