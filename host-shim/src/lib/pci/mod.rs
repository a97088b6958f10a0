//! PCI as far as the host uses it: functions are found, their registers are placed in the bridge's
//! windows, their capabilities are looked up.
//!
//! Only functions on a bridge's first bus are looked at; what is behind a PCI-to-PCI bridge stays as
//! it is. There are crates that do the same, but they want unsafe code of whoever only describes a
//! configuration space, and so could not be tried on one that is made up.
//!
//! Source: PCI Local Bus 3.0, chapter 6; PCI Express Base 5.0, chapter 7.

pub mod assigned;
mod bars;
mod capabilities;
#[cfg(test)]
mod tests;
mod virtio;

pub use bars::{Bar, BarKind, MAX_BARS, PciError, Windows, bars, place, restore};
pub use capabilities::{Capability, capabilities, find_capability, reset_function};
pub use virtio::virtio_status;

use core::fmt;
use core::str::FromStr;

/// Register of vendor (bits 15:0) and device (31:16).
const ID: u16 = 0x00;
/// Register of command (15:0) and status (31:16).
const COMMAND: u16 = 0x04;
/// Register of class (31:8) and revision (7:0).
const CLASS: u16 = 0x08;
/// Register that has the header's type in bits 23:16.
const HEADER: u16 = 0x0c;
/// Register of interrupt line (7:0) and pin (15:8).
const INTERRUPT: u16 = 0x3c;
/// What a read gives where there is no function.
const NOBODY: u16 = 0xffff;

/// Command: the function answers in memory space.
pub const MEMORY_SPACE: u16 = 1 << 1;
/// Command: the function may start transactions of its own: DMA and message-signalled interrupts.
pub const BUS_MASTER: u16 = 1 << 2;
/// Command: the function must not assert its interrupt pin.
pub const INTERRUPT_DISABLE: u16 = 1 << 10;
/// Command: the function answers in I/O space, which no driver of ours uses.
const IO_SPACE: u16 = 1 << 0;

/// A function: its requester ID, bus << 8 | device << 3 | function.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(transparent)]
pub struct Function(u16);

impl Function {
    /// The function `number` (0 to 7) of device `device` (0 to 31); `None` for larger ones.
    #[must_use]
    pub const fn new(bus: u8, device: u8, number: u8) -> Option<Self> {
        if device > 31 || number > 7 {
            return None;
        }
        Some(Self(
            (bus as u16) << 8 | (device as u16) << 3 | number as u16,
        ))
    }

    /// From a requester ID.
    #[must_use]
    pub const fn from_requester(id: u16) -> Self {
        Self(id)
    }

    /// The requester ID.
    #[must_use]
    pub const fn requester(self) -> u16 {
        self.0
    }

    /// Bus, 0 to 255.
    #[must_use]
    pub const fn bus(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// Device, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.0.to_le_bytes()[0] >> 3
    }

    /// Function of the device, 0 to 7.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0.to_le_bytes()[0] & 7
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bus, device, number) = (self.bus(), self.device(), self.number());
        write!(f, "{bus:02x}:{device:02x}.{number}")
    }
}

/// This is not written as `bus:device.function`, hexadecimal with two, two and one digits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NoFunction;

impl FromStr for Function {
    type Err = NoFunction;

    fn from_str(text: &str) -> Result<Self, NoFunction> {
        let digits = |text: &str, count: usize| {
            let plain = text.len() == count && text.bytes().all(|b| b.is_ascii_hexdigit());
            let number = plain.then(|| u8::from_str_radix(text, 16).ok());
            number.flatten().ok_or(NoFunction)
        };
        let (bus, rest) = text.split_once(':').ok_or(NoFunction)?;
        let (device, number) = rest.split_once('.').ok_or(NoFunction)?;
        Self::new(digits(bus, 2)?, digits(device, 2)?, digits(number, 1)?).ok_or(NoFunction)
    }
}

/// Access to the functions' configuration spaces.
pub trait ConfigSpace {
    /// The 32-bit register at `offset`, a multiple of 4 below 4096; all ones where nobody answers.
    fn read(&self, function: Function, offset: u16) -> u32;

    /// Writes it; where nobody answers, nothing happens.
    fn write(&self, function: Function, offset: u16, value: u32);
}

/// What a function says it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Identity {
    /// Which one it is.
    pub function: Function,
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Base class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Type of its header: 0 for a device, 1 for a bridge to another bus.
    pub header: u8,
}

/// The functions on a bus, in the order of their numbers.
pub fn functions(space: &impl ConfigSpace, bus: u8) -> impl Iterator<Item = Identity> {
    let devices = (0..32).filter_map(move |device| Function::new(bus, device, 0));
    devices.flat_map(move |first| {
        // A device without function 0 has none, and one that does not say "multi-function" may
        // answer for function 0 under every number (PCI 3.0 3.2.2.3.4).
        let numbers = match identity(space, first) {
            None => 0,
            Some(_) if space.read(first, HEADER) & 1 << 23 != 0 => 8,
            Some(_) => 1,
        };
        (0..numbers).filter_map(move |number| identity(space, Function(first.0 | number)))
    })
}

/// What is at this place; `None` if nothing is.
pub fn identity(space: &impl ConfigSpace, function: Function) -> Option<Identity> {
    let [a, b, c, d] = space.read(function, ID).to_le_bytes();
    let vendor = u16::from_le_bytes([a, b]);
    if vendor == NOBODY {
        return None;
    }
    Some(Identity {
        function,
        vendor,
        device: u16::from_le_bytes([c, d]),
        class: space.read(function, CLASS) >> 8,
        header: space.read(function, HEADER).to_le_bytes()[2] & 0x7f,
    })
}

/// The command register.
pub fn command(space: &impl ConfigSpace, function: Function) -> u16 {
    let [a, b, ..] = space.read(function, COMMAND).to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// Sets the command register. The status beside it, whose bits are cleared by ones, stays.
pub fn set_command(space: &impl ConfigSpace, function: Function, command: u16) {
    space.write(function, COMMAND, u32::from(command));
}

/// The interrupt pin: 1 to 4 for INTA to INTD; `None` without one.
pub fn interrupt_pin(space: &impl ConfigSpace, function: Function) -> Option<u8> {
    let [_, pin, ..] = space.read(function, INTERRUPT).to_le_bytes();
    (1..=4).contains(&pin).then_some(pin)
}

/// Stops the function: no answers, no DMA, no interrupt.
pub fn quiesce(space: &impl ConfigSpace, function: Function) {
    set_command(space, function, INTERRUPT_DISABLE);
}
