//! Guest memory slots, locking with deferred cache maintenance, memory-type policies.
