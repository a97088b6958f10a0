//! The page-table core beside its peers: the same work, the same table memory, one process.
//!
//! `cargo bench -p ravelin-tests --bench stage2` prints a table; with a path behind `--`, it
//! writes the table and a plot there. `ROW=name CASE=name` runs one measurement once, for
//! `valgrind --tool=callgrind --toggle-collect='*measured*'`.

#![expect(
    unreachable_pub,
    missing_docs,
    clippy::cast_possible_truncation,
    reason = "a program for 64-bit hosts, no library"
)]

mod stage2_memory;
mod stage2_peers;
mod stage2_report;

use std::hint::black_box;
use std::time::{Duration, Instant};

use stage2::{
    Blocks, FaultRequest, Ipa, IpaRange, LeafAttrs, Level, MapRequest, Pa, Perms, Stage2,
};
use stage2_memory::{Machine, arm};
use stage2_peers::{AarchPaging, Multiarch};
use stage2_report::{Report, Row};

pub const GIB: u64 = 1 << 30;
pub const BLOCK: u64 = 2 << 20;
pub const PAGE: u64 = 4096;
pub const PAGES: u64 = GIB / PAGE;
const RUNS: u32 = 15;

/// The only frame that instruction counts include.
#[inline(never)]
pub fn measured<T>(work: impl FnOnce() -> T) -> T {
    black_box(work())
}

/// One case of a row: prepares, then measures.
pub type Case = fn() -> Duration;

fn time<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    black_box(measured(work));
    start.elapsed()
}

/// The best of some runs: noise only ever adds.
fn best(case: Case) -> Duration {
    (0..RUNS).map(|_| case()).min().unwrap_or_default()
}

type Space = Stage2<stage2::ArmStage2, &'static Machine>;

fn space() -> Space {
    let machine = Machine::fresh();
    Stage2::new(arm(), machine, ()).expect("a root fits")
}

fn request(ipa: u64, size: u64, blocks: Blocks) -> MapRequest {
    let attrs = LeafAttrs::normal(Perms::RWX);
    MapRequest::new(Ipa::new(ipa), size, Pa::new(4 * GIB + ipa), attrs).with_blocks(blocks)
}

fn gigabyte() -> IpaRange {
    IpaRange::new(Ipa::new(0), GIB).expect("not empty")
}

fn mapped(blocks: Blocks) -> Space {
    let mut space = space();
    space
        .map(&request(0, GIB, blocks))
        .expect("memory suffices");
    space
}

fn ours_map(blocks: Blocks) -> Duration {
    let mut space = space();
    let request = request(0, GIB, blocks);
    time(|| space.map(black_box(&request)))
}

fn ours_map_single() -> Duration {
    let mut space = space();
    time(|| {
        for page in 0..PAGES {
            let one = request(page * PAGE, PAGE, Blocks::Largest);
            space.map(black_box(&one)).expect("memory suffices");
        }
    })
}

fn ours_unmap() -> Duration {
    let mut space = mapped(Blocks::Never);
    time(|| space.unmap(gigabyte()))
}

fn ours_zap() -> Duration {
    let mut space = mapped(Blocks::Never);
    time(|| space.zap_exclusive(gigabyte()))
}

fn ours_protect() -> Duration {
    let mut space = mapped(Blocks::Never);
    time(|| space.write_protect(gigabyte()))
}

fn ours_split() -> Duration {
    let mut space = mapped(Blocks::UpTo(Level::L2));
    time(|| space.split(gigabyte(), Level::PAGE))
}

/// Pages in an order that no prefetcher guesses: a permutation by an odd multiplier.
pub fn shuffled() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|n| (n.wrapping_mul(0x9e37_79b1) & (PAGES - 1)) * PAGE)
}

fn ours_lookup() -> Duration {
    let space = mapped(Blocks::Never);
    time(|| {
        let mut sum = 0;
        for at in shuffled() {
            if let Ok(found) = space.lookup(Ipa::new(black_box(at)))
                && let stage2::Entry::Leaf { pa, .. } = found.entry
            {
                sum += pa.get();
            }
        }
        sum
    })
}

fn fault_page(space: &Space, at: u64) {
    let attrs = LeafAttrs::normal(Perms::RWX);
    let request = FaultRequest::new(Ipa::new(at), gigabyte(), Pa::new(4 * GIB), attrs)
        .with_blocks(Blocks::Never);
    black_box(space.fault(black_box(&request))).expect("memory suffices");
}

