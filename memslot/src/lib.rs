//! Guest memory slots, locking with deferred cache maintenance, memory-type policies.
//!
//! Portable and free of `unsafe`: hardware, frames and page tables come in through traits, so
//! that every rule of this crate runs, and is tested, on any host.
//!
//! | module | what it decides |
//! |---|---|
//! | [`slot`], [`slots`], [`dirty`] | which guest frames exist, sorted and replaced as a whole |
//! | [`gate`], [`pending`], [`account`] | who may run, what must be done before, what is charged |
//! | [`mtrr`], [`pat`], [`policy`] | the memory type of a leaf, x86 (two profiles) and arm64 |
//! | [`zap`] | which leaves become stale after an event, and who removes them |
//! | [`toggle`] | set/way operations and cache-enable changes of an arm64 guest |
//! | [`steps`] | how much of what grows with a VM's memory is done in one go |
//! | [`vm`] and [`fault`], [`lock`], [`run`], [`flush`], [`edge`], [`change`], [`arm`], [`x86`] | all of it together, over a page table, in one lock order |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod account;
pub mod addr;
pub mod arm;
pub mod change;
pub mod dirty;
pub mod edge;
pub mod error;
pub mod fault;
pub mod flush;
pub mod frames;
pub mod gate;
pub mod lock;
#[cfg(feature = "x86")]
pub mod mtrr;
pub mod noncoherent;
#[cfg(feature = "x86")]
pub mod pat;
pub mod pending;
pub mod policy;
pub mod run;
pub mod sharing;
pub mod slot;
pub mod slots;
pub mod steps;
pub mod sync;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod toggle;
mod unfinished;
pub mod vm;
pub mod withhold;
#[cfg(feature = "x86")]
pub mod x86;
#[cfg(feature = "x86")]
pub mod zap;
