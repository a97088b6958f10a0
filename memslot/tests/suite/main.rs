//! Behaviour of slots, locks, faults and edges over a page table that a test can read and break.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod boots;
mod caches;
mod changes;
mod edges;
mod faults;
mod granules;
mod importers;
mod kit;
mod lock;
mod machine;
mod memory;
mod observers;
mod properties;
mod real;
mod rules;
mod runs;
mod unlock;
mod withhold;
