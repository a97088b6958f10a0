//! Objects in pages that the host has donated.

use core::fmt;
use core::mem::MaybeUninit;
use core::ops::Deref;

use board::PAGE_SIZE;

use el2::vgic::{GicVersion, Vgic};

use super::frames::FramePool;

/// An object in a pool's pages. Dropping it drops the object; the pages stay taken until the whole
/// pool goes.
pub(crate) struct Owned<T: 'static> {
    value: &'static mut T,
}

/// Pages for a `T`.
pub(crate) struct Place<T: 'static> {
    slot: &'static mut MaybeUninit<T>,
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
        let pointer = core::ptr::with_exposed_provenance_mut::<MaybeUninit<T>>(address as usize);
        // SAFETY: the pool has just handed out so many bytes, page-aligned.
        let slot = unsafe { &mut *pointer };
        *slot = MaybeUninit::zeroed();
        Some(Self { slot })
    }

    /// Puts `value` there.
    pub(crate) fn fill(self, value: T) -> Owned<T> {
        Owned {
            value: self.slot.write(value),
        }
    }
}

impl Owned<crate::vm::VmShared> {
    /// The object, for the tables of the VM that owns it.
    pub(crate) fn for_tables(&self) -> &'static crate::vm::VmShared {
        // SAFETY: the VM declares it behind its tables, so it drops them first; the pages stay as
        // they are until the host reclaims them, which needs the VM to be dropped.
        unsafe { &*core::ptr::from_ref(&*self.value) }
    }
}

impl Place<Vgic> {
    /// Puts a copy of the controller after reset there: it is too large for a stack.
    pub(crate) fn fill_with_vgic(self, version: GicVersion, vcpus: u8) -> Owned<Vgic> {
        static TEMPLATE: Vgic = Vgic::new(GicVersion::V3, 1);
        let pointer = self.slot.as_mut_ptr();
        // SAFETY: large and aligned enough, apart; a plain copy of plain values, atomics and an
        // open lock included, that nobody changes in the template.
        unsafe { core::ptr::copy_nonoverlapping(&raw const TEMPLATE, pointer, 1) };
        // SAFETY: initialised just now.
        let value = unsafe { self.slot.assume_init_mut() };
        value.configure(version, vcpus);
        Owned { value }
    }
}

impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: initialised by `fill`, dropped once.
        unsafe { core::ptr::drop_in_place(self.value) };
    }
}

impl<T: fmt::Debug> fmt::Debug for Owned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        T::fmt(self, f)
    }
}
