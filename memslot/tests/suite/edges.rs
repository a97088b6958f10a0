//! Devices, importers, and the edges of the non-coherent count.

use crate::kit::{
    A, A_BASE, A_FRAME, A_PAGES, B, B_BASE, B_FRAME, FLAG, FWB, NONE, PLAIN, R, RW, Vm, cleans,
    gfn, slot, vm, vm_with,
};
use memslot::edge::Dma::{NonSnooping, Snooping};
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::mtrr::Msr;
use memslot::noncoherent::Edge;
use memslot::pending::Work;
use memslot::policy::{ArmPolicy, CdQuirk, EptPolicy, VcpuTypes};
use memslot::slot::{Memslot, SlotId, SlotKind};
use memslot::testing::View;
use stage2::{Combine, Ipa, MemType, Perms};

const FORCED: Option<(MemType, Combine)> = Some((MemType::WriteBack, Combine::ForceStage2));
const HONOURED: Option<(MemType, Combine)> = Some((MemType::WriteBack, Combine::HonourGuest));

fn mem_type(vm: &Vm<ArmPolicy>, page: u64) -> Option<(MemType, Combine)> {
    vm.leaf(page).map(|l| (l.mem, l.combine))
}

fn fwb() -> Vm<ArmPolicy> {
    vm_with(FWB, NONE)
}

#[test]
fn count_0_to_1_removes_leaves_and_faults_honour_the_guest() {
    let vm = fwb();
    vm.touch(A_BASE, Access::Read);
    assert_eq!(mem_type(&vm, A_BASE), FORCED);
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
    assert_eq!(vm.leaves().len(), 0);
    vm.touch(A_BASE, Access::Read);
    assert_eq!(mem_type(&vm, A_BASE), HONOURED);
}

#[test]
fn every_edge_that_removes_leaves_is_counted() {
    let vm = fwb();
    vm.mem.register_device(NonSnooping).unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    assert_eq!(vm.mem.counters().edges, 1);
    vm.mem.unregister_device(NonSnooping).unwrap();
    vm.mem.unregister_device(NonSnooping).unwrap();
    assert_eq!(vm.mem.counters().edges, 2);
}

#[test]
fn count_1_to_2_and_back_touches_nothing() {
    let vm = fwb();
    vm.mem.register_device(NonSnooping).unwrap();
    vm.touch(A_BASE, Access::Read);
    let before = vm.snapshot();
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::None));
    assert_eq!(vm.mem.unregister_device(NonSnooping), Ok(Edge::None));
    assert_eq!(vm.snapshot(), before);
}

#[test]
fn count_1_to_0_removes_leaves_and_faults_force_write_back() {
    let vm = fwb();
    vm.mem.register_device(NonSnooping).unwrap();
    vm.touch(A_BASE, Access::Read);
    assert_eq!(vm.mem.unregister_device(NonSnooping), Ok(Edge::Stopped));
    assert_eq!(vm.leaves().len(), 0);
    vm.touch(A_BASE, Access::Read);
    assert_eq!(mem_type(&vm, A_BASE), FORCED);
}

#[test]
fn count_below_zero_is_refused_and_leaves_zero() {
    let vm = fwb();
    assert_eq!(
        vm.mem.unregister_device(NonSnooping),
        Err(Error::CountUnbalanced)
    );
    assert_eq!(
        vm.mem.unregister_device(Snooping),
        Err(Error::CountUnbalanced)
    );
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
}

#[test]
fn without_forced_write_back_an_edge_removes_nothing() {
    let vm = vm();
    vm.touch(A_BASE, Access::Read);
    let before = vm.snapshot();
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
    assert_eq!(vm.mem.unregister_device(NonSnooping), Ok(Edge::Stopped));
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.mem.counters().edges, 0);
}

#[test]
fn flagged_slots_and_devices_survive_edges() {
    let vm = vm_with(FWB, FLAG);
    let device = Memslot::new(SlotId(4), gfn(0x500), 4, 0xf000, NONE, SlotKind::Mmio).unwrap();
    vm.mem.create_slot(device).unwrap();
    vm.touch(A_BASE, Access::Read);
    vm.touch(0x500, Access::Read);
    let before = vm.snapshot();
    vm.mem.register_device(NonSnooping).unwrap();
    vm.mem.unregister_device(NonSnooping).unwrap();
    assert_eq!(vm.snapshot(), before);
}

