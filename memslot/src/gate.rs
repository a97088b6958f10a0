//! The run gate: one word that tells who is inside the guest.
//!
//! Invariant: while the gate is closed no vCPU is inside, and none gets in. Locking a slot needs
//! that, so that pending work never appears behind a vCPU that has already looked for it. One
//! word per VM replaces taking every vCPU's lock, which does not scale with their number.

use crate::error::Error;
use crate::sync::{AtomicU32, Ordering};

const CLOSED: u32 = 1 << 31;

/// Counts vCPUs inside the guest; can be closed when there is none.
#[derive(Debug, Default)]
pub struct RunGate(AtomicU32);

/// A vCPU's permission to be inside; leaving is dropping it.
#[derive(Debug)]
#[must_use]
pub struct RunPass<'a>(&'a RunGate);

/// The gate is closed for as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct ClosedGate<'a>(&'a RunGate);

impl RunGate {
    /// An open gate, nobody inside.
    #[must_use]
    pub fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Lets a vCPU in.
    ///
    /// # Errors
    /// [`Error::VcpuRunning`]'s counterpart, [`Error::InUse`] with 0, while the gate is closed:
    /// the caller returns to its scheduler and tries again.
    #[inline]
    pub fn enter(&self) -> Result<RunPass<'_>, Error> {
        // Acquire pairs with the release in `ClosedGate::drop`: what was published while the
        // gate was closed is seen by everyone who enters afterwards.
        self.0
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |n| {
                (n & CLOSED == 0 && n + 1 < CLOSED).then(|| n + 1)
            })
            .map_err(|_| Error::InUse(0))?;
        Ok(RunPass(self))
    }

    /// Closes the gate.
    ///
    /// # Errors
    /// [`Error::VcpuRunning`] if a vCPU is inside or the gate is closed already.
    pub fn close(&self) -> Result<ClosedGate<'_>, Error> {
        self.0
            .compare_exchange(0, CLOSED, Ordering::Acquire, Ordering::Relaxed)
            .map_err(|_| Error::VcpuRunning)?;
        Ok(ClosedGate(self))
    }

    /// Number of vCPUs inside, now.
    #[must_use]
    pub fn inside(&self) -> u32 {
        self.0.load(Ordering::Relaxed) & !CLOSED
    }
}

impl Drop for RunPass<'_> {
    fn drop(&mut self) {
        // Release pairs with the acquire in `close`: what the guest did is seen by the closer.
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for ClosedGate<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_needs_everyone_out() {
        let gate = RunGate::new();
        let a = gate.enter().unwrap();
        let b = gate.enter().unwrap();
        assert_eq!(gate.inside(), 2);
        assert_eq!(gate.close().unwrap_err(), Error::VcpuRunning);
        drop(a);
        assert_eq!(gate.close().unwrap_err(), Error::VcpuRunning);
        drop(b);
        assert!(gate.close().is_ok());
    }

    #[test]
    fn more_than_fit_are_refused_and_do_not_close_the_gate() {
        let gate = RunGate(AtomicU32::new(CLOSED - 2));
        let last = gate.enter().unwrap();
        assert_eq!(gate.enter().unwrap_err(), Error::InUse(0));
        assert_eq!(gate.inside(), CLOSED - 1);
        drop(last);
        assert!(gate.enter().is_ok());
    }

    #[test]
    fn nobody_enters_a_closed_gate() {
        let gate = RunGate::new();
        let closed = gate.close().unwrap();
        assert_eq!(gate.enter().unwrap_err(), Error::InUse(0));
        assert_eq!(gate.close().unwrap_err(), Error::VcpuRunning);
        assert_eq!(gate.inside(), 0);
        drop(closed);
        assert!(gate.enter().is_ok());
    }
}
