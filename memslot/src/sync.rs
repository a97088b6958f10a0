//! Locks and atomics: `spin` and `core`, or their `loom` doubles under `cfg(loom)`.
//!
//! Everything concurrent in this crate goes through here, so that the loom models check the very
//! code that runs at EL2.

#[cfg(not(loom))]
mod imp {
    use core::ops::{Deref, DerefMut};
    pub use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
    pub use spin::{MutexGuard, RwLockReadGuard};

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

    /// A spinning readers-writer lock. While a writer waits no new reader gets in: vCPUs that
    /// fault all the time must not keep a zap or a slot change waiting for ever. So nobody may
    /// ask for a read guard while holding one of the same lock.
    #[derive(Debug, Default)]
    pub struct RwLock<T> {
        lock: spin::RwLock<T>,
        /// Writers that wait or are in. Only a hint for readers: `lock` decides, and orders.
        writers: AtomicU32,
    }

    /// Exclusive access.
    #[derive(Debug)]
    pub struct RwLockWriteGuard<'a, T> {
        // Dropped in this order: readers look again when the lock is free.
        guard: spin::RwLockWriteGuard<'a, T>,
        _writer: Writer<'a>,
    }

    #[derive(Debug)]
    struct Writer<'a>(&'a AtomicU32);

    impl<'a> Writer<'a> {
        fn announce(writers: &'a AtomicU32) -> Self {
            writers.fetch_add(1, Ordering::Relaxed);
            Self(writers)
        }
    }

    impl Drop for Writer<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl<T> Deref for RwLockWriteGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            &self.guard
        }
    }

    impl<T> DerefMut for RwLockWriteGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.guard
        }
    }

    impl<T> RwLock<T> {
        /// An unlocked lock around `value`.
        pub const fn new(value: T) -> Self {
            Self {
                lock: spin::RwLock::new(value),
                writers: AtomicU32::new(0),
            }
        }

        /// Waits until no writer holds the lock or waits for it.
        #[inline(never)]
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            self.read_inline()
        }

        /// [`Self::read`] without a call, for a vCPU's fault: everywhere else it would be more code than it
        /// is worth.
        #[inline]
        pub fn read_inline(&self) -> RwLockReadGuard<'_, T> {
            self.try_read().unwrap_or_else(|| self.wait_to_read())
        }

        #[inline]
        fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
            let is_free = self.writers.load(Ordering::Relaxed) == 0;
            is_free.then(|| self.lock.try_read()).flatten()
        }

        #[cold]
        #[inline(never)]
        fn wait_to_read(&self) -> RwLockReadGuard<'_, T> {
            loop {
                // Only looks while it waits: failed attempts would keep the writer's
                // compare-and-swap from seeing the lock free.
                while self.writers.load(Ordering::Relaxed) != 0 {
                    spin_hint();
                }
                if let Some(guard) = self.try_read() {
                    return guard;
                }
            }
        }

        /// Writers that wait or are in.
        #[cfg(test)]
        pub(super) fn writers(&self) -> u32 {
            self.writers.load(Ordering::Relaxed)
        }

        /// Waits until nobody holds the lock.
        #[inline(never)]
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            let writer = Writer::announce(&self.writers);
            RwLockWriteGuard {
                guard: self.lock.write(),
                _writer: writer,
            }
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

        /// The same.
        pub fn read_inline(&self) -> RwLockReadGuard<'_, T> {
            self.read()
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    /// Waits for something that another thread does.
    fn eventually(what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(30), "{what}");
            thread::yield_now();
        }
    }

    #[test]
    fn readers_read_together_and_writers_alone() {
        let lock = RwLock::new(1);
        let (a, b) = (lock.read(), lock.read());
        assert_eq!((*a, *b), (1, 1));
        drop((a, b));
        *lock.write() += 1;
        *lock.write() += 1;
        assert_eq!(*lock.read(), 3);
    }

    #[test]
    fn a_reader_that_comes_after_a_waiting_writer_reads_what_it_wrote() {
        let lock = Arc::new(RwLock::new(0));
        let early = lock.read();
        let held = Arc::clone(&lock);
        let writer = thread::spawn(move || *held.write() = 1);
        eventually("the writer waits", || lock.writers() == 1);
        let held = Arc::clone(&lock);
        let late = thread::spawn(move || *held.read());
        // Time to get past the writer, if that were possible.
        thread::sleep(Duration::from_millis(20));
        assert_eq!(*early, 0);
        drop(early);
        writer.join().unwrap();
        assert_eq!(late.join().unwrap(), 1);
        assert_eq!(lock.writers(), 0);
    }

    #[test]
    fn readers_that_never_pause_do_not_keep_a_writer_out() {
        let lock = Arc::new(RwLock::new(false));
        let readers = [(); 3].map(|()| {
            let lock = Arc::clone(&lock);
            thread::spawn(move || {
                eventually("the writer got in", || {
                    let stop = lock.read();
                    (0..1000).for_each(|_| spin_hint());
                    *stop
                });
            })
        });
        *lock.write() = true;
        readers.into_iter().for_each(|r| r.join().unwrap());
    }
}
