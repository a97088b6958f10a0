//! Events of an arm64 vCPU that move data between its caches and memory.

use crate::flush::OwedFlush;
use crate::toggle::CacheWatch;

/// What EL2 watches a vCPU's caches for, and the flush that the vCPU waits for. It is not let into
/// the guest while one is owed.
#[derive(Debug, Default)]
pub struct VcpuCaches {
    /// Whether writes of SCTLR_EL1 trap.
    pub watch: CacheWatch,
    /// What the guest has asked for.
    pub owed: OwedFlush,
}

impl VcpuCaches {
    /// A trapped data-cache operation by set and way. Afterwards writes of SCTLR_EL1 trap as the
    /// watch says.
    pub fn set_way(&mut self) {
        self.owed.owe(self.watch.set_way());
    }

    /// A trapped write of SCTLR_EL1 that has changed it from `old` to `new`.
    pub fn sctlr_written(&mut self, old: u64, new: u64) {
        self.owed.owe(self.watch.sctlr_written(old, new));
    }
}
