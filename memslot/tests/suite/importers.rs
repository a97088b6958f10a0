//! Importers of a real table's root: admitted behind maintenance, told of every removal, gone
//! before the root goes.

use std::sync::{Arc, Mutex};

use crate::kit::{FWB, LOG, NONE, PLAIN, R, RW, gfn, pages, slot};
use crate::machine::{Real, arm};
use memslot::edge::Dma::{NonSnooping, Snooping};
use memslot::error::{Error, ErrorKind};
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::lock::LockRequest;
use memslot::pending::Work;
use memslot::policy::ArmPolicy;
use memslot::slot::SlotId;
use memslot::testing::View;
use stage2::testing::{Event, FakeMachine};
use stage2::{
    Aging, ArmStage2, ExportError, ExportedRoot, Importer, InvalidateListener, IpaRange, Level,
    Perms,
};

/// 16 pages at frame 0x4_0000, frames from 0x10_0000 on in runs of four.
const A: SlotId = SlotId(1);
const BASE: u64 = 0x4_0000;
const PAGES: u64 = 16;
const FRAME: u64 = 0x10_0000;

/// An IOMMU: caches what it walks, and drops what it is told to.
#[derive(Debug)]
struct Iommu {
    machine: Arc<FakeMachine>,
    told: Mutex<Vec<IpaRange>>,
}

impl InvalidateListener for Iommu {
    fn invalidate(&self, range: IpaRange) {
        self.machine.told(range);
        self.told.lock().unwrap().push(range);
    }
}

impl Iommu {
    /// Whether every page of the range was named since the last call.
    fn was_told(&self, start: u64, npages: u64) -> bool {
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        (start..start + npages).all(|page| told.iter().any(|r| r.contains(gfn(page).start())))
    }
}

type Vm = Real<ArmStage2, ArmPolicy>;

fn vm_of(policy: ArmPolicy) -> Vm {
    let vm = arm(policy, 4, PAGES);
    vm.mem
        .create_slot(slot(A, BASE, PAGES, FRAME, NONE))
        .unwrap();
    vm
}

/// An IOMMU of this machine, for the rest of the test's life.
fn iommu(vm: &Vm) -> &'static Iommu {
    Box::leak(Box::new(Iommu {
        machine: Arc::clone(&vm.machine.fake),
        told: Mutex::default(),
    }))
}

const fn importer(listener: &'static Iommu) -> Importer {
    Importer {
        listener,
        must_be_zero: 0,
        output_bits: 48,
        coarsest_leaf: Level::L1,
    }
}

/// Exports the root and registers one importer.
fn export(vm: &Vm) -> (&'static Iommu, ExportedRoot) {
    let listener = iommu(vm);
    let root = vm.mem.attach_importer(|table| {
        let root = table.export(0)?;
        vm.machine.fake.import();
        table.register(&root, importer(listener))?;
        Ok(root)
    });
    (listener, root.unwrap())
}

/// Takes the only importer away and ends the export.
fn unexport(vm: &Vm, listener: &Iommu, root: ExportedRoot) -> Result<(), Error> {
    vm.mem.detach_importer_with(|table| {
        table.unregister(listener)?;
        table.unexport(root).map_err(|(_, error)| error.into())
    })
}

fn touch(vm: &Vm, page: u64, access: Access) {
    let outcome = vm.fault(page, access, FaultKind::Translation, &());
    assert_eq!(outcome, Ok(FaultOutcome::Resolved));
}

