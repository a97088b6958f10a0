//! What one step does at most, whatever the slot's size and whatever is mapped in it.

use crate::kit::{A, B, FLAG, FWB, LOG, NONE, PLAIN, RW, gfn, slot};
use crate::machine::{Real, arm};
use memslot::edge::Dma::NonSnooping;
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::lock::{LockRequest, LockState};
use memslot::policy::ArmPolicy;
use memslot::slot::LockGranule;
use memslot::steps::Progress::{self, Done, More};
use stage2::{Combine, Level};

type Vm = Real<stage2::ArmStage2, ArmPolicy>;

/// Pages that are cleaned in one step.
const STEP: u64 = 512;
/// Pages where nothing is mapped that are dealt with in one step.
const FRESH: u64 = 32 * STEP;
const GIB: u64 = 1 << 18;
/// Lines of a page.
const LINES: u64 = 64;

const BLOCKS: LockRequest = LockRequest {
    granule: LockGranule::Blocks,
    ..LockRequest::new(A, RW)
};

fn vm(policy: ArmPolicy) -> Vm {
    let vm = arm(policy, GIB, 2 * GIB);
    vm.mem
        .create_slot(slot(A, GIB, GIB, 2 * GIB, NONE))
        .unwrap();
    vm
}

fn touch(vm: &Vm, page: u64, access: Access) -> FaultOutcome {
    vm.fault(page, access, FaultKind::Translation, &()).unwrap()
}

fn register(vm: &Vm) -> Result<Progress, Error> {
    vm.mem.register_in_steps(NonSnooping, || false)
}

fn unregister(vm: &Vm) -> Result<Progress, Error> {
    vm.mem.unregister_in_steps(NonSnooping, || false)
}

fn lines(vm: &Vm) -> u64 {
    vm.machine.caches.traffic().data_lines
}

/// The pages whose type is the guest's.
fn honoured(vm: &Vm) -> u64 {
    let runs = vm.runs().into_iter();
    let honours = runs.filter(|run| run.attrs.combine == Combine::HonourGuest);
    honours.map(|run| run.range.len() >> 12).sum()
}

/// A VM whose slot is locked as one block of 1 GiB, with nothing pending.
fn locked_block() -> Vm {
    let vm = vm(FWB);
    vm.lock(&BLOCKS).unwrap();
    drop(vm.mem.enter().unwrap());
    let levels: Vec<_> = vm.runs().iter().map(|run| run.level).collect();
    assert_eq!(levels, [Level::L1]);
    vm
}

