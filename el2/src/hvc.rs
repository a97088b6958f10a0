//! The host's hypercalls: decoding and answers. See the `abi` crate.

use abi::{Call, Counter, ErrorCode, Features, SMCCC_NOT_SUPPORTED, SMCCC_SUCCESS};

use crate::counters::Counters;

/// What the calls read.
#[derive(Debug)]
pub struct Host<'a> {
    /// What this EL2 can do.
    pub features: Features,
    /// Counters.
    pub counters: &'a Counters,
}

/// How a call is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// With these in `x0..x3`.
    Now([u64; 4]),
    /// By whoever manages VMs.
    AboutVms(Call),
}

/// Answers a call: `id` in `x0`, `argument` in `x1`.
///
/// An id that is not ours gets NOT_SUPPORTED and changes nothing.
#[must_use]
pub fn answer(immediate: u16, id: u64, argument: u64, host: &Host<'_>) -> Answer {
    let unknown = Answer::Now([SMCCC_NOT_SUPPORTED, 0, 0, 0]);
    if immediate != 0 {
        return unknown;
    }
    if id == u64::from(abi::VENDOR_UID) {
        return Answer::Now(abi::RAVELIN_UID.map(u64::from));
    }
    let Some(call) = u32::try_from(id).ok().and_then(Call::from_id) else {
        return unknown;
    };
    let result = match call {
        Call::Version => Ok(u64::from(abi::VERSION)),
        Call::Features => Ok(host.features.bits()),
        Call::HostCounter => Counter::from_number(argument)
            .map(|counter| host.counters.get(counter))
            .ok_or(ErrorCode::Invalid),
        other => return Answer::AboutVms(other),
    };
    Answer::Now([SMCCC_SUCCESS, abi::to_register(result), 0, 0])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(immediate: u16, id: u64, argument: u64) -> [u64; 4] {
        let counters = Counters::new();
        counters.count(Counter::FaultsRefused);
        let host = Host {
            features: Features::HOST_COUNTERS,
            counters: &counters,
        };
        match answer(immediate, id, argument, &host) {
            Answer::Now(registers) => registers,
            Answer::AboutVms(call) => [SMCCC_SUCCESS, call as u64, 0, 0],
        }
    }

    #[test]
    fn calls_about_vms_are_passed_on() {
        assert_eq!(ask(0, 0xc600_0110, 0), [0, 0xc600_0110, 0, 0]);
        assert_eq!(ask(0, 0xc600_0140, 5), [0, 0xc600_0140, 0, 0]);
        assert_eq!(ask(1, 0xc600_0110, 0)[0], u64::MAX);
    }

    #[test]
    fn version_and_features_are_told() {
        assert_eq!(ask(0, 0xc600_0100, 0), [0, 0x1_0003, 0, 0]);
        assert_eq!(ask(0, 0xc600_0101, 0), [0, 1, 0, 0]);
    }

    #[test]
    fn counters_are_read_and_bad_numbers_refused() {
        assert_eq!(ask(0, 0xc600_0102, 3), [0, 1, 0, 0]);
        assert_eq!(ask(0, 0xc600_0102, 99), [0, (-22i64).cast_unsigned(), 0, 0]);
    }

    #[test]
    fn uid_is_ours() {
        assert_eq!(
            ask(0, 0x8600_ff01, 0),
            [0xc291_7d4a, 0x5b4e_603f, 0x6172_189d, 0x6e6c_6576]
        );
    }

    #[test]
    fn strange_ids_and_immediates_are_not_supported() {
        for id in [0, 0x8600_0000, 0xc600_01ff, 0x1_c600_0100, u64::MAX] {
            assert_eq!(ask(0, id, 0)[0], u64::MAX, "{id:#x}");
        }
        assert_eq!(ask(1, 0xc600_0100, 0)[0], u64::MAX);
    }

    proptest! {
        #[test]
        fn any_registers_get_an_answer(immediate: u16, id: u64, argument: u64) {
            let reply = ask(immediate, id, argument);
            prop_assert!(reply[0] == 0 || reply[0] == u64::MAX || id == 0x8600_ff01);
        }
    }
}
