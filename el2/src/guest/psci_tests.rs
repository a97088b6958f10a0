use super::*;

const ENTRY: u64 = 0x4008_0000;

/// The order that a vCPU's run begins with, if it does.
fn take_order(power: &Power, index: u8) -> Option<StartOrder> {
    match power.turn(index) {
        Turn::Starts(order) => Some(order),
        Turn::GoesOn | Turn::IsOff => None,
    }
}

#[cfg(not(loom))]
mod calls {
    use proptest::prelude::*;

    use super::*;

    fn ram(ipa: u64) -> bool {
        (0x4000_0000..0x8000_0000).contains(&ipa)
    }

    fn ask(power: &Power, id: u32, args: [u64; 3]) -> Action {
        call(id, args, power, ram)
    }

    fn error(code: i64) -> Action {
        Action::Return(code.cast_unsigned())
    }

    fn order(entry: u64, context: u64) -> StartOrder {
        StartOrder { entry, context }
    }

    #[test]
    fn version_is_1_1_and_there_is_no_trusted_os() {
        let power = Power::new(1);
        assert_eq!(ask(&power, 0x8400_0000, [0; 3]), Action::Return(0x1_0001));
        assert_eq!(ask(&power, 0x8400_0006, [0; 3]), Action::Return(2));
    }

    #[test]
    fn no_vcpu_goes_on_behind_the_end_of_the_machine() {
        let power = Power::new(2);
        power.order(0, order(ENTRY, 0)).unwrap();
        assert_eq!(take_order(&power, 0), Some(order(ENTRY, 0)));
        power.order(1, order(ENTRY, 0)).unwrap();
        power.end();
        assert_eq!([0, 1].map(|index| power.turn(index)), [Turn::IsOff; 2]);
        power.reset();
        assert_eq!([0, 1].map(|index| power.turn(index)), [Turn::IsOff; 2]);
        power.order(0, order(ENTRY, 1)).unwrap();
        assert_eq!(take_order(&power, 0), Some(order(ENTRY, 1)));
    }

    #[test]
    fn a_vcpu_is_turned_on_runs_and_goes_off() {
        let power = Power::new(2);
        let info = |level| ask(&power, 0xc400_0004, [1, level, 0]);
        assert_eq!(info(0), Action::Return(1));
        let on = ask(&power, 0xc400_0003, [1, ENTRY, 7]);
        assert_eq!(on, Action::TurnedOn { index: 1 });
        assert_eq!(info(0), Action::Return(2));
        assert!(power.is_runnable(1));
        assert_eq!(ask(&power, 0xc400_0003, [1, ENTRY, 8]), error(-5));
        assert_eq!(take_order(&power, 1), Some(order(ENTRY, 7)));
        assert_eq!(info(0), Action::Return(0));
        assert_eq!(power.turn(1), Turn::GoesOn);
        assert_eq!(ask(&power, 0xc400_0003, [1, ENTRY, 8]), error(-4));
        assert_eq!(ask(&power, 0x8400_0002, [0; 3]), Action::Off);
        power.off(1);
        assert_eq!(info(0), Action::Return(1));
        assert!(!power.is_runnable(1));
        assert_eq!(power.turn(1), Turn::IsOff);
    }

    #[test]
    fn cpu_on_refuses_bad_targets_and_entries() {
        let power = Power::new(2);
        let on = |mpidr, entry| ask(&power, 0xc400_0003, [mpidr, entry, 0]);
        for mpidr in [2, 0x100, 1 << 31 | 1, 1 << 32, u64::MAX] {
            assert_eq!(on(mpidr, ENTRY), error(-2), "{mpidr:#x}");
        }
        for entry in [ENTRY + 2, 0x0900_0000, !3] {
            assert_eq!(on(1, entry), error(-9), "{entry:#x}");
        }
        assert_eq!(take_order(&power, 1), None);
    }

    #[test]
    fn narrow_calls_take_the_lower_halves() {
        let power = Power::new(2);
        let args = [0xdead_0000_0001, 0x1_0000_0000 | ENTRY, u64::MAX];
        assert_eq!(
            ask(&power, 0x8400_0003, args),
            Action::TurnedOn { index: 1 }
        );
        assert_eq!(take_order(&power, 1), Some(order(ENTRY, 0xffff_ffff)));
    }

    #[test]
    fn affinity_levels_above_0_take_all_vcpus_together() {
        let power = Power::new(3);
        let info = |mpidr, level| ask(&power, 0xc400_0004, [mpidr, level, 0]);
        assert_eq!(info(0, 1), Action::Return(1));
        power.order(2, order(ENTRY, 0)).unwrap();
        assert_eq!(info(0xff, 1), Action::Return(2));
        let _ = take_order(&power, 2);
        assert_eq!(info(0, 1), Action::Return(0));
        assert_eq!(info(0xff_ffff, 3), Action::Return(0));
        assert_eq!(info(0x100, 1), error(-2));
        assert_eq!(info(3, 0), error(-2));
        assert_eq!(info(0, 4), error(-2));
        assert_eq!(info(1 << 24, 3), error(-2));
    }

