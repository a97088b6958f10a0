//! One vCPU zaps for all that wait.
//!
//! Contention, not the number of zaps, is what zapping costs: vCPUs that change the same
//! registers one after the other want the same ranges removed at the same time. So each queues
//! its ranges; whoever finds no pass under way starts one with all that is queued, sorted and
//! joined, and the rest wait.
//!
//! Invariant: **a caller returns only after a pass that started after its insertion has
//! finished.** A pass takes the whole queue in the critical section that numbers it, so the
//! number of the next pass, read in the section of the insertion, is a ticket for one's ranges.
//! A pass is declared finished in the same section that lets the next one start. Nobody clears
//! what another has queued: overflow replaces the contents by the one range that covers them,
//! and their owners keep waiting.
//!
//! | state of the word | queue | who may start a pass |
//! |---|---|---|
//! | idle, `n` passes finished | empty or not | anyone whose ticket is above `n` |
//! | pass `n + 1` under way | what came since it started | nobody |

use crate::addr::GfnRange;
#[cfg(not(loom))]
use crate::sync::spin_hint;
use crate::sync::{AtomicU64, Mutex, Ordering};

/// Ranges that can wait. More collapse into one that covers everything.
pub const CAPACITY: usize = 16;

/// The pass that will have removed what its holder queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "ranges are removed only by passing the ticket to `ZapList::complete`"]
pub struct Ticket(u64);

#[derive(Debug)]
struct Queue {
    ranges: [GfnRange; CAPACITY],
    len: usize,
}

/// The ranges that wait to be zapped, and the pass under way.
#[derive(Debug)]
pub struct ZapList {
    queue: Mutex<Queue>,
    /// Bits 63:1: passes finished; bit 0: one is under way. Written under the queue's lock.
    passes: AtomicU64,
    #[cfg(loom)]
    idle: crate::sync::Condvar,
}

impl Default for ZapList {
    fn default() -> Self {
        Self::new()
    }
}

impl ZapList {
    /// Nothing queued.
    #[must_use]
    pub fn new() -> Self {
        let queue = Queue {
            ranges: [GfnRange::ALL; CAPACITY],
            len: 0,
        };
        Self {
            queue: Mutex::new(queue),
            passes: AtomicU64::new(0),
            #[cfg(loom)]
            idle: crate::sync::Condvar::new(),
        }
    }

    /// Queues `ranges`; `None` if there are none.
    pub fn insert(&self, ranges: &[GfnRange]) -> Option<Ticket> {
        if ranges.is_empty() {
            return None;
        }
        let mut queue = self.queue.lock();
        for &range in ranges {
            queue.add(range);
        }
        let (finished, under_way) = self.state();
        // A pass under way has taken its ranges already; ours are for the one after it.
        Some(Ticket(finished + 1 + u64::from(under_way)))
    }

    /// Waits until the ticket's pass has finished, or does it.
    ///
    /// `zap` removes the leaves of ascending, disjoint ranges and returns when no CPU and no
    /// importer can use them any more. `relax` is called while another vCPU does the work; it
    /// must answer whatever that vCPU may wait for (TLB rendezvous, stop requests). The caller
    /// holds no lock that `zap` takes.
    pub fn complete(
        &self,
        ticket: Ticket,
        mut zap: impl FnMut(&[GfnRange]),
        mut relax: impl FnMut(),
    ) {
        while self.finished() < ticket.0 {
            match self.start() {
                Some(mut batch) => {
                    zap(batch.joined());
                    self.finish();
                }
                None => self.wait(ticket, &mut relax),
            }
        }
    }

    /// Waits while a pass is under way that may not be the ticket's last.
    #[cfg(not(loom))]
    fn wait(&self, ticket: Ticket, relax: &mut impl FnMut()) {
        while self.finished() < ticket.0 && self.state().1 {
            relax();
            spin_hint();
        }
    }

    /// The same by sleeping: a model checker cannot explore a loop that only waits.
    #[cfg(loom)]
    fn wait(&self, ticket: Ticket, relax: &mut impl FnMut()) {
        relax();
        let mut queue = self.queue.lock();
        while self.finished() < ticket.0 && self.state().1 {
            queue = self.idle.wait(queue);
        }
    }

    fn finished(&self) -> u64 {
        self.state().0
    }

    /// Takes the queue for a pass, unless one is under way.
    fn start(&self) -> Option<Queue> {
        let mut queue = self.queue.lock();
        let (finished, under_way) = self.state();
        if under_way || queue.len == 0 {
            return None;
        }
        self.passes.store(finished << 1 | 1, Ordering::Relaxed);
        Some(core::mem::replace(
            &mut *queue,
            Queue {
                ranges: [GfnRange::ALL; CAPACITY],
                len: 0,
            },
        ))
    }

    fn finish(&self) {
        let _queue = self.queue.lock();
        let (finished, _) = self.state();
        // Release: who sees the pass finished sees the leaves gone.
        self.passes.store((finished + 1) << 1, Ordering::Release);
        #[cfg(loom)]
        self.idle.notify_all();
    }

    fn state(&self) -> (u64, bool) {
        let word = self.passes.load(Ordering::Acquire);
        (word >> 1, word & 1 != 0)
    }
}

