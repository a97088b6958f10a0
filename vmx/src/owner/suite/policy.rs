//! Memory types: every row of both profiles that changes an entry, and every event that makes
//! entries stale. Types are the byte that the entry must have: memory type in bits 5:3,
//! ignore-PAT in bit 6.

use memslot::edge::Dma;
use memslot::error::Error;
use memslot::lock::LockRequest;
use memslot::noncoherent::Edge;
use memslot::policy::{CdQuirk, EptPolicy, Profile};
use memslot::slot::{LockFlags, SlotFlags, SlotId, SlotKind};

use super::Scenario;
use super::kit::{Answer, Check, Driven, MIB, Op, ensure, refused};
use crate::arch::Cpu;

pub(super) const ALL: &[Scenario] = &[
    ("policy/today", today),
    ("policy/today-honouring-pat", today_honouring_pat),
    ("policy/guest-mtrr-without-dma", mtrr_without_dma),
    ("policy/guest-mtrr-types", mtrr_types),
    ("policy/cd-write-back", cd_write_back),
    ("policy/cd-uncached", cd_uncached),
    ("policy/zaps-are-cut-to-the-change", exact_zaps),
    ("policy/bad-values-change-nothing", bad_values),
    ("policy/blocks-follow-mtrrs", block_sizes),
    ("policy/locked-slots-at-an-edge", locked_edge),
    ("policy/firmware-then-system", firmware_then_system),
];

const WB_FORCED: u64 = 0x70;
const WB: u64 = 0x30;
const UC: u64 = 0x00;
const UC_FORCED: u64 = 0x40;
const WC: u64 = 0x08;
const WT: u64 = 0x20;
const WP: u64 = 0x28;

/// Slots of every guest here: plain RAM, RAM flagged non-coherent, a device.
const PLAIN: u64 = 16 * MIB;
const FLAGGED: u64 = 32 * MIB;
const DEVICE: u64 = 48 * MIB;
const BYTES: u64 = 4 * MIB;

/// Registers.
const DEFAULT_TYPE: u32 = 0x2ff;
const PAT: u32 = 0x277;
const CR0: u64 = 0x8001_0033;
const CD: u64 = 1 << 30;
/// Default type register: enabled, with fixed ranges, write-back.
const ON_WB: u64 = 0xc06;

fn guest(cpu: &Cpu, policy: EptPolicy) -> Check<Driven<'_>> {
    let g = Driven::new(cpu, policy)?;
    let (none, flagged) = (SlotFlags::empty(), SlotFlags::NONCOHERENT_DMA);
    g.add(1, PLAIN, BYTES, none, SlotKind::Ram)?;
    g.add(2, FLAGGED, BYTES, flagged, SlotKind::Ram)?;
    g.add(3, DEVICE, 4096, none, SlotKind::Mmio)?;
    Ok(g)
}

fn types(g: &mut Driven<'_>, plain: u64, flagged: u64, device: u64) -> Check {
    let got = [g.type_at(PLAIN)?, g.type_at(FLAGGED)?, g.type_at(DEVICE)?];
    ensure!(
        got == [plain, flagged, device],
        "types {got:x?}, expected {:x?}",
        [plain, flagged, device]
    );
    Ok(())
}

fn register(g: &Driven<'_>, want: Edge) -> Check {
    let edge = g.vm.vm.memory.register_device(Dma::NonSnooping);
    ensure!(edge == Ok(want), "{edge:?}, expected {want:?}");
    Ok(())
}

fn unregister(g: &Driven<'_>, want: Edge) -> Check {
    let edge = g.vm.vm.memory.unregister_device(Dma::NonSnooping);
    ensure!(edge == Ok(want), "{edge:?}, expected {want:?}");
    Ok(())
}

