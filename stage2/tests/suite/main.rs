//! Behaviour of the page-table core on a machine that misbehaves as far as it may.

mod fault;
mod gate;
mod kit;
mod map;
mod unmap;
mod zap;
