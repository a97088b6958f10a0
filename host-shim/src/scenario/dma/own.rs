//! DMA to memory of the host: what a driver wants.

use board::AddrRange;

use super::Setup;
use crate::arch::mem;
use crate::edu::{Direction, Edu, MAX_BYTES};
use crate::scenario::guests::expect;

/// Lets every device read a pattern of its own, and write it elsewhere.
pub(super) fn reached(setup: &Setup) -> Result<(), &'static str> {
    let buffers = Buffers::new(setup.memory.other)?;
    for (number, device) in (1..).zip(&setup.devices) {
        buffers.fill(number);
        device.transfer(Direction::FromMemory, buffers.from.start(), MAX_BYTES)?;
        device.transfer(Direction::ToMemory, buffers.to.start(), MAX_BYTES)?;
        buffers.check(*device, number)?;
    }
    Ok(())
}

/// Memory that a device reads, and memory that it writes.
struct Buffers {
    from: AddrRange,
    to: AddrRange,
}

impl Buffers {
    fn new(memory: AddrRange) -> Result<Self, &'static str> {
        let half = |at| AddrRange::with_size(memory.start() + at, MAX_BYTES).ok_or("no memory");
        Ok(Self {
            from: half(0)?,
            to: half(0x1_0000)?,
        })
    }

    /// Bytes that are different at every place and for every device.
    fn byte(at: usize, number: u8) -> u8 {
        let [low, high, ..] = at.to_le_bytes();
        low ^ high.rotate_left(4) ^ number.wrapping_mul(0x3b)
    }

    fn fill(&self, number: u8) {
        for (at, byte) in mem::bytes_mut(self.from).iter_mut().enumerate() {
            *byte = Self::byte(at, number);
        }
        mem::bytes_mut(self.to).fill(0x77);
    }

    fn check(&self, device: Edu, number: u8) -> Result<(), &'static str> {
        let mut bytes = mem::bytes(self.to).iter().enumerate();
        let right = bytes.all(|(at, byte)| *byte == Self::byte(at, number));
        if !right {
            crate::console::line(format_args!("  {}", device.function()));
        }
        expect(right, "what a device wrote is not what it had read")
    }
}
