//! A VM from its creation to its end on real tables of every granule, with and without forced
//! write-back: two vCPUs, every outcome of a fault, locks, logs, edges.

use std::sync::Barrier;

use crate::kit::{FLAG, FWB, LOG, NONE, PLAIN, R, RO, RW, gfn, pages, slot};
use crate::machine::{Real, arm_with};
use memslot::edge::Dma::NonSnooping;
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::frames::FrameSource;
use memslot::lock::{LockRequest, LockState};
use memslot::policy::ArmPolicy;
use memslot::slot::{LockGranule, Memslot, SlotId, SlotKind};
use memslot::testing::View;
use stage2::{ArmStage2, Combine, Device, Granule, MemType, Perms};

type Vm = Real<ArmStage2, ArmPolicy>;

/// 1024 frames at 1 GiB: 4 MiB of RAM, memory from frame 0x10_0000 on in one piece.
const A: SlotId = SlotId(1);
const BASE: u64 = 0x4_0000;
const PAGES: u64 = 1024;
const FRAME: u64 = 0x10_0000;
/// 64 frames that are read-only, and 64 of a device.
const ROM: SlotId = SlotId(2);
const ROM_BASE: u64 = 0x5_0000;
const DEVICE: SlotId = SlotId(3);
const DEVICE_BASE: u64 = 0x6_0000;

/// Runs a test on every kind of table. Its last argument: frames of 4 KiB in a page.
fn on_every_table(test: impl Fn(&Vm, u64)) {
    for granule in [Granule::K4, Granule::K16, Granule::K64] {
        for policy in [FWB, PLAIN] {
            let vm = arm_with(granule, policy, PAGES, PAGES);
            let device = Memslot::new(DEVICE, gfn(DEVICE_BASE), 64, 0xf_0000, NONE, SlotKind::Mmio);
            for slot in [
                slot(A, BASE, PAGES, FRAME, NONE),
                slot(ROM, ROM_BASE, 64, 0x20_0000, RO),
                device.unwrap(),
            ] {
                vm.mem.create_slot(slot).unwrap();
            }
            test(&vm, 1 << (granule.page_shift() - 12));
            assert_eq!(vm.violations(), [""; 0], "{granule:?} {policy:?}");
        }
    }
}

fn fault(vm: &Vm, page: u64, access: Access) -> Result<FaultOutcome, Error> {
    vm.fault(page, access, FaultKind::Translation, &())
}

fn relax(vm: &Vm, page: u64, access: Access) -> Result<FaultOutcome, Error> {
    vm.fault(page, access, FaultKind::Permission, &())
}

/// What RAM says without non-coherent devices.
fn ram_type(vm: &Vm) -> (MemType, Combine) {
    let combine = if *vm.mem.policy() == FWB {
        Combine::ForceStage2
    } else {
        Combine::HonourGuest
    };
    (MemType::WriteBack, combine)
}

#[test]
fn two_vcpus_fault_a_whole_slot_in() {
    on_every_table(|vm, size| {
        let start = Barrier::new(2);
        let vcpu = |stride: u64, access: Access| {
            start.wait();
            for n in 0..PAGES / size {
                // Odd strides visit every page once, each in another order.
                let page = BASE + n * stride % (PAGES / size) * size;
                while fault(vm, page, access) == Ok(FaultOutcome::Retry) {}
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| vcpu(1, Access::Write));
            scope.spawn(|| vcpu(7, Access::Fetch));
        });
        let leaves = vm.pages();
        for page in 0..PAGES {
            let leaf = leaves[&(BASE + page)];
            assert_eq!(leaf.pa.get() >> 12, FRAME + page);
            assert_eq!((leaf.attrs.mem, leaf.attrs.combine), ram_type(vm));
            assert!(leaf.attrs.perms.contains(Perms::RW));
        }
    });
}

