//! What the payload was told, and how it ends.

use crate::arch::cpu::{self, psci};
use crate::arch::mem;
use crate::console;
use crate::tree::Tree;

/// Longest command line that is kept, in bytes.
const LONGEST: usize = 256;

/// The command line: words, some of them `NAME=VALUE`.
#[derive(Debug)]
pub struct Arguments {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Arguments {
    /// Reads `/chosen/bootargs`; empty if there are none.
    pub fn read(tree: Option<Tree>) -> Self {
        let mut bytes = [0; LONGEST];
        let found = tree
            .and_then(|tree| tree.chosen("bootargs"))
            .unwrap_or((0, 1));
        let length = (found.1.saturating_sub(1) as usize).min(LONGEST);
        for (i, byte) in bytes.iter_mut().take(length).enumerate() {
            *byte = mem::read8(found.0 + i as u64) as u8;
        }
        Self { bytes, length }
    }

    /// The value of `NAME=VALUE`, with `name` ending in `=`.
    pub fn value(&self, name: &str) -> Option<&str> {
        let text = core::str::from_utf8(self.bytes.get(..self.length)?).ok()?;
        text.split(' ').find_map(|word| word.strip_prefix(name))
    }

    /// The same as a number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.parse().ok()
    }

    /// Under a hypervisor, not on the emulated board itself: `under=bare` says the latter.
    pub fn is_guest(&self) -> bool {
        self.value("under=") != Some("bare")
    }
}

/// What the checks found.
#[derive(Debug, Default)]
pub struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// A check: its name, and whether it holds.
    pub fn check(&mut self, name: &str, holds: bool) {
        self.expect(name, holds, true);
    }

    /// A check of a value.
    pub fn expect<T: PartialEq + core::fmt::Debug>(&mut self, name: &str, found: T, expected: T) {
        if found == expected {
            self.passed += 1;
            console::line(format_args!("{name} ok"));
        } else {
            self.failed += 1;
            console::line(format_args!(
                "{name} FAILED found {found:x?}, expected {expected:x?}"
            ));
        }
    }

    /// A figure of a benchmark.
    pub fn bench(&mut self, name: &str, value: u64) {
        console::line(format_args!("bench {name} {value}"));
    }

    /// The closing line, and the end.
    pub fn close(&self) -> ! {
        console::line(format_args!(
            "{} passed, {} failed",
            self.passed, self.failed
        ));
        off()
    }
}

/// Turns the machine off.
pub fn off() -> ! {
    psci::call(psci::SYSTEM_OFF, 0, 0, 0);
    console::line(format_args!("SYSTEM_OFF FAILED it returned"));
    cpu::halt()
}

/// Ends after something that no check expected.
pub fn fail() -> ! {
    console::line(format_args!("0 passed, 1 failed"));
    off()
}
