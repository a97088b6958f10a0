//! Behaviour of the page-table core on a machine that misbehaves as far as it may.

mod fault;
mod field_bugs;
mod formats;
mod gate;
mod golden;
mod kit;
mod map;
mod model;
mod unmap;
mod zap;
