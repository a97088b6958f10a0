//! The same promises on real Arm and EPT tables: blocks, allocation failure, order of steps.

use crate::kit::{FWB, NONE, PLAIN, R, RO, RW, gfn, pages, slot};
use crate::machine::{Real, arm, ept};
use memslot::account::Privilege;
use memslot::edge::Dma::NonSnooping;
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::frames::FrameSource;
use memslot::lock::LockRequest;
use memslot::mtrr::Msr;
use memslot::policy::{ArmPolicy, CdQuirk, EptPolicy, VcpuTypes};
use memslot::slot::{LockGranule, SlotId};
use memslot::steps::Progress;
use stage2::testing::Event;
use stage2::{ArmStage2, Combine, Level, MemType, Pa, PaRange, Perms};

/// 4 MiB at 1 GiB, aligned frames.
const A: SlotId = SlotId(1);
const BASE: u64 = 0x4_0000;
const PAGES: u64 = 1024;
const FRAME: u64 = 0x10_0000;

fn big(policy: ArmPolicy) -> Real<ArmStage2, ArmPolicy> {
    let vm = arm(policy, PAGES, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    vm
}

fn levels<F: stage2::TableFormat, P: memslot::policy::MemTypePolicy>(
    vm: &Real<F, P>,
) -> Vec<Level> {
    vm.runs().iter().map(|r| r.level).collect()
}

fn blocks(perms: memslot::slot::LockFlags) -> LockRequest {
    LockRequest {
        granule: LockGranule::Blocks,
        ..LockRequest::new(A, perms)
    }
}

#[test]
fn a_fault_takes_the_largest_block_of_an_unlocked_slot() {
    let vm = big(PLAIN);
    let outcome = vm.fault(BASE + 600, Access::Read, FaultKind::Translation, &());
    assert_eq!(outcome, Ok(FaultOutcome::Resolved));
    let runs = vm.runs();
    assert_eq!(levels(&vm), [Level::L2]);
    assert_eq!(runs[0].range.start().get() >> 12, BASE + 512);
    assert_eq!(runs[0].pa.get() >> 12, FRAME + 512);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn no_block_mapping_ever_inside_a_locked_slot() {
    let vm = big(PLAIN);
    // A block is there when the lock comes.
    vm.fault(BASE, Access::Fetch, FaultKind::Translation, &())
        .map(drop)
        .unwrap();
    assert_eq!(levels(&vm), [Level::L2]);
    vm.lock(&LockRequest::new(A, R)).unwrap();
    assert_eq!(levels(&vm), [Level::PAGE]);
    assert!(vm.is_full(pages(BASE, PAGES)));
    drop(vm.mem.enter().unwrap());
    for page in [BASE, BASE + 511, BASE + 1023] {
        vm.fault(page, Access::Fetch, FaultKind::Permission, &())
            .map(drop)
            .unwrap();
        vm.fault(page, Access::Write, FaultKind::Permission, &())
            .map(drop)
            .unwrap();
    }
    assert!(levels(&vm).iter().all(|l| l.is_page()));
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn blocks_are_granted_where_they_stay_one_mapping() {
    let vm = big(PLAIN);
    vm.lock(&blocks(RW)).unwrap();
    assert_eq!(levels(&vm), [Level::L2]);
    assert_eq!(vm.runs()[0].range.len(), 4 << 20);
    drop(vm.mem.enter().unwrap());
    // Execution comes for the whole block, and it stays one.
    vm.fault(BASE + 3, Access::Fetch, FaultKind::Permission, &())
        .map(drop)
        .unwrap();
    assert_eq!(levels(&vm), [Level::L2, Level::L2]);
    assert_eq!(vm.runs()[0].attrs.perms, Perms::RWX);
    assert_eq!(vm.runs()[1].attrs.perms, Perms::RW);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn blocks_are_refused_silently_where_logging_may_come() {
    let vm = big(PLAIN);
    vm.lock(&blocks(R)).unwrap();
    assert_eq!(levels(&vm), [Level::PAGE]);
}

#[test]
fn a_read_only_slot_may_be_locked_with_blocks() {
    let vm = arm(PLAIN, PAGES, PAGES);
    vm.mem.create_slot(slot(A, BASE, PAGES, FRAME, RO)).unwrap();
    vm.lock(&blocks(R)).unwrap();
    assert_eq!(levels(&vm), [Level::L2]);
}

#[test]
fn blocks_are_rewritten_in_place_at_an_edge() {
    let vm = big(FWB);
    vm.lock(&blocks(RW)).unwrap();
    drop(vm.mem.enter().unwrap());
    vm.mem.register_device(NonSnooping).unwrap();
    let run = vm.runs()[0];
    assert_eq!((run.level, run.range.len()), (Level::L2, 4 << 20));
    assert_eq!(
        (run.attrs.mem, run.attrs.combine),
        (MemType::WriteBack, Combine::HonourGuest)
    );
    assert_eq!(vm.machine.caches.traffic().data_lines, 4 << 14);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn allocation_failure_at_every_table_of_a_lock_rolls_back() {
    let mut refused = 0;
    for left in 0.. {
        // Runs of 300 pages: the lock maps in four calls that need tables of their own.
        let vm = arm(PLAIN, 300, PAGES);
        vm.mem
            .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
            .unwrap();
        let before = (vm.machine.fake.tables_in_use(), vm.mem.frames().state());
        vm.machine.fake.allow_allocations(Some(left));
        let locked = vm.lock(&LockRequest::new(A, RW));
        assert_eq!(vm.violations(), [""; 0]);
        if locked.is_ok() {
            break;
        }
        assert!(matches!(locked, Err(Error::NeedTables(_))), "{locked:?}");
        assert_eq!(vm.runs(), []);
        assert_eq!(
            (vm.machine.fake.tables_in_use(), vm.mem.frames().state()),
            before
        );
        assert_eq!(vm.mem.frames().account().locked(), 0);
        assert_eq!(vm.mem.slot(A).unwrap().lock, None);
        assert!(vm.mem.pending().is_empty());
        refused += 1;
    }
    // One level-2 table and two level-3 tables.
    assert_eq!(refused, 3);
}

#[test]
fn allocation_failure_of_a_fault_changes_nothing_and_names_the_need() {
    let vm = arm(PLAIN, 1, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    vm.machine.fake.allow_allocations(Some(1));
    let refused = vm.fault(BASE, Access::Read, FaultKind::Translation, &());
    assert_eq!(refused, Err(Error::NeedTables(2)));
    assert_eq!(vm.runs(), []);
    vm.machine.fake.allow_allocations(None);
    let outcome = vm.fault(BASE, Access::Read, FaultKind::Translation, &());
    assert_eq!(outcome, Ok(FaultOutcome::Resolved));
}

#[test]
fn deleting_and_moving_give_every_table_back() {
    let vm = big(PLAIN);
    let empty = vm.machine.fake.tables_in_use();
    vm.lock(&LockRequest::new(A, RW)).unwrap();
    assert_eq!(vm.machine.fake.tables_in_use(), empty + 3);
    drop(vm.mem.enter().unwrap());
    vm.mem.unlock_slot(A).unwrap();
    vm.mem.move_slot(A, gfn(BASE + PAGES)).unwrap();
    assert_eq!(vm.machine.fake.tables_in_use(), empty);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn an_edge_cleans_between_invalidation_and_return() {
    let vm = big(FWB);
    vm.fault(BASE, Access::Write, FaultKind::Translation, &())
        .map(drop)
        .unwrap();
    drop(vm.machine.fake.take_events());
    vm.mem.register_device(NonSnooping).unwrap();
    let events = vm.machine.fake.take_events();
    let at = |wanted: fn(&Event) -> bool| events.iter().position(wanted);
    let invalidated = at(|e| matches!(e, Event::TlbRange(..) | Event::TlbAll)).unwrap();
    let cleaned = at(|e| matches!(e, Event::Data(_))).unwrap();
    assert!(invalidated < cleaned, "{events:?}");
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn a_lock_does_no_maintenance_and_the_first_run_does_it_in_one_piece_per_chunk() {
    let vm = big(PLAIN);
    drop(vm.machine.fake.take_events());
    vm.lock(&LockRequest::new(A, RW)).unwrap();
    let data = |events: Vec<Event>| {
        events
            .iter()
            .filter(|e| matches!(e, Event::Data(_)))
            .count()
    };
    assert_eq!(data(vm.machine.fake.take_events()), 0);
    drop(vm.mem.enter().unwrap());
    assert_eq!(data(vm.machine.fake.take_events()), 2);
    assert_eq!(vm.machine.caches.traffic().data_lines, PAGES * 64);
}

#[test]
fn the_run_after_a_reset_invalidates_fetches_of_executable_pages_alone() {
    let vm = big(FWB);
    vm.lock(&LockRequest::new(A, RW)).unwrap();
    drop(vm.mem.enter().unwrap());
    vm.fault(BASE + 2, Access::Fetch, FaultKind::Permission, &())
        .map(drop)
        .unwrap();
    vm.mem.reset().unwrap();
    drop(vm.machine.fake.take_events());
    drop(vm.mem.enter().unwrap());
    let events = vm.machine.fake.take_events();
    let page = PaRange::new(Pa::new((FRAME + 2) << 12), 1 << 12).unwrap();
    assert_eq!(events, [Event::Fetch(page)]);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn a_block_larger_than_a_chunk_is_flushed_once() {
    const GIB: u64 = 1 << 18;
    let vm = arm(PLAIN, GIB, GIB);
    vm.mem.create_slot(slot(A, GIB, GIB, GIB, NONE)).unwrap();
    vm.lock(&blocks(RW)).unwrap();
    assert_eq!(levels(&vm), [Level::L1]);
    drop(vm.mem.enter().unwrap());
    assert_eq!(vm.machine.caches.traffic().data_lines, GIB * 64);
}

#[test]
fn a_fault_cleans_no_more_than_a_block_of_2_mib() {
    const GIB: u64 = 1 << 18;
    for (policy, level, lines) in [(PLAIN, Level::L2, 512 * 64), (FWB, Level::L1, 0)] {
        let vm = arm(policy, GIB, GIB);
        vm.mem.create_slot(slot(A, GIB, GIB, GIB, NONE)).unwrap();
        let fault = vm.fault(GIB, Access::Read, FaultKind::Translation, &());
        fault.map(drop).unwrap();
        assert_eq!(levels(&vm), [level]);
        assert_eq!(vm.machine.caches.traffic().data_lines, lines);
    }
}

#[test]
fn a_block_of_1_gib_is_unlocked_by_2_mib() {
    const GIB: u64 = 1 << 18;
    let vm = arm(PLAIN, GIB, GIB);
    vm.mem.create_slot(slot(A, GIB, GIB, GIB, NONE)).unwrap();
    vm.lock(&blocks(RW)).unwrap();
    for step in 1..4 {
        let progress = vm.mem.unlock_in_steps(A, || false);
        assert_eq!(progress, Ok(Progress::More));
        let left: u64 = vm.runs().iter().map(|r| r.range.len()).sum();
        assert_eq!(left, (GIB - step * 512) << 12);
        assert_eq!(vm.machine.caches.traffic().data_lines, step * 512 * 64);
    }
    assert_eq!(vm.mem.unlock_in_steps(A, || true), Ok(Progress::Done));
    assert_eq!(levels(&vm), []);
}

const MTRR: EptPolicy = EptPolicy::guest_mtrr(CdQuirk::WriteBack);

#[test]
fn mixed_types_split_blocks_and_uniform_ones_do_not() {
    let vm = ept(MTRR, PAGES, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    let mut vcpu = VcpuTypes::new(46, true);
    // WB, and UC for one page in the first 2 MiB.
    vcpu.mtrrs
        .write(Msr::VariableBase(0), (BASE + 5) << 12)
        .unwrap();
    vcpu.mtrrs
        .write(Msr::VariableMask(0), 0x3fff_ffff_f800)
        .unwrap();
    vcpu.mtrrs.write(Msr::DefaultType, 0x806).unwrap();
    for page in [BASE + 4, BASE + 5, BASE + 600] {
        vm.fault(page, Access::Read, FaultKind::Translation, &vcpu)
            .map(drop)
            .unwrap();
    }
    let seen: Vec<_> = vm.runs().iter().map(|r| (r.level, r.attrs.mem)).collect();
    let wb = MemType::WriteBack;
    assert_eq!(
        seen,
        [
            (Level::PAGE, wb),
            (Level::PAGE, MemType::Uncached),
            (Level::L2, wb)
        ]
    );
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn uncached_ram_can_be_executed_on_x86() {
    let vm = ept(MTRR, PAGES, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    // MTRRs off: all of memory is UC, and firmware runs from it.
    let vcpu = VcpuTypes::new(46, true);
    let outcome = vm.fault(BASE, Access::Fetch, FaultKind::Translation, &vcpu);
    assert_eq!(outcome, Ok(FaultOutcome::Resolved));
    assert_eq!(vm.runs()[0].attrs.mem, MemType::Uncached);
}

#[test]
fn starting_to_log_turns_blocks_into_pages() {
    let vm = big(PLAIN);
    vm.fault(BASE, Access::Write, FaultKind::Translation, &())
        .map(drop)
        .unwrap();
    vm.mem
        .set_slot_flags(A, memslot::slot::SlotFlags::DIRTY_LOG)
        .unwrap();
    vm.fault(BASE, Access::Write, FaultKind::Translation, &())
        .map(drop)
        .unwrap();
    assert_eq!(levels(&vm), [Level::PAGE]);
    let mut words = [0; 16];
    vm.mem.take_dirty_log(A, &mut words).unwrap();
    assert_eq!(words[0], 1);
    assert_eq!(vm.runs()[0].attrs.perms, Perms::READ);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn unmapping_part_of_a_block_keeps_the_rest() {
    let vm = big(PLAIN);
    vm.fault(BASE, Access::Write, FaultKind::Translation, &())
        .map(drop)
        .unwrap();
    vm.mem.host_unmap(pages(BASE + 7, 1)).unwrap();
    assert!(!vm.is_full(pages(BASE + 7, 1)));
    assert!(vm.is_full(pages(BASE, 7)) && vm.is_full(pages(BASE + 8, 504)));
    assert_eq!(
        vm.memory(BASE + 8).map(|pa| pa.get() >> 12),
        Some(FRAME + 8)
    );
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn the_privilege_of_a_request_reaches_the_account() {
    let vm = arm(PLAIN, PAGES, 10);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    let request = LockRequest {
        privilege: Privilege::MayExceedLimit,
        ..LockRequest::new(A, R)
    };
    assert_eq!(vm.lock(&request), Ok(()));
}
