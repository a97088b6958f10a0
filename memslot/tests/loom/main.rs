//! Interleavings of vCPUs, lockers, devices and slot changes, all of them.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p ravelin-memslot --test loom --release`
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod real;

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::thread;

use memslot::addr::GfnRange;
use memslot::edge::Dma;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::lock::LockRequest;
use memslot::mtrr::Msr;
use memslot::noncoherent::Edge;
use memslot::pending::Work;
use memslot::policy::{ArmCaches, ArmPolicy, CdQuirk, EptPolicy, MemTypePolicy, VcpuTypes};
use memslot::slot::{LockFlags, Memslot, SlotFlags, SlotId, SlotKind};
use memslot::steps::Progress;
use memslot::testing::{CacheModel, FakeFrames, ModelLeaf, ModelTable, View};
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use memslot::zap::ZapList;
use stage2::{Combine, Gfn, Ipa, MemType, Pa};

const A: SlotId = SlotId(0);
const B: SlotId = SlotId(1);
const PAGE: u64 = 0x100;
const FRAME: u64 = 0x8000;

struct Vm<P> {
    mem: GuestMemory<ModelTable, P, FakeFrames>,
    caches: Arc<CacheModel>,
}

fn slot(frame: u64) -> Memslot {
    let base = Gfn::try_new(PAGE).unwrap();
    Memslot::new(A, base, 1, frame, SlotFlags::empty(), SlotKind::Ram).unwrap()
}

fn vm<P: MemTypePolicy>(policy: P) -> Arc<Vm<P>> {
    let caches = Arc::new(CacheModel::new());
    let table = ModelTable::new(Arc::clone(&caches));
    let config = VmConfig {
        max_slots: 2,
        gfn_limit: 1 << 20,
        kind: VmKind::Unprotected,
    };
    let mem = GuestMemory::new(config, policy, FakeFrames::new(1, 8), table);
    mem.create_slot(slot(FRAME)).unwrap();
    Arc::new(Vm { mem, caches })
}

impl<P: MemTypePolicy> Vm<P> {
    fn leaf(&self) -> Option<ModelLeaf> {
        self.mem
            .with_table(|t| t.leaves().get(&(PAGE << 12)).copied())
    }

    fn fault(&self, vcpu: &P::Vcpu) -> FaultOutcome {
        let (ipa, access) = (Ipa::new(PAGE << 12), Access::Write);
        let fault = Stage2Fault {
            ipa,
            access,
            kind: FaultKind::Translation,
        };
        self.mem.handle_fault(&fault, vcpu).unwrap()
    }
}

fn check(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 20_000;
    model.check(f);
}

const PLAIN: ArmPolicy = ArmPolicy {
    caches: ArmCaches::Maintenance,
};
const FWB: ArmPolicy = ArmPolicy {
    caches: ArmCaches::ForcedWriteBack,
};

/// Nobody is inside the guest while maintenance is pending, and it is done once.
#[test]
fn locker_against_two_runners() {
    check(3, || {
        let vm = vm(PLAIN);
        let at = Pa::new(FRAME << 12);
        vm.caches.write(at, View::Cacheable, 7);
        let runner = |vm: Arc<Vm<ArmPolicy>>| {
            move || {
                let Ok(pass) = vm.mem.enter() else { return };
                assert_eq!(vm.mem.pending(), Work::empty());
                if vm.leaf().is_some() {
                    assert_eq!(vm.caches.read(at, View::Uncached), 7);
                }
                drop(pass);
            }
        };
        let runners = [
            thread::spawn(runner(Arc::clone(&vm))),
            thread::spawn(runner(Arc::clone(&vm))),
        ];
        let locked = vm.mem.lock_slot(&LockRequest::new(A, LockFlags::READ));
        for r in runners {
            r.join().unwrap();
        }
        if locked.is_ok() {
            drop(vm.mem.enter().unwrap());
            assert_eq!(vm.mem.pending(), Work::empty());
            assert_eq!(vm.mem.counters().slots_flushed, 1);
        }
    });
}

