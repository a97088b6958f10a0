//! Counters of one VM, readable by the host.

use core::sync::atomic::{AtomicU64, Ordering};

use abi::VmCounter;

/// One 64-bit counter per [`VmCounter`].
#[derive(Debug, Default)]
pub struct VmCounters {
    values: [AtomicU64; VmCounter::COUNT],
}

impl VmCounters {
    /// All zero.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            values: [const { AtomicU64::new(0) }; VmCounter::COUNT],
        }
    }

    /// Adds one.
    #[inline]
    pub fn count(&self, counter: VmCounter) {
        self.add(counter, 1);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(&self, counter: VmCounter, n: u64) {
        if let Some(value) = self.values.get(counter as usize) {
            value.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// The present value.
    #[must_use]
    pub fn get(&self, counter: VmCounter) -> u64 {
        self.values
            .get(counter as usize)
            .map_or(0, |value| value.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_count_separately() {
        let counters = VmCounters::new();
        counters.count(VmCounter::Runs);
        counters.add(VmCounter::LinesFlushed, 64);
        counters.add(VmCounter::LinesFlushed, 64);
        assert_eq!(counters.get(VmCounter::Runs), 1);
        assert_eq!(counters.get(VmCounter::LinesFlushed), 128);
        assert_eq!(counters.get(VmCounter::Tables), 0);
    }
}
