//! Roots lent to an importer: an IOMMU, or whoever mirrors the table for one.
//!
//! An importer walks the table on its own and caches what it finds, so it is told of every
//! invalidation, behind the CPUs' TLBs and before any frame or table is given back. A root that
//! is exported is emptied by a zap but never replaced. Callbacks run under the list's lock, so
//! taking an importer off the list waits for callbacks in flight, and they must not call back.

use crate::addr::{IpaRange, Pa};
use crate::format::TableFormat;
use crate::level::{Geometry, Level};
use crate::platform::Platform;
use crate::space::Stage2;
use crate::sync::{AtomicEntry, AtomicU32, Mutex, Ordering, fence};

/// Importers one root can have.
pub const MAX_IMPORTERS: usize = 4;

/// Somebody who caches translations of an exported root.
pub trait InvalidateListener: Sync {
    /// Drops every translation of the range and every step of a walk to it, waits for accesses
    /// in flight, and only then returns. Must not call into the space.
    fn invalidate(&self, range: IpaRange);
}

/// All an importer needs to decide whether it can walk the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootMeta {
    /// Address of the root.
    pub root: Pa,
    /// Shape of the tables.
    pub geometry: Geometry,
    /// Bits of an output address.
    pub output_bits: u32,
    /// The coarsest level that holds leaves.
    pub coarsest_leaf: Level,
    /// Bits that no valid entry has or will have.
    pub reserved_bits: u64,
}

/// The right to import a root. One exists for a space at a time; it goes back through
/// [`Stage2::unexport`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the space cannot be destroyed before the export goes back"]
pub struct ExportedRoot {
    meta: RootMeta,
}

impl ExportedRoot {
    /// What there is to know.
    #[must_use]
    pub const fn meta(&self) -> &RootMeta {
        &self.meta
    }
}

/// An importer and what it can walk.
#[derive(Clone, Copy)]
pub struct Importer {
    /// Who is told.
    pub listener: &'static dyn InvalidateListener,
    /// Bits that its walker wants to be zero in every valid entry.
    pub must_be_zero: u64,
    /// Output bits of its walker.
    pub output_bits: u32,
    /// The coarsest leaf it understands.
    pub coarsest_leaf: Level,
}

impl core::fmt::Debug for Importer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Importer")
            .field("must_be_zero", &self.must_be_zero)
            .finish_non_exhaustive()
    }
}

/// Why a root is not exported or imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// The root is exported, or the importer registered, already.
    #[error("already exported or registered")]
    Busy,
    /// An entry at this address has bits that are to be reserved.
    #[error("the entry at {0:#x} has reserved bits")]
    InUse(u64),
    /// The format itself needs these bits.
    #[error("the format needs bits {0:#x}")]
    NeededBits(u64),
    /// The importer wants bits zero that the export does not promise.
    #[error("bits {0:#x} are not promised to be zero")]
    NotPromised(u64),
    /// The importer's walker handles fewer output bits.
    #[error("output addresses have {0} bits")]
    TooWide(u32),
    /// The importer's walker does not know leaves of this level.
    #[error("leaves may stand at level {0:?}")]
    LargeLeaf(Level),
    /// There is no room for another importer.
    #[error("no more than {MAX_IMPORTERS} importers")]
    Full,
    /// Nobody registered that importer.
    #[error("not registered")]
    Unknown,
    /// Importers are still registered.
    #[error("{0} importers are registered")]
    Imported(usize),
    /// The token belongs to another root.
    #[error("the export belongs to another root")]
    Foreign,
}

type List = [Option<Importer>; MAX_IMPORTERS];

/// Export state of one space.
pub(crate) struct Exports {
    state: AtomicU32,
    reserved: AtomicEntry,
    /// Importers on the list, to skip the lock when there are none.
    count: AtomicU32,
    importers: Mutex<List>,
}

const PRIVATE: u32 = 0;
const EXPORTED: u32 = 1;
const RETIRED: u32 = 2;

impl Exports {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU32::new(PRIVATE),
            reserved: AtomicEntry::new(0),
            count: AtomicU32::new(0),
            importers: Mutex::new([None; MAX_IMPORTERS]),
        }
    }

    pub(crate) fn is_exported(&self) -> bool {
        self.state.load(Ordering::Relaxed) == EXPORTED
    }

    pub(crate) fn retire(&self) {
        self.state.store(RETIRED, Ordering::Relaxed);
    }

    pub(crate) fn may_tear_down(&self) -> bool {
        self.state.load(Ordering::Relaxed) == PRIVATE
    }

    #[inline]
    pub(crate) fn reserved_bits(&self) -> u64 {
        self.reserved.load(Ordering::Relaxed)
    }

    /// Step 4 of the maintenance order. The fence pairs with the one in `register`: either this
    /// sees the importer, or the importer's first walk sees the broken entries.
    #[inline]
    #[track_caller]
    pub(crate) fn notify(&self, range: IpaRange) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::Relaxed) != 0 {
            self.tell_all(range);
        }
    }

    #[cold]
    fn tell_all(&self, range: IpaRange) {
        for importer in self.importers.lock().iter().flatten() {
            importer.listener.invalidate(range);
        }
    }
}

