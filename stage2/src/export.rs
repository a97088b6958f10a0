//! Roots lent to an importer.

use crate::addr::IpaRange;

#[derive(Debug)]
pub(crate) struct Exports {
    retired: bool,
}

impl Exports {
    pub(crate) fn new() -> Self {
        Self { retired: false }
    }
    pub(crate) fn is_exported(&self) -> bool {
        false
    }
    pub(crate) fn retire(&mut self) {
        self.retired = true;
    }
    pub(crate) fn may_tear_down(&self) -> bool {
        !self.retired
    }
    pub(crate) fn reserved_bits(&self) -> u64 {
        0
    }
    pub(crate) fn notify(&self, _range: IpaRange) {}
}
