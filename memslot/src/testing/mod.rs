//! Doubles of the machine: caches, frames, and a page table that a test can read and break.

mod cache;
mod frames;
mod table;

pub use cache::{CacheModel, Stage1, Traffic, View, guest_view};
pub use frames::{FakeFrames, FrameState};
pub use table::{FailAt, ModelLeaf, ModelTable};
