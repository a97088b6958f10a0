//! Invalidation of EPT translations on every CPU, complete when it returns.
//!
//! INVEPT acts on the CPU that executes it (SDM vol. 3C 29.4.3.1), so each VM has a generation
//! that an invalidation raises, and each CPU remembers the generation at which it last executed
//! INVEPT for that VM. A CPU that is outside the guest uses no translation of it and catches up
//! before it next enters; a CPU that is inside is driven out and waited for.
//!
//! Invariant: when [`Shootdown::invalidate`] returns, no CPU is inside the guest that entered
//! before the invalidation began without having executed INVEPT since.
//!
//! | CPU that enters | CPU that invalidates |
//! |---|---|
//! | `inside = 1` | change the tables, `generation += 1` |
//! | read `generation`; if it moved: INVEPT, `seen = generation` | read `inside`; 0: nothing to do |
//! | VM entry ... VM exit, `inside = 0` | kick, wait for `inside = 0` or `seen >= generation` |
//!
//! On both sides a fence stands between the store and the load, so at least one side sees the
//! other. A kick that arrives between
//! the first line and the VM entry is lost; the waiting CPU repeats it, and the preemption timer
//! bounds a guest's stay in any case.

use crate::sync::{AtomicBool, AtomicU64, Ordering, fence};

/// CPUs that a machine may have.
pub const MAX_CPUS: usize = 8;
/// Looks at a CPU that should come out before it is kicked again.
const KICK_AGAIN: u32 = 1000;

/// One CPU's relation to one VM.
#[derive(Debug)]
struct Seat {
    inside: AtomicBool,
    seen: AtomicU64,
}

/// The state of one VM's translations on all CPUs.
#[derive(Debug)]
pub struct Shootdown {
    generation: AtomicU64,
    seats: [Seat; MAX_CPUS],
}

impl Default for Shootdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shootdown {
    /// Every CPU is behind: whatever it cached under the same EPT pointer for an earlier VM goes
    /// before its first entry.
    #[must_use]
    pub fn new() -> Self {
        Self {
            generation: AtomicU64::new(1),
            seats: core::array::from_fn(|_| Seat {
                inside: AtomicBool::new(false),
                seen: AtomicU64::new(0),
            }),
        }
    }

    /// CPU number `cpu` is about to enter the guest; `invept` is called if it must execute one
    /// first. Numbers from [`MAX_CPUS`] on are a caller's defect and share the last seat.
    pub fn enter(&self, cpu: usize, invept: impl FnOnce()) {
        let seat = self.seat(cpu);
        seat.inside.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst); // pairs with the one in `invalidate`
        let now = self.generation.load(Ordering::Acquire);
        if seat.seen.load(Ordering::Relaxed) != now {
            invept();
            seat.seen.store(now, Ordering::Release);
        }
    }

    /// CPU number `cpu` has left the guest.
    pub fn leave(&self, cpu: usize) {
        self.seat(cpu).inside.store(false, Ordering::Release);
    }

    /// Makes every CPU forget every translation. The tables have been changed. `kick` drives a
    /// CPU out of the guest; `wait` is called while one is still inside. Returns the number of
    /// CPUs that were driven out.
    pub fn invalidate(&self, kick: impl Fn(usize), mut wait: impl FnMut()) -> u32 {
        let target = self.generation.fetch_add(1, Ordering::AcqRel) + 1;
        fence(Ordering::SeqCst); // pairs with the one in `enter`
        let mut driven = 0;
        for (cpu, seat) in self.seats.iter().enumerate() {
            let mut looks = 0;
            while seat.inside.load(Ordering::Acquire) && seat.seen.load(Ordering::Acquire) < target
            {
                if looks % KICK_AGAIN == 0 {
                    kick(cpu);
                }
                looks += 1;
                wait();
            }
            driven += u32::from(looks > 0);
        }
        driven
    }

    /// CPUs that are inside the guest now.
    pub fn inside(&self) -> impl Iterator<Item = usize> {
        let seats = self.seats.iter().enumerate();
        seats.filter_map(|(cpu, seat)| seat.inside.load(Ordering::Relaxed).then_some(cpu))
    }

    fn seat(&self, cpu: usize) -> &Seat {
        &self.seats[cpu.min(MAX_CPUS - 1)]
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use core::cell::Cell;

    fn enters_with_invept(s: &Shootdown, cpu: usize) -> bool {
        let executed = Cell::new(false);
        s.enter(cpu, || executed.set(true));
        executed.get()
    }

    #[test]
    fn a_cpu_executes_invept_once_for_each_generation() {
        let s = Shootdown::new();
        assert!(enters_with_invept(&s, 0));
        s.leave(0);
        assert!(!enters_with_invept(&s, 0));
        s.leave(0);
        s.invalidate(|_| panic!("nobody is inside"), || {});
        assert!(enters_with_invept(&s, 0));
        assert!(enters_with_invept(&s, 1));
    }

    #[test]
    fn whoever_is_inside_is_kicked_until_it_leaves() {
        let s = Shootdown::new();
        s.enter(1, || {});
        let kicks = Cell::new(0);
        let waits = Cell::new(0);
        let driven = s.invalidate(
            |cpu| {
                assert_eq!(cpu, 1);
                kicks.set(kicks.get() + 1);
            },
            || {
                waits.set(waits.get() + 1);
                if kicks.get() == 3 {
                    s.leave(1);
                }
            },
        );
        assert_eq!(driven, 1);
        assert_eq!(kicks.get(), 3);
        assert_eq!(waits.get(), 2 * KICK_AGAIN + 1);
    }

    #[test]
    fn who_is_inside_is_known() {
        let s = Shootdown::new();
        s.enter(1, || {});
        s.enter(3, || {});
        s.leave(1);
        assert_eq!(s.inside().collect::<std::vec::Vec<_>>(), [3]);
    }

    #[test]
    fn a_cpu_that_left_and_came_back_is_not_waited_for() {
        let s = Shootdown::new();
        s.enter(1, || {});
        let driven = s.invalidate(
            |_| {},
            || {
                s.leave(1);
                s.enter(1, || {});
            },
        );
        assert_eq!(driven, 1);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicU64 as Word;
    use loom::thread;

    const OLD: u64 = 1;
    const NEW: u64 = 2;

    struct Machine {
        shootdown: Shootdown,
        /// The table entry.
        entry: Word,
        /// Set once the frame behind the old entry has another owner.
        reused: Word,
    }

    /// One stay in the guest: uses what the CPU's TLB has, or fills it from the table.
    fn stay(m: &Machine, tlb: &mut Option<u64>) {
        m.shootdown.enter(0, || *tlb = None);
        let used = *tlb.get_or_insert_with(|| m.entry.load(Ordering::SeqCst));
        if used == OLD {
            assert_eq!(m.reused.load(Ordering::SeqCst), 0, "a stale translation");
        }
        m.shootdown.leave(0);
    }

    #[test]
    fn no_stale_translation_is_used_after_an_invalidation() {
        loom::model(|| {
            let m = Arc::new(Machine {
                shootdown: Shootdown::new(),
                entry: Word::new(OLD),
                reused: Word::new(0),
            });
            let guest = Arc::clone(&m);
            let cpu = thread::spawn(move || {
                let mut tlb = None;
                stay(&guest, &mut tlb);
                stay(&guest, &mut tlb);
            });
            m.entry.store(NEW, Ordering::SeqCst);
            m.shootdown.invalidate(|_| {}, thread::yield_now);
            m.reused.store(1, Ordering::SeqCst);
            assert!(cpu.join().is_ok());
        });
    }
}
