//! Tables taken before the first store, so that an operation cannot stop half-way.

use crate::addr::Pa;
use crate::error::MapError;
use crate::format::TableFormat;
use crate::platform::{DetachedTable, Platform};
use crate::space::Stage2;

/// A stack of tables nobody reaches, linked through their first entries.
#[derive(Debug)]
pub(crate) struct Reserve {
    top: Option<Pa>,
    left: usize,
}

impl Reserve {
    pub(crate) const EMPTY: Self = Self { top: None, left: 0 };
}

/// Marks the last table of the stack: not a table address, as those are page aligned.
const BOTTOM: u64 = 1;

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Takes `needed` tables, or none.
    pub(crate) fn reserve(&self, needed: usize) -> Result<Reserve, MapError> {
        let mut reserve = Reserve::EMPTY;
        while reserve.left < needed {
            let Some(pa) = self.platform.alloc_table() else {
                self.give_back(reserve);
                return Err(MapError::NoMemory { needed });
            };
            self.table(pa).init(0, reserve.top.map_or(BOTTOM, Pa::get));
            reserve = Reserve {
                top: Some(pa),
                left: reserve.left + 1,
            };
        }
        Ok(reserve)
    }

    /// Takes one table from the stack; its contents do not matter. The preparation counted
    /// right, so there is one: running dry is a bug that debug builds stop at, and that release
    /// builds answer by leaving the part unmapped.
    #[inline]
    pub(crate) fn take(&self, reserve: &mut Reserve) -> Option<Pa> {
        debug_assert!(
            reserve.top.is_some(),
            "the preparation counted too few tables"
        );
        let pa = reserve.top?;
        let next = self.table(pa).load(0);
        reserve.top = (next != BOTTOM).then(|| Pa::new(next));
        reserve.left -= 1;
        Some(pa)
    }

    /// Gives back what was not used.
    pub(crate) fn give_back(&self, mut reserve: Reserve) {
        while reserve.top.is_some() {
            if let Some(pa) = self.take(&mut reserve) {
                self.platform.free_table(DetachedTable::new(pa));
            }
        }
    }
}