#[test]
fn an_edge_cleans_every_mapped_page_once() {
    let vm = fwb();
    for page in 0..8 {
        vm.touch(A_BASE + page, Access::Write);
    }
    assert_eq!(vm.data_lines(), 0);
    vm.mem.register_device(NonSnooping).unwrap();
    assert_eq!(vm.data_lines(), 8 * 64);
}

#[test]
fn an_edge_rewrites_locked_leaves_in_place_and_keeps_permissions() {
    let vm = fwb();
    vm.lock(A, RW).unwrap();
    vm.run();
    vm.relax(A_BASE + 1, Access::Fetch);
    vm.mem.register_device(NonSnooping).unwrap();
    for page in 0..A_PAGES {
        assert_eq!(mem_type(&vm, A_BASE + page), HONOURED);
    }
    assert_eq!(vm.perms(A_BASE), Some(Perms::RW));
    assert_eq!(vm.perms(A_BASE + 1), Some(Perms::RWX));
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    vm.run();
    vm.mem.unregister_device(NonSnooping).unwrap();
    assert_eq!(mem_type(&vm, A_BASE + 7), FORCED);
    assert_eq!(vm.leaves().len(), 8);
    assert_eq!(vm.mem.pending(), Work::empty());
}

#[test]
fn an_edge_with_locked_slots_is_refused_while_a_vcpu_runs() {
    let vm = fwb();
    vm.lock(A, RW).unwrap();
    let before = vm.snapshot();
    let inside = vm.mem.enter().unwrap();
    assert_eq!(vm.mem.register_device(NonSnooping), Err(Error::VcpuRunning));
    assert_eq!(vm.snapshot(), before);
    drop(inside);
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
    let inside = vm.mem.enter().unwrap();
    assert_eq!(
        vm.mem.unregister_device(NonSnooping),
        Err(Error::VcpuRunning)
    );
    assert_eq!(mem_type(&vm, A_BASE), HONOURED);
    // A second device is no edge, so nothing must be rewritten.
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::None));
    drop(inside);
}

#[test]
fn an_edge_without_locked_slots_does_not_care_for_running_vcpus() {
    let vm = fwb();
    let inside = vm.mem.enter().unwrap();
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
    drop(inside);
}

#[test]
fn an_edge_with_locked_slots_is_refused_while_other_devices_are_in() {
    let vm = fwb();
    vm.lock(A, RW).unwrap();
    vm.mem.register_device(Snooping).unwrap();
    let before = vm.snapshot();
    assert_eq!(vm.mem.register_device(NonSnooping), Err(Error::InUse(1)));
    assert_eq!(vm.snapshot(), before);
    vm.mem.unregister_device(Snooping).unwrap();
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
}

#[test]
fn a_lock_taken_while_a_device_is_in_honours_the_guest() {
    let vm = fwb();
    vm.mem.register_device(NonSnooping).unwrap();
    vm.lock(A, RW).unwrap();
    assert_eq!(mem_type(&vm, A_BASE), HONOURED);
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
}

#[test]
fn any_device_has_pending_pages_cleaned_first() {
    for dma in [Snooping, NonSnooping] {
        let vm = vm();
        vm.lock(A, RW).unwrap();
        vm.host_writes(A_FRAME, 7);
        vm.mem.register_device(dma).unwrap();
        assert_eq!(vm.data_lines(), A_PAGES * 64);
        let at = vm.memory(A_BASE);
        assert_eq!(vm.caches.read(at, View::Uncached), 7);
    }
}

#[test]
fn a_host_write_between_a_device_and_the_first_run_is_seen() {
    for dma in [Snooping, NonSnooping] {
        let vm = vm();
        vm.lock(A, RW).unwrap();
        vm.mem.register_device(dma).unwrap();
        vm.host_writes(A_FRAME, 7);
        assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
        vm.run();
        let at = vm.memory(A_BASE);
        assert_eq!(vm.caches.read(at, View::Uncached), 7);
        assert_eq!(vm.mem.pending(), Work::empty());
    }
}

