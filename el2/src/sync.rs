//! Atomics and locks: `core`'s and `spin`'s, or loom's when a model is being checked.

#[cfg(not(loom))]
pub(crate) use SpinLock as Mutex;
#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use memslot::sync::Mutex;

/// [`spin::Mutex`], but only the attempt stands where it is locked, in some forty places: who has to
/// wait does so in one. The same in a model: for what is not modelled.
#[derive(Debug, Default)]
pub struct SpinLock<T>(spin::Mutex<T>);

impl<T> SpinLock<T> {
    /// An open lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(spin::Mutex::new(value))
    }

    /// Waits for the lock.
    #[inline]
    pub fn lock(&self) -> spin::MutexGuard<'_, T> {
        self.try_lock().unwrap_or_else(|| self.wait())
    }

    /// Takes the lock if it is free.
    #[inline]
    pub fn try_lock(&self) -> Option<spin::MutexGuard<'_, T>> {
        self.0.try_lock()
    }

    #[cold]
    #[inline(never)]
    fn wait(&self) -> spin::MutexGuard<'_, T> {
        self.0.lock()
    }

    /// The value, which nobody else has any more.
    pub fn into_inner(self) -> T {
        self.0.into_inner()
    }
}
