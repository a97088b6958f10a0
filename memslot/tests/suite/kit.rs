//! A VM on doubles, and short words for what tests do with it.

use std::collections::BTreeMap;
use std::sync::Arc;

use memslot::addr::GfnRange;
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::frames::FrameSource;
use memslot::lock::LockRequest;
use memslot::pending::Work;
use memslot::policy::{ArmCaches, ArmPolicy, MemTypePolicy};
use memslot::slot::{LockFlags, Memslot, SlotFlags, SlotId, SlotKind};
use memslot::testing::{CacheModel, FakeFrames, FrameState, ModelLeaf, ModelTable, View};
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use stage2::{Gfn, Ipa, LeafAttrs, Pa, Perms};

pub(crate) const FWB: ArmPolicy = ArmPolicy {
    caches: ArmCaches::ForcedWriteBack,
};
pub(crate) const PLAIN: ArmPolicy = ArmPolicy {
    caches: ArmCaches::Maintenance,
};

pub(crate) const R: LockFlags = LockFlags::READ;
pub(crate) const RW: LockFlags = LockFlags::READ.union(LockFlags::WRITE);
pub(crate) const NONE: SlotFlags = SlotFlags::empty();
pub(crate) const LOG: SlotFlags = SlotFlags::DIRTY_LOG;
pub(crate) const RO: SlotFlags = SlotFlags::READONLY;
pub(crate) const FLAG: SlotFlags = SlotFlags::NONCOHERENT_DMA;

/// The slot that most tests use: 8 pages at frame 0x100, frames from 0x8000 on.
pub(crate) const A: SlotId = SlotId(1);
pub(crate) const A_BASE: u64 = 0x100;
pub(crate) const A_PAGES: u64 = 8;
pub(crate) const A_FRAME: u64 = 0x8000;
/// A second one: 4 pages at frame 0x200, frames from 0x9000 on.
pub(crate) const B: SlotId = SlotId(2);
pub(crate) const B_BASE: u64 = 0x200;
pub(crate) const B_FRAME: u64 = 0x9000;

pub(crate) const LIMIT: u64 = 64;

pub(crate) struct Vm<P: MemTypePolicy> {
    pub(crate) mem: GuestMemory<ModelTable, P, FakeFrames>,
    pub(crate) caches: Arc<CacheModel>,
}

/// Everything that a failed operation must leave alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    leaves: BTreeMap<u64, ModelLeaf>,
    frames: FrameState,
    charged: u64,
    slots: Vec<Option<Memslot>>,
    pending: Work,
}

pub(crate) fn config(kind: VmKind) -> VmConfig {
    VmConfig {
        max_slots: 8,
        gfn_limit: 1 << 24,
        kind,
    }
}

pub(crate) fn gfn(n: u64) -> Gfn {
    Gfn::try_new(n).unwrap()
}

pub(crate) fn pages(start: u64, npages: u64) -> GfnRange {
    GfnRange::new(start, start + npages).unwrap()
}

pub(crate) fn slot(id: SlotId, base: u64, npages: u64, frame: u64, flags: SlotFlags) -> Memslot {
    Memslot::new(id, gfn(base), npages, frame, flags, SlotKind::Ram).unwrap()
}

/// A VM without slots whose frames come in runs of `run` pages.
pub(crate) fn empty_vm<P: MemTypePolicy>(policy: P, run: u64) -> Vm<P> {
    let caches = Arc::new(CacheModel::new());
    let table = ModelTable::new(Arc::clone(&caches));
    let frames = FakeFrames::new(run, LIMIT);
    let mem = GuestMemory::new(config(VmKind::Unprotected), policy, frames, table);
    Vm { mem, caches }
}

/// A VM with slot A, which has these flags, and frames in runs of three pages.
pub(crate) fn vm_with<P: MemTypePolicy>(policy: P, flags: SlotFlags) -> Vm<P> {
    let vm = empty_vm(policy, 3);
    vm.mem
        .create_slot(slot(A, A_BASE, A_PAGES, A_FRAME, flags))
        .unwrap();
    vm
}