fn ours_faults() -> Duration {
    let space = space();
    time(|| shuffled().for_each(|at| fault_page(&space, at)))
}

/// Two threads; with `shift` 0 both fault the same pages, otherwise one half each.
fn two_threads(disjoint: bool) -> Duration {
    let space = space();
    let half = |n: u64| {
        let space = &space;
        move || {
            for at in shuffled().filter(|at| !disjoint || at / (GIB / 2) == n) {
                fault_page(space, at);
            }
        }
    };
    time(|| {
        std::thread::scope(|scope| {
            scope.spawn(half(0));
            scope.spawn(half(1));
        });
    })
}

/// One thread doing what each of the two does, for the ratio.
fn half_faults() -> Duration {
    let space = space();
    time(|| {
        shuffled()
            .filter(|at| at / (GIB / 2) == 0)
            .for_each(|at| fault_page(&space, at))
    })
}

/// The floor: that many descriptors into zeroed tables, nothing else.
fn floor(count: usize) -> Duration {
    let machine = Machine::fresh();
    let tables = machine.zeroed(count);
    time(|| {
        let mut raw = (4 * GIB) | 0x7ff;
        for word in tables {
            word.store(raw, std::sync::atomic::Ordering::Relaxed);
            raw += PAGE;
        }
    })
}

fn rows() -> Vec<Row> {
    let row = |name, entries, cases: &[(&'static str, Case)]| Row::new(name, entries, cases);
    let pages = PAGES;
    vec![
        row(
            "map-4k",
            pages,
            &[
                ("ours", || ours_map(Blocks::Never)),
                ("aarch64-paging", || AarchPaging::map(PAGE)),
                ("multiarch", || Multiarch::map(PAGE)),
                ("floor", || floor(262_144)),
            ],
        ),
        row(
            "map-2m",
            512,
            &[
                ("ours", || ours_map(Blocks::UpTo(Level::L2))),
                ("aarch64-paging", || AarchPaging::map(BLOCK)),
                ("multiarch", || Multiarch::map(BLOCK)),
                ("floor", || floor(512)),
            ],
        ),
        row(
            "map-largest",
            1,
            &[
                ("ours", || ours_map(Blocks::Largest)),
                ("aarch64-paging", || AarchPaging::map(GIB)),
                ("multiarch", || Multiarch::map(GIB)),
                ("floor", || floor(1)),
            ],
        ),
        row(
            "map-4k-single",
            pages,
            &[
                ("ours", ours_map_single),
                ("aarch64-paging", AarchPaging::map_single),
                ("multiarch", Multiarch::map_single),
            ],
        ),
        row(
            "unmap",
            pages,
            &[
                ("ours", ours_unmap),
                ("aarch64-paging", AarchPaging::unmap),
                ("multiarch", Multiarch::unmap),
            ],
        ),
        row(
            "lookup",
            pages,
            &[
                ("ours", ours_lookup),
                ("aarch64-paging", AarchPaging::lookup),
                ("multiarch", Multiarch::lookup),
            ],
        ),
        row(
            "fault-4k",
            pages,
            &[
                ("ours", ours_faults),
                ("aarch64-paging", AarchPaging::faults),
                ("multiarch", Multiarch::faults),
            ],
        ),
        row(
            "protect",
            pages,
            &[
                ("ours", ours_protect),
                ("aarch64-paging", AarchPaging::protect),
                ("multiarch", Multiarch::protect),
            ],
        ),
        row(
            "zap",
            pages,
            &[("ours", ours_zap), ("aarch64-paging", AarchPaging::unmap)],
        ),
        row(
            "split-512",
            pages,
            &[("ours", ours_split), ("aarch64-paging", AarchPaging::split)],
        ),
        row("threads-1-half", pages / 2, &[("ours", half_faults)]),
        row(
            "threads-2-disjoint",
            pages,
            &[("ours", || two_threads(true))],
        ),
        row("threads-2-same", pages, &[("ours", || two_threads(false))]),
    ]
}

fn main() {
    let rows = rows();
    if let (Ok(row), Ok(case)) = (std::env::var("ROW"), std::env::var("CASE")) {
        let chosen = rows
            .iter()
            .find(|r| r.name == row)
            .and_then(|r| r.case(&case));
        println!("{:?}", chosen.map(|case| case()));
        return;
    }
    let report = Report::measure(&rows, best);
    println!("{report}");
    if let Some(folder) = std::env::args().skip(1).find(|arg| !arg.starts_with('-')) {
        report
            .write(std::path::Path::new(&folder))
            .expect("the folder can be written");
    }
}
