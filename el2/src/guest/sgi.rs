//! Software-generated interrupts by system register: ICC_SGI1R_EL1 and its siblings.
//!
//! Source: Arm GIC architecture (IHI 0069) 12.2.17 to 12.2.19. A guest's vCPUs have Aff0 = index
//! and all other affinities 0, so only that cluster has targets.

/// A decoded request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SgiRequest {
    /// INTID, 0 to 15.
    pub intid: u8,
    /// Target vCPUs by index; none where the request names affinities that nobody has.
    pub targets: u8,
}

impl SgiRequest {
    /// Decodes a value written by vCPU `sender` of a VM of `vcpus` vCPUs, 1 to 8.
    ///
    /// IRM (bit 40) means all but the sender; then the affinities are ignored.
    #[must_use]
    pub fn decode(value: u64, sender: u8, vcpus: u8) -> Self {
        /// Aff3 (55:48), RS (47:44), Aff2 (39:32) and Aff1 (23:16).
        const ELSEWHERE: u64 = 0xff << 48 | 0xf << 44 | 0xff << 32 | 0xff << 16;
        let present = u8::MAX >> 8u8.saturating_sub(vcpus).min(7);
        let [list, _, _, intid, _, irm, ..] = value.to_le_bytes();
        let targets = if irm & 1 != 0 {
            !1u8.checked_shl(u32::from(sender)).unwrap_or(0)
        } else if value & ELSEWHERE != 0 {
            0
        } else {
            list
        };
        Self {
            intid: intid & 0xf,
            targets: targets & present,
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn targets(value: u64, sender: u8, vcpus: u8) -> u8 {
        SgiRequest::decode(value, sender, vcpus).targets
    }

    #[test]
    fn list_names_vcpus_and_bits_27_to_24_the_interrupt() {
        let request = SgiRequest::decode(0x0500_0006, 0, 4);
        assert_eq!((request.intid, request.targets), (5, 0b0110));
        assert_eq!(targets(0x0500_ffff, 0, 4), 0b1111);
    }

    #[test]
    fn routing_mode_1_reaches_all_but_the_sender() {
        assert_eq!(targets(1 << 40 | 0xff << 16, 2, 4), 0b1011);
        assert_eq!(targets(1 << 40, 0, 1), 0);
        assert_eq!(targets(1 << 40, 7, 8), 0b0111_1111);
    }

    #[test]
    fn other_clusters_have_nobody() {
        for bit in [16, 32, 44, 48] {
            assert_eq!(targets(1 << bit | 1, 0, 8), 0, "{bit}");
        }
    }

    proptest! {
        #[test]
        fn targets_exist(value: u64, sender in 0u8..8, vcpus in 1u8..=8) {
            let request = SgiRequest::decode(value, sender, vcpus);
            prop_assert!(request.intid < 16);
            prop_assert_eq!(u32::from(request.targets) >> vcpus, 0);
        }
    }
}
