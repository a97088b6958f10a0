//! Random sequences on real tables: whatever happens, every leaf is what the rules say.

use std::collections::BTreeMap;

use crate::kit::{FLAG, FWB, LOG, NONE, PLAIN, R, RW, gfn, pages, slot};
use crate::machine::{Real, arm, ept};
use memslot::edge::Dma;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::frames::FrameSource;
use memslot::lock::{LockRequest, LockState};
use memslot::mtrr::Msr;
use memslot::policy::{CdQuirk, EptPolicy, MemTypePolicy, Profile, TypeQuery, VcpuTypes};
use memslot::slot::{LockFlags, LockGranule, SlotFlags, SlotId};
use proptest::prelude::*;
use stage2::{Perms, TableFormat};

/// Slots of a test: number, first page, pages, first frame. The first spans a 2 MiB block.
const SLOTS: [(u16, u64, u64, u64); 3] = [
    (0, 0x400, 0x200, 0x10_0400),
    (1, 0x600, 0x40, 0x10_0a00),
    (2, 0xa0, 0x20, 0x10_10a0),
];
/// Where faults happen.
const PROBES: [u64; 7] = [0x400, 0x405, 0x5ff, 0x600, 0x63f, 0xa0, 0xbf];

#[derive(Clone, Debug)]
enum Step {
    Touch {
        probe: usize,
        access: Access,
        vcpu: usize,
    },
    Lock {
        slot: u16,
        perms: LockFlags,
        blocks: bool,
    },
    Unlock(u16),
    UnlockAll,
    Run,
    Reset,
    Register(Dma),
    Unregister(Dma),
    Unmap {
        page: u64,
        npages: u64,
    },
    Recreate {
        slot: u16,
        flags: SlotFlags,
    },
    Flags {
        slot: u16,
        flags: SlotFlags,
    },
    TakeLog(u16),
    Write {
        vcpu: usize,
        msr: Msr,
        value: u64,
    },
    Cd {
        vcpu: usize,
        cd: bool,
    },
    Tables(usize),
}

fn access() -> impl Strategy<Value = Access> {
    prop::sample::select(vec![Access::Read, Access::Write, Access::Fetch])
}

fn flags() -> impl Strategy<Value = SlotFlags> {
    prop::sample::select(vec![NONE, NONE, LOG, FLAG, SlotFlags::READONLY, FLAG | LOG])
}