/// Rows N1, flagged, N2, N3; the count's edges remove the leaves that follow it and no others.
fn today(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, EptPolicy::TODAY)?;
    types(&mut g, WB_FORCED, WB, UC)?;
    register(&g, Edge::Started)?;
    ensure!(!g.has_leaf(PLAIN), "a leaf with a stale type");
    ensure!(g.has_leaf(FLAGGED) && g.has_leaf(DEVICE), "too many zapped");
    types(&mut g, WB, WB, UC)?;
    register(&g, Edge::None)?;
    ensure!(g.has_leaf(PLAIN), "no edge, yet a zap");
    // Registers are storage only.
    g.wrmsr(DEFAULT_TYPE, 0xc00)?;
    g.must(Op::Cr0, CR0 | CD, 0)?;
    ensure!(g.has_leaf(PLAIN), "a register zapped");
    types(&mut g, WB, WB, UC)?;
    unregister(&g, Edge::None)?;
    unregister(&g, Edge::Stopped)?;
    ensure!(!g.has_leaf(PLAIN), "a leaf with a stale type");
    types(&mut g, WB_FORCED, WB, UC)?;
    let below = g.vm.vm.memory.unregister_device(Dma::NonSnooping);
    ensure!(below == Err(Error::CountUnbalanced), "{below:?}");
    Ok(())
}

fn today_honouring_pat(cpu: &Cpu) -> Check {
    let profile = Profile::Today { ignore_pat: false };
    let mut g = guest(cpu, EptPolicy { profile })?;
    types(&mut g, WB, WB, UC)?;
    register(&g, Edge::Started)?;
    ensure!(g.has_leaf(PLAIN), "the type does not depend on the count");
    types(&mut g, WB, WB, UC)
}

const MTRR: EptPolicy = EptPolicy::guest_mtrr(CdQuirk::WriteBack);

/// Rows R1, R2, R3: neither MTRRs nor CD count, and writing them removes nothing.
fn mtrr_without_dma(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, MTRR)?;
    types(&mut g, WB_FORCED, WB, UC)?;
    g.wrmsr(DEFAULT_TYPE, 0xc01)?;
    g.must(Op::Cr0, CR0 | CD, 0)?;
    ensure!(g.has_leaf(PLAIN), "a register zapped");
    types(&mut g, WB_FORCED, WB, UC)
}

/// Row R6: each type, by default, by a variable pair and by a fixed register.
fn mtrr_types(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, MTRR)?;
    register(&g, Edge::Started)?;
    // Off, as after reset: uncached, but for the flagged slot.
    types(&mut g, UC, WB, UC)?;
    for (number, byte) in [(1, WC), (4, WT), (5, WP), (6, WB), (0, UC)] {
        g.wrmsr(DEFAULT_TYPE, 0xc00 | number)?;
        ensure!(!g.has_leaf(PLAIN), "stale after the default type");
        types(&mut g, byte, WB, UC)?;
    }
    g.wrmsr(DEFAULT_TYPE, ON_WB)?;
    types(&mut g, WB, WB, UC)?;
    // Pair 0: 2 MiB of write combining.
    g.wrmsr(0x200, PLAIN | 1)?;
    g.wrmsr(0x201, mask(cpu, 2 * MIB))?;
    ensure!(!g.has_leaf(PLAIN), "stale after the variable pair");
    types(&mut g, WC, WB, UC)?;
    ensure!(g.type_at(PLAIN + 2 * MIB)? == WB, "beyond the pair");
    // Fixed: 0xa0000 to 0xa3fff uncached, the rest of the register write-through.
    g.type_at(0xa_0000)?;
    g.wrmsr(0x259, 0x0404_0404_0404_0400)?;
    ensure!(!g.has_leaf(0xa_0000), "stale after the fixed register");
    ensure!(g.type_at(0xa_0000)? == UC, "fixed uncached");
    ensure!(g.type_at(0xa_4000)? == WT, "fixed write-through");
    Ok(())
}

/// A variable mask register: valid, for `bytes` bytes.
fn mask(cpu: &Cpu, bytes: u64) -> u64 {
    let width = cpu.capabilities.ept.output_bits;
    ((1 << width) - bytes) | (1 << 11)
}

/// Row R4.
fn cd_write_back(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, MTRR)?;
    register(&g, Edge::Started)?;
    types(&mut g, UC, WB, UC)?;
    g.must(Op::Cr0, CR0 | CD, 0)?;
    ensure!(!g.has_leaf(PLAIN), "stale after CD = 1");
    types(&mut g, WB, WB, UC)?;
    // Under CD a register changes no type, so it removes nothing.
    g.wrmsr(DEFAULT_TYPE, 0xc04)?;
    ensure!(g.has_leaf(PLAIN), "zapped under CD");
    g.must(Op::Cr0, CR0, 0)?;
    ensure!(!g.has_leaf(PLAIN), "stale after CD = 0");
    types(&mut g, WT, WB, UC)
}