impl Queue {
    fn add(&mut self, range: GfnRange) {
        let known = self.ranges.get(..self.len).unwrap_or_default();
        if known.iter().any(|k| k.covers(range)) {
            return;
        }
        match self.ranges.get_mut(self.len) {
            Some(free) if range != GfnRange::ALL => {
                *free = range;
                self.len += 1;
            }
            _ => {
                self.ranges = [GfnRange::ALL; CAPACITY];
                self.len = 1;
            }
        }
    }

    /// The ranges in ascending order, overlapping and touching ones joined.
    fn joined(&mut self) -> &[GfnRange] {
        let ranges = self.ranges.get_mut(..self.len).unwrap_or_default();
        ranges.sort_unstable_by_key(|r| r.start());
        let mut kept = 0;
        for i in 1..ranges.len() {
            match ranges[kept].merged(ranges[i]) {
                Some(both) => ranges[kept] = both,
                None => {
                    kept += 1;
                    ranges[kept] = ranges[i];
                }
            }
        }
        let count = if ranges.is_empty() { 0 } else { kept + 1 };
        ranges.get(..count).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn r(start: u64, end: u64) -> GfnRange {
        GfnRange::new(start, end).unwrap()
    }

    fn drain(list: &ZapList, ticket: Ticket) -> Vec<Vec<GfnRange>> {
        let mut passes = vec![];
        list.complete(
            ticket,
            |batch| passes.push(batch.to_vec()),
            || panic!("nobody else"),
        );
        passes
    }

    #[test]
    fn nothing_to_zap_needs_no_ticket() {
        assert_eq!(ZapList::new().insert(&[]), None);
    }

    #[test]
    fn a_lone_caller_zaps_its_own_ranges_sorted_and_joined() {
        let list = ZapList::new();
        let t = list.insert(&[r(8, 9), r(0, 2), r(2, 4), r(3, 5)]).unwrap();
        assert_eq!(drain(&list, t), [[r(0, 5), r(8, 9)]]);
    }

    #[test]
    fn ranges_of_several_callers_go_in_one_pass() {
        let list = ZapList::new();
        let first = list.insert(&[r(0, 1)]).unwrap();
        let second = list.insert(&[r(4, 5), r(0, 1)]).unwrap();
        assert_eq!(first, second);
        assert_eq!(drain(&list, first), [[r(0, 1), r(4, 5)]]);
        assert_eq!(drain(&list, second), Vec::<Vec<GfnRange>>::new());
    }

    #[test]
    fn what_is_queued_during_a_pass_waits_for_the_next() {
        let list = ZapList::new();
        let first = list.insert(&[r(0, 1)]).unwrap();
        let mut late = None;
        list.complete(first, |_| late = list.insert(&[r(0, 1)]), || ());
        assert!(late.unwrap() > first);
        assert_eq!(drain(&list, late.unwrap()), [[r(0, 1)]]);
    }

    #[test]
    fn sixteen_ranges_fit_and_the_seventeenth_collapses_to_everything() {
        let ranges: Vec<_> = (0..17).map(|n| r(2 * n, 2 * n + 1)).collect();
        let list = ZapList::new();
        let t = list.insert(&ranges[..16]).unwrap();
        assert_eq!(drain(&list, t)[0], ranges[..16]);
        let t = list.insert(&ranges).unwrap();
        assert_eq!(drain(&list, t), [[GfnRange::ALL]]);
    }

    #[test]
    fn while_everything_is_queued_more_is_a_no_op() {
        let list = ZapList::new();
        let all = list.insert(&[GfnRange::ALL]).unwrap();
        let more = list.insert(&[r(3, 4)]).unwrap();
        assert_eq!(all, more);
        assert_eq!(drain(&list, more), [[GfnRange::ALL]]);
    }

    #[test]
    fn everything_replaces_what_is_queued() {
        let list = ZapList::new();
        let _ = list.insert(&[r(3, 4)]);
        let all = list.insert(&[GfnRange::ALL]).unwrap();
        assert_eq!(drain(&list, all), [[GfnRange::ALL]]);
    }

    /// One vCPU's pass is under way while another waits for the next: the waiting one is asked to
    /// relax, and then does its own pass.
    #[test]
    fn who_waits_relaxes_and_then_zaps_its_own() {
        let (list, relaxed) = (&ZapList::new(), &Mutex::new(false));
        let passes = &Mutex::new(vec![]);
        let first = list.insert(&[r(0, 1)]).unwrap();
        std::thread::scope(|scope| {
            let mut waiter = None;
            list.complete(
                first,
                |_| {
                    // The pass has started: what is queued from here on is for the next.
                    let second = list.insert(&[r(4, 5)]).unwrap();
                    waiter = Some(scope.spawn(move || {
                        let zap = |batch: &[GfnRange]| passes.lock().push(batch.to_vec());
                        list.complete(second, zap, || *relaxed.lock() = true);
                    }));
                    let start = std::time::Instant::now();
                    while !*relaxed.lock() {
                        assert!(start.elapsed().as_secs() < 20, "nobody relaxes");
                        std::thread::yield_now();
                    }
                },
                || panic!("the first has nobody to wait for"),
            );
            waiter.unwrap().join().unwrap();
        });
        assert_eq!(*passes.lock(), [[r(4, 5)]]);
    }
}
