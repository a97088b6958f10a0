//! Atomics and locks from `core` and `spin`, or from loom when a concurrency test explores their
//! interleavings.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use spin::Mutex;

/// A table entry in memory.
#[cfg(not(loom))]
pub type AtomicEntry = core::sync::atomic::AtomicU64;
/// A table entry in memory.
#[cfg(loom)]
pub type AtomicEntry = loom::sync::atomic::AtomicU64;

/// loom's mutex with the spin lock's signature: nothing here panics with it held.
#[cfg(loom)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

#[cfg(loom)]
impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        match self.0.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

/// Waits for another CPU's progress.
#[inline]
pub(crate) fn relax() {
    #[cfg(not(loom))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}
