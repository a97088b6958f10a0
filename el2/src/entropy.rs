//! Random numbers for guests: from the core, or from firmware; never from the host.

use el2::guest::entropy::EntropySource;

use crate::arch::{firmware, regs};

const TRNG_VERSION: u64 = 0x8400_0050;
const TRNG_RND_64: u64 = 0xc400_0053;

/// Where they come from on this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Entropy {
    /// The RNDR instruction.
    Instruction,
    /// The TRNG interface of EL3's firmware (Arm DEN 0098).
    Firmware,
}

impl Entropy {
    /// What this machine has. `isar0` is ID_AA64ISAR0_EL1, whose upper field says RNDR.
    pub(crate) fn find(isar0: u64, has_firmware: bool) -> Option<Self> {
        if isar0 >> 60 != 0 {
            return Some(Self::Instruction);
        }
        let version = || firmware::call(TRNG_VERSION, [0; 7])[0].cast_signed() as i32;
        (has_firmware && version() >= 0x1_0000).then_some(Self::Firmware)
    }
}

impl EntropySource for Entropy {
    fn next(&self) -> Option<u64> {
        match self {
            // It may fail for a moment; who asks again does so by a call of its own.
            Self::Instruction => (0..16).find_map(|_| regs::random()),
            Self::Firmware => {
                let [status, _, _, word] = firmware::call(TRNG_RND_64, [64, 0, 0, 0, 0, 0, 0]);
                (status == 0).then_some(word)
            }
        }
    }
}
