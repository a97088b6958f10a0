//! Memory that owes cache maintenance, gathered so that neighbours are done together.

use crate::addr::PaRange;

/// Memory gathered for one cache operation.
#[derive(Debug, Default)]
pub(crate) struct Gathered(Option<(u64, u64)>);

impl Gathered {
    /// Adds memory; hands out what was gathered if it does not continue there.
    pub(crate) fn add(&mut self, (start, end): (u64, u64), operation: impl FnOnce(PaRange)) {
        match self.0 {
            Some((from, to)) if to == start => self.0 = Some((from, end)),
            _ => {
                self.finish(operation);
                self.0 = Some((start, end));
            }
        }
    }

    /// Hands out the rest.
    pub(crate) fn finish(&mut self, operation: impl FnOnce(PaRange)) {
        if let Some((start, end)) = self.0.take() {
            operation(PaRange::from_bounds(start, end));
        }
    }
}

/// Runs of memory to clean once an invalidation is complete. There is room for few: memory is
/// mostly contiguous, and who finds no room leaves a note in the table instead.
#[derive(Debug)]
pub(crate) struct Backlog {
    runs: [(u64, u64); Self::ROOM],
    len: usize,
}

impl Backlog {
    const ROOM: usize = 8;

    pub(crate) const EMPTY: Self = Self {
        runs: [(0, 0); Self::ROOM],
        len: 0,
    };

    /// Adds memory if there is room; says whether there was.
    pub(crate) fn add(&mut self, start: u64, end: u64) -> bool {
        if let Some((_, to)) = self.runs[..self.len].last_mut()
            && *to == start
        {
            *to = end;
            return true;
        }
        match self.runs.get_mut(self.len) {
            Some(free) => {
                *free = (start, end);
                self.len += 1;
                true
            }
            None => false,
        }
    }

    /// The runs.
    pub(crate) fn iter(&self) -> impl Iterator<Item = PaRange> {
        self.runs[..self.len]
            .iter()
            .map(|(start, end)| PaRange::from_bounds(*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_share_a_place_and_a_full_backlog_refuses() {
        let mut backlog = Backlog::EMPTY;
        for n in 0..8 {
            assert!(backlog.add(n * 0x10_000, n * 0x10_000 + 0x1000));
            assert!(backlog.add(n * 0x10_000 + 0x1000, n * 0x10_000 + 0x2000));
        }
        assert!(!backlog.add(0, 0x1000));
        assert!(
            backlog.add(0x7_2000, 0x7_3000),
            "it goes on where the last one ends"
        );
        assert_eq!(backlog.iter().count(), 8);
        assert_eq!(
            backlog.iter().last(),
            Some(PaRange::from_bounds(0x7_0000, 0x7_3000))
        );
    }
}