#[test]
fn pending_pages_are_cleaned_before_the_root_is_exported() {
    let vm = vm_of(PLAIN);
    vm.lock(&LockRequest::new(A, RW)).unwrap();
    let at = vm.memory(BASE).unwrap();
    vm.machine.caches.write(at, View::Cacheable, 7);
    let (listener, root) = {
        let listener = iommu(&vm);
        let root = vm.mem.attach_importer(|table| {
            // The importer may walk from here on.
            assert_eq!(vm.machine.caches.read(at, View::Uncached), 7);
            assert_eq!(vm.machine.caches.traffic().data_lines, PAGES * 64);
            let root = table.export(0)?;
            table.register(&root, importer(listener))?;
            Ok(root)
        });
        (listener, root.unwrap())
    };
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    vm.machine.caches.write(at, View::Cacheable, 8);
    drop(vm.mem.enter().unwrap());
    assert_eq!(vm.machine.caches.read(at, View::Uncached), 8);
    assert_eq!(unexport(&vm, listener, root), Ok(()));
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn a_slot_locked_while_exported_is_cleaned_as_it_is_mapped() {
    let vm = vm_of(PLAIN);
    let (listener, root) = export(&vm);
    let at = stage2::Pa::new(FRAME << 12);
    vm.machine.caches.write(at, View::Cacheable, 7);
    // Not through `Real::lock`: no leaf may appear before its maintenance here.
    vm.mem.lock_slot(&LockRequest::new(A, RW)).unwrap();
    assert_eq!(vm.machine.caches.read(at, View::Uncached), 7);
    assert_eq!(vm.violations(), [""; 0]);
    assert_eq!(vm.mem.pending(), Work::FLUSH_DCACHE);
    unexport(&vm, listener, root).unwrap();
    assert_eq!(vm.violations(), [""; 0]);
}

/// Every way in which a leaf goes or loses a permission, and whether the importer hears of it.
#[test]
fn every_removal_reaches_the_importer() {
    type Removal = fn(&Vm);
    let removals: [(&str, Removal); 7] = [
        ("unshare", |vm| vm.mem.unshare_pages(A, 0, 1).unwrap()),
        ("unmap", |vm| vm.mem.host_unmap(pages(BASE, 1)).unwrap()),
        ("delete", |vm| _ = vm.mem.delete_slot(A).unwrap()),
        ("move", |vm| {
            vm.mem.move_slot(A, gfn(BASE + 0x1000)).unwrap()
        }),
        ("log", |vm| vm.mem.set_slot_flags(A, LOG).unwrap()),
        ("reset", |vm| vm.mem.reset().unwrap()),
        ("empty", |vm| vm.mem.empty().unwrap()),
    ];
    for (name, remove) in removals {
        let vm = vm_of(PLAIN);
        let (listener, root) = export(&vm);
        touch(&vm, BASE, Access::Write);
        assert!(
            !listener.was_told(BASE, 1),
            "{name}: a new leaf is no removal"
        );
        remove(&vm);
        assert_eq!(vm.runs(), [], "{name}");
        assert!(listener.was_told(BASE, 1), "{name}");
        unexport(&vm, listener, root).unwrap();
        assert_eq!(vm.violations(), [""; 0], "{name}");
    }
}

#[test]
fn a_page_of_the_log_that_becomes_read_only_is_told() {
    let vm = vm_of(PLAIN);
    vm.mem.set_slot_flags(A, LOG).unwrap();
    let (listener, root) = export(&vm);
    touch(&vm, BASE + 3, Access::Write);
    assert_eq!(vm.mem.take_dirty_word(A, 0), Ok(1 << 3));
    assert!(listener.was_told(BASE + 3, 1));
    assert_eq!(vm.runs()[0].attrs.perms, Perms::READ);
    unexport(&vm, listener, root).unwrap();
    assert_eq!(vm.violations(), [""; 0]);
}

/// Its access to an old leaf would fail.
#[test]
fn leaves_stay_young_for_an_importer() {
    let vm = vm_of(PLAIN);
    let (listener, root) = export(&vm);
    touch(&vm, BASE, Access::Write);
    let clear = || vm.mem.age_pages(A, 0, 1, Aging::Clear);
    assert_eq!(clear(), Err(Error::InUse(1)));
    assert_eq!(vm.mem.age_pages(A, 0, 1, Aging::Test), Ok(1));
    unexport(&vm, listener, root).unwrap();
    assert_eq!(clear(), Ok(1));
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn an_importer_is_told_after_the_cpus_and_before_the_data_is_cleaned() {
    let vm = vm_of(PLAIN);
    let (listener, root) = export(&vm);
    touch(&vm, BASE, Access::Write);
    drop(vm.machine.fake.take_events());
    vm.mem.host_unmap(pages(BASE, 1)).unwrap();
    let events = vm.machine.fake.take_events();
    let at = |wanted: fn(&Event) -> bool| events.iter().position(wanted).unwrap();
    let cpus = at(|e| matches!(e, Event::TlbRange(..) | Event::TlbAll));
    let importer = at(|e| matches!(e, Event::Notify(_)));
    let cleaned = at(|e| matches!(e, Event::Data(_)));
    assert!(cpus < importer && importer < cleaned, "{events:?}");
    unexport(&vm, listener, root).unwrap();
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn the_leaves_of_a_locked_slot_stay_for_the_importer() {
    let vm = vm_of(PLAIN);
    vm.lock(&LockRequest::new(A, RW)).unwrap();
    let (listener, root) = export(&vm);
    drop(vm.mem.enter().unwrap());
    assert_eq!(vm.mem.host_unmap(pages(BASE, 1)), Err(Error::Locked(A)));
    vm.mem.reset().unwrap();
    drop(vm.mem.enter().unwrap());
    assert!(vm.is_full(pages(BASE, PAGES)));
    assert!(listener.told.lock().unwrap().is_empty());
    // Unlocked after a run the leaves stay, unlocked before it they go, and it is told.
    vm.mem.unlock_slot(A).unwrap();
    assert!(vm.is_full(pages(BASE, PAGES)));
    vm.mem.lock_slot(&LockRequest::new(A, R)).unwrap();
    listener.told.lock().unwrap().clear();
    vm.mem.unlock_slot(A).unwrap();
    assert_eq!(vm.runs(), []);
    assert!(listener.was_told(BASE, PAGES));
    unexport(&vm, listener, root).unwrap();
    assert_eq!(vm.violations(), [""; 0]);
}

#[test]
fn coherent_devices_only_beside_an_importer() {
    let vm = vm_of(FWB);
    let (listener, root) = export(&vm);
    assert_eq!(vm.mem.register_device(NonSnooping), Err(Error::InUse(1)));
    vm.mem.register_device(Snooping).unwrap();
    unexport(&vm, listener, root).unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
}

#[test]
fn a_second_export_is_busy_and_counts_nobody() {
    let vm = vm_of(FWB);
    let (listener, root) = export(&vm);
    let again = vm.mem.attach_importer(|table| Ok(table.export(0)?));
    assert_eq!(again, Err(Error::Export(ExportError::Busy)));
    assert_eq!(Error::Export(ExportError::Busy).kind(), ErrorKind::Busy);
    unexport(&vm, listener, root).unwrap();
    assert_eq!(vm.mem.detach_importer(), Err(Error::CountUnbalanced));
}

#[test]
fn a_root_that_another_importer_walks_is_not_taken_back() {
    let vm = vm_of(FWB);
    let (first, root) = export(&vm);
    let second = iommu(&vm);
    vm.mem
        .attach_importer(|table| Ok(table.register(&root, importer(second))?))
        .unwrap();
    let mut kept = None;
    let refused = vm.mem.detach_importer_with(|table| {
        table.unregister(first)?;
        table.unexport(root).map_err(|(root, error)| {
            kept = Some(root);
            error.into()
        })
    });
    assert_eq!(refused, Err(Error::Export(ExportError::Imported(1))));
    // It has not let go of the root, so it still counts.
    assert_eq!(vm.mem.register_device(NonSnooping), Err(Error::InUse(2)));
    vm.mem.detach_importer().unwrap();
    assert_eq!(unexport(&vm, second, kept.unwrap()), Ok(()));
    assert_eq!(vm.mem.register_device(NonSnooping).err(), None);
}

#[test]
fn an_importer_that_wants_bits_nobody_promised_is_refused() {
    let vm = vm_of(FWB);
    let refused = vm.mem.attach_importer(|table| {
        let root = table.export(0)?;
        let wants = Importer {
            must_be_zero: 1 << 11,
            ..importer(iommu(&vm))
        };
        let registered = table.register(&root, wants);
        table.unexport(root).map_err(|(_, error)| error)?;
        Ok(registered?)
    });
    let error = ExportError::NotPromised(1 << 11);
    assert_eq!(refused, Err(Error::Export(error)));
    assert_eq!(Error::Export(error).kind(), ErrorKind::Invalid);
    assert_eq!(vm.mem.detach_importer(), Err(Error::CountUnbalanced));
}