#[test]
fn a_device_needs_no_instruction_maintenance_and_leaves_it_to_the_run() {
    let vm = fwb();
    vm.lock(A, R).unwrap();
    vm.mem.reset().unwrap();
    vm.mem.register_device(Snooping).unwrap();
    assert_eq!(vm.mem.pending(), Work::INVAL_ICACHE);
    assert_eq!(vm.mem.counters().pending_runs, 0);
}

type Admit = fn(&Vm<ArmPolicy>) -> Result<(), Error>;

/// Its user is in already, and reads what was in memory before the host wrote.
#[test]
fn a_slot_locked_beside_a_device_or_importer_is_cleaned_before_it_is_mapped() {
    let cases: [Admit; 3] = [
        |vm| vm.mem.register_device(Snooping).map(|_| ()),
        |vm| vm.mem.register_device(NonSnooping).map(|_| ()),
        |vm| vm.mem.attach_importer(|_| Ok(())),
    ];
    for admit in cases {
        let vm = vm_with(PLAIN, NONE);
        admit(&vm).unwrap();
        vm.host_writes(A_FRAME, 7);
        vm.lock(A, RW).unwrap();
        let at = vm.memory(A_BASE);
        assert_eq!(vm.caches.read(at, View::Uncached), 7);
        // And again at the first run, for what the host writes until then.
        assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    }
}

#[test]
fn an_importer_has_pending_pages_cleaned_first() {
    let vm = vm();
    vm.lock(A, RW).unwrap();
    let lines = vm.mem.attach_importer(|_| Ok(vm.data_lines()));
    assert_eq!(lines, Ok(A_PAGES * 64));
    vm.host_writes(A_FRAME, 7);
    vm.run();
    let at = vm.memory(A_BASE);
    assert_eq!(vm.caches.read(at, View::Uncached), 7);
}

#[test]
fn an_importer_is_refused_while_anything_is_noncoherent() {
    let flagged = vm_with(MTRR, FLAG);
    assert_eq!(
        flagged.mem.attach_importer(|_| Ok(())),
        Err(Error::NonCoherent)
    );
    let counted = vm_with(MTRR, NONE);
    counted.mem.register_device(NonSnooping).unwrap();
    assert_eq!(
        counted.mem.attach_importer(|_| Ok(())),
        Err(Error::NonCoherent)
    );
}

#[test]
fn an_importer_keeps_noncoherent_devices_and_slots_out() {
    let vm = vm_with(MTRR, NONE);
    vm.mem.attach_importer(|_| Ok(())).unwrap();
    assert_eq!(vm.mem.register_device(NonSnooping), Err(Error::InUse(1)));
    let flagged = slot(B, B_BASE, 4, B_FRAME, FLAG);
    assert_eq!(vm.mem.create_slot(flagged), Err(Error::InUse(1)));
    assert_eq!(vm.mem.slot(B), None);
    vm.mem.detach_importer().unwrap();
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
    assert_eq!(vm.mem.create_slot(flagged), Ok(()));
    assert_eq!(vm.mem.detach_importer(), Err(Error::CountUnbalanced));
}

/// Nobody has to be asked on arm64: what is exported has its types already. Only an edge that would
/// change them is refused.
#[test]
fn on_arm_devices_that_do_not_snoop_go_with_an_importer_unless_types_would_change() {
    for (policy, edge) in [(PLAIN, Ok(Edge::Started)), (FWB, Err(Error::InUse(1)))] {
        let vm = vm_with(policy, NONE);
        vm.mem.attach_importer(|_| Ok(())).unwrap();
        assert_eq!(vm.mem.register_device(NonSnooping), edge);
        let flagged = slot(B, B_BASE, 4, B_FRAME, FLAG);
        assert_eq!(vm.mem.create_slot(flagged), Ok(()));
        vm.mem.detach_importer().unwrap();
    }
    let vm = vm_with(FWB, NONE);
    vm.mem.register_device(NonSnooping).unwrap();
    vm.mem.attach_importer(|_| Ok(())).unwrap();
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::None));
    vm.mem.unregister_device(NonSnooping).unwrap();
    let last = vm.mem.unregister_device(NonSnooping);
    assert_eq!(last, Err(Error::InUse(1)));
    vm.mem.detach_importer().unwrap();
    assert_eq!(vm.mem.unregister_device(NonSnooping), Ok(Edge::Stopped));
}

