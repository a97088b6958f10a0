//! Kicks: how a vCPU whose interrupts have changed comes to look at them, wherever it is.
//!
//! Invariant: a change is seen before the vCPU's next instruction, before its core waits, or by the host
//! that lets it sleep; or EL2's SGI is pending for the core where it is, or slept last.
//!
//! Two orders make it so (the models below try every interleaving):
//!
//! * Who changes interrupts stores the change, then looks [where](Whereabouts) the vCPU is; who runs it
//!   says where it is, or that it is nowhere, then looks at its interrupts. With a fence between
//!   the two on both sides, one of them sees the other.
//! * A core has one SGI for the guest that it runs and for those that its host lets sleep. For the host
//!   it is [announced](HostKick) before it is sent. EL2 withdraws it first, and looks whom it was for
//!   then; what was announced but is yet to come stays announced, however often the guest leaves
//!   meanwhile.

use crate::sync::{AtomicBool, AtomicU32, Ordering, fence};

/// No core.
const NOWHERE: u32 = 0;

/// Where a vCPU is, and was: numbers of cores, plus one.
#[derive(Debug)]
pub struct Whereabouts {
    running_on: AtomicU32,
    last_on: AtomicU32,
}

/// Whom an SGI has to reach.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kick {
    /// Nobody: it has never run, or it runs on the core that asks.
    Nobody,
    /// The guest on the core with this number.
    Guest(u32),
    /// The host there, by [`HostKick::announce`] first.
    Host(u32),
}

impl Whereabouts {
    /// Of a vCPU that has never run.
    #[must_use]
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self {
            running_on: AtomicU32::new(NOWHERE),
            last_on: AtomicU32::new(NOWHERE),
        }
    }

    /// Of a vCPU that has never run.
    #[must_use]
    #[cfg(loom)]
    pub fn new() -> Self {
        Self {
            running_on: AtomicU32::new(NOWHERE),
            last_on: AtomicU32::new(NOWHERE),
        }
    }

    /// It runs on core `cpu`, which can be interrupted from here on. Its interrupts are looked at behind this.
    #[inline]
    pub fn enter(&self, cpu: u32) {
        self.last_on.store(cpu + 1, Ordering::Relaxed);
        self.running_on.store(cpu + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// It is with the host. Whether it may sleep is looked at behind this.
    #[inline]
    pub fn leave(&self) {
        self.running_on.store(NOWHERE, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Its interrupts have changed: whom core `me` has to interrupt.
    #[inline]
    pub fn kick(&self, me: Option<u32>) -> Kick {
        fence(Ordering::SeqCst);
        let running = self.running_on.load(Ordering::Relaxed);
        if running != NOWHERE {
            let cpu = running - 1;
            return if me == Some(cpu) {
                Kick::Nobody
            } else {
                Kick::Guest(cpu)
            };
        }
        match self.last_on.load(Ordering::Relaxed) {
            NOWHERE => Kick::Nobody,
            last => Kick::Host(last - 1),
        }
    }
}

impl Default for Whereabouts {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a core's SGI is for its host, or will be.
#[derive(Debug)]
pub struct HostKick(AtomicBool);

impl HostKick {
    /// It is not.
    #[must_use]
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// It is not.
    #[must_use]
    #[cfg(loom)]
    pub fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Before it is sent.
    #[inline]
    pub fn announce(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// After EL2 has withdrawn one: whether the host is to have one instead.
    #[inline]
    pub fn take(&self) -> bool {
        self.0.load(Ordering::Acquire) && self.0.swap(false, Ordering::AcqRel)
    }
}

impl Default for HostKick {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_vcpu_that_has_never_run() {
        assert_eq!(Whereabouts::new().kick(Some(0)), Kick::Nobody);
        assert_eq!(Whereabouts::new().kick(None), Kick::Nobody);
    }

    #[test]
    fn one_that_runs_is_kicked_there_but_by_its_own_core() {
        let place = Whereabouts::new();
        place.enter(3);
        assert_eq!(place.kick(Some(0)), Kick::Guest(3));
        assert_eq!(place.kick(None), Kick::Guest(3));
        assert_eq!(place.kick(Some(3)), Kick::Nobody);
    }

    /// By its own core, too: the host there may be about to sleep.
    #[test]
    fn one_that_is_out_is_the_hosts_where_it_ran_last() {
        let place = Whereabouts::new();
        for cpu in [3, 0] {
            place.enter(cpu);
            place.leave();
            assert_eq!(place.kick(Some(1)), Kick::Host(cpu));
            assert_eq!(place.kick(Some(cpu)), Kick::Host(cpu));
        }
    }

    #[test]
    fn what_is_announced_is_taken_once() {
        let host = HostKick::new();
        assert!(!host.take());
        host.announce();
        host.announce();
        assert!(host.take());
        assert!(!host.take());
    }
}

#[cfg(test)]
#[cfg(loom)]
#[path = "kick_models.rs"]
mod models;
