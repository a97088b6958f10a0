//! The guest's memory-type range registers: storage, validation, look-up.
//!
//! One [`Mtrrs`] per vCPU. A guest must keep the registers of all its CPUs alike (SDM vol. 3,
//! "Memory Type Range Registers"); nothing here relies on it.

mod lookup;
mod registers;
mod uniform;

pub use registers::{GeneralProtection, Msr, Mtrrs, VariableRange};