/// A VM of this kind with an unflagged slot A.
#[cfg(not(miri))]
pub(crate) fn vm_of_kind(kind: VmKind) -> Vm<ArmPolicy> {
    let caches = Arc::new(CacheModel::new());
    let table = ModelTable::new(Arc::clone(&caches));
    let mem = GuestMemory::new(config(kind), PLAIN, FakeFrames::new(3, LIMIT), table);
    mem.create_slot(slot(A, A_BASE, A_PAGES, A_FRAME, NONE))
        .unwrap();
    Vm { mem, caches }
}

/// A VM with an unflagged slot A on CPUs without forced write-back.
pub(crate) fn vm() -> Vm<ArmPolicy> {
    vm_with(PLAIN, NONE)
}

impl<P: MemTypePolicy> Vm<P> {
    pub(crate) fn add_b(&self) -> &Self {
        self.mem
            .create_slot(slot(B, B_BASE, 4, B_FRAME, NONE))
            .unwrap();
        self
    }

    pub(crate) fn lock(&self, id: SlotId, perms: LockFlags) -> Result<(), Error> {
        self.mem.lock_slot(&LockRequest::new(id, perms))
    }

    /// A vCPU goes in and comes out.
    pub(crate) fn run(&self) {
        drop(self.mem.enter().unwrap());
    }

    pub(crate) fn leaf(&self, page: u64) -> Option<LeafAttrs> {
        self.leaves().get(&(page << 12)).map(|l| l.attrs)
    }

    pub(crate) fn perms(&self, page: u64) -> Option<Perms> {
        self.leaf(page).map(|l| l.perms)
    }

    pub(crate) fn leaves(&self) -> BTreeMap<u64, ModelLeaf> {
        self.mem.with_table(ModelTable::leaves)
    }

    /// Memory behind a page; panics if it is not mapped.
    pub(crate) fn memory(&self, page: u64) -> Pa {
        self.leaves()[&(page << 12)].pa
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            leaves: self.leaves(),
            frames: self.mem.frames().state(),
            charged: self.charged(),
            slots: (0..8).map(|n| self.mem.slot(SlotId(n))).collect(),
            pending: self.mem.pending(),
        }
    }

    pub(crate) fn charged(&self) -> u64 {
        self.mem.frames().account().locked()
    }

    pub(crate) fn pinned(&self) -> u64 {
        self.mem.frames().state().pins.values().sum()
    }

    /// The host writes a value into the first line of a frame.
    pub(crate) fn host_writes(&self, frame: u64, value: u64) {
        self.caches
            .write(Pa::new(frame << 12), View::Cacheable, value);
    }

    pub(crate) fn data_lines(&self) -> u64 {
        self.caches.traffic().data_lines
    }
}

impl Vm<ArmPolicy> {
    pub(crate) fn fault(
        &self,
        page: u64,
        access: Access,
        kind: FaultKind,
    ) -> Result<FaultOutcome, Error> {
        let ipa = Ipa::new(page << 12 | 0x18);
        self.mem
            .handle_fault(&Stage2Fault { ipa, access, kind }, &())
    }

    /// A translation fault that must succeed.
    pub(crate) fn touch(&self, page: u64, access: Access) {
        let outcome = self.fault(page, access, FaultKind::Translation);
        assert_eq!(outcome, Ok(FaultOutcome::Resolved));
    }

    /// A permission fault that must succeed.
    pub(crate) fn relax(&self, page: u64, access: Access) {
        let outcome = self.fault(page, access, FaultKind::Permission);
        assert_eq!(outcome, Ok(FaultOutcome::Resolved));
    }
}

/// Data maintenance calls of the table.
pub(crate) fn cleans<P: MemTypePolicy>(vm: &Vm<P>) -> usize {
    vm.mem.with_table(ModelTable::cleans)
}