fn same_listener(a: &Importer, b: &dyn InvalidateListener) -> bool {
    core::ptr::addr_eq(core::ptr::from_ref(a.listener), core::ptr::from_ref(b))
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Lends the root. From here on no entry gets a bit of `reserved_bits`. Exclusive access
    /// makes the test and the insertion one step.
    ///
    /// # Errors
    /// Nothing has changed after an error: [`ExportError::Busy`] for a second export,
    /// [`ExportError::InUse`] or [`ExportError::NeededBits`] when the promise cannot be given.
    pub fn export(&mut self, reserved_bits: u64) -> Result<ExportedRoot, ExportError> {
        if self.exports.is_exported() {
            return Err(ExportError::Busy);
        }
        let needed = self.format.table_word(Pa::new(0)) & reserved_bits;
        if needed != 0 {
            return Err(ExportError::NeededBits(needed));
        }
        if let Some(slot) = self.leaf_with(reserved_bits) {
            return Err(ExportError::InUse(slot));
        }
        self.exports
            .reserved
            .store(reserved_bits, Ordering::Relaxed);
        self.exports.state.store(EXPORTED, Ordering::Relaxed);
        Ok(ExportedRoot {
            meta: self.root_meta(reserved_bits),
        })
    }

    /// The first leaf with one of `bits`. An importer that reserves nothing asks for no walk.
    fn leaf_with(&self, bits: u64) -> Option<u64> {
        let mut clash = None;
        let whole = IpaRange::from_bounds(0, self.geometry().input_end());
        if bits != 0 {
            self.visit_leaves(&whole, &mut |found| {
                if found.raw & bits != 0 && clash.is_none() {
                    clash = Some(found.slot);
                }
            });
        }
        clash
    }

    fn root_meta(&self, reserved_bits: u64) -> RootMeta {
        let blocks = [Level::L0, Level::L1, Level::L2];
        let coarsest = blocks
            .into_iter()
            .find(|level| self.format.supports_leaf(*level));
        RootMeta {
            root: self.root,
            geometry: *self.geometry(),
            output_bits: self.format.output_bits(),
            coarsest_leaf: coarsest.unwrap_or(Level::PAGE),
            reserved_bits,
        }
    }

    /// Ends the export. Every importer must have left.
    ///
    /// # Errors
    /// The token with [`ExportError::Imported`] or [`ExportError::Foreign`].
    pub fn unexport(&mut self, root: ExportedRoot) -> Result<(), (ExportedRoot, ExportError)> {
        if root.meta.root != self.root {
            return Err((root, ExportError::Foreign));
        }
        match self.exports.importers.lock().iter().flatten().count() {
            0 => {}
            left => return Err((root, ExportError::Imported(left))),
        }
        self.exports.reserved.store(0, Ordering::Relaxed);
        self.exports.state.store(PRIVATE, Ordering::Relaxed);
        Ok(())
    }

    /// Puts an importer on the list: test and insertion in one critical section. It may walk
    /// the root when this returns.
    ///
    /// # Errors
    /// What the importer's walker cannot do, or why there is no place for it.
    pub fn register(&self, root: &ExportedRoot, importer: Importer) -> Result<(), ExportError> {
        let meta = &root.meta;
        if meta.root != self.root {
            return Err(ExportError::Foreign);
        }
        let unpromised = importer.must_be_zero & !meta.reserved_bits;
        if unpromised != 0 {
            return Err(ExportError::NotPromised(unpromised));
        }
        if importer.output_bits < meta.output_bits {
            return Err(ExportError::TooWide(meta.output_bits));
        }
        if importer.coarsest_leaf.height() < meta.coarsest_leaf.height() {
            return Err(ExportError::LargeLeaf(meta.coarsest_leaf));
        }
        let mut list = self.exports.importers.lock();
        if list
            .iter()
            .flatten()
            .any(|other| same_listener(other, importer.listener))
        {
            return Err(ExportError::Busy);
        }
        let free = list
            .iter_mut()
            .find(|place| place.is_none())
            .ok_or(ExportError::Full)?;
        *free = Some(importer);
        self.exports.count.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst); // pairs with `notify`
        Ok(())
    }

    /// Takes an importer off the list: waits for callbacks in flight, tells it a last time to
    /// drop everything, and never calls it again.
    ///
    /// # Errors
    /// [`ExportError::Unknown`] when it is not on the list.
    pub fn unregister(&self, listener: &dyn InvalidateListener) -> Result<(), ExportError> {
        let mut list = self.exports.importers.lock();
        let place = list
            .iter_mut()
            .find(|place| place.is_some_and(|other| same_listener(&other, listener)))
            .ok_or(ExportError::Unknown)?;
        listener.invalidate(IpaRange::from_bounds(0, self.geometry().input_end()));
        *place = None;
        self.exports.count.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }
}
