//! One guest memory slot: a range of guest frames with one host backing and one flag word.

use crate::addr::{Gfn, GfnRange};
use crate::error::Error;

bitflags::bitflags! {
    /// Properties of a slot, as the host declares them. Bit numbers follow KVM's where KVM has
    /// the flag (memory-slot flags 0 and 1; bit 3 is the posted non-coherent flag).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SlotFlags: u32 {
        /// Record written pages in a bitmap. May be changed at any time on an unlocked slot.
        const DIRTY_LOG = 1 << 0;
        /// The guest may not write; a write is emulated as MMIO. Fixed at creation.
        const READONLY = 1 << 1;
        /// A device accesses this memory without snooping: the guest's own memory type is always
        /// honoured here, whatever the VM's non-coherent count is. Fixed at creation.
        const NONCOHERENT_DMA = 1 << 3;
        /// Device memory for which the guest may have write combining. Fixed at creation.
        const WRITE_COMBINING = 1 << 4;
    }
}

impl SlotFlags {
    /// What may change during a slot's life.
    pub const MUTABLE: Self = Self::DIRTY_LOG;

    /// Parses a word from outside.
    ///
    /// # Errors
    /// [`Error::BadBits`] with the unknown bits.
    pub fn from_word(word: u32) -> Result<Self, Error> {
        Self::from_bits(word).ok_or_else(|| Error::BadBits(u64::from(word & !Self::all().bits())))
    }
}

bitflags::bitflags! {
    /// Permissions of a lock request.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct LockFlags: u64 {
        /// Map readable; mandatory.
        const READ = 1 << 0;
        /// Map writable, too, and pin with write intent.
        const WRITE = 1 << 1;
    }
}

/// A slot's number, unique within its VM. Any `u16` can be named; which exist is the VM's matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct SlotId(pub u16);

/// What stands behind a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotKind {
    /// Ordinary memory.
    Ram,
    /// Registers or memory of a device, given to the guest directly. Never executable.
    Mmio,
}

/// Which leaves a lock may install.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LockGranule {
    /// One leaf per 4 KiB page.
    #[default]
    BasePages,
    /// Blocks where the backing is contiguous. Granted only where the block stays one mapping
    /// for as long as the lock lasts; base pages otherwise.
    Blocks,
}

/// The lock on a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotLock {
    /// Permissions that the lock was taken with.
    pub flags: LockFlags,
    /// Largest leaves inside the slot.
    pub granule: LockGranule,
}

/// A guest memory slot. Plain data: what belongs to it (bitmap, pins) is kept by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memslot {
    /// Number within the VM.
    pub id: SlotId,
    /// Guest frames.
    pub range: GfnRange,
    /// What the host calls the backing; opaque here, only the frame source reads it.
    pub backing: u64,
    /// Flags.
    pub flags: SlotFlags,
    /// RAM or a device.
    pub kind: SlotKind,
    /// Set while the slot is locked.
    pub lock: Option<SlotLock>,
}

impl Memslot {
    /// An unlocked slot.
    ///
    /// # Errors
    /// [`Error::BadRange`] for a range that is empty or too long; [`Error::BadBits`] for flags
    /// that contradict the kind: write combining is for devices, dirty logging for RAM.
    pub fn new(
        id: SlotId,
        base: Gfn,
        npages: u64,
        backing: u64,
        flags: SlotFlags,
        kind: SlotKind,
    ) -> Result<Self, Error> {
        let range = GfnRange::from_base(base, npages).ok_or(Error::BadRange {
            base: base.get(),
            npages,
        })?;
        let wrong = match kind {
            SlotKind::Ram => flags & SlotFlags::WRITE_COMBINING,
            SlotKind::Mmio => flags & SlotFlags::DIRTY_LOG,
        };
        if !wrong.is_empty() {
            return Err(Error::BadBits(u64::from(wrong.bits())));
        }
        Ok(Self {
            id,
            range,
            backing,
            flags,
            kind,
            lock: None,
        })
    }

    /// Whether a write by the guest is a write to memory (and not emulated).
    #[must_use]
    pub fn is_writable(&self) -> bool {
        !self.flags.contains(SlotFlags::READONLY)
    }

