//! Random sequences on real tables: whatever happens, every leaf is what the rules say, and no
//! observer reads stale data that the rules promise fresh.

use std::collections::BTreeMap;

use crate::kit::{FLAG, FWB, LOG, NONE, PLAIN, R, RW, gfn, pages, slot};
use crate::machine::{Real, arm, ept};
use memslot::edge::Dma;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::frames::FrameSource;
use memslot::lock::{LockRequest, LockState};
use memslot::mtrr::Msr;
use memslot::noncoherent::Edge;
use memslot::policy::{
    ArmPolicy, CdQuirk, EptPolicy, MemTypePolicy, Profile, TypeQuery, VcpuTypes,
};
use memslot::slot::{LockFlags, LockGranule, SlotFlags, SlotId};
use memslot::testing::{Stage1, View, guest_view};
use proptest::prelude::*;
use stage2::{CacheMaintenance, Pa, Perms, TableFormat};

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
        Step::Register(dma) => {
            if vm.mem.register_device(dma).is_ok() && dma == Dma::NonSnooping {
                model.noncoherent += 1;
            }
        }
        Step::Unregister(dma) => {
            if vm.mem.unregister_device(dma).is_ok() && dma == Dma::NonSnooping {
                model.noncoherent -= 1;
            }
        }
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
        Step::Write { .. } | Step::Cd { .. } => registers(vm, &mut model.vcpus, step),
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

/// One page of a guest, its stage-1 view fixed; who wrote last, and what.
#[derive(Clone, Debug)]
enum Act {
    HostWrites(usize),
    GuestReads(usize),
    GuestWrites(usize),
    GuestFetches(usize),
    DeviceReads(usize),
    DeviceWrites(usize),
    Reclaim(usize),
    Lock,
    Unlock,
    Run,
    Reset,
    Register,
    Unregister,
    Speculate(usize),
    Evict(usize),
    FlushAll,
}

const CACHED_PAGES: u64 = 4;
const C_BASE: u64 = 0x800;
const C_FRAME: u64 = 0x20_0000;
const C: SlotId = SlotId(3);

