//! What EL2 decides about a guest's exceptions, without touching a register.

pub mod idregs;
