//! Deletions, moves, logs, resets and devices in steps: what may happen between two of them, and that
//! the end is the same.

use crate::kit::{A, B, FWB, LOG, NONE, PLAIN, R, RW, gfn, slot};
use crate::machine::{Real, arm};
use memslot::edge::Dma::{self, NonSnooping, Snooping};
use memslot::error::{Error, ErrorKind};
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::flush::OwedFlush;
use memslot::lock::{LockRequest, LockState};
use memslot::pending::Work;
use memslot::policy::ArmPolicy;
use memslot::steps::Progress::{self, Done, More};
use memslot::testing::View;
use memslot::toggle::Flush;
use stage2::{Aging, Combine, Pa, Perms};

type Vm = Real<stage2::ArmStage2, ArmPolicy>;

/// Pages that are taken away in one step where they are cleaned.
const STEP: u64 = 512;
/// The same where nothing is.
const FRESH: u64 = 32 * STEP;
/// The slot: three steps where pages are cleaned, two where not.
const BASE: u64 = 3 * FRESH - 8;
const PAGES: u64 = 8 + 2 * STEP;
const FRAME: u64 = 0x10_0000;
/// Where it moves to.
const ELSEWHERE: u64 = 5 * FRESH;

fn busy() -> Error {
    Error::ChangeUnfinished
}

/// A VM whose slot A is mapped by pages, unlocked, with nothing pending.
fn vm(policy: ArmPolicy) -> Vm {
    let vm = arm(policy, PAGES, PAGES);
    let ram = slot(A, BASE, PAGES, FRAME, NONE);
    vm.mem.create_slot(ram).unwrap();
    vm.machine.fake.expect_deferred(true);
    lock(&vm, RW);
    drop(vm.mem.enter().unwrap());
    vm.mem.unlock_slot(A).unwrap();
    vm.machine.fake.expect_deferred(false);
    assert_eq!(mapped(&vm), PAGES);
    vm
}

fn lock(vm: &Vm, perms: memslot::slot::LockFlags) {
    vm.mem.lock_slot(&LockRequest::new(A, perms)).unwrap();
}

fn mapped(vm: &Vm) -> u64 {
    vm.pages().len() as u64
}

fn touch(vm: &Vm, page: u64, access: Access) -> FaultOutcome {
    vm.fault(page, access, FaultKind::Translation, &()).unwrap()
}

/// What was locked before it was cleaned is not the subject here.
fn violations(vm: &Vm) -> Vec<String> {
    let mut found = vm.violations();
    found.retain(|what| !what.ends_with("mapped while dirty"));
    found
}

/// One step of each change.
fn delete(vm: &Vm) -> Result<Progress, Error> {
    let gone = vm.mem.delete_in_steps(A, || false)?;
    Ok(gone.map_or(More, |_| Done))
}

fn move_to(vm: &Vm, base: u64) -> Result<Progress, Error> {
    vm.mem.move_in_steps(A, gfn(base), || false)
}

fn log(vm: &Vm) -> Result<Progress, Error> {
    vm.mem.set_flags_in_steps(A, LOG, || false)
}

fn reset(vm: &Vm) -> Result<Progress, Error> {
    vm.mem.reset_in_steps(|| false)
}

fn register(vm: &Vm, dma: Dma) -> Result<Progress, Error> {
    vm.mem.register_in_steps(dma, || false)
}

type Begin = fn(&Vm) -> Result<Progress, Error>;

/// All of them, and whether nobody enters meanwhile.
const CHANGES: [(&str, Begin, bool); 5] = [
    ("delete", delete, false),
    ("move", |vm| move_to(vm, ELSEWHERE), true),
    ("log", log, false),
    ("reset", reset, true),
    ("device", |vm| register(vm, NonSnooping), true),
];

/// Steps until it is done, the first one included.
fn steps(vm: &Vm, change: Begin) -> u64 {
    let mut steps = 1;
    while change(vm) == Ok(More) {
        steps += 1;
        assert!(steps < 100, "it never ends");
    }
    steps
}

