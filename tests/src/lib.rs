//! Host-side tools and tests of Ravelin.
