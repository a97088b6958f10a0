//! A page table as an ordered map of pages: fails where a test wants, hides nothing, and is
//! small enough for loom.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

use stage2::{
    Age, Aging, Annotation, CacheMaintenance, FaultOutcome, FaultRequest, Ipa, IpaRange, LeafAttrs,
    Level, MapError, MapRequest, Pa, PaRange, Perms,
};

use super::CacheModel;
use crate::table::{GuestTable, LeafRun};

const PAGE: u64 = 4096;

/// One page's leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelLeaf {
    /// Memory behind it.
    pub pa: Pa,
    /// What it says.
    pub attrs: LeafAttrs,
}

/// Which call of a table's operations fails for want of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FailAt {
    /// The n-th `map` from now, counting from 0.
    pub map: Option<usize>,
    /// The n-th `fault` from now, counting from 0.
    pub fault: Option<usize>,
}

/// What was done to the table, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Clean,
    Other,
}

#[derive(Debug, Default)]
struct Inner {
    leaves: BTreeMap<u64, ModelLeaf>,
    notes: BTreeMap<u64, Annotation>,
    fail: FailAt,
    ops: Vec<Op>,
}

/// The table; its cache maintenance goes to a [`CacheModel`] that the test keeps.
#[derive(Debug)]
pub struct ModelTable {
    inner: Mutex<Inner>,
    caches: Arc<CacheModel>,
}

impl ModelTable {
    /// An empty table on these caches.
    #[must_use]
    pub fn new(caches: Arc<CacheModel>) -> Self {
        Self {
            inner: Mutex::default(),
            caches,
        }
    }

    /// Makes a later operation fail.
    pub fn fail_at(&self, fail: FailAt) {
        self.lock().fail = fail;
    }

    /// All leaves by byte address.
    #[must_use]
    pub fn leaves(&self) -> BTreeMap<u64, ModelLeaf> {
        self.lock().leaves.clone()
    }

    /// Data maintenance calls so far.
    #[must_use]
    pub fn cleans(&self) -> usize {
        self.lock()
            .ops
            .iter()
            .filter(|op| **op == Op::Clean)
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, range: IpaRange) {
        let mut inner = self.lock();
        inner.ops.push(Op::Other);
        let keys: Vec<u64> = keys(&inner, range);
        for key in keys {
            if let Some(leaf) = inner.leaves.remove(&key) {
                self.owed(&leaf.attrs, leaf.pa);
            }
        }
    }

    /// Maintenance of one page, by its attributes.
    fn owed(&self, attrs: &LeafAttrs, pa: Pa) {
        if attrs.maintenance().data
            && let Ok(page) = PaRange::new(pa, PAGE)
        {
            self.caches.clean_invalidate_data(page);
        }
    }

    fn fetched(&self, had: Perms, has: Perms, pa: Pa) {
        if has.may_execute()
            && !had.may_execute()
            && let Ok(page) = PaRange::new(pa, PAGE)
        {
            self.caches.invalidate_fetch(page);
        }
    }

    /// Gives a leaf permissions, and makes it young.
    fn add(&self, inner: &mut Inner, at: u64, old: ModelLeaf, perms: Perms) {
        self.fetched(old.attrs.perms, perms, old.pa);
        let attrs = LeafAttrs {
            perms,
            age: Age::Young,
            ..old.attrs
        };
        inner.leaves.insert(at, ModelLeaf { attrs, ..old });
    }

    fn put(&self, inner: &mut Inner, at: u64, new: ModelLeaf, now: bool) {
        let old = inner.leaves.insert(at, new);
        if let Some(old) = old.filter(|o| o.pa == new.pa && types(o) == types(&new)) {
            // Permissions only: the data stays where it is.
            if now {
                self.fetched(old.attrs.perms, new.attrs.perms, new.pa);
            }
            return;
        }
        if let Some(old) = old {
            self.owed(&old.attrs, old.pa);
        }
        if now {
            self.owed(&new.attrs, new.pa);
            self.fetched(Perms::empty(), new.attrs.perms, new.pa);
        }
    }
}

fn types(leaf: &ModelLeaf) -> (stage2::MemType, stage2::Combine) {
    (leaf.attrs.mem, leaf.attrs.combine)
}

fn keys(inner: &Inner, range: IpaRange) -> Vec<u64> {
    inner
        .leaves
        .range(range.start().get()..range.end().get())
        .map(|(k, _)| *k)
        .collect()
}

/// Counts a failure down; true when it is due.
fn due(counter: &mut Option<usize>) -> bool {
    match counter {
        Some(0) => {
            *counter = None;
            true
        }
        Some(n) => {
            *n -= 1;
            false
        }
        None => false,
    }
}