#[test]
fn a_change_in_steps_takes_away_as_much_at_a_time_as_it_cleans() {
    for (policy, parts) in [(PLAIN, [8, STEP, STEP]), (FWB, [8, 2 * STEP, 0])] {
        for (name, change, _) in &CHANGES[..4] {
            let vm = vm(policy);
            let mut left = PAGES;
            for part in parts.into_iter().filter(|part| *part != 0) {
                assert!(change(&vm).is_ok(), "{name}");
                left -= part;
                assert_eq!(mapped(&vm), left, "{name}");
            }
        }
    }
}

#[test]
fn a_change_in_steps_ends_as_one_in_one_go() {
    let at_once: [fn(&Vm); 5] = [
        |vm| assert!(vm.mem.delete_slot(A).is_ok()),
        |vm| vm.mem.move_slot(A, gfn(ELSEWHERE)).unwrap(),
        |vm| vm.mem.set_slot_flags(A, LOG).unwrap(),
        |vm| vm.mem.reset().unwrap(),
        |vm| assert!(vm.mem.register_device(NonSnooping).is_ok()),
    ];
    for policy in [PLAIN, FWB] {
        for ((name, change, _), at_once) in CHANGES.iter().zip(at_once) {
            let (one, other) = (vm(policy), vm(policy));
            steps(&one, *change);
            at_once(&other);
            assert_eq!(one.pages(), other.pages(), "{name}");
            assert_eq!(one.mem.slot(A), other.mem.slot(A), "{name}");
            assert_eq!(one.mem.pending(), other.mem.pending(), "{name}");
            assert_eq!(one.mem.counters(), other.mem.counters(), "{name}");
            let tables = |vm: &Vm| vm.machine.fake.tables_in_use();
            if *name == "delete" || *name == "move" {
                assert_eq!(tables(&one), tables(&other), "{name}");
            }
            assert_eq!(violations(&one), [""; 0], "{name}");
        }
    }
}

/// Everything that changes slots, locks, devices or pages.
fn others(vm: &Vm) -> Vec<(&'static str, Result<(), Error>)> {
    let mem = &vm.mem;
    vec![
        ("create", mem.create_slot(slot(B, 0, 1, 0, NONE))),
        ("delete", mem.delete_slot(B).map(drop)),
        ("move", mem.move_slot(B, gfn(0))),
        ("flags", mem.set_slot_flags(B, LOG)),
        ("lock", mem.lock_slot(&LockRequest::new(A, R))),
        ("unlock", mem.unlock_slot(A)),
        ("snooping", mem.register_device(Snooping).map(drop)),
        ("gone", mem.unregister_device(NonSnooping).map(drop)),
        ("importer", mem.attach_importer(|_| Ok(()))),
        ("registered", mem.attach_registered(|_| Ok(()))),
        ("log", mem.take_dirty_word(A, 0).map(drop)),
        ("unmap", mem.host_unmap(crate::kit::pages(BASE, 1))),
        ("unshare", mem.unshare_pages(A, 0, 1)),
        ("share", mem.share_pages(A, 0, 1)),
        ("age", mem.age_pages(A, 0, 1, Aging::Test).map(drop)),
        ("relax", mem.relax_page(A, 0, Perms::READ)),
    ]
}

#[test]
fn nothing_else_changes_before_a_change_is_complete() {
    for (name, change, keeps_out) in CHANGES {
        let vm = vm(FWB);
        assert_eq!(change(&vm), Ok(More), "{name}");
        let before = (vm.pages(), vm.mem.pending());
        for (other, result) in others(&vm) {
            assert_eq!(result, Err(busy()), "{other} during {name}");
        }
        if name != "reset" {
            assert_eq!(reset(&vm), Err(busy()), "{name}");
        }
        assert_eq!((vm.pages(), vm.mem.pending()), before, "{name}");
        let entered = vm.mem.enter().map(drop);
        let expected = if keeps_out { Err(busy()) } else { Ok(()) };
        assert_eq!(entered, expected, "{name}");
        while change(&vm) == Ok(More) {}
        drop(vm.mem.enter().unwrap());
        vm.mem.create_slot(slot(B, 0, 1, 0, NONE)).unwrap();
    }
    assert_eq!(busy().kind(), ErrorKind::Busy);
}