#[test]
fn a_locked_block_of_1_gib_follows_the_count_by_2_mib() {
    let vm = locked_block();
    for comes in [true, false] {
        let change = if comes { register } else { unregister };
        let before = lines(&vm);
        for step in 1..=GIB / STEP {
            let done = step * STEP;
            assert_eq!(change(&vm), Ok(More));
            assert_eq!(honoured(&vm), if comes { done } else { GIB - done });
            assert_eq!(lines(&vm) - before, done * LINES);
            assert_eq!(vm.mem.enter().map(drop), Err(Error::ChangeUnfinished));
        }
        assert_eq!(change(&vm), Ok(Done));
        drop(vm.mem.enter().unwrap());
    }
    assert!(vm.runs().iter().all(|run| run.level == Level::L2));
    assert_eq!(vm.mem.counters().edges, 2);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn a_locked_block_that_can_not_be_cut_stays_as_it_was() {
    let vm = locked_block();
    vm.machine.fake.allow_allocations(Some(0));
    for _ in 0..2 {
        assert!(matches!(register(&vm), Err(Error::NeedTables(_))));
        assert_eq!((honoured(&vm), lines(&vm)), (0, 0));
        drop(vm.mem.enter().unwrap());
    }
    vm.machine.fake.allow_allocations(None);
    assert_eq!(register(&vm), Ok(More));
    assert_eq!(honoured(&vm), STEP);
}

/// What is pending is cleaned first; what refuses the device behind that is said at once, not hidden
/// behind another cleaning by the next call, and the next.
#[test]
fn a_device_that_is_refused_behind_the_cleaning_is_told_why() {
    let vm = locked_block();
    let pending = slot(B, STEP, 3 * STEP, STEP, FLAG);
    vm.mem.create_slot(pending).unwrap();
    vm.lock(&LockRequest::new(B, RW)).unwrap();
    vm.machine.fake.allow_allocations(Some(0));
    let refused = vm.mem.register_in_steps(NonSnooping, || true);
    assert!(matches!(refused, Err(Error::NeedTables(_))));
    assert_eq!(lines(&vm), 3 * STEP * LINES);
    vm.machine.fake.allow_allocations(None);
    assert!(vm.mem.register_in_steps(NonSnooping, || true).is_ok());
}

/// Nobody is inside while locked leaves change, but a vCPU may knock at any time: that is nobody's
/// error.
#[test]
fn a_vcpu_that_is_refused_is_in_nobodys_way() {
    let vm = locked_block();
    assert_eq!(register(&vm), Ok(More));
    for done in 2..5 {
        assert_eq!(vm.mem.enter().map(drop), Err(Error::ChangeUnfinished));
        assert_eq!(register(&vm), Ok(More));
        assert_eq!(honoured(&vm), done * STEP);
    }
}

/// The slot: its first 8 pages before a boundary of large steps.
fn straddling(vm: &Vm, flags: memslot::slot::SlotFlags) -> memslot::slot::Memslot {
    let b = slot(B, 3 * FRESH - 8, 8 + 2 * FRESH, 3 * GIB, flags);
    assert_eq!(vm.mem.slot(B), None);
    b
}

#[test]
fn a_logged_slot_is_created_in_steps() {
    let vm = vm(PLAIN);
    let b = straddling(&vm, LOG);
    let first = 3 * FRESH - 8;
    assert_eq!(vm.mem.create_in_steps(b, || false), Ok(More));
    assert_eq!(vm.mem.lock_state(B), Some(LockState::Unfinished));
    assert_eq!(vm.mem.create_slot(b), Err(Error::ChangeUnfinished));
    // What is written before the log has come to it is not in it, and can't be written unseen later.
    for page in [first, first + 8 + 100] {
        assert_eq!(touch(&vm, page, Access::Write), FaultOutcome::Resolved);
    }
    assert_eq!(vm.mem.take_dirty_word(B, 0), Err(Error::ChangeUnfinished));
    let go_on = || vm.mem.set_flags_in_steps(B, LOG, || false);
    let mut steps = 1;
    while go_on() == Ok(More) {
        steps += 1;
    }
    // 2 MiB, the rest of 64 MiB in parts of 2 MiB up to where nothing is mapped any more, 64 MiB.
    assert_eq!(steps, 3);
    let mapped: Vec<_> = vm.pages().into_keys().collect();
    assert_eq!(mapped, [first]);
    assert_eq!(vm.mem.take_dirty_word(B, 0), Ok(1));
    assert_eq!(vm.mem.take_dirty_word(B, 1), Ok(0));
    assert_eq!(
        touch(&vm, first + 8 + 100, Access::Write),
        FaultOutcome::Resolved
    );
    assert_eq!(vm.mem.take_dirty_word(B, 1), Ok(1 << (108 - 64)));
    assert_eq!(vm.mem.take_dirty_word(B, 512), Ok(0));
    let beyond = vm.mem.take_dirty_word(B, 513);
    assert_eq!(beyond, Err(Error::BadBuffer(513)));
}

#[test]
fn a_log_of_a_new_slot_can_be_taken_back() {
    let vm = vm(PLAIN);
    let b = straddling(&vm, LOG);
    assert_eq!(vm.mem.create_in_steps(b, || false), Ok(More));
    assert_eq!(vm.mem.set_slot_flags(B, NONE), Ok(()));
    assert_eq!(vm.mem.slot(B).map(|slot| slot.flags), Some(NONE));
    assert_eq!(vm.mem.take_dirty_word(B, 0), Err(Error::NotLogging(B)));
    assert_eq!(vm.mem.create_slot(b), Err(Error::SlotExists(B)));
}

#[test]
fn a_slot_that_is_created_at_once_can_be_read_at_once() {
    let vm = vm(PLAIN);
    assert_eq!(
        vm.mem.create_in_steps(straddling(&vm, LOG), || true),
        Ok(Done)
    );
    assert_eq!(vm.mem.take_dirty_word(B, 0), Ok(0));
    let unlogged = slot(memslot::slot::SlotId(3), 0, 8, 0, NONE);
    assert_eq!(vm.mem.create_in_steps(unlogged, || false), Ok(Done));
}

/// Where nothing is mapped nothing is cleaned: such parts go by 64 MiB, up to the next 2 MiB in which
/// there is something.
#[test]
fn what_is_empty_goes_in_large_steps() {
    let vm = vm(PLAIN);
    let page = GIB + 5 * FRESH + 3 * STEP + 7;
    assert_eq!(touch(&vm, page, Access::Write), FaultOutcome::Resolved);
    let mut steps = 0;
    loop {
        steps += 1;
        let before = lines(&vm);
        let progress = vm.mem.reset_in_steps(|| false);
        assert!(lines(&vm) - before <= STEP * LINES);
        if progress == Ok(Done) {
            break;
        }
    }
    // Parts of 64 MiB, but for the one with the mapping: 2 MiB until it is gone, then the rest; and
    // a step that finds nothing left.
    assert_eq!(steps, 15 + 4 + 1 + 1);
    assert_eq!(vm.runs(), []);
}

/// A lock maps as much at once as nothing is mapped in, to a boundary of 2 MiB.
#[test]
fn a_lock_maps_at_once_up_to_what_is_mapped() {
    let vm = vm(PLAIN);
    let page = GIB + 3 * STEP + 7;
    assert_eq!(touch(&vm, page, Access::Write), FaultOutcome::Resolved);
    vm.machine.fake.expect_deferred(true);
    let mapped = |vm: &Vm| {
        vm.runs()
            .iter()
            .map(|run| run.range.len() >> 12)
            .sum::<u64>()
    };
    assert_eq!(mapped(&vm), STEP, "a block");
    // What is before it, and it.
    for _ in 0..2 {
        assert_eq!(vm.mem.lock_in_steps(&BLOCKS, || false), Ok(More));
        assert_eq!(mapped(&vm), 4 * STEP);
    }
    assert_eq!(vm.mem.lock_in_steps(&BLOCKS, || false), Ok(Done));
    assert_eq!(mapped(&vm), GIB);
    assert_eq!(vm.memory(page).map(|pa| pa.get() >> 12), Some(page + GIB));
    assert_eq!(vm.mem.move_slot(A, gfn(0)), Err(Error::Locked(A)));
}