/// Two vCPUs race for the first run: one flush, and neither is inside before it.
#[test]
fn two_first_runs_flush_once() {
    check(3, || {
        let vm = vm(PLAIN);
        let at = Pa::new(FRAME << 12);
        vm.mem
            .lock_slot(&LockRequest::new(A, LockFlags::READ))
            .unwrap();
        vm.caches.write(at, View::Cacheable, 7);
        let run = |vm: Arc<Vm<ArmPolicy>>| {
            move || {
                let pass = vm.mem.enter().unwrap();
                assert_eq!(vm.caches.read(at, View::Uncached), 7);
                drop(pass);
            }
        };
        let other = thread::spawn(run(Arc::clone(&vm)));
        run(Arc::clone(&vm))();
        other.join().unwrap();
        assert_eq!(vm.mem.counters().slots_flushed, 1);
    });
}

/// A fault that saw the old count never leaves its leaf behind.
#[test]
fn fault_against_count_edge() {
    check(3, || {
        let vm = vm(FWB);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(&()));
        vm.mem.register_device(Dma::NonSnooping).unwrap();
        let _ = vcpu.join().unwrap();
        if let Some(leaf) = vm.leaf() {
            let honoured = (MemType::WriteBack, Combine::HonourGuest);
            assert_eq!((leaf.attrs.mem, leaf.attrs.combine), honoured);
        }
    });
}

/// Two vCPUs fault, the count goes up and down.
#[test]
fn two_faults_against_both_edges() {
    check(2, || {
        let vm = vm(FWB);
        let vcpus = [(); 2].map(|()| {
            let other = Arc::clone(&vm);
            thread::spawn(move || other.fault(&()))
        });
        vm.mem.register_device(Dma::NonSnooping).unwrap();
        vm.mem.unregister_device(Dma::NonSnooping).unwrap();
        for v in vcpus {
            let _ = v.join().unwrap();
        }
        if let Some(leaf) = vm.leaf() {
            assert_eq!(leaf.attrs.combine, Combine::ForceStage2);
        }
    });
}

/// Two devices come and go at the same time: each edge belongs to exactly one of them.
#[test]
fn two_registrations_make_one_edge() {
    check(3, || {
        let vm = vm(FWB);
        let _ = vm.fault(&());
        let come_and_go = |vm: Arc<Vm<ArmPolicy>>| {
            move || {
                let came = vm.mem.register_device(Dma::NonSnooping).unwrap();
                let went = vm.mem.unregister_device(Dma::NonSnooping).unwrap();
                (came == Edge::Started, went == Edge::Stopped)
            }
        };
        let other = thread::spawn(come_and_go(Arc::clone(&vm)));
        let mine = come_and_go(Arc::clone(&vm))();
        let edges = [mine, other.join().unwrap()];
        let starts = edges.iter().filter(|e| e.0).count();
        // One after the other they make two edges each way, together one.
        assert_eq!(starts, edges.iter().filter(|e| e.1).count());
        assert!(starts >= 1);
        assert_eq!(vm.mem.counters().edges, 2 * starts as u64);
        assert_eq!(vm.leaf(), None);
    });
}

/// A fault that saw the old slot never maps its frame after the slot was replaced.
#[test]
fn slot_replacement_against_fault() {
    check(3, || {
        let vm = vm(PLAIN);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(&()));
        vm.mem.delete_slot(A).unwrap();
        vm.mem.create_slot(slot(0x9000)).unwrap();
        let _ = vcpu.join().unwrap();
        if let Some(leaf) = vm.leaf() {
            assert_eq!(leaf.pa, Pa::new(0x9000 << 12));
        }
    });
}

/// The first page behind a boundary of steps.
const BOUNDARY: u64 = 32 * 512;

/// Two pages, each of which is a step.
fn two_steps() -> Arc<Vm<ArmPolicy>> {
    let vm = vm(PLAIN);
    let base = Gfn::try_new(BOUNDARY - 1).unwrap();
    let slot = Memslot::new(B, base, 2, 0x9000, SlotFlags::empty(), SlotKind::Ram).unwrap();
    vm.mem.create_slot(slot).unwrap();
    vm
}