/// Another vCPU, number, place, kind or direction.
#[test]
fn only_the_same_call_continues() {
    let vm = vm(PLAIN);
    assert_eq!(move_to(&vm, ELSEWHERE), Ok(More));
    assert_eq!(move_to(&vm, BASE), Err(busy()));
    assert_eq!(delete(&vm), Err(busy()));
    assert_eq!(steps(&vm, |vm| move_to(vm, ELSEWHERE)), 2);
    let vm = self::vm(PLAIN);
    assert_eq!(delete(&vm), Ok(More));
    assert_eq!(move_to(&vm, ELSEWHERE), Err(busy()));
    assert_eq!(vm.mem.lock_state(A), Some(LockState::Unfinished));
    assert_eq!(steps(&vm, delete), 2);
    assert_eq!(vm.mem.lock_state(A), None);
    assert_eq!(delete(&vm), Err(Error::NoSuchSlot(A)));
}

#[test]
fn a_guest_inside_finds_nothing_in_a_slot_that_is_being_deleted() {
    let vm = vm(PLAIN);
    let inside = vm.mem.enter().unwrap();
    assert_eq!(delete(&vm), Ok(More));
    for page in [BASE, BASE + 8, BASE + PAGES - 1] {
        assert_eq!(touch(&vm, page, Access::Read), FaultOutcome::Mmio);
    }
    assert_eq!(steps(&vm, delete), 2);
    drop(inside);
    assert_eq!(mapped(&vm), 0);
}

#[test]
fn a_guest_inside_waits_for_a_slot_that_moves() {
    let vm = vm(PLAIN);
    let inside = vm.mem.enter().unwrap();
    assert_eq!(move_to(&vm, ELSEWHERE), Ok(More));
    for page in [BASE, BASE + PAGES - 1, ELSEWHERE, ELSEWHERE + PAGES - 1] {
        assert_eq!(touch(&vm, page, Access::Read), FaultOutcome::Retry);
    }
    let neither = ELSEWHERE + PAGES;
    assert_eq!(touch(&vm, neither, Access::Read), FaultOutcome::Mmio);
    assert_eq!(steps(&vm, |vm| move_to(vm, ELSEWHERE)), 2);
    drop(inside);
    assert_eq!(touch(&vm, BASE, Access::Read), FaultOutcome::Mmio);
    assert_eq!(touch(&vm, ELSEWHERE, Access::Read), FaultOutcome::Resolved);
    assert_eq!(vm.memory(ELSEWHERE), Some(Pa::new(FRAME << 12)));
    assert_eq!(violations(&vm), [""; 0]);
}

#[test]
fn a_slot_moves_over_its_own_place_in_steps() {
    let vm = vm(PLAIN);
    let near = BASE + STEP;
    assert_eq!(steps(&vm, |vm| move_to(vm, BASE + STEP)), 3);
    assert_eq!(mapped(&vm), 0);
    assert_eq!(touch(&vm, near, Access::Read), FaultOutcome::Resolved);
    assert_eq!(vm.memory(near), Some(Pa::new(FRAME << 12)));
}

#[test]
fn what_is_written_during_the_first_steps_of_a_log_is_logged_when_it_is_complete() {
    let vm = vm(PLAIN);
    let inside = vm.mem.enter().unwrap();
    assert_eq!(log(&vm), Ok(More));
    assert_eq!(touch(&vm, BASE + 3, Access::Write), FaultOutcome::Resolved);
    assert_eq!(vm.mem.take_dirty_word(A, 0), Err(busy()));
    assert_eq!(steps(&vm, log), 2);
    drop(inside);
    let writable = |leaf: &memslot::table::LeafRun| leaf.attrs.perms.contains(Perms::WRITE);
    let pages = vm.pages();
    let left: Vec<_> = pages.iter().filter(|(_, leaf)| writable(leaf)).collect();
    assert_eq!(left.len(), 1, "the page that is in the log");
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(1 << 3));
}

