//! Slot look-up against `vm-memory`, lock and unlock of 1 GiB, and the first run.
//!
//! `cargo bench -p ravelin-tests --bench memslot -- [--write DIR]`

#![expect(
    clippy::cast_possible_truncation,
    reason = "64-bit host, and times of seconds"
)]

mod memslot_support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use memslot::account::LockedMemory;
use memslot::lock::LockRequest;
use memslot::policy::{ArmCaches, ArmPolicy};
use memslot::slot::{LockFlags, LockGranule, Memslot, SlotFlags, SlotId, SlotKind};
use memslot::slots::Memslots;
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use memslot_support::{Contiguous, Lean};
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Gfn, Granule, Level, Stage2,
    WideAddresses,
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Counts allocations of the heap.
#[derive(Debug)]
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as for `alloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

const GIB_PAGES: u64 = 1 << 18;

fn slots(count: u16) -> Memslots {
    // Two pages each, a gap of one page between; inserted from the top so that each insertion
    // is at the front.
    (0..count).rev().fold(Memslots::new(), |all, n| {
        let base = Gfn::try_new(u64::from(n) * 3).expect("small");
        let kind = SlotKind::Ram;
        let slot = Memslot::new(SlotId(n), base, 2, 0, SlotFlags::empty(), kind);
        all.with(slot.expect("valid")).expect("no overlap")
    })
}

fn peers(count: u16) -> GuestMemoryMmap {
    let ranges: Vec<_> = (0..u64::from(count))
        .map(|n| (GuestAddress(n * 3 * 4096), 2 * 4096))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).expect("mapped")
}

/// Pages that lie in slots, in no order.
fn probes(count: u16) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..4096)
        .map(|_| (next() % u64::from(count)) * 3 + next() % 2)
        .collect()
}

/// Best of many passes, in nanoseconds per probe.
fn best(probes: &[u64], mut look_up: impl FnMut(u64) -> u64) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..300 {
        let start = Instant::now();
        let found: u64 = probes.iter().map(|&p| look_up(black_box(p))).sum();
        black_box(found);
        best = best.min(start.elapsed().as_nanos() as f64 / probes.len() as f64);
    }
    best
}

fn look_ups(out: &mut String) {
    out.push_str("| slots | ours, ns | vm-memory, ns | ratio |\n|---|---|---|---|\n");
    for count in [1, 8, 512, 32_768] {
        let (ours, theirs, probes) = (slots(count), peers(count), probes(count));
        let a = best(&probes, |p| {
            let gfn = Gfn::try_new(p).expect("small");
            ours.find(gfn).map_or(0, |s| u64::from(s.id.0))
        });
        let b = best(&probes, |p| {
            let region = theirs.find_region(GuestAddress(p << 12));
            region.map_or(0, |r| vm_memory::GuestMemoryRegion::start_addr(r).0)
        });
        let _ = writeln!(out, "| {count} | {a:.2} | {b:.2} | {:.2}× |", b / a);
    }
}

type Vm<'m> = GuestMemory<Stage2<ArmStage2, &'m Lean>, ArmPolicy, Contiguous>;

fn vm(machine: &Lean, caches: ArmCaches) -> Vm<'_> {
    let fwb = match caches {
        ArmCaches::ForcedWriteBack => ForceWriteBack::On,
        ArmCaches::Maintenance => ForceWriteBack::Off,
    };
    let format = ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: 39,
        output_bits: 44,
        features: ArmFeatures {
            fwb,
            execute: Execute::Joint,
            wide: WideAddresses::Off,
        },
        start: Some(Level::L1),
    });
    let table = Stage2::new(format.expect("valid"), machine, 1).expect("memory");
    let config = VmConfig {
        max_slots: 4,
        gfn_limit: 1 << 27,
        kind: VmKind::Unprotected,
    };
    let frames = Contiguous(LockedMemory::new(u64::MAX));
    let vm = GuestMemory::new(config, ArmPolicy { caches }, frames, table);
    let base = Gfn::try_new(GIB_PAGES).expect("small");
    let slot = Memslot::new(
        SlotId(0),
        base,
        GIB_PAGES,
        GIB_PAGES,
        SlotFlags::empty(),
        SlotKind::Ram,
    );
    vm.create_slot(slot.expect("valid")).expect("free");
    vm
}

fn timed<R>(f: impl FnOnce() -> R) -> (f64, u64) {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let start = Instant::now();
    black_box(f());
    let seconds = start.elapsed().as_secs_f64();
    (seconds, ALLOCATIONS.load(Ordering::Relaxed) - before)
}

/// Best of several locks, first runs and unlocks of 1 GiB.
fn locks(out: &mut String) {
    out.push_str("| 1 GiB | lock, Mpages/s | heap allocations | table pages | first run, ms | lines cleaned | Glines/s | slots flushed | unlock, Mpages/s |\n|---|---|---|---|---|---|---|---|---|\n");
    for caches in [ArmCaches::Maintenance, ArmCaches::ForcedWriteBack] {
        for granule in [LockGranule::BasePages, LockGranule::Blocks] {
            lock_row(out, caches, granule);
        }
    }
}

fn lock_row(out: &mut String, caches: ArmCaches, granule: LockGranule) {
    let mut best = [f64::MAX; 3];
    let (mut heap, mut tables, mut lines, mut flushed) = (0, 0, 0, 0);
    for _ in 0..7 {
        let machine = Lean::new(1024);
        let vm = vm(&machine, caches);
        let rw = LockFlags::READ | LockFlags::WRITE;
        let request = LockRequest {
            granule,
            ..LockRequest::new(SlotId(0), rw)
        };
        let (lock, allocations) = timed(|| vm.lock_slot(&request).expect("locked"));
        tables = machine.tables.load(Ordering::Relaxed);
        let (run, _) = timed(|| drop(vm.enter().expect("open")));
        lines = machine.lines.load(Ordering::Relaxed);
        flushed = vm.counters().slots_flushed;
        let (unlock, _) = timed(|| vm.unlock_slot(SlotId(0)).expect("unlocked"));
        heap = allocations;
        for (best, now) in best.iter_mut().zip([lock, run, unlock]) {
            *best = best.min(now);
        }
    }
    let pages = GIB_PAGES as f64 / 1e6;
    let _ = writeln!(
        out,
        "| {caches:?}, {granule:?} | {:.1} | {heap} | {tables} | {:.3} | {lines} | {:.2} | {flushed} | {:.0} |",
        pages / best[0],
        best[1] * 1e3,
        lines as f64 / best[1] / 1e9,
        pages / best[2],
    );
}

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let mut text = String::from("## Slot look-up\n\n");
    look_ups(&mut text);
    text.push_str("\n## Lock, first run, unlock\n\n");
    locks(&mut text);
    println!("{text}");
    if let Some(at) = args.iter().position(|a| a == "--write")
        && let Some(dir) = args.get(at + 1)
    {
        std::fs::write(format!("{dir}/memslot.tables.md"), &text)?;
    }
    Ok(())
}
