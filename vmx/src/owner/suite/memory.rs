//! Slots, faults, locks, exported roots: what the hardware finds in the EPT entries.

use core::sync::atomic::{AtomicU64, Ordering};

use memslot::addr::GfnRange;
use memslot::edge::Dma;
use memslot::error::Error;
use memslot::lock::{LockRequest, LockState};
use memslot::policy::EptPolicy;
use memslot::slot::{LockFlags, SlotFlags, SlotId, SlotKind};
use stage2::{Importer, InvalidateListener, IpaRange, Level, Offered};
use vmx::handle::End;

use super::Scenario;
use super::kit::{Answer, Check, Driven, MIB, Op, ensure, refused};
use crate::arch::Cpu;
use crate::guest::Stop;

pub(super) const ALL: &[Scenario] = &[
    ("memory/fault-installs-leaf", fault),
    ("memory/execute-on-first-fetch", fetch),
    ("memory/read-only-slot", read_only),
    ("memory/deleted-slot", deleted),
    ("memory/dirty-log", dirty_log),
    ("memory/locked-slot", locked),
    ("memory/exported-root", exported),
];

const TODAY: EptPolicy = EptPolicy::TODAY;
const AT: u64 = 16 * MIB;
const SLOT: SlotId = SlotId(1);
const NONE: SlotFlags = SlotFlags::empty();
const RAM: SlotKind = SlotKind::Ram;

/// Bits of an EPT leaf (SDM vol. 3C table 29-3).
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;

/// Whether the guest's access ended it because nothing is there.
fn is_nothing(answer: Answer) -> bool {
    matches!(answer, Answer::Stopped(Stop::End(End::NoDevice(_))))
}

/// The first access installs the largest leaf that fits; the hardware keeps its flags.
fn fault(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, AT, 4 * MIB, NONE, RAM)?;
    ensure!(!g.has_leaf(AT), "a leaf before the first access");
    let faults = g.vm.vm.exits.of("memory fault");
    g.must(Op::Load, AT + 0x1238, 0)?;
    ensure!(g.vm.vm.exits.of("memory fault") == faults + 1, "one fault");
    let (entry, level) = g.vm.ept_entry(AT);
    ensure!(level == 2 && entry & LARGE != 0, "a 2 MiB leaf: {entry:#x}");
    ensure!(entry & 0x78 == 0x70, "write-back, PAT ignored: {entry:#x}");
    let flags = cpu.capabilities.ept.access_dirty == Offered::Yes;
    ensure!(
        (entry & ACCESSED != 0) == flags && entry & DIRTY == 0,
        "after a load: {entry:#x}"
    );
    g.must(Op::Store, AT, 5)?;
    let (entry, _) = g.vm.ept_entry(AT);
    ensure!((entry & DIRTY != 0) == flags, "after a store: {entry:#x}");
    ensure!(g.vm.word(AT) == Some(5), "the store is where it belongs");
    Ok(())
}

fn fetch(cpu: &Cpu) -> Check {
    const RET: u64 = 0xc3;
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, AT, 4096, NONE, RAM)?;
    g.must(Op::Store, AT, RET)?;
    ensure!(g.vm.ept_entry(AT).0 & EXECUTE == 0, "executable too early");
    g.must(Op::Call, AT, 0)?;
    ensure!(g.vm.ept_entry(AT).0 & EXECUTE != 0, "not executable");
    Ok(())
}

fn read_only(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, AT, 4096, SlotFlags::READONLY, RAM)?;
    g.must(Op::Load, AT, 0)?;
    ensure!(g.vm.ept_entry(AT).0 & WRITE == 0, "a writable leaf");
    ensure!(is_nothing(g.does(Op::Store, AT, 1)), "the store passed");
    Ok(())
}

fn deleted(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, AT, 4096, NONE, RAM)?;
    g.must(Op::Store, AT, 1)?;
    g.vm.vm.memory.delete_slot(SLOT).map_err(refused)?;
    ensure!(!g.has_leaf(AT), "a leaf without a slot");
    ensure!(is_nothing(g.does(Op::Load, AT, 0)), "the load passed");
    Ok(())
}

fn dirty_log(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, AT, 16 * 4096, SlotFlags::DIRTY_LOG, RAM)?;
    g.must(Op::Load, AT, 0)?;
    let (entry, level) = g.vm.ept_entry(AT);
    ensure!(level == 3 && entry & WRITE == 0, "clean page: {entry:#x}");
    g.must(Op::Touch, AT + 0x3000, 2)?;
    let memory = &g.vm.vm.memory;
    let mut words = [0];
    memory.take_dirty_log(SLOT, &mut words).map_err(refused)?;
    ensure!(words == [0b11000], "log {:#b}", words[0]);
    ensure!(g.vm.ept_entry(AT + 0x3000).0 & WRITE == 0, "not protected");
    memory.take_dirty_log(SLOT, &mut words).map_err(refused)?;
    ensure!(words == [0], "second log {:#b}", words[0]);
    g.must(Op::Touch, AT + 0x3000, 1)?;
    let memory = &g.vm.vm.memory;
    memory.take_dirty_log(SLOT, &mut words).map_err(refused)?;
    ensure!(words == [0b1000], "third log {:#b}", words[0]);
    Ok(())
}