#[test]
fn a_log_that_has_begun_can_be_taken_back() {
    let vm = vm(PLAIN);
    assert_eq!(log(&vm), Ok(More));
    assert_eq!(vm.mem.set_slot_flags(A, NONE), Ok(()));
    assert_eq!(vm.mem.take_dirty_word(A, 0), Err(Error::NotLogging(A)));
    assert_eq!(mapped(&vm), PAGES - 8);
    assert_eq!(touch(&vm, BASE, Access::Write), FaultOutcome::Resolved);
    assert_eq!(violations(&vm), [""; 0]);
}

#[test]
fn a_read_locked_slot_is_write_protected_in_steps() {
    let vm = vm(PLAIN);
    vm.machine.fake.expect_deferred(true);
    lock(&vm, R);
    drop(vm.mem.enter().unwrap());
    let write = vm.fault(BASE + 20, Access::Write, FaultKind::Permission, &());
    assert_eq!(write, Ok(FaultOutcome::Resolved));
    assert_eq!(steps(&vm, log), 3);
    assert_eq!(mapped(&vm), PAGES);
    let pages = vm.pages();
    let leaf = pages.get(&(BASE + 20)).unwrap();
    assert_eq!(leaf.attrs.perms, Perms::READ);
}

#[test]
fn pages_that_were_taken_back_stay_so_through_a_log_and_a_reset_in_steps() {
    for change in [log as Begin, reset] {
        let vm = vm(PLAIN);
        vm.mem.unshare_pages(A, 600, 1).unwrap();
        steps(&vm, change);
        let missing = FaultOutcome::NoFrame(gfn(BASE + 600));
        assert_eq!(touch(&vm, BASE + 600, Access::Read), missing);
    }
}

/// A VM that ends in the middle has what its slot has left behind cleaned, too.
#[test]
fn a_flush_reaches_what_a_slot_has_not_left_yet() {
    for change in [delete as Begin, |vm| move_to(vm, ELSEWHERE)] {
        let vm = vm(PLAIN);
        let last = Pa::new((FRAME + PAGES - 1) << 12);
        assert_eq!(change(&vm), Ok(More));
        vm.machine.caches.write(last, View::Uncached, 7);
        vm.machine.caches.write(last, View::Cacheable, 8);
        let mut owed = OwedFlush::default();
        owed.owe(Flush::All);
        assert_eq!(vm.mem.flush_in_steps(&mut owed, || true), Done);
        assert_eq!(vm.machine.caches.read(last, View::Uncached), 8);
    }
}

#[test]
fn a_vm_that_is_emptied_in_the_middle_has_nothing_left() {
    for (name, change, _) in CHANGES {
        let vm = vm(FWB);
        assert_eq!(change(&vm), Ok(More), "{name}");
        vm.mem.empty().unwrap();
        assert_eq!(mapped(&vm), 0, "{name}");
        drop(vm.mem.enter().unwrap());
    }
}

#[test]
fn a_reset_in_steps_ends_with_the_work_of_locked_slots() {
    let vm = vm(PLAIN);
    vm.mem
        .create_slot(slot(B, 0, 16, FRAME + PAGES, NONE))
        .unwrap();
    vm.machine.fake.expect_deferred(true);
    vm.mem.lock_slot(&LockRequest::new(B, RW)).unwrap();
    drop(vm.mem.enter().unwrap());
    assert_eq!(reset(&vm), Ok(More));
    assert_eq!(vm.mem.pending(), Work::UNFINISHED);
    assert_eq!(steps(&vm, reset), 3, "and one that finds nothing");
    let work = Work::FLUSH_DCACHE | Work::INVAL_ICACHE;
    assert_eq!(vm.mem.pending(), work);
    assert_eq!(vm.mem.lock_state(B), Some(LockState::LockedReset));
    assert_eq!(mapped(&vm), 16);
}