    /// Whether leaves of this slot must be base pages.
    ///
    /// Dirty logging counts pages. A locked slot is rewritten and relaxed leaf by leaf, so it
    /// has blocks only when it was locked with blocks.
    #[must_use]
    pub fn needs_base_pages(&self) -> bool {
        let locked_in_pages = self.lock.is_some_and(|l| !self.blocks_are_forever(l));
        self.flags.contains(SlotFlags::DIRTY_LOG) || locked_in_pages
    }

    /// Whether a block mapped under `lock` stays one mapping until unlock.
    ///
    /// Only dirty logging could ask for smaller leaves later, and it is refused while a slot is
    /// locked for writing and impossible on a read-only one.
    #[must_use]
    pub fn blocks_are_forever(&self, lock: SlotLock) -> bool {
        let never_logged = lock.flags.contains(LockFlags::WRITE) || !self.is_writable();
        lock.granule == LockGranule::Blocks && never_logged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::gfn;

    fn ram(flags: SlotFlags) -> Memslot {
        Memslot::new(SlotId(1), gfn(0x100), 16, 0, flags, SlotKind::Ram).unwrap()
    }

    fn locked(flags: SlotFlags, lock: LockFlags, granule: LockGranule) -> Memslot {
        Memslot {
            lock: Some(SlotLock {
                flags: lock,
                granule,
            }),
            ..ram(flags)
        }
    }

    #[test]
    fn flag_bits_are_those_of_the_abi() {
        assert_eq!(SlotFlags::DIRTY_LOG.bits(), 0x1);
        assert_eq!(SlotFlags::READONLY.bits(), 0x2);
        assert_eq!(SlotFlags::NONCOHERENT_DMA.bits(), 0x8);
        assert_eq!(SlotFlags::WRITE_COMBINING.bits(), 0x10);
        assert_eq!(LockFlags::READ.bits(), 0x1);
        assert_eq!(LockFlags::WRITE.bits(), 0x2);
    }

    #[test]
    fn unknown_flag_bits_are_named_in_the_error() {
        assert_eq!(SlotFlags::from_word(0x104), Err(Error::BadBits(0x104)));
        assert_eq!(
            SlotFlags::from_word(0xb),
            Ok(SlotFlags::from_bits_retain(0xb))
        );
    }

    #[test]
    fn write_combining_is_refused_for_ram() {
        let r = Memslot::new(
            SlotId(0),
            gfn(0),
            1,
            0,
            SlotFlags::WRITE_COMBINING,
            SlotKind::Ram,
        );
        assert_eq!(r, Err(Error::BadBits(0x10)));
    }

    #[test]
    fn dirty_logging_is_refused_for_devices() {
        let r = Memslot::new(
            SlotId(0),
            gfn(0),
            1,
            0,
            SlotFlags::DIRTY_LOG,
            SlotKind::Mmio,
        );
        assert_eq!(r, Err(Error::BadBits(0x1)));
    }

    #[test]
    fn an_empty_slot_is_refused() {
        let r = Memslot::new(SlotId(0), gfn(7), 0, 0, SlotFlags::empty(), SlotKind::Ram);
        assert_eq!(r, Err(Error::BadRange { base: 7, npages: 0 }));
    }

    #[test]
    fn a_logged_slot_needs_base_pages() {
        assert!(ram(SlotFlags::DIRTY_LOG).needs_base_pages());
        assert!(!ram(SlotFlags::empty()).needs_base_pages());
    }

    #[test]
    fn a_lock_means_base_pages_unless_blocks_are_forever() {
        let rw = LockFlags::READ | LockFlags::WRITE;
        let ro = SlotFlags::READONLY;
        let none = SlotFlags::empty();
        assert!(locked(none, rw, LockGranule::BasePages).needs_base_pages());
        assert!(!locked(none, rw, LockGranule::Blocks).needs_base_pages());
        assert!(locked(none, LockFlags::READ, LockGranule::Blocks).needs_base_pages());
        assert!(!locked(ro, LockFlags::READ, LockGranule::Blocks).needs_base_pages());
        assert!(locked(ro, LockFlags::READ, LockGranule::BasePages).needs_base_pages());
    }
}
