//! What a leaf says, before any format turns it into bits.

use bitflags::bitflags;

bitflags! {
    /// What a guest may do with a mapping.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Perms: u8 {
        /// Data reads.
        const READ = 1;
        /// Data writes.
        const WRITE = 1 << 1;
        /// Instruction fetches of the guest's kernel (Arm: EL1).
        const EXEC_KERNEL = 1 << 2;
        /// Instruction fetches of the guest's user space (Arm: EL0).
        const EXEC_USER = 1 << 3;
        /// Instruction fetches by anyone in the guest.
        const EXEC = Self::EXEC_KERNEL.bits() | Self::EXEC_USER.bits();
        /// Reads and writes.
        const RW = Self::READ.bits() | Self::WRITE.bits();
        /// Everything.
        const RWX = Self::RW.bits() | Self::EXEC.bits();
    }
}

impl Perms {
    /// Whether anything may be fetched through the mapping.
    #[must_use]
    #[inline]
    pub const fn may_execute(self) -> bool {
        self.intersects(Self::EXEC)
    }
}

/// Device subtypes, strictest first (Arm ARM B2.10.2). x86 has none and takes only `NGnRnE`
/// through [`MemType::Uncached`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// No gathering, no reordering, no early acknowledgement.
    NGnRnE,
    /// No gathering, no reordering.
    NGnRE,
    /// No gathering.
    NGRE,
    /// Everything allowed.
    GRE,
}

/// A memory type of stage 2, in words both architectures have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemType {
    /// Arm: Normal write-back; x86: WB.
    WriteBack,
    /// Arm without forced write-back: Normal write-through; x86: WT.
    WriteThrough,
    /// x86: WP. Arm has none.
    WriteProtected,
    /// Arm: Normal non-cacheable; x86: WC.
    NonCacheable,
    /// x86: UC. On Arm say which [`MemType::Device`] is meant.
    Uncached,
    /// Arm: Device memory. x86 has none.
    Device(Device),
}

impl MemType {
    /// A number of its own for each, 0 to 8: devices first, in order.
    #[inline]
    pub(crate) const fn number(self) -> usize {
        if matches!(self, Self::WriteBack) {
            4 // nearly every leaf; the others' jump table stays out of its way
        } else {
            self.rarer_number()
        }
    }

    #[inline(never)]
    const fn rarer_number(self) -> usize {
        match self {
            Self::Device(device) => device as usize,
            Self::WriteBack => 4,
            Self::WriteThrough => 5,
            Self::WriteProtected => 6,
            Self::NonCacheable => 7,
            Self::Uncached => 8,
        }
    }
}

/// Who has the last word about the memory type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Combine {
    /// The guest's own type counts, too (Arm: stage 1; x86: PAT).
    HonourGuest,
    /// Stage 2 decides alone (Arm: forced write-back; x86: the ignore-PAT bit).
    ForceStage2,
}

/// Whether the leaf counts as used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Age {
    /// Used since it was last made old; a table without an access flag always says this.
    Young,
    /// Not used; on Arm without hardware update the next use faults.
    Old,
}

/// Four bits of an entry that hardware ignores, 0 to 15.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct SwBits(u8);

impl SwBits {
    /// Bits there are.
    pub const WIDTH: u32 = 4;

    /// Wraps a value of 0 to 15.
    #[must_use]
    #[inline]
    pub const fn try_new(bits: u8) -> Option<Self> {
        if bits < 1 << Self::WIDTH {
            Some(Self(bits))
        } else {
            None
        }
    }

    /// The value, 0 to 15.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Keeps the low four bits of a descriptor field.
    #[inline]
    pub(crate) const fn from_field(field: u64) -> Self {
        Self((field & 0xf) as u8)
    }
}

/// Everything a leaf says besides its address and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeafAttrs {
    /// What the guest may do.
    pub perms: Perms,
    /// Memory type.
    pub mem: MemType,
    /// Who has the last word about it.
    pub combine: Combine,
    /// Bits for the owner of the table.
    pub sw: SwBits,
    /// Access flag.
    pub age: Age,
}