#[test]
fn every_outcome_of_a_fault() {
    use FaultOutcome::{Abort, Mmio, NoFrame, Resolved, Retry};
    on_every_table(|vm, _| {
        assert_eq!(fault(vm, BASE - 1, Access::Read), Ok(Mmio), "no slot");
        assert_eq!(fault(vm, ROM_BASE, Access::Write), Ok(Mmio), "read-only");
        assert_eq!(fault(vm, DEVICE_BASE, Access::Fetch), Ok(Abort));
        vm.mem.frames().take_frame(17);
        assert_eq!(
            fault(vm, BASE + 17, Access::Read),
            Ok(NoFrame(gfn(BASE + 17)))
        );
        assert_eq!(vm.runs(), [], "nothing of this maps anything");
        for (page, access) in [
            (BASE, Access::Read),
            (BASE, Access::Read),
            (ROM_BASE, Access::Fetch),
            (DEVICE_BASE, Access::Write),
        ] {
            assert_eq!(fault(vm, page, access), Ok(Resolved));
        }
        assert_eq!(relax(vm, BASE, Access::Fetch), Ok(Resolved));
        // Another frame stands there now: the leaf goes, and the guest faults again.
        vm.mem.frames().move_backing(0x1000);
        assert_eq!(fault(vm, BASE, Access::Read), Ok(Retry));
        assert_eq!(fault(vm, BASE, Access::Read), Ok(Resolved));
        assert_eq!(
            vm.memory(BASE).map(|pa| pa.get() >> 12),
            Some(FRAME + 0x1000)
        );
        let device = vm.pages()[&DEVICE_BASE].attrs;
        assert_eq!(device.mem, MemType::Device(Device::NGnRE));
    });
}

#[test]
fn a_frame_that_changes_under_a_lock_is_an_error_and_the_leaf_stays() {
    on_every_table(|vm, _| {
        vm.lock(&LockRequest::new(A, R)).unwrap();
        drop(vm.mem.enter().unwrap());
        let before = vm.runs();
        vm.mem.frames().move_backing(0x1000);
        assert_eq!(relax(vm, BASE, Access::Write), Err(Error::BackingChanged));
        assert_eq!(vm.runs(), before);
    });
}

#[test]
fn a_note_in_the_table_means_that_the_host_must_act() {
    on_every_table(|vm, size| {
        let noted = vm.mem.attach_importer(|table| {
            let page = stage2::IpaRange::new(gfn(BASE).start(), size << 12).unwrap();
            Ok(table.annotate(page, stage2::Annotation::try_new(5).unwrap())?)
        });
        assert_eq!(noted, Ok(()));
        let outcome = fault(vm, BASE, Access::Read);
        assert_eq!(outcome, Ok(FaultOutcome::NoFrame(gfn(BASE))));
    });
}

#[test]
fn a_locked_slot_has_pages_of_the_tables_own_size() {
    on_every_table(|vm, size| {
        vm.lock(&LockRequest::new(A, R)).unwrap();
        assert_eq!(vm.mem.frames().account().locked(), PAGES);
        assert!(vm.is_full(pages(BASE, PAGES)));
        drop(vm.mem.enter().unwrap());
        assert_eq!(vm.mem.lock_state(A), Some(LockState::LockedClean));
        relax(vm, BASE + 2 * size - 1, Access::Write)
            .map(drop)
            .unwrap();
        relax(vm, BASE + size, Access::Fetch).map(drop).unwrap();
        let leaves = vm.pages();
        assert!(leaves.values().all(|l| l.level.is_page()));
        let perms = |page| leaves[&page].attrs.perms;
        assert_eq!(perms(BASE + size - 1), Perms::READ);
        assert_eq!(perms(BASE + size), Perms::RWX);
        assert_eq!(perms(BASE + 2 * size - 1), Perms::RWX);
        assert_eq!(perms(BASE + 2 * size), Perms::READ);
    });
}

