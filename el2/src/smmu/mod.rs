//! An Arm SMMUv3: what devices may reach by DMA.
//!
//! Invariant: every stream either aborts, or goes through a stage 2 that EL2 owns: the host's or one
//! VM's. When an invalidation returns, no access of a device uses a translation that was there
//! before, and none is in flight. If the SMMU stops answering, all its streams abort.
//!
//! Source: Arm IHI 0070 (SMMUv3), sections as named at each item. Only stage 2 is used, with the
//! CPUs' own tables, so the tables must be what this SMMU can read: [`Ids::check`].

mod commands;
mod driver;
mod encode;
mod event;
mod faults;
mod ids;
mod register;
mod streams;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;

pub use driver::{AttachError, Faults, MAX_FUNCTIONS, Owner, Port, Smmu, Uses, Walk};
pub use encode::{Command, StreamEntry};
pub use event::{Event, describe};
pub use ids::{Ids, Unfit};
