//! x86 maintenance sequences, over traits of single instructions (SDM vol. 3C 29.4.3, 29.3.7).

use crate::addr::{IpaRange, Pa, PaRange};
use crate::level::Level;
use crate::platform::{CacheMaintenance, RangeOps, TlbCaps, TlbInvalidate};

/// Single operations.
pub trait VmxOps {
    /// Makes every CPU that may run with `pointer` execute `invept` of single-context type, and
    /// waits for them. INVLPG and INVVPID do not reach guest-physical mappings.
    #[track_caller]
    fn invept_everywhere(&self, pointer: u64);
    /// `clflush`, or `clflushopt`, of a line.
    #[track_caller]
    fn flush_line(&self, line: Pa);
    /// `mfence`
    #[track_caller]
    fn fence(&self);
}

/// Whether devices and guests can see memory around the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snoop {
    /// The CPU snoops itself: uncached accesses find cached lines (CPUID.1:EDX.SS).
    Itself,
    /// It does not: lines are flushed.
    No,
}

/// Facts about the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmxFacts {
    /// Bytes of a cache line, a power of two.
    pub line: u64,
    /// Self-snoop.
    pub snoop: Snoop,
}

/// [`TlbInvalidate`] and [`CacheMaintenance`] over single operations.
#[derive(Clone, Copy, Debug)]
pub struct VmxMaintenance<I> {
    ops: I,
    facts: VmxFacts,
}

impl<I: VmxOps> VmxMaintenance<I> {
    /// The sequences for this CPU.
    pub const fn new(ops: I, facts: VmxFacts) -> Self {
        Self { ops, facts }
    }

    /// The operations underneath.
    pub const fn ops(&self) -> &I {
        &self.ops
    }
}

impl<I: VmxOps> TlbInvalidate for VmxMaintenance<I> {
    /// The EPT pointer.
    type Context = u64;

    fn invalidate_range(&self, pointer: u64, _range: IpaRange, _level: Option<Level>) {
        self.ops.invept_everywhere(pointer);
    }

    fn invalidate_all(&self, pointer: u64) {
        self.ops.invept_everywhere(pointer);
    }

    /// INVEPT knows no addresses, so every range is one operation.
    fn caps(&self) -> TlbCaps {
        TlbCaps {
            range_ops: RangeOps::Offered,
            whole_beyond: 0,
        }
    }
}

impl<I: VmxOps> CacheMaintenance for VmxMaintenance<I> {
    fn clean_invalidate_data(&self, range: PaRange) {
        if self.facts.snoop == Snoop::No {
            let mut line = range.start().get() & !(self.facts.line - 1);
            while line < range.end().get() {
                self.ops.flush_line(Pa::new(line));
                line += self.facts.line;
            }
        }
        self.ops.fence();
    }

    /// Instruction fetches are coherent with stores (SDM vol. 3A 12.6).
    fn invalidate_fetch(&self, _range: PaRange) {}

    /// Stores are seen in order, by walkers, too (SDM vol. 3A 9.2.3).
    fn publish(&self) {}
}
