//! What observers see: the classic bug of early maintenance, and that deferral ends it.

use crate::kit::{A, A_BASE, A_FRAME, A_PAGES, FLAG, FWB, NONE, PLAIN, RW, Vm, pages, vm, vm_with};
use memslot::arm::VcpuCaches;
use memslot::edge::Dma::NonSnooping;
use memslot::fault::Access;
use memslot::policy::ArmPolicy;
use memslot::steps::Progress;
use memslot::testing::{Stage1, View, guest_view};
use stage2::{CacheMaintenance, Pa, PaRange};

/// Memory of the first line of slot A.
const LINE: Pa = Pa::new(A_FRAME << 12);

fn all_frames() -> PaRange {
    PaRange::new(LINE, 16 << 12).unwrap()
}

/// How the guest sees page A_BASE with this stage 1.
fn view(vm: &Vm<ArmPolicy>, stage1: Stage1) -> View {
    let leaf = vm.leaf(A_BASE).expect("mapped");
    guest_view(stage1, leaf.mem, leaf.combine)
}

/// A guest with its MMU off reads.
fn guest_reads(vm: &Vm<ArmPolicy>) -> u64 {
    vm.caches.read(LINE, view(vm, Stage1::Device))
}

#[test]
fn the_classic_bug_maintenance_at_lock_time_hides_a_later_host_write() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    // What a hypervisor without deferral does: maintenance belongs to the lock.
    vm.caches.clean_invalidate_data(all_frames());
    vm.host_writes(A_FRAME, 7);
    assert_eq!(guest_reads(&vm), 0, "the guest misses the write");
}

#[test]
fn deferred_maintenance_shows_a_write_between_lock_and_run_to_an_mmu_off_guest() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.host_writes(A_FRAME, 7);
    vm.run();
    assert_eq!(guest_reads(&vm), 7);
}

#[test]
fn forced_write_back_shows_it_without_any_maintenance() {
    let vm = vm_with(FWB, NONE);
    vm.lock(A, RW).unwrap();
    vm.host_writes(A_FRAME, 7);
    vm.run();
    assert_eq!(guest_reads(&vm), 7);
    assert_eq!(vm.data_lines(), 0);
}

#[test]
fn a_flagged_slot_needs_maintenance_even_with_forced_write_back() {
    let vm = vm_with(FWB, FLAG);
    vm.lock(A, RW).unwrap();
    vm.host_writes(A_FRAME, 7);
    vm.run();
    assert_eq!(guest_reads(&vm), 7);
}

#[test]
fn a_write_between_reset_and_run_is_seen() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.mem.reset().unwrap();
    vm.host_writes(A_FRAME, 9);
    assert_eq!(guest_reads(&vm), 0);
    vm.run();
    assert_eq!(guest_reads(&vm), 9);
}

#[test]
fn a_write_between_an_edge_and_the_next_run_is_seen() {
    let vm = vm_with(FWB, NONE);
    vm.lock(A, RW).unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    vm.host_writes(A_FRAME, 5);
    vm.run();
    assert_eq!(guest_reads(&vm), 5);
}

#[test]
fn a_device_that_comes_before_the_first_run_sees_what_the_host_wrote() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.host_writes(A_FRAME, 3);
    vm.mem.register_device(NonSnooping).unwrap();
    assert_eq!(vm.caches.read(LINE, View::Uncached), 3);
}

#[test]
fn a_page_faulted_in_shows_what_the_host_wrote() {
    let vm = vm();
    vm.host_writes(A_FRAME, 4);
    vm.touch(A_BASE, Access::Read);
    assert_eq!(guest_reads(&vm), 4);
}

#[test]
fn force_to_honour_a_device_sees_what_the_guest_wrote_before() {
    for locked in [false, true] {
        let vm = vm_with(FWB, NONE);
        if locked {
            vm.lock(A, RW).unwrap();
        }
        vm.touch_if_needed(locked);
        // The guest believes this page to be non-cacheable; force write-back overrides it.
        assert_eq!(view(&vm, Stage1::NonCacheable), View::Cacheable);
        vm.caches.write(LINE, View::Cacheable, 6);
        vm.mem.register_device(NonSnooping).unwrap();
        assert_eq!(vm.caches.read(LINE, View::Uncached), 6, "locked: {locked}");
        vm.touch_if_needed(locked);
        assert_eq!(view(&vm, Stage1::NonCacheable), View::Uncached);
    }
}

#[test]
fn honour_to_force_the_guest_sees_what_the_device_wrote() {
    for locked in [false, true] {
        let vm = vm_with(FWB, NONE);
        vm.mem.register_device(NonSnooping).unwrap();
        if locked {
            vm.lock(A, RW).unwrap();
            vm.run();
        }
        vm.touch_if_needed(locked);
        vm.caches.write(LINE, View::Uncached, 8);
        // A CPU fetches the old line through the host's alias on its own.
        vm.caches.write(LINE, View::Uncached, 7);
        vm.caches.speculate(LINE);
        vm.caches.write(LINE, View::Uncached, 8);
        vm.mem.unregister_device(NonSnooping).unwrap();
        vm.touch_if_needed(locked);
        assert_eq!(guest_reads(&vm), 8, "locked: {locked}");
    }
}

#[test]
fn no_dirty_line_survives_an_edge_to_overwrite_the_device() {
    let vm = vm_with(FWB, NONE);
    vm.touch(A_BASE, Access::Write);
    vm.caches.write(LINE, View::Cacheable, 1);
    vm.mem.register_device(NonSnooping).unwrap();
    vm.caches.write(LINE, View::Uncached, 2);
    vm.caches.evict(LINE);
    assert_eq!(vm.caches.read(LINE, View::Uncached), 2);
}

