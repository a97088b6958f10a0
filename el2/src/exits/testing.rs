//! A vCPU without a machine: its VM is made of the library's own objects over fake tables, its registers
//! are plain values. What handles an exit can't tell the difference.

mod vcpu;
mod vm;

pub use vcpu::{Did, El1, FakeVcpu, Lines};
pub use vm::{
    DEVICE, DEVICE_PAGES, FakeVm, GICC, Ground, OWNED_PAGES, RAM, RAM_PAGES, READ_ONLY,
    READ_ONLY_PAGES, Shape, TAKEN_PAGE,
};