#[test]
fn pending_pages_are_cleaned_for_a_device_in_small_steps() {
    let vm = vm(PLAIN);
    vm.machine.fake.expect_deferred(true);
    lock(&vm, RW);
    let before = vm.machine.caches.traffic().data_lines;
    for cleaned in [8, 8 + STEP, PAGES] {
        assert_eq!(register(&vm, Snooping), Ok(More));
        let lines = vm.machine.caches.traffic().data_lines - before;
        assert_eq!(lines, cleaned * 64);
    }
    let counters = vm.mem.counters();
    assert_eq!(register(&vm, Snooping), Ok(Done));
    assert_eq!(vm.mem.counters(), counters);
    // It stays pending for the first run.
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    vm.mem.unregister_device(Snooping).map(drop).unwrap();
    let none = vm.mem.unregister_device(Snooping).map(drop);
    assert_eq!(none, Err(Error::CountUnbalanced));
}

#[test]
fn locked_leaves_follow_the_count_in_small_steps() {
    let vm = vm(FWB);
    lock(&vm, RW);
    let honours = |vm: &Vm| {
        let pages = vm.pages();
        let leaves = pages.values();
        let honours = leaves.filter(|leaf| leaf.attrs.combine == Combine::HonourGuest);
        honours.count() as u64
    };
    assert_eq!(honours(&vm), 0);
    for changed in [8, 8 + STEP] {
        assert_eq!(register(&vm, NonSnooping), Ok(More));
        assert_eq!(honours(&vm), changed);
        assert_eq!(vm.mem.enter().map(drop), Err(busy()));
    }
    assert_eq!(steps(&vm, |vm| register(vm, NonSnooping)), 2);
    assert_eq!(honours(&vm), PAGES);
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    assert_eq!(vm.mem.counters().edges, 1);
}

/// A device can go at any time; its count is nobody's step.
#[test]
fn a_snooping_device_goes_in_the_middle_of_a_change() {
    let vm = vm(FWB);
    vm.mem.register_device(Snooping).map(drop).unwrap();
    assert_eq!(delete(&vm), Ok(More));
    vm.mem.unregister_device(Snooping).map(drop).unwrap();
    assert_eq!(delete(&vm), Ok(Done));
}

/// A block of 1 GiB that owes cleaning is cut, which takes a table: without one a step changes nothing.
#[test]
fn a_step_that_lacks_a_table_leaves_the_change_where_it_was() {
    const GIB: u64 = 1 << 18;
    for (name, change, _) in &CHANGES[..4] {
        let vm = arm(PLAIN, GIB, GIB);
        vm.mem
            .create_slot(slot(A, 2 * GIB, GIB, 4 * GIB, NONE))
            .unwrap();
        vm.machine.fake.expect_deferred(true);
        let blocks = LockRequest {
            granule: memslot::slot::LockGranule::Blocks,
            ..LockRequest::new(A, RW)
        };
        vm.mem.lock_slot(&blocks).unwrap();
        drop(vm.mem.enter().unwrap());
        vm.mem.unlock_slot(A).unwrap();
        let before = vm.runs();
        assert_eq!(before.len(), 1, "one block");
        vm.machine.fake.allow_allocations(Some(0));
        let refused = if *name == "move" {
            vm.mem.move_in_steps(A, gfn(GIB), || false)
        } else {
            change(&vm)
        };
        assert!(
            matches!(refused, Err(Error::NeedTables(_))),
            "{name}: {refused:?}"
        );
        assert_eq!(vm.runs(), before, "{name}");
        drop(vm.mem.enter().unwrap());
        vm.machine.fake.allow_allocations(None);
        let lines = vm.machine.caches.traffic().data_lines;
        let first = if *name == "move" {
            vm.mem.move_in_steps(A, gfn(GIB), || false)
        } else {
            change(&vm)
        };
        assert_eq!(first, Ok(More), "{name}");
        let cleaned = vm.machine.caches.traffic().data_lines - lines;
        assert_eq!(cleaned, STEP * 64, "{name}");
    }
}
