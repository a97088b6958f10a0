//! The VM table: handles, and how far the life of the VM behind each has come.
//!
//! ```text
//! Free ──reserve──▶ Reserved ──create──▶ Live ──destroy──▶ Dying ──destroy──▶ Dead ──reclaim…──▶ Free
//!   ▲                  │                   └───────── in one step ──────────────▲
//!   └──── reclaim ─────┘
//! ```
//!
//! An entry's lock is held for reading as long as anyone uses its VM, a running vCPU included, and is
//! only ever tried, never waited for: who would end a VM in use, or use one that ends, gets BUSY.
//!
//! Generic over the VM, so that the reference model and loom drive what runs on the board.

use abi::ErrorCode;
use board::{AddrRange, PAGE_SIZE};
use memslot::steps::Progress;

use crate::guest_memory::{Contents, Donations};
use crate::host_map::HostReach;
use crate::ownership::{Ownership, OwnershipError};
use crate::page_state::Owner;
use crate::sync::{Mutex, TryLock, TryReadGuard};
use crate::vm_error::Refusal;

/// Handles start here, so that a forgotten 0 is none.
pub const FIRST_HANDLE: u64 = 0x1000;
/// Most pages in one donation: what one call wipes, cleans and annotates.
const MAX_DONATION: u64 = 512;

/// A VM that comes to an end in steps, and is dropped behind the last one.
pub trait Teardown {
    /// What is left to do. It is dropped when the last of the VM's memory is back.
    type Left: core::fmt::Debug;

    /// Begins it. Nobody else uses the VM any more.
    fn begin(&self) -> Self::Left;

    /// Takes the next step. Behind the last one nothing refers to its tables but itself.
    fn go_on(&self, left: &mut Self::Left) -> Progress;
}

/// The memory that VMs are made of, and who has to agree about it.
pub struct Estate<'a, 's, H, C> {
    /// The board's.
    pub ownership: &'a Ownership<'s>,
    /// The host's.
    pub host: &'a H,
    /// The machine's.
    pub contents: &'a C,
}

impl<H, C> core::fmt::Debug for Estate<'_, '_, H, C> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Estate").finish_non_exhaustive()
    }
}

impl<H: HostReach, C: Contents> Estate<'_, '_, H, C> {
    /// Takes at most 512 pages from the host for EL2, out of its caches, too.
    ///
    /// # Errors
    ///
    /// As [`Ownership::donate`].
    pub fn donate(&self, range: AddrRange) -> Result<(), OwnershipError> {
        // EL2 makes objects and lists of free pages in it, and address 0 is nobody's pointer. On a
        // Raspberry Pi there is RAM.
        if range.size() / PAGE_SIZE > MAX_DONATION || range.start() == 0 {
            return Err(OwnershipError::NotOwned(range));
        }
        self.ownership.donate(self.host, range, Owner::Hypervisor)?;
        // The host may have written it past the cache, with lines of it still there.
        self.contents.settle(range);
        Ok(())
    }

    /// Wipes some pages of a VM that is gone and gives them back.
    fn take_back(&self, donated: &mut Donations) -> Result<Option<AddrRange>, OwnershipError> {
        donated.take_back(self.ownership, self.host, self.contents)
    }
}

/// A place in the table.
#[derive(Debug, Default)]
enum Entry<V, L> {
    /// Nobody's.
    #[default]
    Free,
    /// A handle without a VM.
    Reserved,
    /// A VM.
    Live {
        /// The VM; dropped before its memory goes.
        vm: V,
        /// What the host has donated to it. Its own lock, so that a VM whose vCPUs run can get more.
        donated: Mutex<Donations>,
    },
    /// A VM that ends: nobody uses it any more.
    Dying {
        /// As above.
        vm: V,
        /// As above.
        donated: Donations,
        /// What is left to do.
        left: L,
    },
    /// A VM that was: its memory waits to be reclaimed.
    Dead {
        /// As above.
        donated: Donations,
        /// What was left to do, done: dropped when all memory is back. `None` if there never was a VM.
        _done: Option<L>,
    },
}

type EntryLock<V> = TryLock<Entry<V, <V as Teardown>::Left>>;
type EntryGuard<'a, V> = TryReadGuard<'a, Entry<V, <V as Teardown>::Left>>;