fn act() -> impl Strategy<Value = Act> {
    let page = || 0usize..4;
    prop_oneof![
        4 => page().prop_map(Act::HostWrites),
        4 => page().prop_map(Act::GuestReads),
        4 => page().prop_map(Act::GuestWrites),
        2 => page().prop_map(Act::GuestFetches),
        3 => page().prop_map(Act::DeviceReads),
        3 => page().prop_map(Act::DeviceWrites),
        2 => page().prop_map(Act::Reclaim),
        2 => Just(Act::Lock),
        2 => Just(Act::Unlock),
        2 => Just(Act::Run),
        1 => Just(Act::Reset),
        2 => Just(Act::Register),
        2 => Just(Act::Unregister),
        4 => page().prop_map(Act::Speculate),
        3 => page().prop_map(Act::Evict),
        1 => Just(Act::FlushAll),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Host,
    Guest,
    Device,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    value: u64,
    writer: Writer,
    /// Memory itself holds the value, and no dirty line can overwrite it.
    in_memory: bool,
}

struct Observed {
    vm: Real<stage2::ArmStage2, ArmPolicy>,
    stage1: [Stage1; 4],
    cells: [Cell; 4],
    devices: u32,
    next: u64,
}

impl Observed {
    fn at(page: usize) -> Pa {
        Pa::new((C_FRAME + page as u64) << 12)
    }

    /// How the guest sees a page that is mapped.
    fn view(&self, page: usize) -> Option<View> {
        let leaf = *self.vm.pages().get(&(C_BASE + page as u64))?;
        Some(guest_view(
            self.stage1[page],
            leaf.attrs.mem,
            leaf.attrs.combine,
        ))
    }

    fn is_mapped(&self, page: usize) -> bool {
        self.view(page).is_some()
    }

    fn is_pending(&self) -> bool {
        !self.vm.mem.pending().is_empty()
    }

    fn write(&mut self, page: usize, view: View, writer: Writer) {
        self.next += 1;
        self.vm
            .machine
            .caches
            .write(Self::at(page), view, self.next);
        let in_memory = view == View::Uncached;
        self.cells[page] = Cell {
            value: self.next,
            writer,
            in_memory,
        };
    }

    fn reads(&self, page: usize, view: View, who: &str) {
        let seen = self.vm.machine.caches.read(Self::at(page), view);
        assert_eq!(
            seen, self.cells[page].value,
            "{who} reads page {page} by {view:?}"
        );
    }

    /// The guest runs and touches a page.
    fn guest(&mut self, page: usize, access: Access) -> View {
        self.run();
        let absent = !self.is_mapped(page);
        let outcome = self
            .vm
            .fault(C_BASE + page as u64, access, FaultKind::Translation, &());
        assert_eq!(outcome, Ok(FaultOutcome::Resolved));
        if absent {
            self.cleaned(page);
        }
        self.view(page).unwrap()
    }

    fn run(&mut self) {
        drop(self.vm.mem.enter().unwrap());
        // The first run cleans what was pending; harmless to assume where nothing was.
    }

    /// A page whose leaf needs maintenance was cleaned and invalidated.
    fn cleaned(&mut self, page: usize) {
        let owes = self
            .vm
            .pages()
            .get(&(C_BASE + page as u64))
            .is_some_and(|l| l.attrs.maintenance().data);
        self.cells[page].in_memory |= owes;
    }

    fn all_cleaned(&mut self) {
        (0..4).for_each(|p| self.cleaned(p));
    }

    /// The host may write what no guest or device uses: unmapped pages, and pages of a lock
    /// whose maintenance is still to come. Forced write-back makes everything coherent.
    fn host_may_write(&self, page: usize) -> bool {
        let Some(leaf) = self.vm.pages().get(&(C_BASE + page as u64)).copied() else {
            return true;
        };
        !leaf.attrs.maintenance().data || self.is_pending()
    }

    fn device_edge(&mut self, edge: Edge, mapped: [bool; 4]) {
        // Where an edge changes types, every page that was mapped was cleaned. A flagged slot's
        // guest has had its own types all along, and cleans for its device itself.
        let flagged = self.vm.mem.slot(C).is_some_and(|s| s.flags == FLAG);
        if edge != Edge::None && !flagged && self.vm.mem.policy() == &FWB {
            for page in (0..4).filter(|p| mapped[*p]) {
                self.cells[page].in_memory = true;
            }
        }
    }

    fn apply(&mut self, act: &Act) {
        let mapped = [0, 1, 2, 3].map(|p| self.is_mapped(p));
        match *act {
            Act::HostWrites(p) if self.host_may_write(p) => {
                self.write(p, View::Cacheable, Writer::Host)
            }
            Act::GuestReads(p) => {
                let view = self.guest(p, Access::Read);
                self.reads(p, view, "guest");
            }
            Act::GuestWrites(p) => {
                let view = self.guest(p, Access::Write);
                self.write(p, view, Writer::Guest);
            }
            // Code that the host wrote, in a page that is made executable now.
            Act::GuestFetches(p) if !mapped[p] && self.cells[p].writer == Writer::Host => {
                let _ = self.guest(p, Access::Fetch);
                let fetched = self.vm.machine.caches.fetch(Self::at(p));
                assert_eq!(fetched, self.cells[p].value, "fetch of page {p}");
            }
            Act::DeviceReads(p) if self.devices > 0 && self.cells[p].in_memory => {
                self.reads(p, View::Uncached, "device");
            }
            Act::DeviceWrites(p)
                if self.devices > 0
                    && self.cells[p].in_memory
                    && self.view(p) == Some(View::Uncached) =>
            {
                self.write(p, View::Uncached, Writer::Device);
            }
            Act::Reclaim(p) if self.vm.mem.host_unmap(pages(C_BASE + p as u64, 1)).is_ok() => {
                self.reads(p, View::Cacheable, "host");
            }
            Act::Lock => {
                let _ = self.vm.lock(&LockRequest::new(C, RW));
            }
            Act::Unlock => drop(self.vm.mem.unlock_slot(C)),
            Act::Run => {
                let pending = self.is_pending();
                self.run();
                if pending {
                    self.all_cleaned();
                }
            }
            Act::Reset => self.vm.mem.reset().unwrap(),
            Act::Register => {
                let pending = self.is_pending();
                let edge = self.vm.mem.register_device(Dma::NonSnooping).unwrap();
                self.devices += 1;
                if pending {
                    self.all_cleaned();
                }
                self.device_edge(edge, mapped);
            }
            Act::Unregister if self.devices > 0 => {
                let edge = self.vm.mem.unregister_device(Dma::NonSnooping).unwrap();
                self.devices -= 1;
                self.device_edge(edge, mapped);
            }
            Act::Speculate(p) => self.vm.machine.caches.speculate(Self::at(p)),
            Act::Evict(p) => self.vm.machine.caches.evict(Self::at(p)),
            Act::FlushAll => {
                self.vm.mem.flush_all();
                self.all_cleaned();
            }
            _ => {}
        }
    }
}

fn stage1() -> impl Strategy<Value = Stage1> {
    prop::sample::select(vec![
        Stage1::WriteBack,
        Stage1::NonCacheable,
        Stage1::Device,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(160) })]

    #[test]
    fn no_observer_reads_stale_data_that_is_promised_fresh(
        fwb in any::<bool>(),
        flagged in any::<bool>(),
        stage1 in prop::array::uniform4(stage1()),
        acts in prop::collection::vec(act(), 1..60),
    ) {
        let vm = arm(if fwb { FWB } else { PLAIN }, 4, 64);
        let flags = if flagged { FLAG } else { NONE };
        vm.mem.create_slot(slot(C, C_BASE, CACHED_PAGES, C_FRAME, flags)).unwrap();
        let cell = Cell { value: 0, writer: Writer::Host, in_memory: false };
        let mut o = Observed { vm, stage1, cells: [cell; 4], devices: 0, next: 0 };
        for act in &acts {
            o.apply(act);
        }
        prop_assert_eq!(o.vm.violations(), [""; 0]);
    }
}

/// The model itself notices missing maintenance: without the first run's flush it fails.
#[test]
fn the_observers_would_notice_a_missing_flush() {
    let vm = arm(PLAIN, 4, 64);
    vm.mem
        .create_slot(slot(C, C_BASE, CACHED_PAGES, C_FRAME, NONE))
        .unwrap();
    vm.lock(&LockRequest::new(C, RW)).unwrap();
    let at = Observed::at(0);
    vm.machine.caches.write(at, View::Cacheable, 9);
    assert_eq!(vm.machine.caches.read(at, View::Uncached), 0);
    vm.machine
        .caches
        .clean_invalidate_data(stage2::PaRange::new(at, 4096).unwrap());
    assert_eq!(vm.machine.caches.read(at, View::Uncached), 9);
}
