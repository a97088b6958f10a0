//! Tables taken before the first store, so that an operation cannot stop half-way.

use crate::addr::Pa;
use crate::error::MapError;
use crate::format::TableFormat;
use crate::platform::{DetachedTable, Platform};
use crate::space::Stage2;

/// A queue of tables nobody reaches, linked through their first entries. They are used in the
/// order in which they were handed out, which is mostly that of memory: neighbours in the input
/// become neighbours in memory, as hardware and software that walk them like it.
#[derive(Debug)]
pub(crate) struct Reserve {
    first: Option<Pa>,
    last: Option<Pa>,
}

impl Reserve {
    pub(crate) const EMPTY: Self = Self {
        first: None,
        last: None,
    };
}

/// Marks the last table of the queue: not a table address, as those are page aligned.
const LAST: u64 = 1;

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Takes `needed` tables, or none.
    pub(crate) fn reserve(&self, needed: usize) -> Result<Reserve, MapError> {
        let mut reserve = Reserve::EMPTY;
        for _ in 0..needed {
            let Some(pa) = self.platform.alloc_table() else {
                self.give_back(reserve);
                return Err(MapError::NoMemory { needed });
            };
            self.table(pa).init(0, LAST);
            match reserve.last {
                Some(last) => self.table(last).init(0, pa.get()),
                None => reserve.first = Some(pa),
            }
            reserve.last = Some(pa);
        }
        Ok(reserve)
    }

    /// Takes one table from the queue; its contents do not matter. The preparation counted
    /// right, so there is one: running dry is a bug that debug builds stop at, and that release
    /// builds answer by leaving the part unmapped.
    #[inline]
    pub(crate) fn take(&self, reserve: &mut Reserve) -> Option<Pa> {
        debug_assert!(
            reserve.first.is_some(),
            "the preparation counted too few tables"
        );
        let pa = reserve.first?;
        let next = self.table(pa).peek(0);
        reserve.first = (next != LAST).then(|| Pa::new(next));
        Some(pa)
    }

    /// Gives back what was not used.
    pub(crate) fn give_back(&self, mut reserve: Reserve) {
        while reserve.first.is_some() {
            if let Some(pa) = self.take(&mut reserve) {
                self.platform.free_table(DetachedTable::new(pa));
            }
        }
    }
}
