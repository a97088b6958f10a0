//! Which leaves become stale after an event, and who removes them.
//!
//! [`plan`](self) functions turn a change of a vCPU's registers into ranges; [`ZapList`] has one
//! vCPU at a time do the work for all that wait.

mod list;
mod plan;

pub use list::{CAPACITY, Ticket, ZapList};
pub use plan::{ZapPlan, set_cd, write_msr};
