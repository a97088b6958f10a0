//! Single pages of a slot that stays: taken back, lent again, looked at, relaxed.

use crate::kit::{self, A, FWB, LOG, NONE, PLAIN, R, RO, RW, gfn, slot};
use crate::machine::{Real, arm};
use memslot::addr::GfnRange;
use memslot::error::{Error, ErrorKind};
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::lock::LockRequest;
use memslot::policy::ArmPolicy;
use memslot::sharing::MAX_PAGES;
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::testing::View;
use memslot::vm::VmKind;
use stage2::{Aging, ArmStage2, Pa, Perms};

type Vm = Real<ArmStage2, ArmPolicy>;

const BASE: u64 = 0x4_0000;
const PAGES: u64 = 1024;
const FRAME: u64 = 0x10_0000;
const NONE_SUCH: SlotId = SlotId(2);

fn vm_with(policy: ArmPolicy, flags: SlotFlags) -> Vm {
    let vm = arm(policy, PAGES, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, flags))
        .unwrap();
    vm
}

fn vm() -> Vm {
    vm_with(PLAIN, NONE)
}

fn touch(vm: &Vm, page: u64, access: Access) -> FaultOutcome {
    vm.fault(BASE + page, access, FaultKind::Translation, &())
        .unwrap()
}

fn young(vm: &Vm, first: u64, count: u64) -> u64 {
    vm.mem.age_pages(A, first, count, Aging::Test).unwrap()
}

fn clear(vm: &Vm, first: u64, count: u64) -> Result<u64, Error> {
    vm.mem.age_pages(A, first, count, Aging::Clear)
}

fn perms(vm: &Vm, page: u64) -> Option<Perms> {
    vm.pages().get(&(BASE + page)).map(|r| r.attrs.perms)
}

#[test]
fn a_page_that_was_taken_back_is_missing_until_it_is_lent_again() {
    for policy in [PLAIN, FWB] {
        let vm = vm_with(policy, NONE);
        assert_eq!(touch(&vm, 7, Access::Write), FaultOutcome::Resolved);
        vm.mem.unshare_pages(A, 7, 1).unwrap();
        assert_eq!(vm.memory(BASE + 7), None);
        assert!(vm.memory(BASE + 6).is_some() && vm.memory(BASE + 8).is_some());
        for access in [Access::Read, Access::Write, Access::Fetch] {
            let missing = FaultOutcome::NoFrame(gfn(BASE + 7));
            assert_eq!(touch(&vm, 7, access), missing);
        }
        vm.mem.share_pages(A, 7, 1).unwrap();
        assert_eq!(touch(&vm, 7, Access::Read), FaultOutcome::Resolved);
        assert_eq!(vm.memory(BASE + 7), Some(Pa::new((FRAME + 7) << 12)));
        assert_eq!(vm.violations(), [""; 0]);
    }
}

/// The guest's caches are off, the host's are on, both ways.
#[test]
fn what_either_side_wrote_reaches_the_other() {
    let vm = vm();
    let page = Pa::new((FRAME + 7) << 12);
    let caches = &vm.machine.caches;
    assert_eq!(touch(&vm, 7, Access::Write), FaultOutcome::Resolved);
    caches.write(page, View::Uncached, 1);
    vm.mem.unshare_pages(A, 7, 1).unwrap();
    assert_eq!(caches.read(page, View::Cacheable), 1);
    caches.write(page, View::Cacheable, 2);
    vm.mem.share_pages(A, 7, 1).unwrap();
    assert_eq!(touch(&vm, 7, Access::Read), FaultOutcome::Resolved);
    assert_eq!(caches.read(page, View::Uncached), 2);
}

#[test]
fn a_page_is_taken_back_once_and_lent_again_once() {
    let vm = vm();
    assert_eq!(vm.mem.share_pages(A, 7, 1), Err(Error::Shared(7)));
    vm.mem.unshare_pages(A, 7, 2).unwrap();
    assert_eq!(vm.mem.unshare_pages(A, 6, 2), Err(Error::Unshared(7)));
    assert_eq!(touch(&vm, 6, Access::Read), FaultOutcome::Resolved);
    assert_eq!(vm.mem.share_pages(A, 7, 3), Err(Error::Shared(9)));
    vm.mem.share_pages(A, 8, 1).unwrap();
    assert_eq!(vm.mem.share_pages(A, 7, 2), Err(Error::Shared(8)));
    assert_eq!(Error::Unshared(7).kind(), ErrorKind::Exists);
    assert_eq!(Error::Shared(7).kind(), ErrorKind::Invalid);
}

