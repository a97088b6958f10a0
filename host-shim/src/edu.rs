//! QEMU's `edu`, a PCI device with a DMA engine: it copies between memory and a buffer of its own.
//!
//! Source: QEMU, `docs/specs/edu.rst`. A transfer starts 100 ms after its command. The buffer can only
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
/// Seconds that a transfer may take, on an emulator that has little time.
const PATIENCE: u64 = 20;

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
    registers: Mmio,
    function: Function,
}

impl Edu {
    /// Turns the device on; `None` if it is none.
    pub(crate) fn open(pci: &Pci, device: &Device) -> Option<Self> {
        let registers = Mmio::new(pci.registers(device, 0)?.start());
        pci.enable(device.function());
        let known = registers.read(IDENTIFICATION) & 0xff == 0xed;
        known.then_some(Self {
            registers,
            function: device.function(),
        })
    }

    /// Which function it is.
    pub(crate) const fn function(self) -> Function {
        self.function
    }

    /// Tells it to copy `bytes`, at most [`MAX_BYTES`], between bus address `address` and the start of
    /// its buffer. That begins 100 ms later.
    pub(crate) fn start(self, direction: Direction, address: u64, bytes: u64) {
        let (source, destination, way) = match direction {
            Direction::FromMemory => (address, BUFFER, 0),
            Direction::ToMemory => (BUFFER, address, TO_MEMORY),
        };
        self.registers.write_long(SOURCE, source);
        self.registers.write_long(DESTINATION, destination);
        self.registers.write_long(COUNT, bytes.min(MAX_BYTES));
        self.registers.write_long(COMMAND, RUN | way);
    }

    /// Whether a transfer has begun or is to begin.
    pub(crate) fn is_busy(self) -> bool {
        self.registers.read_long(COMMAND) & RUN != 0
    }

    /// Waits until nothing is left to do.
    pub(crate) fn finish(self) -> Result<(), &'static str> {
        let deadline = ticks() + PATIENCE * ticks_per_second();
        while self.is_busy() {
            if ticks() > deadline {
                return Err("a transfer does not end");
            }
            core::hint::spin_loop();
        }
        Ok(())
    }

    /// A transfer from start to end, whether or not memory was reached.
    pub(crate) fn transfer(
        self,
        direction: Direction,
        address: u64,
        bytes: u64,
    ) -> Result<(), &'static str> {
        self.start(direction, address, bytes);
        self.finish()
    }
}
