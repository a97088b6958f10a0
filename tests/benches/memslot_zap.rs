//! The zap experiment: an OVMF-like boot on 2 to 16 vCPU threads, five ways to remove leaves.
//!
//! `cargo bench -p ravelin-tests --bench memslot_zap -- [--write DIR]`: the second form replaces the
//! table and the picture of `DIR/zap.md`.
//!
//! A 16 GiB guest is mapped in 4 KiB pages, with a hole from 2 to 4 GiB as on a PC. Each vCPU thread touches pages, sets CR0.CD, turns
//! MTRRs off, writes eleven fixed and two pairs of variable registers, turns MTRRs on and clears
//! CD, five times. After every event that zaps it looks at two pages of its own: a leaf of the
//! old type there is a lost zap.

#![expect(
    clippy::cast_possible_truncation,
    reason = "64-bit host, and times of seconds"
)]

mod memslot_support;

use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, RwLock};
use std::time::Instant;

use memslot::addr::GfnRange;
use memslot::mtrr::Msr;
use memslot::policy::{CdQuirk, EptPolicy, MemTypePolicy, TypeQuery, VcpuTypes};
use memslot::slot::{SlotFlags, SlotKind};
use memslot::zap::{ZapList, set_cd, write_msr};
use memslot_support::Lean;
use stage2::{
    Blocks, Entry, Ept, EptConfig, FaultRequest, Gfn, Ipa, IpaRange, LeafAttrs, MapRequest,
    Offered, Pa, Perms, Stage2,
};

const POLICY: EptPolicy = EptPolicy::guest_mtrr(CdQuirk::WriteBack);
/// End of guest memory in pages: 16 GiB of RAM with a hole for devices from 2 to 4 GiB.
const PAGES: u64 = (18 << 30) >> 12;
const HOLE: (u64, u64) = ((2 << 30) >> 12, (4 << 30) >> 12);
const ROUNDS: usize = 5;
/// Pages that a vCPU touches in each round.
const WORKING_SET: u64 = 512;
const ALL_WB: u64 = 0x0606_0606_0606_0606;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    BlindAll,
    CdEdges,
    Serialised,
    FineGrained,
    FineShared,
}

impl Strategy {
    const EACH: [Self; 5] = [
        Self::BlindAll,
        Self::CdEdges,
        Self::Serialised,
        Self::FineGrained,
        Self::FineShared,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::BlindAll => "blind ALL",
            Self::CdEdges => "ALL at CD edges",
            Self::Serialised => "serialised list",
            Self::FineGrained => "fine-grained",
            Self::FineShared => "fine-grained, shared lock",
        }
    }
}

#[derive(Debug, Default)]
struct Totals {
    zaps: AtomicU64,
    passes: AtomicU64,
    held: AtomicU64,
    spent: AtomicU64,
    worked: AtomicU64,
    lost: AtomicU64,
}

struct Vm<'m> {
    table: RwLock<Stage2<Ept, &'m Lean>>,
    machine: &'m Lean,
    list: ZapList,
    totals: Totals,
    /// Ranges that were zapped, and how often. What a walk over them visits is counted at the
    /// end: it does not change, because tables stay.
    walked: Mutex<BTreeMap<(u64, u64), u64>>,
}

fn add(total: &AtomicU64, n: u64) {
    total.fetch_add(n, Ordering::Relaxed);
}

/// Nanoseconds that this thread has run on a CPU: waiting without one does not count.
fn thread_time() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

fn ipa_range(range: GfnRange) -> IpaRange {
    let end = range.end().min(PAGES).max(range.start().get() + 1);
    IpaRange::new(range.start().start(), (end - range.start().get()) << 12).expect("fits")
}

fn attrs(vcpu: &VcpuTypes, page: u64) -> LeafAttrs {
    let query = TypeQuery {
        gfn: Gfn::try_new(page).expect("small"),
        kind: SlotKind::Ram,
        flags: SlotFlags::empty(),
        noncoherent_dma: true,
    };
    let (mem, combine) = POLICY.encode(POLICY.leaf_type(&query, vcpu));
    LeafAttrs::new(Perms::RW, mem, combine)
}

