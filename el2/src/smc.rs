//! Which of the host's SMCs reach firmware.
//!
//! Default deny: what is not on the list gets NOT_SUPPORTED and nothing else happens. Source: SMC
//! Calling Convention (Arm DEN 0028), TRNG firmware interface (DEN 0098).

/// What to do with a trapped SMC or a firmware call made by HVC.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// PSCI: served by EL2.
    Psci,
    /// SMCCC_VERSION: answered by EL2, see [`SMCCC_VERSION`].
    Version,
    /// SMCCC_ARCH_FEATURES: answered for our own calls, else forwarded.
    ArchFeatures,
    /// On the allow-list: goes to firmware if there is one.
    Forward,
    /// NOT_SUPPORTED.
    Refuse,
}

/// The convention's version that EL2 implements: 1.2.
pub const SMCCC_VERSION: u64 = 0x1_0002;
/// Function id of SMCCC_VERSION.
pub const SMCCC_VERSION_ID: u32 = 0x8000_0000;
/// Function id of SMCCC_ARCH_FEATURES.
pub const SMCCC_ARCH_FEATURES_ID: u32 = 0x8000_0001;

/// SMCs that firmware may answer: identification, the Spectre-class workarounds, and random
/// numbers. None of them takes an address.
const FORWARDED: &[u32] = &[
    0x8000_0002, // SMCCC_ARCH_SOC_ID
    0x8000_3fff, // SMCCC_ARCH_WORKAROUND_3
    0x8000_7fff, // SMCCC_ARCH_WORKAROUND_2
    0x8000_8000, // SMCCC_ARCH_WORKAROUND_1
    0x8400_0050, // TRNG_VERSION
    0x8400_0051, // TRNG_FEATURES
    0x8400_0052, // TRNG_GET_UUID
    0x8400_0053, // TRNG_RND, 32-bit
    0xc400_0053, // TRNG_RND, 64-bit
];

/// Decides about the call with this value in `x0`, by an SMC or HVC with this immediate.
///
/// The function id is `w0`; the upper half must be zero or the call is refused, so that nobody
/// can hide an id from a filter that looks at another width.
#[must_use]
pub fn judge(immediate: u16, x0: u64) -> Verdict {
    let Ok(id) = u32::try_from(x0) else {
        return Verdict::Refuse;
    };
    match id {
        _ if immediate != 0 => Verdict::Refuse,
        SMCCC_VERSION_ID => Verdict::Version,
        SMCCC_ARCH_FEATURES_ID => Verdict::ArchFeatures,
        _ if is_psci(id) => Verdict::Psci,
        _ if FORWARDED.contains(&id) => Verdict::Forward,
        _ => Verdict::Refuse,
    }
}

/// Standard secure service, function numbers 0x00 to 0x1f, either width (DEN 0022 5.1).
#[inline]
pub(crate) const fn is_psci(id: u32) -> bool {
    id & !0x4000_001f == 0x8400_0000
}

/// SMCCC_ARCH_FEATURES for an id that EL2 answers itself: `Some(0)` if it does.
#[must_use]
pub fn arch_feature(id: u64) -> Option<u64> {
    match u32::try_from(id) {
        Ok(SMCCC_VERSION_ID | SMCCC_ARCH_FEATURES_ID) => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn psci_in_both_widths_is_served() {
        assert_eq!(judge(0, 0x8400_0000), Verdict::Psci);
        assert_eq!(judge(0, 0xc400_0003), Verdict::Psci);
        assert_eq!(judge(0, 0x8400_001f), Verdict::Psci);
        assert_eq!(judge(0, 0x8400_0020), Verdict::Refuse);
    }

    #[test]
    fn firmware_interfaces_that_take_memory_are_refused() {
        // FF-A version and memory share, a SiP call, an OEM call, a trusted OS.
        for id in [
            0x8400_0063,
            0xc400_0073,
            0x8200_ff01,
            0x8300_0000,
            0xb200_0000,
        ] {
            assert_eq!(judge(0, id), Verdict::Refuse, "{id:#x}");
        }
    }

    #[test]
    fn immediates_and_wide_ids_are_refused() {
        assert_eq!(judge(1, 0x8400_0000), Verdict::Refuse);
        assert_eq!(judge(0, 0x1_8400_0000), Verdict::Refuse);
    }

    #[test]
    fn workarounds_and_random_numbers_are_forwarded() {
        assert_eq!(judge(0, 0x8000_8000), Verdict::Forward);
        assert_eq!(judge(0, 0xc400_0053), Verdict::Forward);
        assert_eq!(judge(0, 0xc400_0052), Verdict::Refuse);
    }

    #[test]
    fn arch_features_knows_only_what_el2_answers() {
        assert_eq!(arch_feature(0x8000_0000), Some(0));
        assert_eq!(arch_feature(0x8000_8000), None);
        assert_eq!(arch_feature(u64::MAX), None);
    }

    proptest! {
        /// Only listed ids are ever forwarded.
        #[test]
        fn forwarding_is_an_allow_list(immediate: u16, x0: u64) {
            if judge(immediate, x0) == Verdict::Forward {
                prop_assert!(immediate == 0);
                prop_assert!(FORWARDED.contains(&u32::try_from(x0).unwrap()));
            }
        }
    }
}