#[test]
fn pages_beyond_the_slot_none_and_too_many_are_refused() {
    let vm = vm();
    let wrong = [
        (0, 0),
        (PAGES, 1),
        (PAGES - 1, 2),
        (u64::MAX, 1),
        (0, MAX_PAGES + 1),
        (1, u64::MAX),
    ];
    for (base, npages) in wrong {
        let refused = Error::BadRange { base, npages };
        assert_eq!(vm.mem.unshare_pages(A, base, npages), Err(refused));
        assert_eq!(vm.mem.share_pages(A, base, npages), Err(refused));
        assert_eq!(clear(&vm, base, npages), Err(refused));
    }
    let beyond = Error::BadRange {
        base: PAGES,
        npages: 1,
    };
    assert_eq!(vm.mem.relax_page(A, PAGES, Perms::RW), Err(beyond));
    vm.mem
        .unshare_pages(A, PAGES - MAX_PAGES, MAX_PAGES)
        .unwrap();
    let none = Error::NoSuchSlot(NONE_SUCH);
    assert_eq!(vm.mem.unshare_pages(NONE_SUCH, 0, 1), Err(none));
    assert_eq!(vm.mem.share_pages(NONE_SUCH, 0, 1), Err(none));
    assert_eq!(vm.mem.age_pages(NONE_SUCH, 0, 1, Aging::Test), Err(none));
    assert_eq!(vm.mem.relax_page(NONE_SUCH, 0, Perms::READ), Err(none));
}

#[test]
fn a_locked_slot_refuses_all_but_a_look() {
    let vm = vm();
    vm.mem.lock_slot(&LockRequest::new(A, RW)).unwrap();
    drop(vm.mem.enter().unwrap());
    let locked = Error::Locked(A);
    assert_eq!(vm.mem.unshare_pages(A, 7, 1), Err(locked));
    assert_eq!(vm.mem.share_pages(A, 7, 1), Err(locked));
    assert_eq!(clear(&vm, 7, 1), Err(locked));
    assert_eq!(vm.mem.relax_page(A, 7, Perms::EXEC), Err(locked));
    assert_eq!(young(&vm, 0, MAX_PAGES), MAX_PAGES);
}

#[test]
fn a_slot_with_a_page_missing_is_not_locked() {
    let vm = vm();
    vm.mem.unshare_pages(A, 7, 1).unwrap();
    let lock = vm.mem.lock_slot(&LockRequest::new(A, R));
    assert_eq!(lock, Err(Error::PinFailed(7)));
    vm.mem.share_pages(A, 7, 1).unwrap();
    vm.mem.lock_slot(&LockRequest::new(A, R)).unwrap();
}

#[test]
fn pages_of_a_protected_vm_are_not_the_hosts_to_take_or_look_at() {
    let vm = kit::vm_of_kind(VmKind::Protected);
    let refused = Error::NotTheHosts;
    assert_eq!(vm.mem.unshare_pages(A, 0, 1), Err(refused));
    assert_eq!(vm.mem.share_pages(A, 0, 1), Err(refused));
    for aging in [Aging::Test, Aging::Clear] {
        assert_eq!(vm.mem.age_pages(A, 0, 1, aging), Err(refused));
    }
    assert_eq!(vm.mem.relax_page(A, 0, Perms::READ), Err(refused));
    assert_eq!(refused.kind(), ErrorKind::NotPermitted);
}

#[test]
fn neither_a_reset_nor_a_log_brings_a_page_back() {
    let vm = vm();
    vm.mem.unshare_pages(A, 7, 1).unwrap();
    vm.mem.reset().unwrap();
    let missing = FaultOutcome::NoFrame(gfn(BASE + 7));
    assert_eq!(touch(&vm, 7, Access::Read), missing);
    vm.mem.set_slot_flags(A, LOG).unwrap();
    assert_eq!(touch(&vm, 7, Access::Read), missing);
    assert_eq!(touch(&vm, 8, Access::Write), FaultOutcome::Resolved);
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(1 << 8));
}

#[test]
fn a_slot_with_pages_taken_back_does_not_move() {
    let vm = vm();
    vm.mem.unshare_pages(A, 7, 2).unwrap();
    vm.mem.share_pages(A, 8, 1).unwrap();
    let refused = vm.mem.move_slot(A, gfn(BASE + PAGES));
    assert_eq!(refused, Err(Error::SomeUnshared(A)));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Exists);
    let missing = FaultOutcome::NoFrame(gfn(BASE + 7));
    assert_eq!(touch(&vm, 7, Access::Read), missing, "nothing has changed");
    vm.mem.share_pages(A, 7, 1).unwrap();
    vm.mem.move_slot(A, gfn(BASE + PAGES)).unwrap();
    assert_eq!(touch(&vm, PAGES + 7, Access::Read), FaultOutcome::Resolved);
}

#[test]
fn unmapping_for_the_host_does_not_give_back_what_it_has_taken() {
    let vm = vm();
    vm.mem.unshare_pages(A, 7, 1).unwrap();
    let range = GfnRange::from_base(gfn(BASE), PAGES).unwrap();
    let refused = vm.mem.host_unmap(range);
    assert_eq!(refused, Err(Error::SomeUnshared(A)));
    let missing = FaultOutcome::NoFrame(gfn(BASE + 7));
    assert_eq!(touch(&vm, 7, Access::Read), missing);
    assert_eq!(touch(&vm, 8, Access::Read), FaultOutcome::Resolved);
}

