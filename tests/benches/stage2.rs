//! The page-table core beside its peers: the same work, the same table memory, one process.
//!
//! `cargo bench -p ravelin-tests --bench stage2` runs it under criterion; with a path behind
//! `--`, it writes tables and a plot there. `ROW=name CASE=name` runs one measurement once, for
//! `valgrind --tool=callgrind --toggle-collect='*measured*'`; `COUNTS=1` only counts what is asked
//! of the machine.

#![expect(
    unreachable_pub,
    missing_docs,
    clippy::cast_possible_truncation,
    reason = "a program for 64-bit hosts, no library"
)]

mod stage2_memory;
mod stage2_ours;
mod stage2_peers;
mod stage2_report;

use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criterion::Criterion;
use stage2_memory::Machine;
use stage2_ours::{
    Faults, Lookup, MapBlocks, MapEach, MapLargest, MapOver, MapPages, MapRandom, MapReadOnly,
    Protect, Split, Unmap, Zap, apart, disjoint, half, largest, same, timed,
};
use stage2_peers::{AarchPaging, LongMode, Multiarch};
use stage2_report::{Report, Row};

pub const GIB: u64 = 1 << 30;
pub const BLOCK: u64 = 2 << 20;
pub const PAGE: u64 = 4096;
pub const PAGES: u64 = GIB / PAGE;
/// Empty tables that a row takes whose single run is too short for a clock: no more than a
/// first-level cache holds.
pub const EMPTY_TABLES: u64 = 16;

/// The only frame that instruction counts include.
#[inline(never)]
pub fn measured<T>(work: impl FnOnce() -> T) -> T {
    black_box(work())
}

/// One case of a row: prepares, then measures.
pub type Case = fn() -> Duration;

pub fn time<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    black_box(measured(work));
    start.elapsed()
}

/// Every page once, each far from the one before: a permutation by an odd multiplier.
pub fn shuffled() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|n| (n.wrapping_mul(0x9e37_79b1) & (PAGES - 1)) * PAGE)
}

/// The floor: that many descriptors into zeroed tables, nothing else.
fn floor(count: usize) -> Duration {
    let words = Machine::fresh().zeroed(count);
    time(|| {
        let mut raw = (4 * GIB) | 0x7ff;
        for word in words {
            word.store(raw, Ordering::Relaxed);
            raw += PAGE;
        }
    })
}

/// The floor of a look-up: reading a descriptor for each page, in the same order.
fn read_floor() -> Duration {
    let words = Machine::fresh().zeroed(PAGES as usize);
    time(|| {
        let index = |at: u64| (black_box(at) / PAGE) as usize % words.len();
        shuffled().fold(0, |sum: u64, at| {
            sum.wrapping_add(words[index(at)].load(Ordering::Relaxed))
        })
    })
}

/// Every entry of a full gigabyte: the root's, its table's, the pages.
const EVERY: u64 = 1 + 512 + PAGES;
/// A page a call into empty tables: the first call finds nothing there, the next learns the table
/// of the gigabyte from the root's entry, the first in each table of pages reads one entry more
/// and all others one and their own.
const WALKS: u64 = 1 + 1 + 511 + (PAGES - 512) * 2;
/// The same in order, where the table of the last page is known.
const CALLS: u64 = 1 + 1 + 511 + (PAGES - 512);

