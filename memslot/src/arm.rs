//! Events of an arm64 vCPU that move data between its caches and memory.

use crate::frames::FrameSource;
use crate::policy::ArmPolicy;
use crate::table::GuestTable;
use crate::toggle::{CacheWatch, Flush};
use crate::vm::GuestMemory;

impl<T: GuestTable, S: FrameSource> GuestMemory<T, ArmPolicy, S> {
    /// A trapped data-cache operation by set and way. Afterwards writes of SCTLR_EL1 trap as
    /// `watch` says.
    pub fn guest_set_way(&self, watch: &mut CacheWatch) {
        let flush = watch.set_way();
        self.carry_out_flush(flush);
    }

    /// A trapped write of SCTLR_EL1 that has changed it from `old` to `new`.
    pub fn guest_sctlr(&self, watch: &mut CacheWatch, old: u64, new: u64) {
        let flush = watch.sctlr_written(old, new);
        self.carry_out_flush(flush);
    }

    fn carry_out_flush(&self, flush: Flush) {
        if flush == Flush::All {
            self.flush_all();
        }
    }
}
