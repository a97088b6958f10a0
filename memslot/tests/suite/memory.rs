//! Every allocation of every operation fails once: an error, nothing changed, and no allocation
//! that cannot fail. One that could not would end this process.
#![expect(unsafe_code, reason = "an allocator that fails when a test says so")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::kit::{A, A_BASE, A_FRAME, B, B_BASE, LOG, NONE, PLAIN, R, config, gfn, slot};
use memslot::account::LockedMemory;
use memslot::addr::{Gfn, GfnRange, Pfn};
use memslot::error::Error;
use memslot::fault::Access;
use memslot::frames::{FrameMissing, FrameRun, FrameSource, PinIntent};
use memslot::lock::LockRequest;
use memslot::pending::Work;
use memslot::policy::ArmPolicy;
use memslot::slot::{Memslot, SlotId};
use memslot::table::{GuestTable, LeafRun};
use memslot::vm::{GuestMemory, VmKind};
use stage2::{
    Aging, Annotation, FaultOutcome, FaultRequest, Ipa, IpaRange, LeafAttrs, MapError, MapRequest,
    PaRange, Perms,
};

thread_local! {
    /// Allocations that this thread may still make.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The system's allocator, with a thread's allowance.
struct Rationed;

#[global_allocator]
static ALLOCATOR: Rationed = Rationed;

fn granted() -> bool {
    LEFT.with(|left| match left.get() {
        Some(0) => false,
        Some(n) => {
            left.set(Some(n - 1));
            true
        }
        None => true,
    })
}

// SAFETY: every allocation that is made is the system allocator's; failing is allowed.
unsafe impl GlobalAlloc for Rationed {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if granted() {
            // SAFETY: the caller's promise is passed on.
            unsafe { System.alloc(layout) }
        } else {
            ptr::null_mut()
        }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

/// With only so many allocations.
fn rationed<R>(allocations: usize, f: impl FnOnce() -> R) -> R {
    LEFT.with(|left| left.set(Some(allocations)));
    let result = f();
    LEFT.with(|left| left.set(None));
    result
}

/// Of slot A.
const PAGES: u64 = 16;

type Leaves = [Option<(u64, LeafAttrs)>; 16];

/// The leaves of slot A's pages, in an array.
#[derive(Default)]
struct Flat(Mutex<Leaves>);

impl Flat {
    fn each(&self, range: IpaRange, f: impl Fn(u64, &mut Option<(u64, LeafAttrs)>)) {
        let mut leaves = self.0.lock().unwrap();
        for (page, leaf) in (A_BASE..).zip(leaves.iter_mut()) {
            if range.contains(gfn(page).start()) {
                f((page << 12) - range.start().get(), leaf);
            }
        }
    }
}

impl GuestTable for Flat {
    fn fault(&self, _: &FaultRequest) -> Result<FaultOutcome, MapError> {
        Ok(FaultOutcome::Retry)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), MapError> {
        let range = IpaRange::new(request.ipa, request.size)?;
        let (pa, attrs) = (request.pa.get(), request.attrs);
        self.each(range, |offset, leaf| *leaf = Some((pa + offset, attrs)));
        Ok(())
    }
    fn unmap(&mut self, range: IpaRange) -> Result<(), MapError> {
        self.zap(range)
    }
    fn annotate(&mut self, range: IpaRange, _: Annotation) -> Result<(), MapError> {
        self.zap(range)
    }
    fn first_note(&self, _: IpaRange) -> Option<(Ipa, Annotation)> {
        None
    }
    fn zap(&self, range: IpaRange) -> Result<(), MapError> {
        self.each(range, |_, leaf| *leaf = None);
        Ok(())
    }
    fn age(&self, range: IpaRange, _: Aging) -> Result<u64, MapError> {
        Ok(range.len())
    }
    fn relax(&self, _: Ipa, _: Perms) -> Result<FaultOutcome, MapError> {
        Ok(FaultOutcome::Relaxed)
    }
    fn next_run(&self, _: IpaRange) -> Option<LeafRun> {
        None
    }
    fn clean_invalidate_data(&self, _: PaRange) {}
    fn invalidate_fetch(&self, _: PaRange) {}
}

/// Frames in runs of three; counts pinned pages.
struct Counted {
    account: LockedMemory,
    pinned: AtomicU64,
}

impl FrameSource for Counted {
    fn resolve(&self, _: &Memslot, gfn: Gfn, _: Access) -> Result<FrameRun, FrameMissing> {
        Err(FrameMissing(gfn))
    }
    fn pin(&self, slot: &Memslot, want: GfnRange, _: PinIntent) -> Result<FrameRun, FrameMissing> {
        let three = GfnRange::new(want.start().get(), want.start().get() + 3);
        let range = three.and_then(|r| r.intersection(want)).unwrap();
        let pfn = slot.backing + want.start().get() - slot.range.start().get();
        self.pinned.fetch_add(range.npages(), Ordering::Relaxed);
        let pfn = Pfn::try_new(pfn).unwrap();
        Ok(FrameRun { range, pfn })
    }
    fn unpin(&self, _: &Memslot, run: FrameRun, _: PinIntent) {
        self.pinned.fetch_sub(run.range.npages(), Ordering::Relaxed);
    }
    fn sequence(&self) -> u64 {
        0
    }
    fn account(&self) -> &LockedMemory {
        &self.account
    }
}

type Vm = GuestMemory<Flat, ArmPolicy, Counted>;

fn vm() -> Vm {
    let frames = Counted {
        account: LockedMemory::new(PAGES),
        pinned: AtomicU64::new(0),
    };
    let vm = GuestMemory::new(config(VmKind::Unprotected), PLAIN, frames, Flat::default());
    for slot in [
        slot(A, A_BASE, PAGES, A_FRAME, NONE),
        slot(B, B_BASE, 4, 0, NONE),
    ] {
        vm.create_slot(slot).unwrap();
    }
    vm
}

/// All that an operation that fails must leave alone.
#[derive(Debug, PartialEq)]
struct State {
    slots: [Option<Memslot>; 3],
    leaves: Leaves,
    pinned: u64,
    charged: u64,
    pending: Work,
    logs: bool,
}

fn state(vm: &Vm) -> State {
    State {
        slots: [A, B, C].map(|id| vm.slot(id)),
        leaves: vm.with_table(|t| *t.0.lock().unwrap()),
        pinned: vm.frames().pinned.load(Ordering::Relaxed),
        charged: vm.frames().account.locked(),
        pending: vm.pending(),
        // Refused for its buffer if there is a log, and only then.
        logs: matches!(vm.take_dirty_log(A, &mut []), Err(Error::BadBuffer(_))),
    }
}

/// Fails each allocation of an operation in turn, each on a VM of its own; how many there were.
/// What has failed succeeds when it is repeated.
fn allocations(prepare: impl Fn(&Vm), operation: impl Fn(&Vm) -> Result<(), Error>) -> usize {
    for allowed in 0.. {
        let vm = vm();
        prepare(&vm);
        let before = state(&vm);
        match rationed(allowed, || operation(&vm)) {
            Ok(()) => return allowed,
            Err(error) => assert_eq!(error, Error::OutOfMemory),
        }
        assert_eq!(state(&vm), before, "after {allowed} allocations");
        assert_eq!(operation(&vm), Ok(()));
    }
    unreachable!("an operation that always fails");
}

const C: SlotId = SlotId(3);

// A collection of slots is three arrays: first frames, slots, positions by number.

#[test]
fn creating_a_slot_makes_one_collection() {
    let c = slot(C, 0x300, 4, 0, NONE);
    assert_eq!(allocations(|_| (), |vm| vm.create_slot(c)), 3);
}

#[test]
fn creating_a_logged_slot_makes_a_bitmap_and_a_place_for_it() {
    let c = slot(C, 0x300, 4, 0, LOG);
    assert_eq!(allocations(|_| (), |vm| vm.create_slot(c)), 5);
}

#[test]
fn deleting_a_slot_makes_one_collection() {
    let delete = |vm: &Vm| vm.delete_slot(A).map(|_| ());
    assert_eq!(allocations(|_| (), delete), 3);
}

#[test]
fn moving_a_slot_makes_a_collection_without_and_one_with_it() {
    assert_eq!(allocations(|_| (), |vm| vm.move_slot(A, gfn(0x300))), 6);
}

#[test]
fn starting_to_log_makes_collections_a_bitmap_and_a_place() {
    assert_eq!(allocations(|_| (), |vm| vm.set_slot_flags(A, LOG)), 8);
}

#[test]
fn starting_to_log_a_locked_slot_fails_as_cleanly() {
    let lock = |vm: &Vm| vm.lock_slot(&LockRequest::new(A, R)).unwrap();
    assert_eq!(allocations(lock, |vm| vm.set_slot_flags(A, LOG)), 8);
}

#[test]
fn a_lock_makes_a_place_for_itself_and_for_its_pins() {
    // Six runs: their list grows once, from four places to eight.
    let lock = |vm: &Vm| vm.lock_slot(&LockRequest::new(A, R));
    assert_eq!(allocations(|_| (), lock), 3);
}

#[test]
fn runs_resets_unlocks_and_teardown_allocate_nothing() {
    let lock = |vm: &Vm| vm.lock_slot(&LockRequest::new(A, R)).unwrap();
    let life = |vm: &Vm| {
        drop(vm.enter()?);
        vm.reset()?;
        drop(vm.enter()?);
        vm.unlock_slot(A)?;
        vm.empty()
    };
    assert_eq!(allocations(lock, life), 0);
}
