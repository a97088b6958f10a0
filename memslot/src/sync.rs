//! Locks and atomics: `spin` and `core`, or their `loom` doubles under `cfg(loom)`.
//!
//! Everything concurrent in this crate goes through here, so that the loom models check the very
//! code that runs at EL2.

#[cfg(not(loom))]
mod imp {
    pub use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
    pub use spin::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

    /// A spinning mutual-exclusion lock.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(spin::Mutex<T>);

    impl<T> Mutex<T> {
        /// An unlocked lock around `value`.
        pub const fn new(value: T) -> Self {
            Self(spin::Mutex::new(value))
        }

        /// Waits for the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock()
        }
    }

    /// A spinning readers-writer lock.
    #[derive(Debug, Default)]
    pub struct RwLock<T>(spin::RwLock<T>);

    impl<T> RwLock<T> {
        /// An unlocked lock around `value`.
        pub const fn new(value: T) -> Self {
            Self(spin::RwLock::new(value))
        }

        /// Waits until no writer holds the lock.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read()
        }

        /// Waits until nobody holds the lock.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write()
        }
    }

    /// Tells the CPU that this is a waiting loop.
    pub fn spin_hint() {
        core::hint::spin_loop();
    }
}

#[cfg(loom)]
mod imp {
    pub use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
    pub use loom::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

    /// The loom double of the mutual-exclusion lock.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// An unlocked lock around `value`.
        pub fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        /// Waits for the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0
                .lock()
                .expect("loom's locks are poisoned only by a failed model")
        }
    }

    /// The loom double of the readers-writer lock.
    #[derive(Debug, Default)]
    pub struct RwLock<T>(loom::sync::RwLock<T>);

    impl<T> RwLock<T> {
        /// An unlocked lock around `value`.
        pub fn new(value: T) -> Self {
            Self(loom::sync::RwLock::new(value))
        }

        /// Waits until no writer holds the lock.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0
                .read()
                .expect("loom's locks are poisoned only by a failed model")
        }

        /// Waits until nobody holds the lock.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0
                .write()
                .expect("loom's locks are poisoned only by a failed model")
        }
    }

    /// A condition to sleep on.
    #[derive(Debug, Default)]
    pub struct Condvar(loom::sync::Condvar);

    impl Condvar {
        /// Nobody sleeps.
        pub fn new() -> Self {
            Self(loom::sync::Condvar::new())
        }

        /// Lets go of the lock, sleeps, and takes the lock again.
        pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
            self.0
                .wait(guard)
                .expect("loom's locks are poisoned only by a failed model")
        }

        /// Wakes everyone.
        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

#[cfg(loom)]
pub use imp::Condvar;
#[cfg(not(loom))]
pub use imp::spin_hint;
pub use imp::{
    AtomicU8, AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering, RwLock, RwLockReadGuard,
    RwLockWriteGuard,
};
