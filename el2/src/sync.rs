//! Atomics and locks: `core`'s and `spin`'s, or loom's when a model is being checked.

#[cfg(not(loom))]
pub(crate) use SpinLock as Mutex;
#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use memslot::sync::Mutex;

/// A readers-writer lock that is only ever tried.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct TryLock<T>(spin::RwLock<T>);

/// Shared access.
#[cfg(not(loom))]
pub(crate) type TryReadGuard<'a, T> = spin::RwLockReadGuard<'a, T>;

#[cfg(not(loom))]
impl<T> TryLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(spin::RwLock::new(value))
    }

    #[inline]
    pub(crate) fn try_read(&self) -> Option<TryReadGuard<'_, T>> {
        self.0.try_read()
    }

    #[inline]
    pub(crate) fn try_write(&self) -> Option<spin::RwLockWriteGuard<'_, T>> {
        self.0.try_write()
    }
}

/// The loom double of the lock that is only tried.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct TryLock<T>(loom::sync::RwLock<T>);

/// Shared access.
#[cfg(loom)]
pub(crate) type TryReadGuard<'a, T> = loom::sync::RwLockReadGuard<'a, T>;

#[cfg(loom)]
impl<T> TryLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::RwLock::new(value))
    }

    pub(crate) fn try_read(&self) -> Option<TryReadGuard<'_, T>> {
        self.0.try_read().ok()
    }

    pub(crate) fn try_write(&self) -> Option<loom::sync::RwLockWriteGuard<'_, T>> {
        self.0.try_write().ok()
    }
}

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
}