#[test]
fn a_new_slot_knows_nothing_of_what_was_taken_before() {
    let vm = vm();
    vm.mem.unshare_pages(A, 7, 1).unwrap();
    vm.mem.delete_slot(A).unwrap();
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    assert_eq!(touch(&vm, 7, Access::Read), FaultOutcome::Resolved);
}

#[test]
fn taking_a_page_of_a_block_takes_a_table_or_changes_nothing() {
    let vm = vm_with(FWB, NONE);
    assert_eq!(touch(&vm, 0, Access::Read), FaultOutcome::Resolved);
    vm.machine.fake.allow_allocations(Some(0));
    let refused = vm.mem.unshare_pages(A, 7, 1);
    assert_eq!(refused, Err(Error::NeedTables(1)));
    assert!(vm.memory(BASE + 7).is_some());
    vm.machine.fake.allow_allocations(None);
    vm.mem.unshare_pages(A, 7, 1).unwrap();
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn a_page_is_young_after_its_use_and_not_before() {
    let vm = vm_with(PLAIN, LOG);
    assert_eq!(young(&vm, 0, MAX_PAGES), 0);
    for page in [3, 4] {
        assert_eq!(touch(&vm, page, Access::Read), FaultOutcome::Resolved);
    }
    assert_eq!(clear(&vm, 0, MAX_PAGES), Ok(2));
    assert_eq!(clear(&vm, 0, MAX_PAGES), Ok(0));
    let used = vm.fault(BASE + 4, Access::Read, FaultKind::AccessFlag, &());
    assert_eq!(used, Ok(FaultOutcome::Resolved));
    assert_eq!([3, 4].map(|page| young(&vm, page, 1)), [0, 1]);
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn a_block_counts_with_the_pages_asked_for_and_ages_as_a_whole() {
    let vm = vm_with(FWB, NONE);
    assert_eq!(touch(&vm, 0, Access::Read), FaultOutcome::Resolved);
    assert_eq!(young(&vm, 500, 24), 12);
    assert_eq!(clear(&vm, 7, 1), Ok(1));
    assert_eq!(young(&vm, 0, MAX_PAGES), 0);
}

#[test]
fn a_read_only_page_of_a_log_becomes_writable_and_dirty() {
    let vm = vm_with(PLAIN, LOG);
    assert_eq!(touch(&vm, 5, Access::Read), FaultOutcome::Resolved);
    assert_eq!(perms(&vm, 5), Some(Perms::READ));
    assert_eq!(vm.mem.relax_page(A, 5, Perms::RW), Ok(()));
    assert_eq!(perms(&vm, 5), Some(Perms::RW));
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(1 << 5));
    assert_eq!(perms(&vm, 5), Some(Perms::READ));
    assert_eq!(vm.mem.relax_page(A, 5, Perms::EXEC), Ok(()));
    assert_eq!(perms(&vm, 5), Some(Perms::READ | Perms::EXEC));
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(0));
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn relaxing_nothing_makes_a_page_young() {
    let vm = vm_with(PLAIN, LOG);
    assert_eq!(touch(&vm, 5, Access::Read), FaultOutcome::Resolved);
    assert_eq!(clear(&vm, 5, 1), Ok(1));
    assert_eq!(vm.mem.relax_page(A, 5, Perms::empty()), Ok(()));
    assert_eq!(young(&vm, 5, 1), 1);
    assert_eq!(perms(&vm, 5), Some(Perms::READ));
}

#[test]
fn what_a_slot_forbids_is_not_relaxed() {
    let vm = vm_with(PLAIN, RO);
    assert_eq!(touch(&vm, 5, Access::Read), FaultOutcome::Resolved);
    let refused = Error::PermsRefused(A);
    assert_eq!(vm.mem.relax_page(A, 5, Perms::RW), Err(refused));
    assert_eq!(refused.kind(), ErrorKind::NotPermitted);
    let device = Memslot::new(NONE_SUCH, gfn(0x10), 4, 0x900, NONE, SlotKind::Mmio);
    vm.mem.create_slot(device.unwrap()).unwrap();
    let fetch = vm.mem.relax_page(NONE_SUCH, 0, Perms::EXEC);
    assert_eq!(fetch, Err(Error::PermsRefused(NONE_SUCH)));
    let nothing = vm.mem.relax_page(NONE_SUCH, 0, Perms::RW);
    assert_eq!(nothing, Err(Error::NoLeaf(0)));
}

#[test]
fn a_page_without_a_leaf_is_not_relaxed() {
    let vm = vm_with(PLAIN, LOG);
    assert_eq!(vm.mem.relax_page(A, 5, Perms::RW), Err(Error::NoLeaf(5)));
    vm.mem.unshare_pages(A, 5, 1).unwrap();
    assert_eq!(vm.mem.relax_page(A, 5, Perms::RW), Err(Error::NoLeaf(5)));
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(0));
    assert_eq!(Error::NoLeaf(5).kind(), ErrorKind::Invalid);
}
