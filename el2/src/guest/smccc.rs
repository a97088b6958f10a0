//! A guest's HVCs: the architecture's calls, PSCI, entropy, and KVM's vendor calls.
//!
//! Default deny: what is not on a list gets NOT_SUPPORTED and nothing else happens. A guest's SMC
//! is undefined (its identification registers say that there is no EL3), and never comes here.
//!
//! Source: SMC Calling Convention (Arm DEN 0028), TRNG firmware interface (DEN 0098), Linux's
//! `Documentation/virt/kvm/arm/hypercalls.rst` for the vendor calls.

use super::entropy::{self, EntropySource};
use super::idregs::GuestIds;
use super::protected::{self, MmioGuard, Request};
use super::psci::{self, Power};
use crate::smc::{SMCCC_ARCH_FEATURES_ID, SMCCC_VERSION, SMCCC_VERSION_ID};

/// NOT_SUPPORTED, sign-extended.
const NOT_SUPPORTED: u64 = u64::MAX;
const SUCCESS: u64 = 0;
/// INVALID_PARAMETER, sign-extended (DEN 0028 7.1).
pub const INVALID_PARAMETER: u64 = u64::MAX - 2;
const WORKAROUND_1: u32 = 0x8000_8000;
const WORKAROUND_2: u32 = 0x8000_7fff;
const WORKAROUND_3: u32 = 0x8000_3fff;
const VENDOR_UID: u32 = 0x8600_ff01;
const VENDOR_FEATURES: u32 = 0x8600_0000;
/// Ours: how memory at an address of the guest is really accessed, see [`Action::Attributes`].
const MEMORY_ATTRIBUTES: u32 = abi::GUEST_MEMORY_ATTRIBUTES;
/// 28b46fb6-2ec5-11e9-a9ca-4b564d003a74, little-endian words.
const KVM_UID: [u64; 4] = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];
/// Bitmap of an unprotected guest's vendor calls by function number: only the bitmap itself.
const KVM_FEATURES: u64 = 1;

/// How a core stands to a Spectre-class attack, as SMCCC_ARCH_FEATURES tells it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mitigation {
    /// Nobody knows, or nothing helps: NOT_SUPPORTED.
    #[default]
    Unknown,
    /// The core is not affected: 1.
    NotNeeded,
    /// Firmware's call helps: 0. The guest's calls go to firmware.
    Firmware,
}

impl Mitigation {
    /// From firmware's answer to SMCCC_ARCH_FEATURES on this core (DEN 0028 7.4 to 7.6).
    #[must_use]
    pub const fn from_firmware(answer: i32) -> Self {
        match answer {
            0 => Self::Firmware,
            1 => Self::NotNeeded,
            _ => Self::Unknown,
        }
    }

    const fn answer(self) -> u64 {
        match self {
            Self::Unknown => NOT_SUPPORTED,
            Self::NotNeeded => 1,
            Self::Firmware => 0,
        }
    }
}

/// Mitigations of the cores that a VM may run on: if they differ, the worst.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Mitigations {
    /// SMCCC_ARCH_WORKAROUND_1: branch target injection (CVE-2017-5715).
    pub workaround_1: Mitigation,
    /// SMCCC_ARCH_WORKAROUND_2: speculative store bypass (CVE-2018-3639).
    pub workaround_2: Mitigation,
    /// SMCCC_ARCH_WORKAROUND_3: branch history injection (CVE-2022-23960).
    pub workaround_3: Mitigation,
}

impl Mitigations {
    /// The call of firmware that keeps what one world has taught the core's predictors from the next
    /// one; `None` where the cores need none, or firmware has none. WORKAROUND_3 does what
    /// WORKAROUND_1 does, and more (DEN 0028 7.6).
    #[must_use]
    #[inline]
    pub const fn between_worlds(&self) -> Option<u32> {
        match (self.workaround_3, self.workaround_1) {
            (Mitigation::Firmware, _) => Some(WORKAROUND_3),
            (_, Mitigation::Firmware) => Some(WORKAROUND_1),
            _ => None,
        }
    }
}

/// What the calls read of the VM that makes one. Asked for piece by piece: most calls need none of it.
pub trait Caller {
    /// Power states of the VM.
    fn power(&self) -> &Power;
    /// Its identification registers.
    fn ids(&self) -> &GuestIds;
    /// Its cores' mitigations.
    fn mitigations(&self) -> &Mitigations;
    /// Where random numbers come from, if anywhere.
    fn entropy(&self) -> Option<&dyn EntropySource>;
    /// The guarded pages of a protected VM.
    fn guard(&self) -> Option<&MmioGuard>;
    /// Whether an IPA is RAM of the guest.
    fn is_memory(&self, ipa: u64) -> bool;
}