fn register() -> impl Strategy<Value = (Msr, u64)> {
    let kind = || prop::sample::select(vec![0u64, 1, 4, 5, 6]);
    prop_oneof![
        2 => (kind(), prop::sample::select(vec![0u64, 0x800, 0xc00]))
            .prop_map(|(t, f)| (Msr::DefaultType, f | t)),
        1 => (0u8..11, kind()).prop_map(|(n, t)| (Msr::Fixed(n), t * 0x0101_0101_0101_0101)),
        2 => (0u8..3, prop::sample::select(vec![0xa0u64, 0x400, 0x404, 0x500, 0x600]), kind())
            .prop_map(|(n, page, t)| (Msr::VariableBase(n), page << 12 | t)),
        2 => (0u8..3, 0u32..10, any::<bool>()).prop_map(|(n, order, valid)| {
            let mask = 0x3fff_ffff_f000 & !((1u64 << (order + 12)) - 1);
            (Msr::VariableMask(n), mask | u64::from(valid) << 11)
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let id = || 0u16..3;
    let dma = || prop::sample::select(vec![Dma::NonSnooping, Dma::NonSnooping, Dma::Snooping]);
    let lock = (id(), any::<bool>(), any::<bool>());
    prop_oneof![
        12 => (0..PROBES.len(), access(), 0usize..2)
            .prop_map(|(probe, access, vcpu)| Step::Touch { probe, access, vcpu }),
        3 => lock.prop_map(|(slot, w, blocks)| Step::Lock { slot, perms: if w { RW } else { R }, blocks }),
        2 => id().prop_map(Step::Unlock),
        1 => Just(Step::UnlockAll),
        3 => Just(Step::Run),
        1 => Just(Step::Reset),
        3 => dma().prop_map(Step::Register),
        2 => dma().prop_map(Step::Unregister),
        2 => (0xa0u64..0x640, 1u64..0x20).prop_map(|(page, npages)| Step::Unmap { page, npages }),
        2 => (id(), flags()).prop_map(|(slot, flags)| Step::Recreate { slot, flags }),
        2 => (id(), flags()).prop_map(|(slot, flags)| Step::Flags { slot, flags }),
        1 => id().prop_map(Step::TakeLog),
        6 => (0usize..2, register()).prop_map(|(vcpu, (msr, value))| Step::Write { vcpu, msr, value }),
        3 => (0usize..2, any::<bool>()).prop_map(|(vcpu, cd)| Step::Cd { vcpu, cd }),
        1 => (0usize..3).prop_map(Step::Tables),
    ]
}

/// What a test keeps beside the VM.
struct Model<V> {
    vcpus: Vec<V>,
    /// Which vCPU's fault made the leaf of a page.
    maker: BTreeMap<u64, usize>,
    noncoherent: u32,
}

type Writes<F, P> = fn(&Real<F, P>, &mut [<P as MemTypePolicy>::Vcpu], &Step);

fn apply<F: TableFormat, P: MemTypePolicy>(
    vm: &Real<F, P>,
    model: &mut Model<P::Vcpu>,
    step: &Step,
    registers: Writes<F, P>,
) {
    match *step {
        Step::Lock {
            slot,
            perms,
            blocks,
        } => {
            let granule = if blocks {
                LockGranule::Blocks
            } else {
                LockGranule::BasePages
            };
            let _ = vm.lock(&LockRequest {
                granule,
                ..LockRequest::new(SlotId(slot), perms)
            });
        }
        Step::Unlock(slot) => drop(vm.mem.unlock_slot(SlotId(slot))),
        Step::UnlockAll => vm.mem.unlock_all().unwrap(),
        Step::Run => drop(vm.mem.enter().unwrap()),
        Step::Reset => vm.mem.reset().unwrap(),
        Step::Unmap { page, npages } => drop(vm.mem.host_unmap(pages(page, npages))),
        Step::Recreate { slot: n, flags } => {
            if vm.mem.delete_slot(SlotId(n)).is_ok() {
                let (id, base, npages, frame) = SLOTS[usize::from(n)];
                vm.mem
                    .create_slot(slot(SlotId(id), base, npages, frame, flags))
                    .unwrap();
            }
        }
        Step::Flags { slot, flags } => drop(vm.mem.set_slot_flags(SlotId(slot), flags)),
        Step::TakeLog(slot) => {
            let mut words =
                vec![0; usize::try_from(SLOTS[usize::from(slot)].2.div_ceil(64)).unwrap()];
            let _ = vm.mem.take_dirty_log(SlotId(slot), &mut words);
        }
        Step::Write { .. } | Step::Cd { .. } => registers(vm, &mut model.vcpus, step),
        Step::Touch { .. } | Step::Tables(_) => apply_fault(vm, model, step),
        Step::Register(_) | Step::Unregister(_) => apply_device(vm, model, step),
    }
}

/// Faults, and who made which leaf.
fn apply_fault<F: TableFormat, P: MemTypePolicy>(
    vm: &Real<F, P>,
    model: &mut Model<P::Vcpu>,
    step: &Step,
) {
    let before = vm.pages();
    match *step {
        Step::Touch {
            probe,
            access,
            vcpu,
        } => {
            // What a guest would do: fault until the access goes through or leaves.
            for _ in 0..3 {
                let kind = FaultKind::Translation;
                let outcome = vm.fault(PROBES[probe], access, kind, &model.vcpus[vcpu]);
                for (page, leaf) in vm.pages() {
                    if before.get(&page).is_none_or(|b| {
                        (b.attrs.mem, b.attrs.combine) != (leaf.attrs.mem, leaf.attrs.combine)
                    }) {
                        model.maker.insert(page, vcpu);
                    }
                }
                if outcome != Ok(FaultOutcome::Retry) {
                    break;
                }
            }
        }
        Step::Tables(n) => {
            vm.machine.fake.allow_allocations(Some(n));
            let kind = FaultKind::Translation;
            let _ = vm.fault(PROBES[n], Access::Read, kind, &model.vcpus[0]);
            for (page, _) in vm.pages() {
                if !before.contains_key(&page) {
                    model.maker.insert(page, 0);
                }
            }
            vm.machine.fake.allow_allocations(None);
        }
        _ => {}
    }
}

fn apply_device<F: TableFormat, P: MemTypePolicy>(
    vm: &Real<F, P>,
    model: &mut Model<P::Vcpu>,
    step: &Step,
) {
    match *step {
        Step::Register(dma) => {
            let done = vm.mem.register_device(dma).is_ok();
            model.noncoherent += u32::from(done && dma == Dma::NonSnooping);
        }
        Step::Unregister(dma) => {
            let done = vm.mem.unregister_device(dma).is_ok();
            model.noncoherent -= u32::from(done && dma == Dma::NonSnooping);
        }
        _ => {}
    }
}

/// Everything that must hold between any two steps.
fn check<F: TableFormat, P: MemTypePolicy>(vm: &Real<F, P>, model: &Model<P::Vcpu>) {
    let leaves = vm.pages();
    let (mut locked_pages, mut work_due) = (0, false);
    for (id, base, npages, frame) in SLOTS {
        let slot = vm.mem.slot(SlotId(id)).unwrap();
        for page in base..base + npages {
            let Some(leaf) = leaves.get(&page) else {
                assert!(
                    slot.lock.is_none(),
                    "page {page:#x} of a locked slot is gone"
                );
                continue;
            };
            assert_eq!(leaf.pa.get() >> 12, frame + (page - base));
            let query = TypeQuery::of(&slot, gfn(page), model.noncoherent > 0);
            let vcpu = &model.vcpus[model.maker.get(&page).copied().unwrap_or(0)];
            let wanted = vm
                .mem
                .policy()
                .encode(vm.mem.policy().leaf_type(&query, vcpu));
            assert_eq!(
                (leaf.attrs.mem, leaf.attrs.combine),
                wanted,
                "page {page:#x}"
            );
            assert!(slot.is_writable() || !leaf.attrs.perms.contains(Perms::WRITE));
            assert!(leaf.level.is_page() || !slot.needs_base_pages());
        }
        if slot.lock.is_some() {
            locked_pages += npages;
            work_due |= vm.mem.lock_state(SlotId(id)) != Some(LockState::LockedClean);
        }
    }
    let inside = |page: &u64| SLOTS.iter().any(|(_, b, n, _)| (*b..b + n).contains(page));
    assert!(leaves.keys().all(inside), "a leaf outside of every slot");
    assert_eq!(vm.mem.frames().account().locked(), locked_pages);
    assert_eq!(
        vm.mem.frames().state().pins.values().sum::<u64>(),
        locked_pages
    );
    assert_eq!(!vm.mem.pending().is_empty(), work_due);
    assert_eq!(vm.violations(), [""; 0]);
}

fn create_all<F: TableFormat, P: MemTypePolicy>(vm: &Real<F, P>) {
    for (id, base, npages, frame) in SLOTS {
        vm.mem
            .create_slot(slot(SlotId(id), base, npages, frame, NONE))
            .unwrap();
    }
}

fn run<F: TableFormat, P: MemTypePolicy>(
    vm: &Real<F, P>,
    vcpus: Vec<P::Vcpu>,
    steps: &[Step],
    registers: Writes<F, P>,
) {
    create_all(vm);
    let mut model = Model {
        vcpus,
        maker: BTreeMap::new(),
        noncoherent: 0,
    };
    for step in steps {
        apply(vm, &mut model, step, registers);
        check(vm, &model);
    }
    vm.mem.empty().unwrap();
    assert_eq!(vm.pages(), BTreeMap::new());
    assert_eq!(vm.mem.frames().account().locked(), 0);
    assert_eq!(vm.violations(), [""; 0]);
}

fn x86_registers(vm: &Real<stage2::Ept, EptPolicy>, vcpus: &mut [VcpuTypes], step: &Step) {
    match *step {
        Step::Write { vcpu, msr, value } => {
            let _ = vm
                .mem
                .write_memory_type_msr(&mut vcpus[vcpu], msr, value, || ());
        }
        Step::Cd { vcpu, cd } => vm.mem.write_cd(&mut vcpus[vcpu], cd, || ()),
        _ => {}
    }
}

fn x86_policy() -> impl Strategy<Value = EptPolicy> {
    prop::sample::select(vec![
        EptPolicy::guest_mtrr(CdQuirk::WriteBack),
        EptPolicy::guest_mtrr(CdQuirk::Uncached),
        EptPolicy::TODAY,
        EptPolicy {
            profile: Profile::Today { ignore_pat: false },
        },
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]

    #[test]
    fn no_arm_leaf_has_another_type_than_the_decision(
        fwb in any::<bool>(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let vm = arm(if fwb { FWB } else { PLAIN }, 0x200, 0x400);
        run(&vm, vec![(), ()], &steps, |_, _, _| ());
    }

    #[test]
    fn no_x86_leaf_has_another_type_than_the_decision(
        policy in x86_policy(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let vm = ept(policy, 0x200, 0x400);
        run(&vm, vec![VcpuTypes::new(46, true), VcpuTypes::new(46, true)], &steps, x86_registers);
    }
}
