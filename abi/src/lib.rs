//! Hypercall numbers, argument and error types, the same on both sides.