/// What to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Put these into `x0` to `x3`.
    Return([u64; 4]),
    /// PSCI: see [`psci::Action`].
    Power(psci::Action),
    /// Translate this virtual address of the guest by AT S12E1R: `x0` 0, `x1` the attribute
    /// (PAR_EL1 63:56), `x2` the shareability (8:7), or `x0` [`INVALID_PARAMETER`] if it has none.
    Attributes(u64),
    /// A protected guest's call, see [`protected::Request`].
    Protected(Request),
    /// Make this call of firmware, which takes no argument, and put 0 into `x0`.
    Firmware(u32),
}

/// Performs or decides a guest's HVC with this immediate and `x0` to `x3`.
#[must_use]
#[inline]
pub fn call(immediate: u16, registers: [u64; 4], caller: &impl Caller) -> Action {
    let [id, args @ ..] = registers;
    // The upper half must be zero, as for the host (see `crate::smc::judge`).
    let (0, Ok(id)) = (immediate, u32::try_from(id)) else {
        return one(NOT_SUPPORTED);
    };
    if crate::smc::is_psci(id) {
        let is_memory = |ipa| caller.is_memory(ipa);
        return Action::Power(psci::call(id, args, caller.power(), is_memory));
    }
    about_the_machine(id, args, caller)
}

/// The calls beside PSCI.
#[inline(never)]
fn about_the_machine(id: u32, args: [u64; 3], caller: &impl Caller) -> Action {
    let [first, ..] = args;
    match id {
        SMCCC_VERSION_ID => one(SMCCC_VERSION),
        SMCCC_ARCH_FEATURES_ID => one(arch_feature(first, caller)),
        WORKAROUND_1 | WORKAROUND_2 | WORKAROUND_3 => workaround(id, caller),
        VENDOR_UID => Action::Return(KVM_UID),
        MEMORY_ATTRIBUTES => Action::Attributes(first),
        VENDOR_FEATURES if caller.guard().is_some() => {
            Action::Return([protected::FEATURES, 0, 0, 0])
        }
        VENDOR_FEATURES => Action::Return([KVM_FEATURES, 0, 0, 0]),
        _ => {
            let guard = caller.guard();
            if let Some(request) = guard.and_then(|guard| protected::call(id, args, guard)) {
                return Action::Protected(request);
            }
            entropy::call(id, first, caller.entropy()).map_or(one(NOT_SUPPORTED), Action::Return)
        }
    }
}

/// An answer in `x0`; SMCCC 1.2 keeps the other registers, and what is in them is the guest's.
const fn one(value: u64) -> Action {
    Action::Power(psci::Action::Return(value))
}

fn arch_feature(id: u64, caller: &impl Caller) -> u64 {
    // A 32-bit call: the argument is `w1`.
    let [a, b, c, d, ..] = id.to_le_bytes();
    let id = u32::from_le_bytes([a, b, c, d]);
    match id {
        SMCCC_VERSION_ID | SMCCC_ARCH_FEATURES_ID => SUCCESS,
        _ => mitigation(id, caller).answer(),
    }
}

/// How the guest's core stands to the attack behind a workaround. CSV2, which the guest may read,
/// already says that the first is not needed: then nothing else is said here.
fn mitigation(id: u32, caller: &impl Caller) -> Mitigation {
    let known = caller.mitigations();
    match id {
        WORKAROUND_1 if caller.ids().has_csv2() => Mitigation::NotNeeded,
        WORKAROUND_1 => known.workaround_1,
        // Firmware's call turns it on or off for the core, whoever is on it next: not a guest's to say.
        WORKAROUND_2 if known.workaround_2 == Mitigation::Firmware => Mitigation::Unknown,
        WORKAROUND_2 => known.workaround_2,
        WORKAROUND_3 => known.workaround_3,
        _ => Mitigation::Unknown,
    }
}

/// The call itself. Where it is not needed it does nothing and succeeds (DEN 0028 7.4.3).
fn workaround(id: u32, caller: &impl Caller) -> Action {
    match mitigation(id, caller) {
        Mitigation::Unknown => one(NOT_SUPPORTED),
        Mitigation::NotNeeded => one(SUCCESS),
        Mitigation::Firmware => Action::Firmware(id),
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "smccc_tests.rs"]
mod tests;
