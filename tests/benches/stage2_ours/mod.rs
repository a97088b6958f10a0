//! The operations under test, on any memory: timed on one machine, counted on another.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use stage2::{
    ArmStage2, Blocks, FaultRequest, Ipa, IpaRange, LeafAttrs, Level, MapRequest, Pa, Perms,
    Platform, Stage2,
};

use crate::stage2_memory::{Counted, Counts, Machine, arm, take_from_part};
use crate::{EMPTY_TABLES, GIB, PAGE, PAGES, shuffled, time};

type Space<P> = Stage2<ArmStage2, P>;
type Shared = Space<&'static Machine>;

fn request(ipa: u64, size: u64, blocks: Blocks) -> MapRequest {
    let attrs = LeafAttrs::normal(Perms::RWX);
    MapRequest::new(Ipa::new(ipa), size, Pa::new(4 * GIB + ipa), attrs).with_blocks(blocks)
}

fn gigabyte() -> IpaRange {
    IpaRange::new(Ipa::new(0), GIB).expect("not empty")
}

/// Work on a space, and what is mapped before.
pub trait Work {
    const BEFORE: Option<Blocks> = Some(Blocks::Never);

    fn run<P: Platform<Context = ()>>(space: &mut Space<P>);
}

fn prepared<W: Work, P: Platform<Context = ()>>(platform: P) -> Space<P> {
    let mut space = Stage2::new(arm(), platform, ()).expect("a root fits");
    if let Some(blocks) = W::BEFORE {
        let all = request(0, GIB, blocks);
        space.map(&all).expect("memory suffices");
    }
    space
}

/// How long it takes.
pub fn timed<W: Work>() -> Duration {
    let mut space = prepared::<W, _>(Machine::fresh());
    time(|| W::run(&mut space))
}

/// What it asks of the machine.
pub fn counted<W: Work>() -> Counts {
    let mut space = prepared::<W, _>(Counted::fresh());
    let before = space.platform().counts.clone();
    W::run(&mut space);
    space.platform().counts.since(&before)
}

fn map<P: Platform<Context = ()>>(space: &mut Space<P>, blocks: Blocks) {
    let all = request(0, GIB, blocks);
    space.map(black_box(&all)).expect("memory suffices");
}

pub struct MapPages;

impl Work for MapPages {
    const BEFORE: Option<Blocks> = None;
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        map(space, Blocks::Never);
    }
}

/// The largest block into an empty table, of which there are as many as a clock needs.
pub fn largest() -> Duration {
    let machine = Machine::fresh();
    let mut spaces: Vec<_> = (0..EMPTY_TABLES).map(|_| empty(machine)).collect();
    time(|| {
        for space in &mut spaces {
            MapLargest::run(space);
        }
    })
}

pub struct MapBlocks;

impl Work for MapBlocks {
    const BEFORE: Option<Blocks> = None;
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        map(space, Blocks::UpTo(Level::L2));
    }
}

pub struct MapLargest;

impl Work for MapLargest {
    const BEFORE: Option<Blocks> = None;
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        map(space, Blocks::Largest);
    }
}

/// Pages in a row, one call each.
pub struct MapEach;

impl Work for MapEach {
    const BEFORE: Option<Blocks> = None;
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        for page in 0..PAGES {
            let one = request(page * PAGE, PAGE, Blocks::Largest);
            space.map(black_box(&one)).expect("memory suffices");
        }
    }
}

/// Pages all over the place, one exclusive call each.
pub struct MapRandom;

impl Work for MapRandom {
    const BEFORE: Option<Blocks> = None;
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        for at in shuffled() {
            let one = request(at, PAGE, Blocks::Never);
            space.map(black_box(&one)).expect("memory suffices");
        }
    }
}

/// The same as faults, which may run beside each other.
pub struct Faults;

impl Work for Faults {
    const BEFORE: Option<Blocks> = None;
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        shuffled().for_each(|at| fault_page(space, at));
    }
}

/// Other memory over all pages, each of which has to be broken.
pub struct MapOver;

impl Work for MapOver {
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        let other = MapRequest {
            pa: Pa::new(8 * GIB),
            ..request(0, GIB, Blocks::Never)
        };
        space.map(black_box(&other)).expect("memory suffices");
    }
}

/// The same memory with fewer permissions, which needs no break.
pub struct MapReadOnly;

impl Work for MapReadOnly {
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        let less = MapRequest {
            attrs: LeafAttrs::normal(Perms::READ | Perms::EXEC),
            ..request(0, GIB, Blocks::Never)
        };
        space.map(black_box(&less)).expect("memory suffices");
    }
}

pub struct Unmap;

impl Work for Unmap {
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        space.unmap(gigabyte()).expect("whole pages");
    }
}

pub struct Zap;

impl Work for Zap {
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        space.zap_exclusive(gigabyte()).expect("whole pages");
    }
}

pub struct Protect;

impl Work for Protect {
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        space.write_protect(gigabyte()).expect("whole pages");
    }
}

pub struct Split;

impl Work for Split {
    const BEFORE: Option<Blocks> = Some(Blocks::UpTo(Level::L2));
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        space
            .split(gigabyte(), Level::PAGE)
            .expect("memory suffices");
    }
}

pub struct Lookup;

impl Work for Lookup {
    fn run<P: Platform<Context = ()>>(space: &mut Space<P>) {
        let mut sum = 0;
        for at in shuffled() {
            if let Ok(found) = space.lookup(Ipa::new(black_box(at)))
                && let stage2::Entry::Leaf { pa, .. } = found.entry
            {
                sum += pa.get();
            }
        }
        black_box(sum);
    }
}

fn fault_page<P: Platform<Context = ()>>(space: &Space<P>, at: u64) {
    let attrs = LeafAttrs::normal(Perms::RWX);
    let request = FaultRequest::new(Ipa::new(at), gigabyte(), Pa::new(4 * GIB), attrs)
        .with_blocks(Blocks::Never)
        .on_missing();
    space.fault(black_box(&request)).expect("memory suffices");
}

fn empty(machine: &'static Machine) -> Shared {
    Stage2::new(arm(), machine, ()).expect("a root fits")
}

fn fault_half(space: &Shared, half: u64) {
    shuffled()
        .filter(|at| at / (GIB / 2) == half)
        .for_each(|at| fault_page(space, at));
}

/// Two threads, from the start of the earlier to the end of the later.
fn two_threads(work: impl Fn(u64) + Sync) -> Duration {
    let ready = Barrier::new(2);
    let timed = &|n: u64| {
        take_from_part(n as usize);
        ready.wait();
        let start = Instant::now();
        work(n);
        (start, Instant::now())
    };
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|n| scope.spawn(move || timed(n)));
        let times = threads.map(|thread| thread.join().expect("no case panics"));
        let [(one, its_end), (other, end)] = times;
        its_end.max(end).duration_since(one.min(other))
    })
}

/// What each of two threads does, on one.
pub fn half() -> Duration {
    let space = empty(Machine::fresh());
    time(|| fault_half(&space, 0))
}

/// Two threads in one space, half of it each.
pub fn disjoint() -> Duration {
    let space = empty(Machine::fresh());
    two_threads(|n| fault_half(&space, n))
}

/// Two threads that share nothing at all: what the machine has to give.
pub fn apart() -> Duration {
    let spaces = Machine::fresh_pair().map(empty);
    two_threads(|n| fault_half(&spaces[n as usize], n))
}

/// Two threads on the same pages.
pub fn same() -> Duration {
    let space = empty(Machine::fresh());
    two_threads(|_| shuffled().for_each(|at| fault_page(&space, at)))
}