impl LeafAttrs {
    /// A young leaf without software bits.
    #[must_use]
    #[inline]
    pub const fn new(perms: Perms, mem: MemType, combine: Combine) -> Self {
        Self {
            perms,
            mem,
            combine,
            sw: SwBits(0),
            age: Age::Young,
        }
    }

    /// Write-back memory whose type the guest may weaken.
    #[must_use]
    #[inline]
    pub const fn normal(perms: Perms) -> Self {
        Self::new(perms, MemType::WriteBack, Combine::HonourGuest)
    }

    /// Write-back memory whatever the guest says. Arm needs FEAT_S2FWB for it.
    #[must_use]
    #[inline]
    pub const fn forced_write_back(perms: Perms) -> Self {
        Self::new(perms, MemType::WriteBack, Combine::ForceStage2)
    }

    /// Arm device memory, nGnRE: what KVM gives guests for MMIO.
    #[must_use]
    #[inline]
    pub const fn device(perms: Perms) -> Self {
        Self::new(perms, MemType::Device(Device::NGnRE), Combine::HonourGuest)
    }

    /// The same with software bits.
    #[must_use]
    #[inline]
    pub const fn with_sw(mut self, sw: SwBits) -> Self {
        self.sw = sw;
        self
    }

    /// The same with another age.
    #[must_use]
    #[inline]
    pub const fn with_age(mut self, age: Age) -> Self {
        self.age = age;
        self
    }

    /// Which cache maintenance a mapping of this kind owes.
    ///
    /// The data cache is left alone only for device memory and where the leaf itself forces
    /// write-back: every other leaf lets a guest read memory around the cache (non-cacheable
    /// stage 1, or its MMU off), so dirty lines must reach memory before the guest looks and
    /// before the next owner does. The feature of the CPU alone proves nothing.
    #[must_use]
    #[inline]
    pub const fn maintenance(&self) -> Maintenance {
        let ram = !matches!(self.mem, MemType::Device(_))
            && !matches!(
                (self.mem, self.combine),
                (MemType::Uncached, Combine::HonourGuest)
            );
        let forced = matches!(
            (self.mem, self.combine),
            (MemType::WriteBack, Combine::ForceStage2)
        );
        Maintenance {
            data: ram && !forced,
            fetch: ram && self.perms.may_execute(),
        }
    }
}

/// Cache maintenance a leaf owes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Maintenance {
    /// Clean and invalidate the data cache to the point of coherency, at map and at unmap.
    pub data: bool,
    /// Invalidate the instruction cache at map.
    pub fetch: bool,
}

impl Maintenance {
    /// Nothing owed.
    pub(crate) const NONE: Self = Self {
        data: false,
        fetch: false,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn software_bits_are_four() {
        assert_eq!(SwBits::try_new(15).map(SwBits::get), Some(15));
        assert_eq!(SwBits::try_new(16), None);
        assert_eq!(SwBits::from_field(0x35).get(), 5);
    }

    #[test]
    fn only_forced_write_back_and_devices_need_no_data_cache_maintenance() {
        let owes = |mem, combine| LeafAttrs::new(Perms::RW, mem, combine).maintenance().data;
        assert!(!owes(MemType::WriteBack, Combine::ForceStage2));
        assert!(owes(MemType::WriteBack, Combine::HonourGuest));
        assert!(owes(MemType::NonCacheable, Combine::HonourGuest));
        assert!(owes(MemType::WriteThrough, Combine::HonourGuest));
        assert!(owes(MemType::Uncached, Combine::ForceStage2));
        assert!(!owes(MemType::Uncached, Combine::HonourGuest));
        assert!(!owes(MemType::Device(Device::NGnRE), Combine::HonourGuest));
    }

    #[test]
    fn any_executable_memory_needs_the_instruction_cache() {
        let owes = |perms| LeafAttrs::forced_write_back(perms).maintenance().fetch;
        assert!(owes(Perms::EXEC_USER) && owes(Perms::EXEC_KERNEL) && owes(Perms::RWX));
        assert!(!owes(Perms::RW));
        assert!(!LeafAttrs::device(Perms::RWX).maintenance().fetch);
    }
}
