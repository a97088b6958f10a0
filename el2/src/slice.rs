//! How long one call keeps its core.

use crate::arch::regs;

/// Steps of one call at most. A step cleans 2 MiB or maps 64 MiB (`memslot::steps`).
const STEPS: u32 = 8;

/// What is left of a call's time.
#[derive(Debug)]
pub(crate) struct Slice(u32);

impl Slice {
    /// A whole one.
    pub(crate) const fn new() -> Self {
        Self(STEPS)
    }

    /// Whether there is time for another step: not if the host has an interrupt, which it gets only
    /// when the call returns.
    pub(crate) fn go_on(&mut self) -> bool {
        self.0 = self.0.saturating_sub(1);
        self.0 > 0 && !regs::interrupt_pending()
    }
}
