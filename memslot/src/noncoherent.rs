//! The VM's count of devices that access memory without snooping the caches.
//!
//! Invariant: the count is changed, and the leaves that the change makes stale are removed, in
//! one section that excludes faults. Hence `&mut self`: whoever can change it excludes everyone
//! who could read it.

use crate::error::Error;

/// The count. Lives inside the page-table lock.
#[derive(Debug, Default)]
pub struct NoncoherentDma(u32);

/// What a change of the count means for existing leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// The count changed between two non-zero values: no type changes.
    None,
    /// 0 → 1: memory types must be honoured from now on.
    Started,
    /// 1 → 0: they need not be honoured any more.
    Stopped,
}

impl NoncoherentDma {
    /// No such device.
    #[must_use]
    pub const fn new() -> Self {
        Self(0)
    }

    /// With `count` such devices.
    #[must_use]
    pub(crate) const fn with_count(count: u32) -> Self {
        Self(count)
    }

    /// Number of registered devices.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.0
    }

    /// Whether there is one at all.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.0 != 0
    }

    /// Adds one.
    ///
    /// # Errors
    /// [`Error::CountUnbalanced`] at the maximum; the count stays.
    pub fn register(&mut self) -> Result<Edge, Error> {
        self.0 = self.0.checked_add(1).ok_or(Error::CountUnbalanced)?;
        Ok(if self.0 == 1 {
            Edge::Started
        } else {
            Edge::None
        })
    }

    /// Removes one.
    ///
    /// # Errors
    /// [`Error::CountUnbalanced`] below zero; the count stays zero.
    pub fn unregister(&mut self) -> Result<Edge, Error> {
        self.0 = self.0.checked_sub(1).ok_or(Error::CountUnbalanced)?;
        Ok(if self.0 == 0 {
            Edge::Stopped
        } else {
            Edge::None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_0_to_1_is_an_edge() {
        let mut n = NoncoherentDma::new();
        assert!(!n.any());
        assert_eq!(n.register(), Ok(Edge::Started));
        assert!(n.any());
    }

    #[test]
    fn count_1_to_2_and_back_is_no_edge() {
        let mut n = NoncoherentDma(1);
        assert_eq!(n.register(), Ok(Edge::None));
        assert_eq!(n.count(), 2);
        assert_eq!(n.unregister(), Ok(Edge::None));
        assert_eq!(n.count(), 1);
    }

    #[test]
    fn count_1_to_0_is_an_edge() {
        let mut n = NoncoherentDma(1);
        assert_eq!(n.unregister(), Ok(Edge::Stopped));
        assert_eq!(n.count(), 0);
    }

    #[test]
    fn below_zero_is_refused_and_leaves_zero() {
        let mut n = NoncoherentDma::new();
        assert_eq!(n.unregister(), Err(Error::CountUnbalanced));
        assert_eq!(n.count(), 0);
    }

    #[test]
    fn above_the_maximum_is_refused_and_leaves_the_maximum() {
        let mut n = NoncoherentDma(u32::MAX);
        assert_eq!(n.register(), Err(Error::CountUnbalanced));
        assert_eq!(n.count(), u32::MAX);
    }
}