/// Row R5.
fn cd_uncached(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, EptPolicy::guest_mtrr(CdQuirk::Uncached))?;
    register(&g, Edge::Started)?;
    g.wrmsr(DEFAULT_TYPE, ON_WB)?;
    types(&mut g, WB, WB, UC)?;
    g.must(Op::Cr0, CR0 | CD, 0)?;
    ensure!(!g.has_leaf(PLAIN), "stale after CD = 1");
    types(&mut g, UC_FORCED, WB, UC)?;
    g.must(Op::Cr0, CR0, 0)?;
    ensure!(!g.has_leaf(PLAIN), "stale after CD = 0");
    types(&mut g, WB, WB, UC)
}

/// A write removes what it changes; elsewhere the leaves stay. A CD toggle with write-back as
/// the default touches only what differs from it.
fn exact_zaps(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, MTRR)?;
    register(&g, Edge::Started)?;
    g.wrmsr(DEFAULT_TYPE, ON_WB)?;
    let (inside, outside) = (PLAIN, PLAIN + 2 * MIB);
    g.type_at(inside)?;
    g.type_at(outside)?;
    g.wrmsr(0x200, PLAIN)?;
    g.wrmsr(0x201, mask(cpu, 2 * MIB))?;
    ensure!(!g.has_leaf(inside) && g.has_leaf(outside), "variable pair");
    g.type_at(inside)?;
    g.must(Op::Cr0, CR0 | CD, 0)?;
    ensure!(!g.has_leaf(inside) && g.has_leaf(outside), "CD = 1");
    g.type_at(inside)?;
    g.must(Op::Cr0, CR0, 0)?;
    ensure!(!g.has_leaf(inside) && g.has_leaf(outside), "CD = 0");
    // PAT is the guest's own: never a zap.
    g.type_at(inside)?;
    g.wrmsr(PAT, 0x0106_0006_0007_0406)?;
    ensure!(g.has_leaf(inside) && g.has_leaf(outside), "PAT");
    // The old span goes, too, when a pair moves.
    g.wrmsr(0x200, outside)?;
    ensure!(!g.has_leaf(inside) && !g.has_leaf(outside), "moved pair");
    Ok(())
}

fn bad_values(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, MTRR)?;
    register(&g, Edge::Started)?;
    g.wrmsr(DEFAULT_TYPE, ON_WB)?;
    types(&mut g, WB, WB, UC)?;
    let bad: [(u32, u64); 7] = [
        (DEFAULT_TYPE, 0xc02),
        (DEFAULT_TYPE, 0x1c06),
        (0x200, PLAIN | 7),
        (0x201, 1 << 10),
        (0x250, 0x03),
        (PAT, 0x02),
        (0xfe, 0x508),
    ];
    for (number, value) in bad {
        let before = g.does(Op::ReadMsr, 0, number.into());
        let answer = g.does(Op::WriteMsr, value, number.into());
        ensure!(
            answer == Answer::Raised(13),
            "{number:#x} took {value:#x}: {answer:?}"
        );
        let after = g.does(Op::ReadMsr, 0, number.into());
        ensure!(before == after, "{number:#x} changed");
    }
    ensure!(g.has_leaf(PLAIN), "a refused write zapped");
    Ok(())
}

/// One uncached page cuts its 2 MiB block into pages; the next block, and a flagged slot under
/// the same registers, stay whole.
fn block_sizes(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, MTRR)?;
    register(&g, Edge::Started)?;
    g.wrmsr(DEFAULT_TYPE, ON_WB)?;
    for (pair, at) in [(0, PLAIN), (1, FLAGGED)] {
        g.wrmsr(0x200 + 2 * pair, at + 0x5000)?;
        g.wrmsr(0x201 + 2 * pair, mask(cpu, 4096))?;
    }
    ensure!(g.type_at(PLAIN + 0x5000)? == UC, "the page");
    ensure!(g.type_at(PLAIN)? == WB, "its neighbour");
    ensure!(g.vm.ept_entry(PLAIN).1 == 3, "a block across a border");
    g.type_at(PLAIN + 2 * MIB)?;
    ensure!(g.vm.ept_entry(PLAIN + 2 * MIB).1 == 2, "the next block");
    g.type_at(FLAGGED)?;
    ensure!(g.vm.ept_entry(FLAGGED).1 == 2, "the flagged slot");
    Ok(())
}

