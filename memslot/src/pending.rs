//! Work that must be done before the next vCPU enters the guest.
//!
//! Invariant: a bit is published (release) after the mappings it concerns, and cleared only
//! after the maintenance it stands for has completed. Who sees no bit (acquire) may enter.

use crate::sync::{AtomicU8, Ordering};

bitflags::bitflags! {
    /// Deferred maintenance.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Work: u8 {
        /// Clean and invalidate to the point of coherency every page of the locked slots that
        /// need it.
        const FLUSH_DCACHE = 1 << 0;
        /// Invalidate the instruction caches to the point of unification, once.
        const INVAL_ICACHE = 1 << 1;
        /// A lock, a move, a reset or a change of types is not complete: nobody enters before it is, or is taken back.
        const UNFINISHED = 1 << 2;
    }
}

/// A VM's pending work: the union of what its slots need. Changed only under the slots lock.
#[derive(Debug, Default)]
pub struct PendingOps(AtomicU8);

impl PendingOps {
    /// Nothing to do.
    #[must_use]
    pub fn new() -> Self {
        Self(AtomicU8::new(0))
    }

    /// Adds `work`. The caller has completed the mappings that need it.
    pub fn publish(&self, work: Work) {
        self.0.fetch_or(work.bits(), Ordering::Release);
    }

    /// What is to be done.
    #[must_use]
    pub fn load(&self) -> Work {
        Work::from_bits_truncate(self.0.load(Ordering::Acquire))
    }

    /// Replaces the whole set. The caller holds the slots lock and has completed everything
    /// that is no longer in `rest`.
    pub fn replace(&self, rest: Work) {
        self.0.store(rest.bits(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_the_numbers_of_the_specification() {
        assert_eq!(Work::FLUSH_DCACHE.bits(), 1);
        assert_eq!(Work::INVAL_ICACHE.bits(), 2);
        assert_eq!(Work::UNFINISHED.bits(), 4);
    }

    #[test]
    fn publishing_adds_and_replacing_forgets() {
        let p = PendingOps::new();
        assert_eq!(p.load(), Work::empty());
        p.publish(Work::FLUSH_DCACHE);
        p.publish(Work::INVAL_ICACHE);
        assert_eq!(p.load(), Work::FLUSH_DCACHE | Work::INVAL_ICACHE);
        p.replace(Work::INVAL_ICACHE);
        assert_eq!(p.load(), Work::INVAL_ICACHE);
    }
}
