//! Behaviour of slots, locks, faults and edges over a page table that a test can read and break.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

// What Miri leaves out maps thousands of pages or runs hundreds of random cases. The unsafe code
// below is `stage2`'s; `importers` brings Miri to it by way of this crate.
#[cfg(not(miri))]
mod boots;
mod caches;
mod changes;
mod edges;
mod faults;
#[cfg(not(miri))]
mod granules;
mod importers;
mod kit;
mod lock;
mod machine;
mod memory;
#[cfg(not(miri))]
mod observers;
#[cfg(not(miri))]
mod properties;
#[cfg(not(miri))]
mod real;
mod rules;
mod runs;
mod unlock;
#[cfg(not(miri))]
mod withhold;