/// At most `N` VMs, 256 of them with a handle.
#[derive(Debug)]
pub struct VmTable<V: Teardown, const N: usize> {
    entries: [EntryLock<V>; N],
}

impl<V: Teardown, const N: usize> Default for VmTable<V, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<V: Teardown, const N: usize> VmTable<V, N> {
    /// No VM.
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new() -> Self {
        Self {
            entries: [const { TryLock::new(Entry::Free) }; N],
        }
    }

    /// No VM.
    #[cfg(loom)]
    #[must_use]
    pub fn new() -> Self {
        Self {
            entries: core::array::from_fn(|_| TryLock::new(Entry::Free)),
        }
    }

    fn entry(&self, handle: u64) -> Result<(u8, &EntryLock<V>), ErrorCode> {
        let index = handle
            .checked_sub(FIRST_HANDLE)
            .and_then(|index| u8::try_from(index).ok())
            .ok_or(ErrorCode::NotFound)?;
        let entry = self.entries.get(usize::from(index));
        entry.map(|e| (index, e)).ok_or(ErrorCode::NotFound)
    }

    /// An entry that nobody changes meanwhile, and its index.
    #[inline(never)]
    fn held(&self, handle: u64) -> Result<(u8, EntryGuard<'_, V>), ErrorCode> {
        let (index, entry) = self.entry(handle)?;
        Ok((index, entry.try_read().ok_or(ErrorCode::Busy)?))
    }

    /// Lends the VM with this handle.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotFound`] if there is none; [`ErrorCode::Busy`] while it comes or ends; or what
    /// `use_vm` says.
    pub fn with<R>(
        &self,
        handle: u64,
        use_vm: impl FnOnce(&V) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        match &*self.held(handle)?.1 {
            Entry::Live { vm, .. } => use_vm(vm),
            _ => Err(ErrorCode::NotFound.into()),
        }
    }

    /// Reserves a handle.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NoSpace`].
    pub fn reserve(&self) -> Result<u64, ErrorCode> {
        for (number, entry) in (FIRST_HANDLE..).zip(&self.entries) {
            // Looked at first: who holds another VM's entry for writing, if only for a moment, makes
            // that VM's calls on other CPUs fail with BUSY.
            if entry.try_read().is_some_and(|e| matches!(*e, Entry::Free))
                && let Some(mut entry) = entry.try_write()
                && matches!(*entry, Entry::Free)
            {
                *entry = Entry::Reserved;
                return Ok(number);
            }
        }
        Err(ErrorCode::NoSpace)
    }

    /// Creates the VM of a reserved handle out of donated memory, at least `least` pages. `build` gets
    /// the index of the VM and gives it with a value to pass on.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Exists`] if the handle is not reserved, [`ErrorCode::NoMemory`],
    /// [`ErrorCode::Busy`], as [`Estate::donate`]; [`ErrorCode::Invalid`] if nothing can be built. Where
    /// the host's tables are lacking for giving the memory back then, it waits to be reclaimed, as that of a
    /// VM that was.
    pub fn create<R>(
        &self,
        estate: &Estate<'_, '_, impl HostReach, impl Contents>,
        handle: u64,
        (memory, least): (AddrRange, u64),
        build: impl FnOnce(u8) -> Option<(V, R)>,
    ) -> Result<R, Refusal> {
        let (index, entry) = self.entry(handle)?;
        let mut entry = entry.try_write().ok_or(ErrorCode::Busy)?;
        if !matches!(*entry, Entry::Reserved) {
            return Err(ErrorCode::Exists.into());
        }
        if memory.size() / PAGE_SIZE < least {
            return Err(Refusal {
                code: ErrorCode::NoMemory,
                pages: least,
            });
        }
        let mut donated = Donations::new();
        donated.prepare()?;
        estate.donate(memory)?;
        donated.add_state(memory);
        let Some((vm, built)) = build(index) else {
            let back = estate.take_back(&mut donated);
            if !donated.is_empty() {
                let _done = None;
                *entry = Entry::Dead { donated, _done };
            }
            back?;
            return Err(ErrorCode::Invalid.into());
        };
        let donated = Mutex::new(donated);
        *entry = Entry::Live { vm, donated };
        Ok(built)
    }

