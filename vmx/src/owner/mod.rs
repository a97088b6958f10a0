//! Who owns the VMs of this machine: a Linux guest with a console, or scenarios.

pub(crate) mod linux;
pub(crate) mod suite;
