//! The x86 machine: its disk image, and the emulator that runs it.

pub mod bochs;
pub mod disk;
pub mod kernel;
pub mod linux;