impl GuestTable for ModelTable {
    fn fault(&self, request: &FaultRequest) -> Result<FaultOutcome, MapError> {
        let mut inner = self.lock();
        if due(&mut inner.fail.fault) {
            return Err(MapError::NoMemory { needed: 3 });
        }
        let at = request.ipa.get() & !(PAGE - 1);
        let pa = Pa::new(request.pa.get() + (at - request.window.start().get()));
        let new = ModelLeaf {
            pa,
            attrs: request.attrs,
        };
        let now = request.cmo == stage2::CmoMode::Now;
        if let Some(note) = inner.notes.get(&at) {
            return Ok(FaultOutcome::Annotated(*note));
        }
        let Some(old) = inner.leaves.get(&at).copied() else {
            self.put(&mut inner, at, new, now);
            return Ok(FaultOutcome::Mapped(Level::PAGE));
        };
        if old.pa != pa || types(&old) != types(&new) {
            let entry = stage2::Entry::Leaf {
                pa: old.pa,
                attrs: old.attrs,
            };
            return Ok(FaultOutcome::Conflict(entry));
        }
        let perms = old.attrs.perms | new.attrs.perms;
        if perms == old.attrs.perms && old.attrs.age == Age::Young {
            return Ok(FaultOutcome::AlreadyMapped);
        }
        self.add(&mut inner, at, old, perms);
        Ok(FaultOutcome::Relaxed)
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), MapError> {
        let mut inner = self.lock();
        if due(&mut inner.fail.map) {
            return Err(MapError::NoMemory { needed: 7 });
        }
        inner.ops.push(Op::Other);
        for offset in (0..request.size).step_by(4096) {
            let pa = Pa::new(request.pa.get() + offset);
            let now = request.cmo == stage2::CmoMode::Now;
            let new = ModelLeaf {
                pa,
                attrs: request.attrs,
            };
            self.put(&mut inner, request.ipa.get() + offset, new, now);
        }
        Ok(())
    }

    fn unmap(&mut self, range: IpaRange) -> Result<(), MapError> {
        self.remove(range);
        let bytes = range.start().get()..range.end().get();
        self.lock().notes.retain(|at, _| !bytes.contains(at));
        Ok(())
    }

    fn annotate(&mut self, range: IpaRange, note: Annotation) -> Result<(), MapError> {
        self.remove(range);
        let pages = (range.start().get()..range.end().get()).step_by(4096);
        self.lock().notes.extend(pages.map(|at| (at, note)));
        Ok(())
    }

    fn first_note(&self, range: IpaRange) -> Option<(Ipa, Annotation)> {
        let bytes = range.start().get()..range.end().get();
        let inner = self.lock();
        let (at, note) = inner.notes.range(bytes).next()?;
        Some((Ipa::new(*at), *note))
    }

    fn zap(&self, range: IpaRange) -> Result<(), MapError> {
        self.remove(range);
        Ok(())
    }

    fn age(&self, range: IpaRange, aging: Aging) -> Result<u64, MapError> {
        let mut inner = self.lock();
        let bytes = range.start().get()..range.end().get();
        let mut young = 0;
        for (_, leaf) in inner.leaves.range_mut(bytes) {
            young += u64::from(leaf.attrs.age == Age::Young) * PAGE;
            if aging == Aging::Clear {
                leaf.attrs.age = Age::Old;
            }
        }
        Ok(young)
    }

    fn relax(&self, ipa: Ipa, add: Perms) -> Result<FaultOutcome, MapError> {
        let mut inner = self.lock();
        let at = ipa.get() & !(PAGE - 1);
        let old = *inner.leaves.get(&at).ok_or(MapError::NotMapped(ipa))?;
        self.add(&mut inner, at, old, old.attrs.perms | add);
        Ok(FaultOutcome::Relaxed)
    }

    fn next_run(&self, range: IpaRange) -> Option<LeafRun> {
        let inner = self.lock();
        let mut leaves = inner.leaves.range(range.start().get()..range.end().get());
        let (at, leaf) = leaves.next()?;
        let mut size = PAGE;
        for (next, other) in leaves {
            let follows = *next == at + size && other.pa.get() == leaf.pa.get() + size;
            if !follows || other.attrs != leaf.attrs {
                break;
            }
            size += PAGE;
        }
        let range = IpaRange::new(Ipa::new(*at), size).ok()?;
        Some(LeafRun {
            range,
            pa: leaf.pa,
            attrs: leaf.attrs,
            level: Level::PAGE,
        })
    }

    fn clean_invalidate_data(&self, range: PaRange) {
        self.lock().ops.push(Op::Clean);
        self.caches.clean_invalidate_data(range);
    }

    fn invalidate_fetch(&self, range: PaRange) {
        self.caches.invalidate_fetch(range);
    }
}
