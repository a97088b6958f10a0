//! Behaviour of slots, locks, faults and edges over a page table that a test can read and break.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

// Miri leaves out the modules on `stage2`'s checking machine, which looks at every entry behind
// every step, and those that map thousands of pages or run hundreds of random cases.
#[cfg(not(miri))]
mod boots;
#[cfg(not(miri))]
mod bounded;
mod caches;
mod changes;
mod edges;
mod faults;
#[cfg(not(miri))]
mod granules;
#[cfg(not(miri))]
mod importers;
mod kit;
mod lock;
#[cfg(not(miri))]
mod machine;
mod memory;
#[cfg(not(miri))]
mod observers;
#[cfg(not(miri))]
mod properties;
#[cfg(not(miri))]
mod real;
#[cfg(not(miri))]
mod rules;
mod runs;
#[cfg(not(miri))]
mod sharing;
#[cfg(not(miri))]
mod steps;
#[cfg(not(miri))]
mod unfinished;
mod unlock;
#[cfg(not(miri))]
mod withhold;