    /// Gives a VM more memory for its state and tables: what the host donates goes to `add`.
    ///
    /// # Errors
    ///
    /// As [`Self::with`] and [`Estate::donate`].
    pub fn top_up(
        &self,
        estate: &Estate<'_, '_, impl HostReach, impl Contents>,
        handle: u64,
        memory: AddrRange,
        add: impl FnOnce(&V),
    ) -> Result<u64, Refusal> {
        let (_, entry) = self.held(handle)?;
        let Entry::Live { vm, donated } = &*entry else {
            return Err(ErrorCode::NotFound.into());
        };
        let mut donated = donated.lock();
        donated.prepare()?;
        estate.donate(memory)?;
        donated.add_state(memory);
        add(vm);
        Ok(0)
    }

    /// Remembers the memory that `give` moves to the guest of a VM.
    ///
    /// # Errors
    ///
    /// As [`Self::with`].
    pub fn donate_memory(
        &self,
        handle: u64,
        give: impl FnOnce(&V) -> Result<AddrRange, Refusal>,
    ) -> Result<u64, Refusal> {
        let (index, entry) = self.held(handle)?;
        let Entry::Live { vm, donated } = &*entry else {
            return Err(ErrorCode::NotFound.into());
        };
        let mut donated = donated.lock();
        donated.prepare()?;
        let range = give(vm)?;
        donated.add_memory(range, index);
        Ok(0)
    }

    /// Lends the VM whose guest owns a page.
    ///
    /// # Errors
    ///
    /// As [`Self::with`]; [`ErrorCode::NotFound`] if the page is no guest's.
    pub fn with_owner<R>(
        &self,
        ownership: &Ownership<'_>,
        page: AddrRange,
        use_vm: impl FnOnce(&V) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let Some(Owner::Guest(index)) = ownership.pages().owner(page.start()) else {
            return Err(ErrorCode::NotFound.into());
        };
        self.with(FIRST_HANDLE + u64::from(index), use_vm)
    }

    /// Ends a VM: its mappings are gone and its memory is nobody's when this returns a value. It does
    /// so in steps: from the first on nothing but this call reaches the VM.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Again`] if something is left; [`ErrorCode::NotFound`]; [`ErrorCode::Busy`].
    pub fn destroy(&self, ownership: &Ownership<'_>, handle: u64) -> Result<u64, Refusal> {
        let (index, entry) = self.entry(handle)?;
        let mut entry = entry.try_write().ok_or(ErrorCode::Busy)?;
        let (vm, donated, mut left) = match core::mem::take(&mut *entry) {
            Entry::Free => return Err(ErrorCode::NotFound.into()),
            ended @ (Entry::Reserved | Entry::Dead { .. }) => {
                *entry = ended;
                return Ok(0);
            }
            Entry::Live { vm, donated } => {
                let left = vm.begin();
                (vm, core::mem::take(&mut *donated.lock()), left)
            }
            Entry::Dying { vm, donated, left } => (vm, donated, left),
        };
        if vm.go_on(&mut left) == Progress::More {
            *entry = Entry::Dying { vm, donated, left };
            return Err(ErrorCode::Again.into());
        }
        drop(vm);
        ownership.end_all_leases(index);
        *entry = Entry::Dead {
            donated,
            _done: Some(left),
        };
        Ok(0)
    }

    /// Gives one donated range of a VM that has ended back to the host, wiped; `None` when nothing is
    /// left: then the handle is free.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Invalid`] if it has not ended; [`ErrorCode::Again`] if more is to be looked at than in
    /// one call; [`ErrorCode::Busy`]; missing tables of the host: to
    /// be repeated.
    pub fn reclaim(
        &self,
        estate: &Estate<'_, '_, impl HostReach, impl Contents>,
        handle: u64,
    ) -> Result<Option<AddrRange>, Refusal> {
        let (_, entry) = self.entry(handle)?;
        let mut entry = entry.try_write().ok_or(ErrorCode::Busy)?;
        match &mut *entry {
            Entry::Free | Entry::Live { .. } | Entry::Dying { .. } => {
                return Err(ErrorCode::Invalid.into());
            }
            Entry::Reserved => {}
            Entry::Dead { donated, .. } => {
                if let Some(range) = estate.take_back(donated)? {
                    return Ok(Some(range));
                }
                if !donated.is_empty() {
                    return Err(ErrorCode::Again.into());
                }
            }
        }
        *entry = Entry::Free;
        Ok(None)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "vm_table_tests.rs"]
mod tests;
