//! Fuzz targets for everything that takes bytes or registers from somebody who is not trusted.
//!
//! A target is a function of bytes that panics when something is wrong: the code under test panics, or
//! breaks a promise that the target checks. It decodes the bytes into calls, accesses or files itself, so
//! that few bytes are wasted on what is refused at once. Two programs feed the targets:
//!
//! * `tests/replay.rs`, part of `make test`: the inputs of `corpus/` and a bounded number of mutants of
//!   them, always the same;
//! * `src/bin/fuzz.rs`, part of `make soak`: libFuzzer, guided by coverage.
#![forbid(unsafe_code)]

mod exits;
mod guest_exit;
mod host_call;
mod mutate;
mod tree;
mod vgic;
mod virtio;
mod vm_call;

pub use mutate::Mutator;

/// What is fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name, and that of its folder in `corpus/`.
    pub name: &'static str,
    /// Runs one input.
    ///
    /// # Panics
    ///
    /// When the code under test is wrong.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 8] = [
    Target {
        name: "host_call",
        run: host_call::run,
    },
    Target {
        name: "vm_call",
        run: vm_call::run,
    },
    Target {
        name: "guest_exit",
        run: guest_exit::run,
    },
    Target {
        name: "exits",
        run: exits::run,
    },
    Target {
        name: "vgic",
        run: vgic::run,
    },
    Target {
        name: "board_tree",
        run: tree::board,
    },
    Target {
        name: "fit",
        run: tree::fit,
    },
    Target {
        name: "virtio",
        run: virtio::run,
    },
];

/// The target of this name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}
