//! Atomics and locks: `core`'s and `spin`'s, or loom's when a model is being checked.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(loom)]
pub(crate) use memslot::sync::Mutex;
#[cfg(not(loom))]
pub(crate) use spin::Mutex;