fn write(vm: &Vm<ArmPolicy>, page: u64) -> FaultOutcome {
    let fault = Stage2Fault {
        ipa: Ipa::new(page << 12),
        access: Access::Write,
        kind: FaultKind::Translation,
    };
    vm.mem.handle_fault(&fault, &()).unwrap()
}

/// Two CPUs make the same call, step by step, while a vCPU faults: the slot goes once, with its last
/// leaf, and nothing comes back.
#[test]
fn two_deletions_in_steps_against_a_fault() {
    check(2, || {
        let vm = two_steps();
        let others = [Arc::clone(&vm), Arc::clone(&vm)];
        let [one, two] = others;
        let vcpu = thread::spawn(move || write(&one, BOUNDARY));
        let cpu = thread::spawn(move || {
            let step = two.mem.delete_in_steps(B, || false);
            u32::from(matches!(step, Ok(Some(_))))
        });
        let mut gone = 0;
        for _ in 0..2 {
            let step = vm.mem.delete_in_steps(B, || false);
            gone += u32::from(matches!(step, Ok(Some(_))));
        }
        gone += cpu.join().unwrap();
        let _ = vcpu.join().unwrap();
        assert_eq!(gone, 1);
        assert!(vm.mem.with_table(ModelTable::leaves).is_empty());
        assert_eq!(write(&vm, BOUNDARY), FaultOutcome::Mmio);
    });
}

/// A log that begins in steps: what is writable when it has begun is in it.
#[test]
fn a_log_in_steps_against_write_faults() {
    check(3, || {
        let vm = two_steps();
        assert_eq!(write(&vm, BOUNDARY - 1), FaultOutcome::Resolved);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || (write(&other, BOUNDARY), write(&other, BOUNDARY - 1)));
        let log = || vm.mem.set_flags_in_steps(B, SlotFlags::DIRTY_LOG, || false);
        assert_eq!(log(), Ok(Progress::More));
        assert_eq!(log(), Ok(Progress::Done));
        let _ = vcpu.join().unwrap();
        let leaves = vm.mem.with_table(ModelTable::leaves);
        let bits = vm.mem.take_dirty_word(B, 0).unwrap();
        for (bit, page) in [(0, BOUNDARY - 1), (1, BOUNDARY)] {
            let leaf = leaves.get(&(page << 12));
            let writable = leaf.is_some_and(|l| l.attrs.perms.contains(stage2::Perms::WRITE));
            assert!(!writable || bits >> bit & 1 == 1, "page {page}");
        }
    });
}

/// A page that the host has taken back is nowhere, whatever faults meanwhile.
#[test]
fn unshare_against_fault() {
    check(3, || {
        let vm = vm(PLAIN);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(&()));
        vm.mem.unshare_pages(A, 0, 1).unwrap();
        let _ = vcpu.join().unwrap();
        assert_eq!(vm.leaf(), None);
        assert!(matches!(vm.fault(&()), FaultOutcome::NoFrame(_)));
    });
}

/// A fault that looked the old frame up never maps it after the host took it back.
#[test]
fn reclaim_against_fault() {
    check(3, || {
        let vm = vm(PLAIN);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(&()));
        vm.mem.frames().move_backing(0x1000);
        let page = GfnRange::new(PAGE, PAGE + 1).unwrap();
        vm.mem.host_unmap(page).unwrap();
        let _ = vcpu.join().unwrap();
        if let Some(leaf) = vm.leaf() {
            assert_eq!(leaf.pa, Pa::new((FRAME + 0x1000) << 12));
        }
    });
}

/// A fault that saw the slot unlocked never replaces or widens what the lock made.
#[test]
fn lock_against_fault() {
    check(3, || {
        let vm = vm(PLAIN);
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(&()));
        vm.mem
            .lock_slot(&LockRequest::new(A, LockFlags::READ))
            .unwrap();
        let _ = vcpu.join().unwrap();
        assert_eq!(vm.leaf().unwrap().pa, Pa::new(FRAME << 12));
        assert_eq!(
            vm.mem
                .lock_slot(&LockRequest::new(A, LockFlags::READ))
                .is_err(),
            true
        );
    });
}