fn map_rows() -> Vec<Row> {
    let (ours, floored) = ("ours", "floor");
    let (aarch, multi, long) = ("aarch64-paging", "multiarch", "x86_64");
    vec![
        Row::of::<MapPages>("map-4k", PAGES)
            .at_least(1)
            .case(ours, timed::<MapPages>)
            .case(aarch, || AarchPaging::map(PAGE))
            .case(multi, || Multiarch::map(PAGE))
            .case(long, LongMode::map_pages)
            .case(floored, || floor(262_144)),
        Row::of::<MapBlocks>("map-2m", 512)
            .at_least(1)
            .case(ours, timed::<MapBlocks>)
            .case(aarch, || AarchPaging::map(BLOCK))
            .case(multi, || Multiarch::map(BLOCK))
            .case(long, LongMode::map_blocks)
            .case(floored, || floor(512)),
        Row::of::<MapLargest>("map-largest", EMPTY_TABLES)
            .at_least(1)
            .case(ours, largest)
            .case(aarch, AarchPaging::largest)
            .case(multi, Multiarch::largest)
            .case(long, LongMode::largest)
            .case(floored, || floor(EMPTY_TABLES as usize)),
        Row::of::<MapEach>("map-4k-single", PAGES)
            .at_least(CALLS)
            .case(ours, timed::<MapEach>)
            .case(aarch, AarchPaging::map_single)
            .case(multi, Multiarch::map_single)
            .case(long, LongMode::map_pages),
        Row::of::<MapRandom>("map-4k-random", PAGES)
            .at_least(WALKS)
            .case(ours, timed::<MapRandom>)
            .case(aarch, AarchPaging::faults)
            .case(multi, Multiarch::faults)
            .case(long, LongMode::faults),
        Row::of::<Faults>("fault-4k", PAGES)
            .at_least(WALKS)
            .case(ours, timed::<Faults>)
            .case(aarch, AarchPaging::faults)
            .case(multi, Multiarch::faults)
            .case(long, LongMode::faults),
    ]
}

fn change_rows() -> Vec<Row> {
    let ours = "ours";
    let (aarch, multi, long) = ("aarch64-paging", "multiarch", "x86_64");
    vec![
        Row::of::<Unmap>("unmap", PAGES)
            .at_least(EVERY)
            .case(ours, timed::<Unmap>)
            .case(aarch, AarchPaging::unmap)
            .case(multi, Multiarch::unmap)
            .case(long, LongMode::unmap),
        Row::of::<Protect>("protect", PAGES)
            .at_least(EVERY)
            .case(ours, timed::<Protect>)
            .case(aarch, AarchPaging::protect)
            .case(multi, Multiarch::protect)
            .case(long, LongMode::protect),
        Row::of::<MapOver>("map-over", PAGES)
            .at_least(EVERY)
            .case(ours, timed::<MapOver>),
        Row::of::<MapReadOnly>("map-read-only", PAGES)
            .at_least(EVERY)
            .case(ours, timed::<MapReadOnly>),
        Row::of::<Zap>("zap", PAGES)
            .at_least(EVERY)
            .case(ours, timed::<Zap>)
            .case(aarch, AarchPaging::unmap),
        Row::of::<Split>("split-512", PAGES)
            .at_least(1 + 512)
            .case(ours, timed::<Split>)
            .case(aarch, AarchPaging::split),
        Row::of::<Lookup>("lookup", PAGES)
            .at_least(1 + 2 * PAGES)
            .case(ours, timed::<Lookup>)
            .case(aarch, AarchPaging::lookup)
            .case(multi, Multiarch::lookup)
            .case(long, LongMode::lookup)
            .case("floor", read_floor),
    ]
}

fn thread_rows() -> Vec<Row> {
    [
        ("threads-1-half", PAGES / 2, half as Case),
        ("threads-2-disjoint", PAGES, disjoint),
        ("threads-2-apart", PAGES, apart),
        ("threads-2-same", PAGES, same),
    ]
    .map(|(name, entries, case)| Row::uncounted(name, entries).case("ours", case))
    .into()
}

fn rows() -> Vec<Row> {
    [map_rows(), change_rows(), thread_rows()]
        .into_iter()
        .flatten()
        .collect()
}

/// Few samples of little time: all rows together take a minute or two.
fn harness() -> Criterion {
    Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(30))
        .measurement_time(Duration::from_millis(400))
        .without_plots()
}

fn main() {
    let rows = rows();
    if let (Ok(row), Ok(case)) = (std::env::var("ROW"), std::env::var("CASE")) {
        let chosen = rows
            .iter()
            .find(|r| r.name == row)
            .and_then(|r| r.find(&case));
        println!("{:?}", chosen.map(|case| case()));
        return;
    }
    if std::env::var("COUNTS").is_ok() {
        println!("{}", Report::count(&rows));
        return;
    }
    let report = Report::measure(&rows, harness());
    println!("{report}");
    if let Some(folder) = std::env::args().skip(1).find(|arg| !arg.starts_with('-')) {
        report
            .write(Path::new(&folder))
            .expect("the folder can be written");
    }
}