#[test]
fn blocks_of_a_write_lock_are_flushed_and_kept() {
    on_every_table(|vm, _| {
        let blocks = LockRequest {
            granule: LockGranule::Blocks,
            ..LockRequest::new(A, RW)
        };
        vm.lock(&blocks).unwrap();
        let at = vm.memory(BASE + 9).unwrap();
        vm.machine.caches.write(at, View::Cacheable, 7);
        drop(vm.mem.enter().unwrap());
        let forced = *vm.mem.policy() == FWB;
        let lines = if forced { 0 } else { PAGES * 64 };
        assert_eq!(vm.machine.caches.traffic().data_lines, lines);
        let view = if forced {
            View::Cacheable
        } else {
            View::Uncached
        };
        assert_eq!(vm.machine.caches.read(at, view), 7);
    });
}

#[test]
fn the_log_has_a_bit_for_every_frame_of_a_written_page() {
    on_every_table(|vm, size| {
        vm.mem.set_slot_flags(A, LOG).unwrap();
        fault(vm, BASE + 64 + size, Access::Write)
            .map(drop)
            .unwrap();
        fault(vm, BASE + 64 + 3 * size + 1, Access::Read)
            .map(drop)
            .unwrap();
        let bits = ((1 << size) - 1) << size;
        assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(0));
        assert_eq!(vm.mem.take_dirty_word(A, 1), Ok(bits));
        assert!(vm.pages().values().all(|l| l.attrs.perms == Perms::READ));
        relax(vm, BASE + 64 + 2 * size - 1, Access::Write)
            .map(drop)
            .unwrap();
        assert_eq!(vm.mem.take_dirty_word(A, 1), Ok(bits));
    });
}

#[test]
fn an_edge_removes_pages_and_rewrites_locked_ones() {
    on_every_table(|vm, _| {
        vm.lock(&LockRequest::new(ROM, R)).unwrap();
        drop(vm.mem.enter().unwrap());
        fault(vm, BASE, Access::Read).map(drop).unwrap();
        vm.mem.register_device(NonSnooping).unwrap();
        let leaves = vm.pages();
        let locked = leaves[&ROM_BASE].attrs;
        let honoured = (MemType::WriteBack, Combine::HonourGuest);
        assert_eq!((locked.mem, locked.combine), honoured);
        let depends = *vm.mem.policy() == FWB;
        assert_eq!(leaves.contains_key(&BASE), !depends);
        vm.mem.unregister_device(NonSnooping).unwrap();
        let locked = vm.pages()[&ROM_BASE].attrs;
        assert_eq!((locked.mem, locked.combine), ram_type(vm));
    });
}

#[test]
fn a_slot_or_an_unmap_that_cuts_a_page_is_refused() {
    on_every_table(|vm, size| {
        for (base, npages) in [(1, 64), (0, 1), (0, 63), (63, 1), (62, 3)] {
            let base = 0x7_0000 + base;
            let cut = slot(SlotId(7), base, npages, 0, FLAG);
            let refused = Error::BadRange { base, npages };
            let expected = if size == 1 { Ok(()) } else { Err(refused) };
            assert_eq!(vm.mem.create_slot(cut), expected);
            assert_eq!(vm.mem.host_unmap(pages(base, npages)), expected);
            let _ = vm.mem.delete_slot(SlotId(7));
        }
        let moved = vm.mem.move_slot(ROM, gfn(0x7_0001));
        assert_eq!(moved.is_ok(), size == 1);
    });
}

#[test]
fn missing_tables_at_every_step_of_a_lock_leave_nothing() {
    on_every_table(|vm, _| {
        let before = (vm.machine.fake.snapshot(), vm.mem.frames().state());
        let mut refused = 0;
        for left in 0.. {
            vm.machine.fake.allow_allocations(Some(left));
            if vm.lock(&LockRequest::new(A, RW)).is_ok() {
                break;
            }
            let now = (vm.machine.fake.snapshot(), vm.mem.frames().state());
            assert_eq!(now, before);
            assert_eq!(vm.mem.lock_state(A), Some(LockState::Unlocked));
            assert!(vm.mem.pending().is_empty());
            assert_eq!(vm.mem.frames().account().locked(), 0);
            refused += 1;
        }
        assert!(refused > 0);
        vm.machine.fake.allow_allocations(None);
    });
}
