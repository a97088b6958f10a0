//! Who owns each page of RAM.
//!
//! Invariant: every page of RAM has exactly one owner; only a guest's page can be shared, and only
//! with the host. Four bytes a page; zero means "the host's, shared with nobody", so a zeroed array
//! is the state of a machine on which EL2 has taken nothing.

use core::fmt;

use board::{AddrRange, MAX_MEMORY, PAGE_SIZE, RangeList};

use crate::sync::{AtomicU32, Ordering};

/// Bits of a word that hold the owner.
const OWNER: u32 = 0x3ff;
/// The guest that owns the page shares it with the host.
const SHARED: u32 = 1 << 10;

/// The page is the host's for good: the board has reserved it, and no reset wipes it (`overwrite.rs`).
const RESERVED: u32 = 1 << 11;

/// An owner of memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    /// The host.
    Host,
    /// EL2 itself.
    Hypervisor,
    /// The guest with this index in the VM table.
    Guest(u8),
    /// Firmware, which said that nobody may map it: nobody gets it. The host reaches it only where
    /// the device tree names a driver for it.
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
        match word & OWNER {
            0 => Self::Host,
            1 => Self::Hypervisor,
            0x3ff => Self::Firmware,
            other => Self::Guest((other - 2).to_le_bytes()[0]),
        }
    }
}

/// As messages say it.
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "the host's",
            Self::Hypervisor => "EL2's",
            Self::Firmware => "firmware's",
            Self::Guest(index) => return write!(f, "VM {index}'s"),
        })
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
        let owned = |word: &AtomicU32| word.load(Ordering::Acquire) & OWNER == owner.encode();
        self.words_of(range)
            .is_some_and(|words| words.iter().all(owned))
    }

    /// Whether `range` is RAM in one piece, whoever owns it.
    #[must_use]
    pub fn is_memory(&self, range: AddrRange) -> bool {
        self.words_of(range).is_some()
    }

    /// Whether all of `range` belongs to `owner` and is shared with the host as `shared` says.
    #[must_use]
    pub fn all_shared(&self, range: AddrRange, owner: Owner, shared: bool) -> bool {
        let word = owner.encode() | if shared { SHARED } else { 0 };
        let same = |w: &AtomicU32| w.load(Ordering::Acquire) == word;
        self.words_of(range)
            .is_some_and(|words| words.iter().all(same))
    }

    /// Shares all pages of `range` with the host, or ends that; their owner stays. The caller
    /// excludes other changes of the same pages.
    pub fn set_shared(&self, range: AddrRange, shared: bool) {
        for word in self.words_of(range).into_iter().flatten() {
            let owner = word.load(Ordering::Acquire) & OWNER;
            let flag = if shared { SHARED } else { 0 };
            word.store(owner | flag, Ordering::Release);
        }
    }

    /// Marks pages of the host, before it runs, that it can't give to anybody else: [`Self::all_shared`] is
    /// false for them, whichever way.
    pub fn reserve(&self, range: AddrRange) {
        for word in self.words_of(range).into_iter().flatten() {
            if word.load(Ordering::Relaxed) == Owner::Host.encode() {
                word.store(RESERVED, Ordering::Relaxed);
            }
        }
    }

    /// The first pages of `range` that belong to `owner`, up to the first that does not.
    #[must_use]
    pub fn first_run(&self, range: AddrRange, owner: Owner) -> Option<AddrRange> {
        let words = self.words_of(range)?;
        let is = |word: &AtomicU32| word.load(Ordering::Acquire) & OWNER == owner.encode();
        let skip = words.iter().position(is)?;
        let length = words.iter().skip(skip).take_while(|word| is(word)).count();
        let start = range.start() + skip as u64 * PAGE_SIZE;
        AddrRange::with_size(start, length as u64 * PAGE_SIZE)
    }

    /// Gives all pages of `range` from one owner to another, if all are RAM and the first one's
    /// now; says whether. The caller excludes other changes of the same pages.
    #[must_use]
    #[inline]
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
    fn sharing_keeps_the_owner_and_a_transfer_ends_it() {
        let words = words(6);
        let states = PageStates::new(memory(), &words).unwrap();
        let range = AddrRange::new(0x1000, 0x3000).unwrap();
        let (guest, host) = (Owner::Guest(7), Owner::Host);
        assert!(states.transfer(range, host, guest));
        states.set_shared(range, true);
        assert!(states.all_owned_by(range, guest) && states.all_shared(range, guest, true));
        assert!(!states.all_shared(range, guest, false) && !states.all_shared(range, host, true));
        assert_eq!(states.owner(0x2000), Some(guest));
        assert!(states.transfer(range, guest, host));
        assert!(states.all_shared(range, host, false));
    }

    #[test]
    fn only_the_hosts_pages_are_reserved_and_stay_its_own() {
        let words = words(6);
        let states = PageStates::new(memory(), &words).unwrap();
        let first = AddrRange::new(0, 0x1000).unwrap();
        let whole = AddrRange::new(0, 0x3000).unwrap();
        assert!(states.transfer(first, Owner::Host, Owner::Firmware));
        states.reserve(whole);
        assert_eq!(states.owner(0), Some(Owner::Firmware));
        let rest = AddrRange::new(0x1000, 0x3000).unwrap();
        assert!(states.all_owned_by(rest, Owner::Host));
        assert!(!states.all_shared(rest, Owner::Host, false));
        assert!(states.all_shared(AddrRange::new(0x3000, 0x4000).unwrap(), Owner::Host, false));
    }

    #[test]
    fn the_first_run_of_an_owner_is_found() {
        let words = words(6);
        let states = PageStates::new(memory(), &words).unwrap();
        let whole = AddrRange::new(0, 0x4000).unwrap();
        let guest = Owner::Guest(0);
        assert_eq!(states.first_run(whole, guest), None);
        let middle = AddrRange::new(0x1000, 0x3000).unwrap();
        assert!(states.transfer(middle, Owner::Host, guest));
        assert_eq!(states.first_run(whole, guest), Some(middle));
        let first = AddrRange::new(0, 0x1000).unwrap();
        assert_eq!(states.first_run(whole, Owner::Host), Some(first));
        let beyond = AddrRange::new(0, 0x5000).unwrap();
        assert_eq!(states.first_run(beyond, guest), None);
    }

    #[test]
    fn too_few_words_are_refused() {
        assert!(PageStates::new(memory(), &words(5)).is_none());
    }
}
