//! Function ids and their arguments.

/// The host's calls.
///
/// Ids: fast, SMC64, owner 6 (vendor-specific hypervisor service), numbers from 0x100 so that
/// KVM's vendor calls (0x00 to 0x3f), which guests use, never meet ours.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Call {
    /// No argument; gives [`crate::VERSION`].
    Version = 0xc600_0100,
    /// No argument; gives [`Features`].
    Features = 0xc600_0101,
    /// `x1`: a [`Counter`]; gives its value since boot, summed over all CPUs.
    HostCounter = 0xc600_0102,
}

impl Call {
    const ALL: [Self; 3] = [Self::Version, Self::Features, Self::HostCounter];

    /// The call with this function id.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|call| *call as u32 == id)
    }
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
        for call in Call::ALL {
            assert_eq!(call as u32 & 0xff00_0000, 0xc600_0000);
            assert_eq!(Call::from_id(call as u32), Some(call));
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
