//! Objects in pages that the host has donated.

use core::fmt;
use core::mem::MaybeUninit;
use core::ops::Deref;
use core::ptr::NonNull;

use board::PAGE_SIZE;

use el2::vgic::{GicVersion, Vgic};

use super::frames::FramePool;

/// An object in a pool's pages. Dropping it drops the object; the pages stay taken until the whole
/// pool goes.
pub(crate) struct Owned<T> {
    pointer: NonNull<T>,
}

/// Pages for a `T`.
pub(crate) struct Place<T> {
    pointer: NonNull<MaybeUninit<T>>,
}

impl<T> Place<T> {
    /// Bytes that a place takes: a power of two, at least a page.
    pub(crate) const SIZE: u64 = {
        let size = (size_of::<T>() as u64).next_power_of_two();
        if size < PAGE_SIZE { PAGE_SIZE } else { size }
    };

    /// Takes zeroed pages out of `pool`, which must outlive the object.
    pub(crate) fn take(pool: &FramePool) -> Option<Self> {
        let address = pool.alloc(Self::SIZE)?;
        let pointer = NonNull::new(core::ptr::with_exposed_provenance_mut(address as usize))?;
        // SAFETY: the pool has just handed out so many bytes, page-aligned.
        unsafe { pointer.cast::<u8>().write_bytes(0, Self::SIZE as usize) };
        Some(Self { pointer })
    }

    /// Puts `value` there.
    pub(crate) fn fill(self, value: T) -> Owned<T> {
        // SAFETY: large and aligned enough (pages), exclusively ours.
        unsafe { self.pointer.cast::<T>().write(value) };
        Owned {
            pointer: self.pointer.cast(),
        }
    }
}

impl Owned<crate::vm::VmShared> {
    /// The object, for the tables of the VM that owns it.
    pub(crate) fn for_tables(&self) -> &'static crate::vm::VmShared {
        // SAFETY: the VM declares it behind its tables, so it drops them first; the pages stay as
        // they are until the host reclaims them, which needs the VM to be dropped.
        unsafe { self.pointer.as_ref() }
    }
}

impl Place<Vgic> {
    /// Puts a copy of the controller after reset there: it is too large for a stack.
    pub(crate) fn fill_with_vgic(self, version: GicVersion, vcpus: u8) -> Owned<Vgic> {
        static TEMPLATE: Vgic = Vgic::new(GicVersion::V3, 1);
        let pointer = self.pointer.cast::<Vgic>();
        // SAFETY: large and aligned enough, apart; a plain copy of plain values, atomics and an
        // open lock included, that nobody changes in the template.
        unsafe { core::ptr::copy_nonoverlapping(&raw const TEMPLATE, pointer.as_ptr(), 1) };
        let mut owned = Owned { pointer };
        // SAFETY: initialised just now, exclusively ours.
        unsafe { owned.pointer.as_mut() }.configure(version, vcpus);
        owned
    }
}

impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: initialised by `fill`, alive until this is dropped.
        unsafe { self.pointer.as_ref() }
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: initialised by `fill`, dropped once.
        unsafe { self.pointer.drop_in_place() };
    }
}

impl<T: fmt::Debug> fmt::Debug for Owned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        T::fmt(self, f)
    }
}

// SAFETY: it owns its `T`, as a box does.
unsafe impl<T: Send> Send for Owned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Owned<T> {}
