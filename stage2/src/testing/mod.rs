//! A machine to test on: table memory, a TLB, caches and an importer that misbehave as much as
//! the architecture lets them, and a checker that knows the rules.
//!
//! The model is adversarial where hardware may be: it caches every translation the moment a
//! walker could see it, never forgets one before it is told to, keeps walk steps for tables, and
//! keeps a frame dirty while anything could still write it. It decodes raw descriptors with its
//! own tables, retyped from the manuals, and trusts nothing of the crate but its addresses.
//!
//! A [`Mutation`] takes one maintenance step away, or delays it behind the next one; the
//! scenarios in `tests/` show that every such step is missed.

#![expect(clippy::cast_possible_truncation, reason = "tests run on 64-bit hosts")]

mod arm;
mod caches;
mod effects;
mod machine;
mod mutation;
mod ports;
mod ranges;
mod rules;
mod tlb;
mod walker;

pub use arm::{FakeArm, Wrong};
pub use caches::Caches;
pub use machine::{Event, FakeMachine};
pub use mutation::{Mutation, Op, Site};
pub use ranges::RangeSet;
pub use tlb::{Cached, FakeTlb};
pub use walker::{Arch, Found, HighBits, RawEntry, RawLeaf, Tables};