impl Vm<'_> {
    /// Entries that all zaps together looked at.
    fn entries(&self) -> u64 {
        let root = self.table.read().expect("no panics").root().get();
        let walked = self.walked.lock().expect("no panics");
        walked
            .iter()
            .map(|(range, times)| times * walk(self.machine, root, 0, 0, *range))
            .sum()
    }

    fn fault(&self, vcpu: &VcpuTypes, page: u64) {
        let at = Ipa::new(page << 12);
        let window = IpaRange::new(at, 4096).expect("one page");
        let request = FaultRequest::new(at, window, Pa::new(page << 12), attrs(vcpu, page));
        let table = self.table.read().expect("no panics");
        // A leaf that another vCPU made with other registers stays; only private pages count.
        let _ = table
            .fault(&request.with_blocks(Blocks::Never))
            .expect("tables are there");
    }

    fn zap(&self, ranges: &[GfnRange], shared: bool) {
        let ranges = ranges.iter().filter(|r| r.start().get() < PAGES);
        add(&self.totals.passes, 1);
        for &range in ranges {
            let bytes = ipa_range(range);
            let key = (bytes.start().get(), bytes.end().get());
            *self
                .walked
                .lock()
                .expect("no panics")
                .entry(key)
                .or_default() += 1;
            let held = if shared {
                let table = self.table.read().expect("no panics");
                let start = Instant::now();
                table.zap(bytes).expect("inside");
                start.elapsed()
            } else {
                let mut table = self.table.write().expect("no panics");
                let start = Instant::now();
                table.zap_exclusive(bytes).expect("inside");
                start.elapsed()
            };
            add(&self.totals.held, held.as_nanos() as u64);
        }
    }

    /// Removes what an event of a vCPU made stale, in the strategy's way.
    fn carry_out(&self, strategy: Strategy, plan: &[GfnRange]) {
        if plan.is_empty() {
            return;
        }
        add(&self.totals.zaps, 1);
        let (start, worked) = (Instant::now(), thread_time());
        let all = [GfnRange::ALL];
        match strategy {
            Strategy::BlindAll | Strategy::CdEdges => self.zap(&all, false),
            Strategy::Serialised => self.queue(&all, false),
            Strategy::FineGrained => self.queue(plan, false),
            Strategy::FineShared => self.queue(plan, true),
        }
        add(&self.totals.spent, start.elapsed().as_nanos() as u64);
        add(&self.totals.worked, thread_time() - worked);
    }

    fn queue(&self, ranges: &[GfnRange], shared: bool) {
        if let Some(ticket) = self.list.insert(ranges) {
            self.list.complete(
                ticket,
                |batch| self.zap(batch, shared),
                std::thread::yield_now,
            );
        }
    }

    /// Counts private pages that still have a type of before.
    fn check(&self, vcpu: &VcpuTypes, private: [u64; 2]) {
        let table = self.table.read().expect("no panics");
        for page in private {
            if let Ok(found) = table.lookup(Ipa::new(page << 12))
                && let Entry::Leaf { attrs: has, .. } = found.entry
            {
                let wanted = attrs(vcpu, page);
                if (has.mem, has.combine) != (wanted.mem, wanted.combine) {
                    add(&self.totals.lost, 1);
                }
            }
        }
    }

    /// A register write. Blind zapping acts on it even under CD, as it acts on nothing else.
    fn msr(&self, strategy: Strategy, vcpu: &mut VcpuTypes, msr: Msr, value: u64) {
        let plan = if strategy == Strategy::BlindAll {
            let cd = std::mem::replace(&mut vcpu.cd, false);
            let plan = write_msr(&POLICY, true, vcpu, msr, value).expect("valid");
            vcpu.cd = cd;
            plan
        } else {
            write_msr(&POLICY, true, vcpu, msr, value).expect("valid")
        };
        self.carry_out(strategy, plan.ranges());
    }

    fn cd(&self, strategy: Strategy, vcpu: &mut VcpuTypes, cd: bool) {
        let plan = set_cd(&POLICY, true, vcpu, cd);
        self.carry_out(strategy, plan.ranges());
    }

    fn boot(&self, strategy: Strategy, me: u64) {
        // CD is set at reset.
        let mut vcpu = VcpuTypes::new(46, true);
        vcpu.cd = true;
        let private = [0xa0 + me, PAGES - 1 - me];
        for round in 0..ROUNDS {
            for n in 0..WORKING_SET {
                self.fault(&vcpu, 0x100 + (me * 0x8000 + n * 61) % (HOLE.0 - 0x100));
            }
            private.iter().for_each(|&p| self.fault(&vcpu, p));
            if round > 0 {
                self.cd(strategy, &mut vcpu, true);
                self.check(&vcpu, private);
                private.iter().for_each(|&p| self.fault(&vcpu, p));
            }
            self.program(strategy, &mut vcpu, round);
            self.check(&vcpu, private);
            self.cd(strategy, &mut vcpu, false);
            self.check(&vcpu, private);
        }
    }

    fn program(&self, strategy: Strategy, vcpu: &mut VcpuTypes, round: usize) {
        self.msr(strategy, vcpu, Msr::DefaultType, 0x6);
        for n in 0..11 {
            self.msr(
                strategy,
                vcpu,
                Msr::Fixed(n),
                if n < 2 { ALL_WB } else { 0 },
            );
        }
        self.msr(strategy, vcpu, Msr::VariableBase(0), 0x8000_0000);
        self.msr(strategy, vcpu, Msr::VariableMask(0), 0x3fff_8000_0800);
        if round > 0 {
            self.msr(strategy, vcpu, Msr::VariableBase(1), 0x8_0000_0000);
            self.msr(strategy, vcpu, Msr::VariableMask(1), 0x3ff8_0000_0800);
        }
        self.msr(strategy, vcpu, Msr::DefaultType, 0xc06);
    }
}

