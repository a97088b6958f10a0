//! Atomics from `core`, or from loom when a concurrency test explores their interleavings.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A table entry in memory.
#[cfg(not(loom))]
pub type AtomicEntry = core::sync::atomic::AtomicU64;
/// A table entry in memory.
#[cfg(loom)]
pub type AtomicEntry = loom::sync::atomic::AtomicU64;

/// Waits for another CPU's progress.
#[inline]
pub(crate) fn relax() {
    #[cfg(not(loom))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}
