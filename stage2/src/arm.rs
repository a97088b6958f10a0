//! Arm's maintenance sequences, over traits of single instructions.
//!
//! A hypervisor implements [`ArmTlbOps`] and [`ArmCacheOps`], one instruction each, and gets
//! [`TlbInvalidate`](crate::TlbInvalidate) and
//! [`CacheMaintenance`](crate::CacheMaintenance) with the order, the operands, the contexts and
//! the line arithmetic done: the part that is wrong in the field, and that can be tested here.

mod cache;
mod operand;
mod tlb;

pub use cache::{ArmCache, ArmCacheFacts, ArmCacheOps, FetchPolicy};
pub use operand::{RangeOp, TlbiOps, ipa_operand};
pub use tlb::{ArmTlb, ArmTlbFacts, ArmTlbOps, LevelHint, Repeat};
