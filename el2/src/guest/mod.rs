//! What EL2 decides about a guest's exceptions, without touching a register.

pub mod idregs;
pub mod mmio;
pub mod psci;
pub mod sgi;
pub mod sysreg;
pub mod timer;
