//! An SMMU's registers, and the memory that it reads and writes.

use board::uart::UartRegs;
use el2::smmu::Port;

use super::frames::{self, FramePool};
use super::instructions;
use super::mmio::Mmio;

/// The SMMU as its driver sees it.
#[derive(Debug)]
pub(crate) struct Registers {
    mmio: Mmio,
    pool: &'static FramePool,
}

impl Registers {
    /// The SMMU at `base`, which the device tree names and EL2 maps; its tables and queues come from
    /// EL2's `pool`.
    pub(crate) const fn new(base: u64, pool: &'static FramePool) -> Self {
        Self {
            mmio: Mmio::owned(base),
            pool,
        }
    }
}

impl Port for Registers {
    fn read(&self, offset: u32) -> u32 {
        self.mmio.read(offset as usize)
    }

    fn write(&self, offset: u32, value: u32) {
        self.mmio.write(offset as usize, value);
    }

    fn load(&self, address: u64) -> u64 {
        frames::shared_word(address).load(core::sync::atomic::Ordering::Relaxed)
    }

    fn store(&self, address: u64, value: u64) {
        frames::shared_word(address).store(value, core::sync::atomic::Ordering::Relaxed);
    }

    fn publish(&self) {
        // The SMMU is an observer of the full system (IHI 0070 3.21.3).
        instructions::dsb_sy();
    }

    fn alloc(&self, size: u64) -> Option<u64> {
        let start = self.pool.alloc(size)?;
        for at in (start..start + size).step_by(8) {
            self.store(at, 0);
        }
        Some(start)
    }
}
