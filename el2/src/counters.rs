//! Counters of what EL2 did, readable by the host.

use core::sync::atomic::{AtomicU64, Ordering};

use abi::Counter;

/// One 64-bit counter per [`Counter`]; they wrap after centuries.
#[derive(Debug, Default)]
pub struct Counters {
    values: [AtomicU64; Counter::COUNT],
}

impl Counters {
    /// All zero.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            values: [const { AtomicU64::new(0) }; Counter::COUNT],
        }
    }

    /// Adds one.
    pub fn count(&self, counter: Counter) {
        if let Some(value) = self.values.get(counter as usize) {
            value.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The present value.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
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
        let counters = Counters::new();
        counters.count(Counter::Hypercalls);
        counters.count(Counter::Hypercalls);
        counters.count(Counter::TablesRecycled);
        assert_eq!(counters.get(Counter::Hypercalls), 2);
        assert_eq!(counters.get(Counter::TablesRecycled), 1);
        assert_eq!(counters.get(Counter::FaultsRefused), 0);
    }
}
