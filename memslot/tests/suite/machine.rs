//! Real page tables on a machine that checks every step and models caches line by line.
#![expect(unsafe_code, reason = "a test machine lends memory to page tables")]

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use memslot::addr::GfnRange;
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::lock::LockRequest;
use memslot::policy::{ArmCaches, ArmPolicy, EptPolicy, MemTypePolicy};
use memslot::table::{GuestTable, LeafRun};
use memslot::testing::{CacheModel, FakeFrames};
use memslot::vm::{GuestMemory, VmKind};
use stage2::testing::{Arch, FakeMachine};
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, AtomicEntry, CacheMaintenance, DetachedTable, EntryRef, Ept,
    EptConfig, Execute, ForceWriteBack, Granule, Ipa, IpaRange, Level, Offered, Pa, PaRange,
    Stage2, TableFormat, TableMemory, TlbCaps, TlbInvalidate, WideAddresses,
};

use crate::kit::config;

/// Table memory, TLB and rules from `fake`; what observers see from `caches`.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) fake: Arc<FakeMachine>,
    pub(crate) caches: Arc<CacheModel>,
}

// SAFETY: every method is passed on to an implementor that made the promise.
unsafe impl TableMemory for Machine {
    fn alloc_table(&self) -> Option<Pa> {
        self.fake.alloc_table()
    }
    fn free_table(&self, table: DetachedTable) {
        self.fake.free_table(table);
    }
    fn alloc_root(&self, size: u64) -> Option<Pa> {
        self.fake.alloc_root(size)
    }
    fn free_root(&self, root: DetachedTable, size: u64) {
        self.fake.free_root(root, size);
    }
    fn table_ptr(&self, table: Pa) -> NonNull<AtomicEntry> {
        self.fake.table_ptr(table)
    }
    fn store(&self, entry: EntryRef<'_>, raw: u64) {
        self.fake.store(entry, raw);
    }
    fn compare_exchange(&self, entry: EntryRef<'_>, old: u64, new: u64) -> bool {
        self.fake.compare_exchange(entry, old, new)
    }
}

impl TlbInvalidate for Machine {
    type Context = u16;
    fn invalidate_range(&self, context: u16, range: IpaRange, level: Option<Level>) {
        self.fake.invalidate_range(context, range, level);
    }
    fn invalidate_all(&self, context: u16) {
        self.fake.invalidate_all(context);
    }
    fn caps(&self) -> TlbCaps {
        self.fake.caps()
    }
}

impl CacheMaintenance for Machine {
    fn clean_invalidate_data(&self, range: PaRange) {
        self.fake.clean_invalidate_data(range);
        self.caches.clean_invalidate_data(range);
    }
    fn invalidate_fetch(&self, range: PaRange) {
        self.fake.invalidate_fetch(range);
        self.caches.invalidate_fetch(range);
    }
    fn publish(&self) {
        self.fake.publish();
    }
}

/// A VM on real tables.
pub(crate) struct Real<F: TableFormat, P: MemTypePolicy> {
    pub(crate) mem: GuestMemory<Stage2<F, Machine>, P, FakeFrames>,
    pub(crate) machine: Machine,
    /// What went wrong in locks.
    wrong: Mutex<Vec<String>>,
}

fn build<F: TableFormat, P: MemTypePolicy>(
    arch: Arch,
    format: F,
    policy: P,
    frames: FakeFrames,
) -> Real<F, P> {
    let fake = Arc::new(FakeMachine::new(arch, 96));
    let machine = Machine {
        fake,
        caches: Arc::new(CacheModel::new()),
    };
    let table = Stage2::new(format, machine.clone(), 5).unwrap();
    machine.fake.attach(table.root());
    let mem = GuestMemory::new(config(VmKind::Unprotected), policy, frames, table);
    Real {
        mem,
        machine,
        wrong: Mutex::default(),
    }
}

pub(crate) fn arm(policy: ArmPolicy, run: u64, limit: u64) -> Real<ArmStage2, ArmPolicy> {
    arm_with(Granule::K4, policy, run, limit)
}

/// Input bits and first level of a table with this granule; 64 GiB fit each.
fn shape(granule: Granule) -> (u8, Level) {
    match granule {
        Granule::K4 => (39, Level::L1),
        Granule::K16 => (40, Level::L1),
        Granule::K64 => (40, Level::L2),
    }
}