    #[test]
    fn standby_waits_and_power_down_starts_over() {
        let power = Power::new(1);
        let suspend = |state| ask(&power, 0xc400_0001, [state, ENTRY, 9]);
        assert_eq!(suspend(0), Action::Standby);
        assert_eq!(suspend(0x0100_ffff), Action::Standby);
        let down = Action::PowerDown(order(ENTRY, 9));
        assert_eq!(suspend(1 << 16), down);
        for bad in [1 << 17, 1 << 23, 1 << 26, 1 << 31] {
            assert_eq!(suspend(bad), error(-2), "{bad:#x}");
        }
        let elsewhere = ask(&power, 0xc400_0001, [1 << 16, 0x1000, 0]);
        assert_eq!(elsewhere, error(-9));
    }

    #[test]
    fn the_machine_goes_off_and_is_reset_in_both_ways() {
        let power = Power::new(1);
        let reset = |warm| Action::SystemReset { warm };
        assert_eq!(ask(&power, 0x8400_0008, [0; 3]), Action::SystemOff);
        assert_eq!(ask(&power, 0x8400_0009, [0; 3]), reset(false));
        assert_eq!(ask(&power, 0x8400_0012, [0; 3]), reset(true));
        assert_eq!(ask(&power, 0xc400_0012, [0, 5, 0]), reset(true));
        assert_eq!(ask(&power, 0xc400_0012, [1, 0, 0]), error(-2));
        assert_eq!(ask(&power, 0xc400_0012, [0x8000_0000, 0, 0]), error(-2));
    }

    #[test]
    fn features_name_what_is_served_and_no_more() {
        let power = Power::new(1);
        let feature = |id| ask(&power, 0x8400_000a, [id, 0, 0]);
        for id in [
            0x8400_0012,
            0xc400_0012,
            0xc400_0001,
            0x8400_0008,
            0x8000_0000,
        ] {
            assert_eq!(feature(id), Action::Return(0), "{id:#x}");
        }
        for id in [0x8400_0005, 0xc400_000e, 0xc400_000f, 0x8400_0013, 0] {
            assert_eq!(feature(id), error(-1), "{id:#x}");
        }
        assert_eq!(ask(&power, 0xc400_000e, [0; 3]), error(-1));
        assert_eq!(ask(&power, 0x8400_001f, [0; 3]), error(-1));
    }

    #[test]
    fn reset_turns_every_vcpu_off() {
        let power = Power::new(8);
        power.order(7, order(ENTRY, 0)).unwrap();
        power.reset();
        assert!((0..8).all(|index| !power.is_runnable(index)));
        assert_eq!(
            power.order(8, order(ENTRY, 0)),
            Err(PsciError::InvalidParameters)
        );
    }

    proptest! {
        /// No call turns on a vCPU that does not exist, or one at a place that is no memory.
        #[test]
        fn any_call_is_answered(
            number in 0u32..0x20, wide: bool, args in any::<[u64; 3]>(), vcpus in 0u8..=9,
        ) {
            let power = Power::new(vcpus);
            let id = 0x8400_0000 | number | u32::from(wide) << 30;
            match ask(&power, id, args) {
                Action::TurnedOn { index } => {
                    prop_assert!(index < vcpus.min(8));
                    prop_assert!(ram(take_order(&power, index).unwrap().entry));
                }
                Action::PowerDown(order) => prop_assert!(ram(order.entry)),
                _ => {}
            }
        }
    }
}

#[cfg(loom)]
mod models {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    fn cpu_on(power: &Power, context: u64) -> Action {
        call(0xc400_0003, [1, ENTRY, context], power, |_| true)
    }

    /// Two vCPUs turn on a third that is just turning itself off: at most one order is accepted
    /// for each time it is off, every accepted order is started from, and whole.
    #[test]
    fn racing_cpu_on_and_cpu_off_lose_and_double_no_start() {
        loom::model(|| {
            let power = Arc::new(Power::new(2));
            power
                .order(
                    1,
                    StartOrder {
                        entry: ENTRY,
                        context: 99,
                    },
                )
                .unwrap();
            assert!(take_order(&power, 1).is_some());
            let rivals: std::vec::Vec<_> = [1u64, 2]
                .into_iter()
                .map(|context| {
                    let power = Arc::clone(&power);
                    thread::spawn(move || cpu_on(&power, context))
                })
                .collect();
            power.off(1);
            let early = take_order(&power, 1);
            let answers: std::vec::Vec<_> = rivals
                .into_iter()
                .map(|rival| rival.join().unwrap())
                .collect();
            let late = take_order(&power, 1);
            let accepted = answers
                .iter()
                .filter(|answer| **answer == Action::TurnedOn { index: 1 })
                .count();
            let started = usize::from(early.is_some()) + usize::from(late.is_some());
            assert_eq!(accepted, started);
            assert!(started <= 1, "it was off once");
            for order in early.iter().chain(&late) {
                assert_eq!(order.entry, ENTRY);
                assert!(order.context == 1 || order.context == 2);
            }
        });
    }
}
