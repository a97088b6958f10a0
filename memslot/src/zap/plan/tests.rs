//! Each row of the tables of events, with ranges computed by hand, and the promise itself.

use super::*;
use std::vec::Vec;

const ON: EptPolicy = EptPolicy::guest_mtrr(CdQuirk::WriteBack);
const OFF: EptPolicy = EptPolicy::guest_mtrr(CdQuirk::Uncached);
const ALL_WB: u64 = 0x0606_0606_0606_0606;
/// 2 GiB of 40 address bits, valid.
const MASK_2G: u64 = 0xff_8000_0800;
const UC_2G: (u64, u64) = (0x8000_0000, 0x10_0000);

fn r(start: u64, end: u64) -> GfnRange {
    GfnRange::new(start, end).unwrap()
}

/// A vCPU with these registers, written while nothing is honoured.
fn vcpu(writes: &[(Msr, u64)]) -> VcpuTypes {
    let mut v = VcpuTypes::new(40, true);
    for &(msr, value) in writes {
        v.mtrrs.write(msr, value).unwrap();
    }
    v
}

fn write(v: &mut VcpuTypes, msr: Msr, value: u64) -> Vec<GfnRange> {
    write_msr(&ON, true, v, msr, value)
        .unwrap()
        .ranges()
        .to_vec()
}

fn toggle(policy: EptPolicy, v: &VcpuTypes, cd: bool) -> Vec<GfnRange> {
    let mut v = v.clone();
    v.cd = !cd;
    set_cd(&policy, true, &mut v, cd).ranges().to_vec()
}

fn fixed_enabled() -> VcpuTypes {
    vcpu(&[(Msr::DefaultType, 0xc06)])
}

#[test]
fn w1_pat_never_zaps() {
    assert_eq!(write(&mut fixed_enabled(), Msr::Pat, 0x6), []);
}

#[test]
fn w2_nothing_zaps_while_types_are_not_honoured() {
    let mut v = fixed_enabled();
    let plan = write_msr(&ON, false, &mut v, Msr::DefaultType, 0xc00).unwrap();
    assert_eq!(plan, ZapPlan::NONE);
    let plan = write_msr(&EptPolicy::TODAY, true, &mut v, Msr::DefaultType, 0xc06).unwrap();
    assert_eq!(plan, ZapPlan::NONE);
    assert_eq!(v.mtrrs.read(Msr::DefaultType), Ok(0xc06));
}

#[test]
fn w3_nothing_zaps_while_cd_is_set() {
    let mut v = fixed_enabled();
    v.cd = true;
    assert_eq!(write(&mut v, Msr::DefaultType, 0), []);
    assert_eq!(write(&mut v, Msr::Fixed(0), ALL_WB), []);
}

#[test]
fn w4_ranges_written_while_disabled_do_not_zap() {
    let mut v = vcpu(&[(Msr::DefaultType, 0x406)]);
    assert_eq!(write(&mut v, Msr::VariableMask(0), MASK_2G), []);
    assert_eq!(write(&mut v, Msr::Fixed(0), ALL_WB), []);
}

#[test]
fn w5_fixed_registers_do_not_zap_while_fixed_ranges_are_disabled() {
    let mut v = vcpu(&[(Msr::DefaultType, 0x806)]);
    assert_eq!(write(&mut v, Msr::Fixed(0), ALL_WB), []);
}

#[test]
fn w6_a_fixed_register_zaps_its_span() {
    assert_eq!(
        write(&mut fixed_enabled(), Msr::Fixed(0), ALL_WB),
        [r(0, 0x80)]
    );
    assert_eq!(
        write(&mut fixed_enabled(), Msr::Fixed(1), ALL_WB),
        [r(0x80, 0xa0)]
    );
    assert_eq!(
        write(&mut fixed_enabled(), Msr::Fixed(2), ALL_WB),
        [r(0xa0, 0xc0)]
    );
    assert_eq!(
        write(&mut fixed_enabled(), Msr::Fixed(3), ALL_WB),
        [r(0xc0, 0xc8)]
    );
    assert_eq!(
        write(&mut fixed_enabled(), Msr::Fixed(10), ALL_WB),
        [r(0xf8, 0x100)]
    );
}

#[test]
fn w7_the_default_type_register_zaps_all() {
    let all = [GfnRange::ALL];
    assert_eq!(write(&mut vcpu(&[]), Msr::DefaultType, 0x806), all);
    assert_eq!(write(&mut fixed_enabled(), Msr::DefaultType, 0x406), all);
    assert_eq!(write(&mut fixed_enabled(), Msr::DefaultType, 0xc00), all);
}

#[test]
fn w7_fe_alone_zaps_the_fixed_area_and_no_change_zaps_nothing() {
    assert_eq!(
        write(&mut fixed_enabled(), Msr::DefaultType, 0x806),
        [r(0, 0x100)]
    );
    assert_eq!(write(&mut fixed_enabled(), Msr::DefaultType, 0xc06), []);
    assert_eq!(write(&mut vcpu(&[]), Msr::DefaultType, 0x405), []);
}

