//! Behaviour of the page-table core on a machine that misbehaves as far as it may.

mod dump;
mod exact;
mod export;
mod fault;
mod field_bugs;
mod formats;
mod gate;
mod golden;
mod kit;
mod map;
mod model;
mod race;
mod remembered;
mod resize;
mod starve;
mod unmap;
mod visits;
mod vmx;
mod zap;