#[test]
fn an_export_that_fails_counts_no_importer() {
    let vm = fwb();
    let failed = vm.mem.attach_importer::<()>(|_| Err(Error::OutOfMemory));
    assert_eq!(failed, Err(Error::OutOfMemory));
    assert_eq!(vm.mem.detach_importer(), Err(Error::CountUnbalanced));
}

const MTRR: EptPolicy = EptPolicy::guest_mtrr(CdQuirk::WriteBack);

fn x86_touch(vm: &Vm<EptPolicy>, page: u64, vcpu: &VcpuTypes) -> Option<(MemType, Combine)> {
    let ipa = Ipa::new(page << 12);
    let fault = Stage2Fault {
        ipa,
        access: Access::Read,
        kind: FaultKind::Translation,
    };
    assert_eq!(
        vm.mem.handle_fault(&fault, vcpu),
        Ok(FaultOutcome::Resolved)
    );
    vm.leaf(page).map(|l| (l.mem, l.combine))
}

#[test]
fn x86_edges_remove_leaves_and_do_no_maintenance() {
    let vm = vm_with(EptPolicy::TODAY, NONE);
    let vcpu = VcpuTypes::new(40, true);
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), FORCED);
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
    assert_eq!(vm.leaves().len(), 0);
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), HONOURED);
    assert_eq!(cleans(&vm), 0);
}

#[test]
fn x86_the_last_device_that_goes_removes_leaves_made_from_registers() {
    let vm = vm_with(MTRR, NONE);
    vm.mem.register_device(NonSnooping).unwrap();
    let vcpu = VcpuTypes::new(40, true);
    let uncached = Some((MemType::Uncached, Combine::HonourGuest));
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), uncached);
    assert_eq!(vm.mem.unregister_device(NonSnooping), Ok(Edge::Stopped));
    assert_eq!(vm.leaves().len(), 0);
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), FORCED);
}

#[test]
fn x86_with_registers_that_count_refuses_locks_and_edges_over_locks() {
    let vm = vm_with(MTRR, NONE);
    vm.lock(A, R).unwrap();
    assert_eq!(vm.mem.register_device(NonSnooping), Err(Error::NonCoherent));
    vm.mem.unlock_slot(A).unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    assert_eq!(vm.lock(A, R), Err(Error::NonCoherent));
    assert_eq!((vm.pinned(), vm.charged()), (0, 0));
}

#[test]
fn x86_a_register_write_removes_leaves_of_its_span_only() {
    let vm = vm_with(MTRR, NONE);
    vm.add_b();
    vm.mem.register_device(NonSnooping).unwrap();
    let mut vcpu = VcpuTypes::new(40, true);
    vm.mem
        .write_memory_type_msr(&mut vcpu, Msr::DefaultType, 0x806, || ())
        .unwrap();
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), HONOURED);
    assert_eq!(x86_touch(&vm, B_BASE, &vcpu), HONOURED);
    // UC, 1 MiB at 1 MiB: frames 0x100 to 0x1ff.
    vm.mem
        .write_memory_type_msr(&mut vcpu, Msr::VariableBase(0), 0x10_0000, || ())
        .unwrap();
    vm.mem
        .write_memory_type_msr(&mut vcpu, Msr::VariableMask(0), 0xff_fff0_0800, || ())
        .unwrap();
    assert_eq!(
        vm.leaves().keys().copied().collect::<Vec<_>>(),
        [B_BASE << 12]
    );
    let uncached = Some((MemType::Uncached, Combine::HonourGuest));
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), uncached);
}