/// The dirty log loses no write: a writable leaf has its bit set, or was handed out.
#[test]
fn dirty_log_against_a_write_fault() {
    check(3, || {
        let vm = vm(PLAIN);
        vm.mem.set_slot_flags(A, SlotFlags::DIRTY_LOG).unwrap();
        let other = Arc::clone(&vm);
        let vcpu = thread::spawn(move || other.fault(&()));
        let mut first = [0];
        vm.mem.take_dirty_log(A, &mut first).unwrap();
        let _ = vcpu.join().unwrap();
        let writable = vm
            .leaf()
            .is_some_and(|l| l.attrs.perms.contains(stage2::Perms::WRITE));
        let mut second = [0];
        vm.mem.take_dirty_log(A, &mut second).unwrap();
        assert_eq!(writable, second[0] == 1);
        assert_eq!(first[0] | second[0], 1);
    });
}

/// Three vCPUs make their own page stale and wait; one of them overflows the list. Nobody
/// returns while its page is stale, and everybody returns.
fn zap_list(ranges_of_first: u64) {
    check(2, move || {
        let list = Arc::new(ZapList::new());
        let stale = Arc::new([(); 3].map(|()| AtomicBool::new(false)));
        let zappers = Arc::new(AtomicU32::new(0));
        let vcpus: [_; 3] = core::array::from_fn(|me| {
            let (list, stale) = (Arc::clone(&list), Arc::clone(&stale));
            let zappers = Arc::clone(&zappers);
            let count = if me == 0 { ranges_of_first } else { 1 };
            move || {
                stale[me].store(true, Ordering::Relaxed);
                // Page `me`, then others far away.
                let ranges: Vec<_> = (0..count)
                    .map(|n| {
                        GfnRange::new(me as u64 * 2 + n * 100, me as u64 * 2 + n * 100 + 1).unwrap()
                    })
                    .collect();
                let ticket = list.insert(&ranges).unwrap();
                let zap = |batch: &[GfnRange]| {
                    assert_eq!(
                        zappers.fetch_add(1, Ordering::Relaxed),
                        0,
                        "one zapper at a time"
                    );
                    for (page, s) in stale.iter().enumerate() {
                        let page = Gfn::try_new(page as u64 * 2).unwrap();
                        if batch.iter().any(|r| r.contains(page)) {
                            s.store(false, Ordering::Relaxed);
                        }
                    }
                    zappers.fetch_sub(1, Ordering::Relaxed);
                };
                list.complete(ticket, zap, || ());
                assert!(
                    !stale[me].load(Ordering::Relaxed),
                    "vCPU {me} returned too early"
                );
            }
        });
        let [main, a, b] = vcpus;
        let others = [thread::spawn(a), thread::spawn(b)];
        main();
        for o in others {
            o.join().unwrap();
        }
    });
}

#[test]
fn zap_list_with_three_vcpus() {
    zap_list(1);
}

#[test]
fn zap_list_with_three_vcpus_and_overflow() {
    zap_list(17);
}

/// Register writes of two vCPUs through the whole path, each against its own next fault.
#[test]
fn register_writes_against_each_other() {
    check(2, || {
        let vm = vm(EptPolicy::guest_mtrr(CdQuirk::WriteBack));
        vm.mem.register_device(Dma::NonSnooping).unwrap();
        let work = |vm: Arc<Vm<EptPolicy>>| {
            move || {
                let mut vcpu = VcpuTypes::new(40, true);
                let write = |vcpu: &mut _| {
                    vm.mem
                        .write_memory_type_msr(vcpu, Msr::DefaultType, 0x804, || ())
                };
                write(&mut vcpu).unwrap();
                let _ = vm.fault(&vcpu);
            }
        };
        let other = thread::spawn(work(Arc::clone(&vm)));
        work(Arc::clone(&vm))();
        other.join().unwrap();
        if let Some(leaf) = vm.leaf() {
            assert_eq!(leaf.attrs.mem, MemType::WriteThrough);
        }
    });
}