/// Entries of linked tables whose span meets the range.
fn walk(machine: &Lean, table: u64, level: u32, base: u64, (start, end): (u64, u64)) -> u64 {
    let shift = 12 + 9 * (3 - level);
    let mut seen = 0;
    for index in 0..512 {
        let at = base + ((index as u64) << shift);
        if at >= end || at + (1 << shift) <= start {
            continue;
        }
        seen += 1;
        let raw = machine.word(table, index);
        if level < 3 && raw & 7 != 0 && raw & 0x80 == 0 {
            seen += walk(
                machine,
                raw & 0xf_ffff_ffff_f000,
                level + 1,
                at,
                (start, end),
            );
        }
    }
    seen
}

#[derive(Clone, Debug)]
struct Row {
    vcpus: u64,
    strategy: Strategy,
    zaps: u64,
    passes: u64,
    entries: u64,
    held_ms: f64,
    spent_ms: f64,
    worked_ms: f64,
    wall_ms: f64,
    lost: u64,
}

fn run(strategy: Strategy, vcpus: u64) -> Row {
    let machine = Lean::new(PAGES as usize / 512 + 64);
    let format = Ept::new(&EptConfig {
        output_bits: 46,
        execute_only: Offered::Yes,
        gigabyte: Offered::Yes,
        access_dirty: Offered::No,
    });
    let mut table = Stage2::new(format.expect("valid"), &machine, 1).expect("memory");
    let start_type = attrs(
        &VcpuTypes {
            cd: true,
            ..VcpuTypes::new(46, true)
        },
        0x100,
    );
    for (start, end) in [(0, HOLE.0), (HOLE.1, PAGES)] {
        let (at, size) = (start << 12, (end - start) << 12);
        let request = MapRequest::new(Ipa::new(at), size, Pa::new(at), start_type);
        let _ = table
            .map(&request.with_blocks(Blocks::Never))
            .expect("memory");
    }
    let vm = Vm {
        table: RwLock::new(table),
        machine: &machine,
        list: ZapList::new(),
        totals: Totals::default(),
        walked: Mutex::default(),
    };
    let barrier = Barrier::new(vcpus as usize);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for me in 0..vcpus {
            let (vm, barrier) = (&vm, &barrier);
            scope.spawn(move || {
                barrier.wait();
                vm.boot(strategy, me);
            });
        }
    });
    let wall_ms = start.elapsed().as_secs_f64() * 1e3;
    let t = |a: &AtomicU64| a.load(Ordering::Relaxed);
    Row {
        vcpus,
        strategy,
        zaps: t(&vm.totals.zaps),
        passes: t(&vm.totals.passes),
        entries: vm.entries(),
        held_ms: t(&vm.totals.held) as f64 / 1e6,
        spent_ms: t(&vm.totals.spent) as f64 / 1e6,
        worked_ms: t(&vm.totals.worked) as f64 / 1e6,
        wall_ms,
        lost: t(&vm.totals.lost),
    }
}

fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| vCPUs | strategy | zaps asked | passes | entries visited | lock held, ms | CPU time of all vCPUs, ms | spent by all vCPUs, ms | wall, ms | fewer entries than blind | less CPU time | less time spent | lost zaps |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for r in rows {
        let blind = rows
            .iter()
            .find(|b| b.vcpus == r.vcpus)
            .expect("first of its group");
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {:.3} | {:.3} | {:.3} | {:.1} | {:.0}× | {:.0}× | {:.0}× | {} |",
            r.vcpus,
            r.strategy.name(),
            r.zaps,
            r.passes,
            r.entries,
            r.held_ms,
            r.worked_ms,
            r.spent_ms,
            r.wall_ms,
            blind.entries as f64 / r.entries.max(1) as f64,
            blind.worked_ms / r.worked_ms.max(1e-6),
            blind.spent_ms / r.spent_ms.max(1e-6),
            r.lost,
        );
    }
    out
}

/// Bars on a logarithmic scale: time spent by all vCPUs.
fn svg(rows: &[Row]) -> String {
    const COLOURS: [&str; 5] = ["#7a0019", "#c8553d", "#e0a458", "#5b8e7d", "#1d4e89"];
    let y = |ms: f64| 340.0 - (ms.max(1e-3).log10() + 3.0) * 42.0;
    let mut out = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 760 420\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"760\" height=\"420\" fill=\"white\"/>\n<text x=\"380\" y=\"22\" text-anchor=\"middle\" font-size=\"15\">Time spent zapping by all vCPUs (ms, logarithmic)</text>\n",
    );
    for power in -3..=4 {
        let (at, label) = (y(10f64.powi(power)), 10f64.powi(power));
        let _ = writeln!(
            out,
            "<line x1=\"60\" x2=\"740\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"54\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            at + 4.0
        );
    }
    for (n, r) in rows.iter().enumerate() {
        let (group, bar) = (n / 5, n % 5);
        let x = 75 + group * 170 + bar * 29;
        let top = y(r.spent_ms);
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{top:.1}\" width=\"26\" height=\"{:.1}\" fill=\"{}\"><title>{} vCPUs, {}: {:.3} ms</title></rect>",
            340.0 - top,
            COLOURS[bar],
            r.vcpus,
            r.strategy.name(),
            r.spent_ms
        );
        if bar == 0 {
            let _ = writeln!(
                out,
                "<text x=\"{}\" y=\"358\" text-anchor=\"middle\">{} vCPUs</text>",
                x + 71,
                r.vcpus
            );
        }
    }
    for (n, s) in Strategy::EACH.iter().enumerate() {
        let x = 40 + n * 145;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"385\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"{}\" y=\"395\">{}</text>",
            COLOURS[n],
            x + 17,
            s.name()
        );
    }
    out.push_str("</svg>\n");
    out
}

/// The page with its table, the lines that begin with a bar behind the picture, replaced.
fn with_table(page: &str, table: &str) -> String {
    let (before, behind) = page.split_once("zap.svg)\n").unwrap_or((page, ""));
    let rest = behind
        .trim_start()
        .lines()
        .skip_while(|l| l.starts_with('|'));
    let rest: String = rest.map(|line| format!("{line}\n")).collect();
    format!("{before}zap.svg)\n\n{table}{rest}")
}

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let counts: &[u64] = if args.iter().any(|a| a == "--quick") {
        &[2]
    } else {
        &[2, 4, 8, 16]
    };
    let rows: Vec<Row> = counts
        .iter()
        .flat_map(|&n| Strategy::EACH.map(|s| run(s, n)))
        .collect();
    let text = table(&rows);
    println!("{text}");
    if let Some(at) = args.iter().position(|a| a == "--write")
        && let Some(dir) = args.get(at + 1)
    {
        std::fs::write(format!("{dir}/zap.svg"), svg(&rows))?;
        let page = format!("{dir}/zap.md");
        std::fs::write(&page, with_table(&std::fs::read_to_string(&page)?, &text))?;
    }
    assert!(rows.iter().all(|r| r.lost == 0), "a zap was lost");
    Ok(())
}
