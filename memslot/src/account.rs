//! Accounting of locked pages against a limit.
//!
//! A charge is the number of pages in the slot, whether or not a page is also locked through
//! another slot. The limit is tested twice: before any work, so that a hopeless request costs
//! nothing, and atomically at the end, because the limit may have been lowered, or another VM of
//! the same owner charged, in between.

use crate::error::Error;
use crate::sync::{AtomicU64, Ordering};

/// Whether the caller may exceed the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// The limit holds.
    Ordinary,
    /// The caller may lock any amount of memory.
    MayExceedLimit,
}

/// The locked pages of one owner, and their limit. May be shared by several VMs.
#[derive(Debug)]
pub struct LockedMemory {
    limit: AtomicU64,
    locked: AtomicU64,
}

impl LockedMemory {
    /// Nothing locked; at most `limit` pages.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit: AtomicU64::new(limit),
            locked: AtomicU64::new(0),
        }
    }

    /// Pages locked now.
    #[must_use]
    pub fn locked(&self) -> u64 {
        self.locked.load(Ordering::Relaxed)
    }

    /// Sets the limit, in pages. What is locked stays locked.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Whether `npages` more would fit now. Promises nothing.
    ///
    /// # Errors
    /// [`Error::LockedLimit`].
    pub fn check(&self, npages: u64, privilege: Privilege) -> Result<(), Error> {
        self.room(self.locked(), npages, privilege).map(|_| ())
    }

    /// Charges `npages`.
    ///
    /// # Errors
    /// [`Error::LockedLimit`]; nothing is charged then.
    pub fn charge(&self, npages: u64, privilege: Privilege) -> Result<(), Error> {
        let mut now = self.locked();
        loop {
            let next = self.room(now, npages, privilege)?;
            match self
                .locked
                .compare_exchange(now, next, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return Ok(()),
                Err(moved) => now = moved,
            }
        }
    }

    /// Takes back a charge of `npages`. More than is charged takes back everything.
    pub fn uncharge(&self, npages: u64) {
        let mut now = self.locked();
        debug_assert!(now >= npages, "uncharge of {npages} pages, {now} charged");
        while let Err(moved) = self.locked.compare_exchange(
            now,
            now.saturating_sub(npages),
            Ordering::Relaxed,
            Ordering::Relaxed,
        ) {
            now = moved;
        }
    }

    fn room(&self, locked: u64, wanted: u64, privilege: Privilege) -> Result<u64, Error> {
        let limit = self.limit.load(Ordering::Relaxed);
        let refused = Error::LockedLimit {
            wanted,
            locked,
            limit,
        };
        let total = locked.checked_add(wanted).ok_or(refused)?;
        match privilege {
            Privilege::Ordinary if total > limit => Err(refused),
            _ => Ok(total),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Privilege::{MayExceedLimit, Ordinary};

    #[test]
    fn a_charge_that_fits_exactly_is_accepted_and_one_page_more_is_not() {
        let m = LockedMemory::new(10);
        assert!(m.charge(4, Ordinary).is_ok());
        assert!(m.check(6, Ordinary).is_ok());
        let refused = Error::LockedLimit {
            wanted: 7,
            locked: 4,
            limit: 10,
        };
        assert_eq!(m.check(7, Ordinary), Err(refused));
        assert_eq!(m.charge(7, Ordinary), Err(refused));
        assert!(m.charge(6, Ordinary).is_ok());
        assert_eq!(m.locked(), 10);
    }

    #[test]
    fn the_privileged_exceed_the_limit_but_not_arithmetic() {
        let m = LockedMemory::new(1);
        assert!(m.charge(5, MayExceedLimit).is_ok());
        assert_eq!(m.locked(), 5);
        assert!(m.charge(u64::MAX, MayExceedLimit).is_err());
        assert_eq!(m.locked(), 5);
    }

    #[test]
    fn lowering_the_limit_keeps_what_is_locked() {
        let m = LockedMemory::new(10);
        m.charge(8, Ordinary).unwrap();
        m.set_limit(4);
        assert_eq!(m.locked(), 8);
        assert!(m.check(0, Ordinary).is_err());
        m.uncharge(8);
        assert_eq!(m.locked(), 0);
        assert!(m.check(4, Ordinary).is_ok());
    }
}