/// A locked slot is there, all of it, before the first access, and cannot be taken away.
fn locked(cpu: &Cpu) -> Check {
    const PAGES: u64 = 64;
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, AT, PAGES * 4096, NONE, RAM)?;
    let memory = &g.vm.vm.memory;
    let lock = LockRequest::new(SLOT, LockFlags::READ | LockFlags::WRITE);
    memory.lock_slot(&lock).map_err(refused)?;
    ensure!(memory.frames().pinned() == PAGES, "pinned pages");
    ensure!(
        memory.lock_state(SLOT) == Some(LockState::LockedClean),
        "x86 owes no maintenance"
    );
    for page in 0..PAGES {
        let (entry, level) = g.vm.ept_entry(AT + page * 4096);
        ensure!(
            level == 3 && entry & 0x7b == 0x73,
            "page {page}: {entry:#x}"
        );
    }
    let faults = g.vm.vm.exits.of("memory fault");
    g.must(Op::Touch, AT, PAGES)?;
    ensure!(g.vm.vm.exits.of("memory fault") == faults, "a fault");
    let memory = &g.vm.vm.memory;
    ensure!(
        memory.delete_slot(SLOT) == Err(Error::Locked(SLOT)),
        "deleted while locked"
    );
    let range = GfnRange::new(AT >> 12, (AT >> 12) + 1).ok_or("range")?;
    ensure!(
        memory.host_unmap(range) == Err(Error::Locked(SLOT)),
        "unmapped while locked"
    );
    memory.unlock_slot(SLOT).map_err(refused)?;
    ensure!(memory.frames().pinned() == 0, "still pinned");
    memory.delete_slot(SLOT).map_err(refused)?;
    Ok(())
}

/// An importer that counts what it is told.
struct Walker {
    calls: AtomicU64,
    last: AtomicU64,
}

impl InvalidateListener for Walker {
    fn invalidate(&self, range: IpaRange) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.last.store(range.start().get(), Ordering::Relaxed);
    }
}

static WALKER: Walker = Walker {
    calls: AtomicU64::new(0),
    last: AtomicU64::new(0),
};

/// A root that is lent: told of every invalidation, emptied and never replaced, and incompatible
/// with memory that is accessed without snooping.
fn exported(cpu: &Cpu) -> Check {
    /// VT-d wants bit 11 of every entry to be zero.
    const RESERVED: u64 = 1 << 11;
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, AT, 4096, NONE, RAM)?;
    let memory = &g.vm.vm.memory;
    let export = |table: &mut stage2::Stage2<_, _>| {
        let root = table.export(RESERVED);
        root.map_err(|_| Error::InUse(1))
    };
    let root = memory.attach_importer(export).map_err(refused)?;
    let meta = *root.meta();
    ensure!(meta.root.get() == g.vm.root(), "another root");
    let importer = Importer {
        listener: &WALKER,
        must_be_zero: RESERVED,
        output_bits: meta.output_bits,
        coarsest_leaf: Level::L1,
    };
    memory
        .with_table(|t| t.register(&root, importer))
        .map_err(refused)?;
    let refusal = memory.register_device(Dma::NonSnooping);
    ensure!(refusal == Err(Error::InUse(1)), "{refusal:?}");
    let flagged = g.add(2, AT + MIB, 4096, SlotFlags::NONCOHERENT_DMA, RAM);
    ensure!(flagged.is_err(), "a non-coherent slot under an export");
    g.must(Op::Store, AT, 1)?;
    let told = WALKER.calls.load(Ordering::Relaxed);
    let memory = &g.vm.vm.memory;
    memory.delete_slot(SLOT).map_err(refused)?;
    ensure!(
        WALKER.calls.load(Ordering::Relaxed) > told && WALKER.last.load(Ordering::Relaxed) == AT,
        "the importer was not told"
    );
    ensure!(!g.has_leaf(AT) && g.vm.root() == meta.root.get(), "root");
    memory
        .with_table(|t| t.unregister(&WALKER))
        .map_err(refused)?;
    memory
        .detach_importer_with(|t| t.unexport(root).map_err(|_| Error::InUse(1)))
        .map_err(refused)?;
    let edge = memory.register_device(Dma::NonSnooping);
    ensure!(edge.is_ok(), "{edge:?} after the export");
    Ok(())
}
