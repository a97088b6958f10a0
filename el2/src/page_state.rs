//! Who owns each page of RAM.
//!
//! Invariant: every page of RAM has exactly one owner. Four bytes a page; zero means "the host's,
//! shared with nobody", so a zeroed array is the state of a machine on which EL2 has taken nothing.

use board::{AddrRange, MAX_MEMORY, PAGE_SIZE, RangeList};
use core::sync::atomic::{AtomicU32, Ordering};

/// An owner of memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    /// The host.
    Host,
    /// EL2 itself.
    Hypervisor,
    /// The guest with this index in the VM table.
    Guest(u8),
    /// Firmware, which said that nobody may map it: the host keeps it, nobody else gets it.
    Firmware,
}

impl Owner {
    /// Bits 9:0 of a page's word.
    const fn encode(self) -> u32 {
        match self {
            Self::Host => 0,
            Self::Hypervisor => 1,
            Self::Guest(index) => 2 + index as u32,
            Self::Firmware => 0x3ff,
        }
    }

    const fn decode(word: u32) -> Self {
        match word & 0x3ff {
            0 => Self::Host,
            1 => Self::Hypervisor,
            0x3ff => Self::Firmware,
            other => Self::Guest((other - 2).to_le_bytes()[0]),
        }
    }
}

/// The array, over all RAM of the board.
#[derive(Debug)]
pub struct PageStates<'a> {
    memory: RangeList<MAX_MEMORY>,
    words: &'a [AtomicU32],
}

impl<'a> PageStates<'a> {
    /// States in `words`, zeroed, for all pages of `memory`; `None` if there are too few words.
    #[must_use]
    pub fn new(memory: RangeList<MAX_MEMORY>, words: &'a [AtomicU32]) -> Option<Self> {
        let pages = usize::try_from(memory.total() / PAGE_SIZE).ok()?;
        (pages <= words.len()).then_some(Self { memory, words })
    }

    /// RAM, page-aligned.
    #[must_use]
    pub fn memory(&self) -> &RangeList<MAX_MEMORY> {
        &self.memory
    }

    fn word(&self, address: u64) -> Option<&AtomicU32> {
        let mut before = 0;
        for range in self.memory.as_slice() {
            if range.contains(address) {
                let index = before + (address - range.start()) / PAGE_SIZE;
                return self.words.get(usize::try_from(index).ok()?);
            }
            before += range.size() / PAGE_SIZE;
        }
        None
    }

    /// The owner of the page at `address`; `None` if that is not RAM.
    #[must_use]
    pub fn owner(&self, address: u64) -> Option<Owner> {
        Some(Owner::decode(self.word(address)?.load(Ordering::Acquire)))
    }

    /// The words of all pages of `range`; `None` if it is not inside one range of RAM.
    fn words_of(&self, range: AddrRange) -> Option<&[AtomicU32]> {
        let mut before = 0;
        for ram in self.memory.as_slice() {
            if ram.contains(range.start()) {
                let first = before + (range.start() - ram.start()) / PAGE_SIZE;
                let count = range.size().div_ceil(PAGE_SIZE);
                let first = usize::try_from(first).ok()?;
                let end = first.checked_add(usize::try_from(count).ok()?)?;
                return (range.end() <= ram.end())
                    .then(|| self.words.get(first..end))
                    .flatten();
            }
            before += ram.size() / PAGE_SIZE;
        }
        None
    }

    /// Whether all of `range` is RAM (in one piece) and belongs to `owner`.
    #[must_use]
    pub fn all_owned_by(&self, range: AddrRange, owner: Owner) -> bool {
        let owned = |word: &AtomicU32| word.load(Ordering::Acquire) == owner.encode();
        self.words_of(range)
            .is_some_and(|words| words.iter().all(owned))
    }

    /// Gives all pages of `range` from one owner to another, if all are RAM and the first one's
    /// now; says whether. The caller excludes other changes of the same pages.
    #[must_use]
    pub fn transfer(&self, range: AddrRange, from: Owner, to: Owner) -> bool {
        if !self.all_owned_by(range, from) {
            return false;
        }
        for word in self.words_of(range).into_iter().flatten() {
            word.store(to.encode(), Ordering::Release);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn words(count: usize) -> Vec<AtomicU32> {
        (0..count).map(|_| AtomicU32::new(0)).collect()
    }

    fn memory() -> RangeList<MAX_MEMORY> {
        let mut memory = RangeList::new();
        memory
            .insert(AddrRange::new(0, 0x4000).unwrap(), "ram")
            .unwrap();
        memory
            .insert(AddrRange::new(0x10_0000, 0x10_2000).unwrap(), "ram")
            .unwrap();
        memory
    }

    #[test]
    fn owners_survive_the_encoding() {
        for owner in [
            Owner::Host,
            Owner::Hypervisor,
            Owner::Guest(0),
            Owner::Guest(254),
            Owner::Firmware,
        ] {
            assert_eq!(Owner::decode(owner.encode()), owner);
        }
    }

    #[test]
    fn each_page_has_its_own_word_across_holes() {
        let words = words(6);
        let states = PageStates::new(memory(), &words).unwrap();
        let range = AddrRange::new(0x10_1000, 0x10_2000).unwrap();
        assert!(states.transfer(range, Owner::Host, Owner::Hypervisor));
        assert_eq!(states.owner(0x10_1fff), Some(Owner::Hypervisor));
        assert_eq!(states.owner(0x10_0fff), Some(Owner::Host));
        assert_eq!(states.owner(0x3fff), Some(Owner::Host));
        assert_eq!(states.owner(0x4000), None);
    }

    #[test]
    fn taking_is_all_or_nothing() {
        let words = words(6);
        let states = PageStates::new(memory(), &words).unwrap();
        let beyond = AddrRange::new(0x3000, 0x5000).unwrap();
        assert!(!states.transfer(beyond, Owner::Host, Owner::Hypervisor));
        assert_eq!(states.owner(0x3000), Some(Owner::Host));
        let range = AddrRange::new(0x3000, 0x4000).unwrap();
        assert!(states.transfer(range, Owner::Host, Owner::Guest(3)));
        assert!(!states.transfer(range, Owner::Host, Owner::Hypervisor));
        assert_eq!(states.owner(0x3000), Some(Owner::Guest(3)));
    }

    #[test]
    fn too_few_words_are_refused() {
        assert!(PageStates::new(memory(), &words(5)).is_none());
    }
}