/// A locked leaf never goes: it is rewritten in place where its type follows the count alone,
/// and the edge is refused where the type would follow a vCPU's registers.
fn locked_edge(cpu: &Cpu) -> Check {
    let lock = LockRequest::new(SlotId(1), LockFlags::READ | LockFlags::WRITE);
    let g = guest(cpu, EptPolicy::TODAY)?;
    g.vm.vm.memory.lock_slot(&lock).map_err(refused)?;
    ensure!(g.vm.ept_entry(PLAIN).0 & 0x78 == WB_FORCED, "locked leaf");
    register(&g, Edge::Started)?;
    ensure!(g.vm.ept_entry(PLAIN).0 & 0x7b == 0x33, "after 0 to 1");
    unregister(&g, Edge::Stopped)?;
    ensure!(g.vm.ept_entry(PLAIN).0 & 0x7b == 0x73, "after 1 to 0");
    drop(g);
    let g = guest(cpu, MTRR)?;
    g.vm.vm.memory.lock_slot(&lock).map_err(refused)?;
    let refusal = g.vm.vm.memory.register_device(Dma::NonSnooping);
    ensure!(refusal == Err(Error::NonCoherent), "{refusal:?}");
    ensure!(g.vm.ept_entry(PLAIN).0 & 0x7b == 0x73, "changed");
    Ok(())
}

/// What firmware and a system do with their caches from power-on, while a device that does not
/// snoop is there; then that device goes and comes back.
fn firmware_then_system(cpu: &Cpu) -> Check {
    let mut g = guest(cpu, MTRR)?;
    register(&g, Edge::Started)?;
    // Firmware: caches off, MTRRs off. The quirk keeps memory write-back.
    g.must(Op::Cr0, CR0 | CD, 0)?;
    g.wrmsr(DEFAULT_TYPE, 0)?;
    g.must(Op::Store, PLAIN, 1)?;
    ensure!(g.type_at(PLAIN)? == WB, "CD = 1");
    // It lays out its memory and turns MTRRs on, then caches.
    g.wrmsr(0x200, PLAIN + 2 * MIB)?;
    g.wrmsr(0x201, mask(cpu, 2 * MIB))?;
    for register in [0x250, 0x258] {
        g.wrmsr(register, 0x0606_0606_0606_0606)?;
    }
    g.wrmsr(DEFAULT_TYPE, ON_WB)?;
    g.must(Op::Cr0, CR0, 0)?;
    ensure!(g.type_at(PLAIN)? == WB, "CD = 0, write-back range");
    ensure!(g.type_at(PLAIN + 2 * MIB)? == UC, "CD = 0, uncached range");
    // The system sets its PAT, and reprograms the MTRRs as the manual says: CD, off, write, on.
    g.wrmsr(PAT, 0x0007_0106_0007_0106)?;
    g.must(Op::Cr0, CR0 | CD, 0)?;
    g.wrmsr(DEFAULT_TYPE, ON_WB & !0x800)?;
    g.wrmsr(0x200, (PLAIN + 2 * MIB) | 1)?;
    g.wrmsr(DEFAULT_TYPE, ON_WB)?;
    g.must(Op::Cr0, CR0, 0)?;
    ensure!(g.type_at(PLAIN + 2 * MIB)? == WC, "write combining");
    ensure!(g.must(Op::Load, PLAIN, 0)? == 1, "the firmware's word");
    // The device goes: nothing is honoured. It comes back: the same types again.
    unregister(&g, Edge::Stopped)?;
    ensure!(g.type_at(PLAIN + 2 * MIB)? == WB_FORCED, "without device");
    register(&g, Edge::Started)?;
    ensure!(g.type_at(PLAIN + 2 * MIB)? == WC, "with it again");
    ensure!(g.type_at(PLAIN)? == WB, "with it again");
    ensure!(g.must(Op::Load, PLAIN, 0)? == 1, "the firmware's word");
    Ok(())
}
