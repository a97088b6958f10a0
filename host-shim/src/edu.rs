//! QEMU's `edu`, a PCI device with a DMA engine: it copies between memory and a buffer of its own.
//!
//! Source: QEMU, `docs/specs/edu.rst`. A transfer happens 100 ms after its command, at once. The buffer can only
//! be seen by another transfer. The device takes addresses of any width with `dma_mask=-1`.

use board::uart::UartRegs;
use vmm::pci::Function;

use crate::arch::{Mmio, ticks, ticks_per_second};
use crate::pci::{Device, Pci};

/// Vendor and device.
pub(crate) const ID: (u16, u16) = (0x1234, 0x11e8);
/// Bytes that a transfer moves at most: half of the buffer, whose last byte some versions don't reach.
pub(crate) const MAX_BYTES: u64 = 0x800;

/// Register: what it is. The lowest byte is always the same.
const IDENTIFICATION: usize = 0x0;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const RUN: u64 = 1 << 0;
const TO_MEMORY: u64 = 1 << 1;
/// Where the device's buffer is in its own addresses.
const BUFFER: u64 = 0x4_0000;
/// Milliseconds from a command to its transfer.
pub(crate) const DELAY: u64 = 100;

/// When a transfer happens that is started now, in ticks of the counter: the emulator counts whole
/// milliseconds of the same clock.
pub(crate) fn due() -> u64 {
    let per_millisecond = ticks_per_second() / 1000;
    (ticks() / per_millisecond + DELAY) * per_millisecond
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Direction {
    /// The device reads memory.
    FromMemory,
    /// The device writes memory.
    ToMemory,
}

/// A device, by its registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Edu {
    base: u64,
    function: Function,
}

impl Edu {
    /// Turns the device on; `None` if it is none.
    pub(crate) fn open(pci: &Pci, device: &Device) -> Option<Self> {
        let base = pci.registers(device, 0)?.start();
        pci.enable(device.function());
        let known = Mmio::new(base).read(IDENTIFICATION) & 0xff == 0xed;
        known.then_some(Self {
            base,
            function: device.function(),
        })
    }

    /// Address of its registers; all that is needed is in the first page.
    pub(crate) const fn registers(self) -> u64 {
        self.base
    }

    /// Which function it is.
    pub(crate) const fn function(self) -> Function {
        self.function
    }

    /// Tells it to copy `bytes`, at most [`MAX_BYTES`], between bus address `address` and the start of
    /// its buffer. It does so after [`DELAY`].
    pub(crate) fn start(self, direction: Direction, address: u64, bytes: u64) {
        let (source, destination, way) = match direction {
            Direction::FromMemory => (address, BUFFER, 0),
            Direction::ToMemory => (BUFFER, address, TO_MEMORY),
        };
        let registers = Mmio::new(self.base);
        registers.write_long(SOURCE, source);
        registers.write_long(DESTINATION, destination);
        registers.write_long(COUNT, bytes.min(MAX_BYTES));
        registers.write_long(COMMAND, RUN | way);
    }

    /// Whether a transfer is still to come.
    pub(crate) fn is_busy(self) -> bool {
        Mmio::new(self.base).read_long(COMMAND) & RUN != 0
    }
}
