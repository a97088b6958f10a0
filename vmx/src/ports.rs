//! I/O ports of a VM, behind one trait: what a VM's owner emulates.

use crate::exit::Width;

/// A VM's devices. `now` is the time-stamp counter. What is not implemented is that of devices without interrupts.
pub trait Ports {
    /// The guest writes `width` bytes.
    fn output(&mut self, port: u16, width: Width, value: u32, now: u64);
    /// The guest reads `width` bytes.
    fn input(&mut self, port: u16, width: Width, now: u64) -> u32;
    /// Time has passed.
    fn poll(&mut self, _now: u64) {}
    /// Whether an interrupt waits.
    fn interrupting(&self) -> bool {
        false
    }
    /// The CPU takes the most urgent interrupt: its vector.
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    /// When [`Ports::poll`] must be called next at the latest.
    fn deadline(&self) -> Option<u64> {
        None
    }
    /// Whether the guest has asked for a reset of its machine.
    fn wants_reset(&self) -> bool {
        false
    }
}

/// A VM without devices: reads give ones, as an empty bus does.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPorts;

impl Ports for NoPorts {
    fn output(&mut self, _port: u16, _width: Width, _value: u32, _now: u64) {}

    fn input(&mut self, _port: u16, _width: Width, _now: u64) -> u32 {
        u32::MAX
    }
}