#[test]
fn x86_a_cd_toggle_removes_what_is_not_write_back() {
    let vm = vm_with(MTRR, NONE);
    vm.mem.register_device(NonSnooping).unwrap();
    let mut vcpu = VcpuTypes::new(40, true);
    vcpu.mtrrs.write(Msr::DefaultType, 0x804).unwrap();
    let write_through = Some((MemType::WriteThrough, Combine::HonourGuest));
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), write_through);
    vm.mem.write_cd(&mut vcpu, true, || ());
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), HONOURED);
    vm.mem.write_cd(&mut vcpu, false, || ());
    assert_eq!(x86_touch(&vm, A_BASE, &vcpu), write_through);
}

#[test]
fn x86_zaps_spare_flagged_and_locked_slots() {
    let vm = vm_with(MTRR, FLAG);
    vm.lock(A, R).unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    let mut vcpu = VcpuTypes::new(40, true);
    vm.mem
        .write_memory_type_msr(&mut vcpu, Msr::DefaultType, 0x806, || ())
        .unwrap();
    assert_eq!(vm.leaves().len(), 8);
    assert_eq!(vm.mem.counters().zap_passes, 1);
}

#[test]
fn x86_zaps_spare_flagged_slots_and_devices_that_are_mapped_on_demand() {
    let vm = vm_with(MTRR, FLAG);
    vm.add_b();
    let device = Memslot::new(SlotId(4), gfn(0x500), 4, 0xf000, NONE, SlotKind::Mmio);
    vm.mem.create_slot(device.unwrap()).unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    let mut vcpu = VcpuTypes::new(40, true);
    for page in [A_BASE, B_BASE, 0x500] {
        x86_touch(&vm, page, &vcpu);
    }
    vm.mem
        .write_memory_type_msr(&mut vcpu, Msr::DefaultType, 0x806, || ())
        .unwrap();
    let left: Vec<_> = vm.leaves().into_keys().collect();
    assert_eq!(left, [A_BASE << 12, 0x500 << 12]);
}

#[test]
fn x86_register_writes_and_toggles_zap_nothing_while_every_device_snoops() {
    let vm = vm_with(MTRR, NONE);
    let mut vcpu = VcpuTypes::new(40, true);
    x86_touch(&vm, A_BASE, &vcpu);
    vm.mem
        .write_memory_type_msr(&mut vcpu, Msr::DefaultType, 0x804, || ())
        .unwrap();
    vm.mem.write_cd(&mut vcpu, true, || ());
    assert_eq!(vm.leaves().len(), 1);
    assert_eq!(vm.mem.counters().zap_passes, 0);
}

#[test]
fn x86_a_vcpu_with_other_registers_replaces_the_leaf() {
    let vm = vm_with(MTRR, NONE);
    vm.mem.register_device(NonSnooping).unwrap();
    let mut other = VcpuTypes::new(40, true);
    other.mtrrs.write(Msr::DefaultType, 0x804).unwrap();
    x86_touch(&vm, A_BASE, &VcpuTypes::new(40, true));
    let ipa = Ipa::new(A_BASE << 12);
    let fault = Stage2Fault {
        ipa,
        access: Access::Read,
        kind: FaultKind::Permission,
    };
    assert_eq!(vm.mem.handle_fault(&fault, &other), Ok(FaultOutcome::Retry));
    let write_through = Some((MemType::WriteThrough, Combine::HonourGuest));
    assert_eq!(x86_touch(&vm, A_BASE, &other), write_through);
}

#[test]
fn an_importer_leaves_only_when_its_root_is_taken_back() {
    let vm = fwb();
    vm.mem.attach_importer(|_| Ok(())).unwrap();
    let failed = vm
        .mem
        .detach_importer_with::<()>(|_| Err(Error::OutOfMemory));
    assert_eq!(failed, Err(Error::OutOfMemory));
    assert_eq!(vm.mem.register_device(NonSnooping), Err(Error::InUse(1)));
    assert_eq!(vm.mem.detach_importer_with(|_| Ok(7)), Ok(7));
    assert_eq!(
        vm.mem.detach_importer_with(|_| Ok(7)),
        Err(Error::CountUnbalanced)
    );
    assert_eq!(vm.mem.register_device(NonSnooping), Ok(Edge::Started));
}
