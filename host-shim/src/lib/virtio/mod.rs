//! The device side of virtio: split virtqueues, the MMIO transport, and three devices.
//!
//! Everything that a guest supplies is an allegation: addresses are checked by [`GuestMemory`] at
//! every access, a descriptor is read once and chains are cut at the queue's size, and one access to
//! a register of [`transport::Transport`] does a bounded amount of work. A guest that breaks the rules
//! of a queue finds its device in the state DEVICE_NEEDS_RESET.
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2, OASIS; the sections are named where they apply.

pub mod block;
pub mod console;
pub mod entropy;
pub mod queue;
#[cfg(test)]
mod testing;
pub mod transport;

use thiserror::Error;

/// The address is not in the guest's memory.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("{0:#x} is outside the guest's memory")]
pub struct BadAddress(pub u64);

/// A guest's memory. The guest may write it at any time.
pub trait GuestMemory {
    /// Copies from the guest.
    ///
    /// # Errors
    ///
    /// [`BadAddress`] unless all of it is the guest's memory; `to` may have changed.
    fn read(&self, ipa: u64, to: &mut [u8]) -> Result<(), BadAddress>;

    /// Copies to the guest.
    ///
    /// # Errors
    ///
    /// [`BadAddress`] unless all of it is the guest's memory. Of memory that the guest takes back
    /// meanwhile, a part may have been written.
    fn write(&self, ipa: u64, from: &[u8]) -> Result<(), BadAddress>;
}

/// What devices need of their host.
pub trait Host {
    /// Output of the guest's console.
    fn print(&mut self, bytes: &[u8]);

    /// Fills `bytes` with random numbers.
    fn random(&mut self, bytes: &mut [u8]);
}
