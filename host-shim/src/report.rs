//! Results of scenarios, one line each, and the closing line that test runners read.

use core::fmt::Display;

use crate::console::line;

/// Counts of what passed and failed.
#[derive(Debug, Default)]
pub(crate) struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// Prints and counts one result.
    pub(crate) fn check<E: Display>(&mut self, name: &str, result: Result<(), E>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                line(format_args!("{name} ok"));
            }
            Err(why) => {
                self.failed += 1;
                line(format_args!("{name} FAILED {why}"));
            }
        }
    }

    /// Prints the closing line.
    pub(crate) fn close(&self) {
        line(format_args!(
            "{} passed, {} failed",
            self.passed, self.failed
        ));
    }
}