#[test]
fn reclaim_gives_the_host_what_the_guest_wrote() {
    let vm = vm();
    vm.touch(A_BASE, Access::Write);
    vm.caches.speculate(LINE);
    vm.caches.write(LINE, view(&vm, Stage1::NonCacheable), 11);
    assert_eq!(vm.caches.read(LINE, View::Cacheable), 0);
    vm.mem.host_unmap(pages(A_BASE, 8)).unwrap();
    assert_eq!(vm.caches.read(LINE, View::Cacheable), 11);
}

#[test]
fn reclaim_after_force_needs_no_maintenance() {
    let vm = vm_with(FWB, NONE);
    vm.touch(A_BASE, Access::Write);
    vm.caches.write(LINE, view(&vm, Stage1::NonCacheable), 11);
    vm.mem.host_unmap(pages(A_BASE, 8)).unwrap();
    assert_eq!(vm.caches.read(LINE, View::Cacheable), 11);
    assert_eq!(vm.data_lines(), 0);
}

#[test]
fn reclaim_then_next_owner_sees_the_zeroes_not_the_old_data() {
    let vm = vm();
    vm.touch(A_BASE, Access::Write);
    vm.caches.write(LINE, View::Uncached, 0x5ec);
    vm.mem.host_unmap(pages(A_BASE, 8)).unwrap();
    vm.host_writes(A_FRAME, 0);
    vm.touch(A_BASE, Access::Read);
    assert_eq!(guest_reads(&vm), 0);
}

#[test]
fn unlock_before_run_still_shows_the_hosts_write() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    vm.host_writes(A_FRAME, 2);
    vm.mem.unlock_slot(A).unwrap();
    vm.run();
    vm.touch(A_BASE, Access::Read);
    assert_eq!(guest_reads(&vm), 2);
}

#[test]
fn a_fetch_sees_code_that_the_host_wrote() {
    let vm = vm();
    assert_eq!(vm.caches.fetch(LINE), 0);
    vm.host_writes(A_FRAME, 0xc0de);
    vm.touch(A_BASE, Access::Fetch);
    assert_eq!(vm.caches.fetch(LINE), 0xc0de);
}

#[test]
fn a_fetch_from_a_locked_page_sees_code_written_before_the_run() {
    for policy in [PLAIN, FWB] {
        let vm = vm_with(policy, NONE);
        vm.lock(A, RW).unwrap();
        assert_eq!(vm.caches.fetch(LINE), 0);
        vm.host_writes(A_FRAME, 0xc0de);
        vm.run();
        vm.relax(A_BASE, Access::Fetch);
        assert_eq!(vm.caches.fetch(LINE), 0xc0de);
    }
}

#[test]
fn a_fetch_after_reset_sees_the_new_code() {
    for policy in [PLAIN, FWB] {
        let vm = vm_with(policy, NONE);
        vm.lock(A, RW).unwrap();
        vm.run();
        vm.relax(A_BASE, Access::Fetch);
        assert_eq!(vm.caches.fetch(LINE), 0);
        vm.mem.reset().unwrap();
        vm.host_writes(A_FRAME, 0xc0de);
        vm.run();
        assert_eq!(vm.caches.fetch(LINE), 0xc0de);
    }
}

#[test]
fn set_way_flush_moves_data_between_the_guests_cache_and_memory() {
    let vm = vm();
    vm.touch(A_BASE, Access::Write);
    vm.caches.write(LINE, view(&vm, Stage1::WriteBack), 21);
    assert_eq!(guest_reads(&vm), 0);
    vm.mem.flush_all();
    assert_eq!(guest_reads(&vm), 21);
}

#[test]
fn a_guest_that_turns_its_caches_on_or_off_sees_its_own_data() {
    const ON: u64 = 0b101;
    let vm = vm();
    let mut caches = VcpuCaches::default();
    let flush = |caches: &mut VcpuCaches| {
        assert_eq!(
            vm.mem.flush_in_steps(&mut caches.owed, || true),
            Progress::Done
        );
    };
    vm.touch(A_BASE, Access::Write);
    // Caches off: it writes memory; a CPU has speculatively fetched the old line.
    vm.caches.speculate(LINE);
    vm.caches.write(LINE, View::Uncached, 31);
    caches.sctlr_written(0, ON);
    flush(&mut caches);
    assert_eq!(vm.caches.read(LINE, View::Cacheable), 31);
    // Caches on: it writes the cache, then cleans it by set and way and turns it off.
    vm.caches.write(LINE, View::Cacheable, 32);
    caches.set_way();
    flush(&mut caches);
    assert_eq!(vm.caches.read(LINE, View::Uncached), 32);
    vm.caches.write(LINE, View::Cacheable, 33);
    caches.sctlr_written(ON, 0);
    flush(&mut caches);
    assert_eq!(guest_reads(&vm), 33);
    let lines = vm.data_lines();
    caches.set_way();
    flush(&mut caches);
    assert_eq!(vm.data_lines(), lines);
}

#[test]
fn a_flush_of_everything_skips_forced_leaves() {
    let vm = vm_with(FWB, NONE);
    for page in 0..A_PAGES {
        vm.touch(A_BASE + page, Access::Write);
    }
    vm.mem.flush_all();
    assert_eq!(vm.data_lines(), 0);
}

impl Vm<ArmPolicy> {
    fn touch_if_needed(&self, locked: bool) {
        if !locked {
            self.touch(A_BASE, Access::Write);
        }
    }
}
