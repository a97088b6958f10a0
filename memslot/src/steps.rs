//! Work that grows with a VM's memory, in steps.
//!
//! The caller says between two steps whether to go on: a hypervisor has other work when an interrupt
//! waits. What is left is remembered with what it belongs to (a slot's lock, a vCPU, a VM that ends),
//! in a state that every other operation knows, so that whoever repeats the call continues it.

use crate::addr::GfnRange;

/// How far an operation got that may be cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// All is done.
    Done,
    /// Something is left: repeat the call.
    More,
}

/// How much of an operation is done in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Everything.
    Whole,
    /// One step.
    Step,
}

/// Frames whose memory is cleaned, or whose leaves are taken away, in one step: 2 MiB, a block.
pub(crate) const FRAMES: u64 = 512;
/// Frames that are mapped in one step where nothing is mapped and nothing is cleaned: 64 MiB.
const FRESH_FRAMES: u64 = 32 * FRAMES;
/// The same where blocks are possible: 1 GiB, the largest of them.
const BLOCK_FRAMES: u64 = 512 * FRAMES;

/// What the mapping of the next frames costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cost {
    /// Leaves are replaced, or memory is cleaned.
    Maintenance,
    /// A store for each frame.
    Pages,
    /// A store for each block.
    Blocks,
}

impl Extent {
    /// The first part of `rest`, up to a boundary of the step's size.
    pub(crate) fn first(self, rest: GfnRange, cost: Cost) -> GfnRange {
        let frames = match cost {
            Cost::Maintenance => FRAMES,
            Cost::Pages => FRESH_FRAMES,
            Cost::Blocks => BLOCK_FRAMES,
        };
        let start = rest.start().get();
        let end = (start - start % frames + frames).min(rest.end());
        match (self, GfnRange::new(start, end)) {
            (Self::Step, Some(part)) => part,
            _ => rest,
        }
    }

    /// The last part of `rest`, from a boundary of a block on.
    pub(crate) fn last(self, rest: GfnRange) -> GfnRange {
        let last = rest.end() - 1;
        let start = (last - last % FRAMES).max(rest.start().get());
        match (self, GfnRange::new(start, rest.end())) {
            (Self::Step, Some(part)) => part,
            _ => rest,
        }
    }
}

/// Repeats `step` for as long as something is left and `go_on` allows it. The first step's error is
/// the caller's; a later one's comes again when the call is repeated, which has changed nothing then.
pub(crate) fn repeat<E>(
    mut go_on: impl FnMut() -> bool,
    mut step: impl FnMut() -> Result<Progress, E>,
) -> Result<Progress, E> {
    let mut progress = step()?;
    while progress == Progress::More && go_on() {
        match step() {
            Ok(next) => progress = next,
            Err(_) => break,
        }
    }
    Ok(progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GfnRange {
        GfnRange::new(start, end).unwrap()
    }

    #[test]
    fn steps_end_at_boundaries_of_their_size() {
        let first = |start, end, cost| Extent::Step.first(range(start, end), cost);
        assert_eq!(first(3, 2000, Cost::Maintenance), range(3, 512));
        assert_eq!(first(512, 2000, Cost::Maintenance), range(512, 1024));
        assert_eq!(first(1536, 2000, Cost::Maintenance), range(1536, 2000));
        assert_eq!(first(3, 40_000, Cost::Pages), range(3, 16_384));
        assert_eq!(first(3, 1 << 20, Cost::Blocks), range(3, 1 << 18));
        assert_eq!(
            Extent::Whole.first(range(3, 40_000), Cost::Pages),
            range(3, 40_000)
        );
    }

    #[test]
    fn steps_backwards_start_at_boundaries() {
        let last = |start, end| Extent::Step.last(range(start, end));
        assert_eq!(last(3, 2000), range(1536, 2000));
        assert_eq!(last(3, 1536), range(1024, 1536));
        assert_eq!(last(3, 512), range(3, 512));
        assert_eq!(Extent::Whole.last(range(3, 2000)), range(3, 2000));
    }

    #[test]
    fn steps_are_repeated_until_all_is_done_or_something_is_more_urgent() {
        let run = |urgent_after: u32, fails_at: u32| {
            let (mut asked, mut steps) = (0, 0);
            let go_on = || {
                asked += 1;
                asked <= urgent_after
            };
            let progress = repeat(go_on, || {
                steps += 1;
                match steps {
                    n if n == fails_at => Err(n),
                    5 => Ok(Progress::Done),
                    _ => Ok(Progress::More),
                }
            });
            (progress, steps)
        };
        assert_eq!(run(9, 9), (Ok(Progress::Done), 5));
        assert_eq!(run(2, 9), (Ok(Progress::More), 3));
        assert_eq!(run(9, 1), (Err(1), 1));
        assert_eq!(run(9, 3), (Ok(Progress::More), 3));
    }
}