#[test]
fn w8_a_pair_that_becomes_valid_zaps_its_span() {
    let mut v = vcpu(&[(Msr::DefaultType, 0x806)]);
    assert_eq!(write(&mut v, Msr::VariableBase(3), 0x8000_0000), []);
    assert_eq!(
        write(&mut v, Msr::VariableMask(3), MASK_2G),
        [r(UC_2G.0 >> 12, UC_2G.1)]
    );
}

#[test]
fn w8_a_pair_that_becomes_invalid_zaps_where_it_was() {
    let pair = [
        (Msr::VariableBase(3), 0x8000_0000),
        (Msr::VariableMask(3), MASK_2G),
    ];
    let mut v = vcpu(&[pair[0], pair[1], (Msr::DefaultType, 0x806)]);
    assert_eq!(
        write(&mut v, Msr::VariableMask(3), MASK_2G & !0x800),
        [r(0x8_0000, 0x10_0000)]
    );
}

#[test]
fn w8_moving_a_live_pair_zaps_both_places() {
    let pair = [
        (Msr::VariableBase(3), 0x8000_0000),
        (Msr::VariableMask(3), MASK_2G),
    ];
    let mut v = vcpu(&[pair[0], pair[1], (Msr::DefaultType, 0x806)]);
    let both = [r(0x8_0000, 0x10_0000), r(0x10_0000, 0x18_0000)];
    assert_eq!(write(&mut v, Msr::VariableBase(3), 0x1_0000_0000), both);
}

#[test]
fn w8_an_unchanged_value_zaps_nothing() {
    let pair = [
        (Msr::VariableBase(3), 0x8000_0000),
        (Msr::VariableMask(3), MASK_2G),
    ];
    let mut v = vcpu(&[pair[0], pair[1], (Msr::DefaultType, 0x806)]);
    assert_eq!(write(&mut v, Msr::VariableMask(3), MASK_2G), []);
}

#[test]
fn a_refused_write_changes_and_zaps_nothing() {
    let mut v = fixed_enabled();
    let before = v.clone();
    assert!(write_msr(&ON, true, &mut v, Msr::DefaultType, 0xc02).is_err());
    assert_eq!(v, before);
}

#[test]
fn t0_no_toggle_or_not_honoured_zaps_nothing() {
    let mut v = fixed_enabled();
    assert_eq!(set_cd(&ON, true, &mut v, false), ZapPlan::NONE);
    assert_eq!(set_cd(&OFF, true, &mut v, false), ZapPlan::NONE);
    assert_eq!(set_cd(&OFF, false, &mut v, true), ZapPlan::NONE);
    assert!(v.cd);
    assert_eq!(
        set_cd(&EptPolicy::TODAY, true, &mut v, false),
        ZapPlan::NONE
    );
    assert!(!v.cd);
}

#[test]
fn t1_without_the_quirk_every_toggle_zaps_all() {
    let states = [
        vcpu(&[(Msr::DefaultType, 0xc06)]),
        vcpu(&[(Msr::DefaultType, 0xc00)]),
        vcpu(&[]),
        VcpuTypes::new(40, false),
    ];
    for v in &states {
        assert_eq!(toggle(OFF, v, true), [GfnRange::ALL]);
        assert_eq!(toggle(OFF, v, false), [GfnRange::ALL]);
    }
}

#[test]
fn t1_a_default_other_than_wb_zaps_all() {
    let v = vcpu(&[(Msr::DefaultType, 0xc00)]);
    assert_eq!(toggle(ON, &v, true), [GfnRange::ALL]);
    assert_eq!(toggle(ON, &v, false), [GfnRange::ALL]);
}

#[test]
fn t1_disabled_mtrrs_of_a_guest_that_has_them_zap_all() {
    let v = vcpu(&[(Msr::DefaultType, 0x6)]);
    assert_eq!(toggle(ON, &v, true), [GfnRange::ALL]);
    assert_eq!(toggle(ON, &v, false), [GfnRange::ALL]);
}

#[test]
fn t2_a_guest_without_mtrrs_zaps_nothing() {
    let v = VcpuTypes::new(40, false);
    assert_eq!(toggle(ON, &v, true), []);
    assert_eq!(toggle(ON, &v, false), []);
}

#[test]
fn t3_the_ovmf_layout_costs_two_ranges_then_three() {
    let mut v = vcpu(&[
        (Msr::Fixed(0), ALL_WB),
        (Msr::Fixed(1), ALL_WB),
        (Msr::VariableBase(0), 0x8000_0000),
        (Msr::VariableMask(0), MASK_2G),
        (Msr::DefaultType, 0xc06),
    ]);
    let two = [r(0, 0x100), r(0x8_0000, 0x10_0000)];
    assert_eq!(toggle(ON, &v, true), two);
    assert_eq!(toggle(ON, &v, false), two);
    v.mtrrs.write(Msr::VariableBase(1), 0x8_0000_0000).unwrap();
    v.mtrrs.write(Msr::VariableMask(1), 0xf8_0000_0800).unwrap();
    let three = [two[0], two[1], r(0x80_0000, 0x100_0000)];
    assert_eq!(toggle(ON, &v, false), three);
}