pub(crate) fn arm_with(
    granule: Granule,
    policy: ArmPolicy,
    run: u64,
    limit: u64,
) -> Real<ArmStage2, ArmPolicy> {
    let fwb = policy.caches == ArmCaches::ForcedWriteBack;
    let (input_bits, start) = shape(granule);
    let format = ArmStage2::new(&ArmConfig {
        granule,
        input_bits,
        output_bits: 44,
        features: ArmFeatures {
            fwb: if fwb {
                ForceWriteBack::On
            } else {
                ForceWriteBack::Off
            },
            execute: Execute::Joint,
            wide: WideAddresses::Off,
        },
        start: Some(start),
    });
    let page_shift = granule.page_shift();
    let arch = Arch {
        xnx: false,
        page_shift: page_shift.into(),
        index_bits: u32::from(page_shift) - 3,
        ..Arch::arm_4k(start.number(), input_bits.into(), fwb)
    };
    build(arch, format.unwrap(), policy, FakeFrames::new(run, limit))
}

pub(crate) fn ept(policy: EptPolicy, run: u64, limit: u64) -> Real<Ept, EptPolicy> {
    let format = Ept::new(&EptConfig {
        output_bits: 46,
        execute_only: Offered::Yes,
        gigabyte: Offered::Yes,
        access_dirty: Offered::No,
    });
    build(
        Arch::ept_4k(),
        format.unwrap(),
        policy,
        FakeFrames::new(run, limit),
    )
}

impl<F: TableFormat, P: MemTypePolicy> Real<F, P> {
    /// All leaves of a VM, in order, as runs.
    pub(crate) fn runs(&self) -> Vec<LeafRun> {
        let all = IpaRange::new(Ipa::new(0), 1 << 36).unwrap();
        let mut found = Vec::new();
        let mut rest = Some(all);
        self.mem.with_table(|t| {
            while let Some(run) = rest.and_then(|r| t.next_run(r)) {
                found.push(run);
                let left = all.end().get() - run.range.end().get();
                rest = IpaRange::new(run.range.end(), left).ok();
            }
        });
        found
    }

    /// All leaves by page: memory, attributes, level.
    pub(crate) fn pages(&self) -> BTreeMap<u64, LeafRun> {
        let mut pages = BTreeMap::new();
        for run in self.runs() {
            for n in 0..run.range.len() >> 12 {
                let start = Ipa::new(run.range.start().get() + (n << 12));
                let pa = Pa::new(run.pa.get() + (n << 12));
                let range = IpaRange::new(start, 1 << 12).unwrap();
                pages.insert(start.get() >> 12, LeafRun { range, pa, ..run });
            }
        }
        pages
    }

    pub(crate) fn fault(
        &self,
        page: u64,
        access: Access,
        kind: FaultKind,
        vcpu: &P::Vcpu,
    ) -> Result<FaultOutcome, Error> {
        let fault = Stage2Fault {
            ipa: Ipa::new(page << 12),
            access,
            kind,
        };
        self.mem.handle_fault(&fault, vcpu)
    }

    /// Every rule that the machine saw broken so far.
    pub(crate) fn violations(&self) -> Vec<String> {
        let mut wrong = std::mem::take(&mut *self.wrong.lock().unwrap());
        wrong.extend(self.machine.fake.finish());
        wrong
    }

    /// Locks a slot; only here may leaves appear before their maintenance.
    pub(crate) fn lock(&self, request: &LockRequest) -> Result<(), Error> {
        self.machine.fake.expect_deferred(true);
        let before = self.machine.fake.finish();
        let locked = self.mem.lock_slot(request);
        // Leaves that the lock replaces owe their cleaning until the first run, as all of the
        // slot does; the machine's own books end with the operation.
        let deferred = |v: &String| !v.ends_with("left without cleaning");
        let during = self.machine.fake.finish().into_iter().filter(deferred);
        self.wrong
            .lock()
            .unwrap()
            .extend(before.into_iter().chain(during));
        self.machine.fake.expect_deferred(false);
        locked
    }

    /// Whether all pages of a range are mapped.
    pub(crate) fn is_full(&self, range: GfnRange) -> bool {
        let pages = self.pages();
        (range.start().get()..range.end()).all(|p| pages.contains_key(&p))
    }

    pub(crate) fn memory(&self, page: u64) -> Option<Pa> {
        self.pages().get(&page).map(|l| l.pa)
    }
}