#[test]
fn t3_wb_ranges_and_all_wb_fixed_bytes_zap_nothing() {
    let mut writes: Vec<_> = (0..11).map(|n| (Msr::Fixed(n), ALL_WB)).collect();
    writes.push((Msr::VariableBase(0), 0x8000_0006));
    writes.push((Msr::VariableMask(0), MASK_2G));
    writes.push((Msr::DefaultType, 0xc06));
    assert_eq!(toggle(ON, &vcpu(&writes), true), []);
}

#[test]
fn t3_one_fixed_byte_that_is_not_wb_zaps_the_area() {
    let mut writes: Vec<_> = (0..11).map(|n| (Msr::Fixed(n), ALL_WB)).collect();
    writes.push((Msr::Fixed(7), 0x0606_0606_0506_0606));
    writes.push((Msr::DefaultType, 0xc06));
    assert_eq!(toggle(ON, &vcpu(&writes), true), [r(0, 0x100)]);
}

#[test]
fn t3_disabled_fixed_ranges_zap_nothing() {
    assert_eq!(toggle(ON, &vcpu(&[(Msr::DefaultType, 0x806)]), true), []);
}

#[test]
fn a_full_plan_becomes_everything() {
    let mut plan = ZapPlan::NONE;
    for n in 0..9 {
        plan.add(r(n, n + 1));
    }
    assert_eq!(plan.ranges().len(), 9);
    plan.add(r(100, 101));
    assert_eq!(plan, ZapPlan::ALL);
}

/// Arithmetic only: nothing for Miri to see, and long in it.
#[cfg(not(miri))]
mod promise {
    use super::*;
    use crate::addr::gfn;
    use crate::policy::{MemTypePolicy, TypeQuery};
    use crate::slot::{SlotFlags, SlotKind};
    use proptest::prelude::*;
    use std::vec;

    #[derive(Clone, Debug)]
    enum Event {
        Write(Msr, u64),
        Cd(bool),
    }

    fn event() -> impl Strategy<Value = Event> {
        let kind = || prop::sample::select(vec![0u64, 1, 4, 5, 6]);
        let flags = prop::sample::select(vec![0u64, 0x400, 0x800, 0xc00, 0xc00]);
        let byte = prop::sample::select(vec![0u64, 6, 6, 4]);
        prop_oneof![
            3 => (kind(), flags).prop_map(|(t, f)| Event::Write(Msr::DefaultType, f | t)),
            2 => (0u8..11, byte).prop_map(|(n, b)| Event::Write(Msr::Fixed(n), b * 0x0101_0101_0101_0101)),
            3 => (0u8..8, 0u64..0x400, kind())
                .prop_map(|(n, page, t)| Event::Write(Msr::VariableBase(n), page << 12 | t)),
            3 => (0u8..8, 0u64..0x400, any::<bool>()).prop_map(|(n, m, valid)| {
                Event::Write(Msr::VariableMask(n), (m << 12) | 0xff_ffc0_0000 | u64::from(valid) << 11)
            }),
            3 => any::<bool>().prop_map(Event::Cd),
            1 => Just(Event::Write(Msr::Pat, 0x6)),
        ]
    }

    fn type_of(policy: EptPolicy, v: &VcpuTypes, page: u64) -> (stage2::MemType, stage2::Combine) {
        let query = TypeQuery {
            gfn: gfn(page),
            kind: SlotKind::Ram,
            flags: SlotFlags::empty(),
            noncoherent_dma: true,
        };
        policy.encode(policy.leaf_type(&query, v))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// The promise: no page outside the plan changes its type.
        #[test]
        fn a_plan_covers_every_page_whose_type_changes(
            events in prop::collection::vec(event(), 1..24),
            quirk_on in any::<bool>(),
            offered in any::<bool>(),
        ) {
            let policy = if quirk_on { ON } else { OFF };
            let mut v = VcpuTypes::new(40, offered);
            for e in events {
                let old = v.clone();
                let plan = match e {
                    Event::Cd(cd) => set_cd(&policy, true, &mut v, cd),
                    Event::Write(msr, value) => write_msr(&policy, true, &mut v, msr, value)
                        .unwrap_or(ZapPlan::NONE),
                };
                for page in (0..0x480u64).chain([0x8_0000]) {
                    if type_of(policy, &old, page) != type_of(policy, &v, page) {
                        let covered = plan.ranges().iter().any(|r| r.contains(gfn(page)));
                        prop_assert!(covered, "page {page:#x} after {e:?}");
                    }
                }
            }
        }
    }
}
