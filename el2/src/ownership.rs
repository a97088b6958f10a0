//! Moving memory between the host, EL2 and guests.
//!
//! Invariant: a page that EL2 or a protected guest owns is annotated in the host's stage 2 and
//! leased to nobody, unless its guest shares it with the host: then it is not annotated. A page that
//! an unprotected guest may reach is the host's, and leased. So no guest reaches memory that the
//! host could give away meanwhile, and the host reaches nothing that is not its or shared with it.
//!
//! A page on its way to a guest is EL2's while EL2 wipes or measures it, and on its way back while
//! EL2 wipes it: neither side ever sees what the other left, and nobody sees it half done.
//!
//! Every transition holds one lock, checks everything, and then commits what can't fail. The only
//! step that can fail behind the checks, the host's stage 2 lacking a table, changes nothing.
//! Lock order: this one, then the host's stage 2.

use alloc::vec::Vec;

use board::AddrRange;
use memslot::steps::Progress;
use stage2::MapError;
use thiserror::Error;

use crate::host_map::{HostMapError, HostReach};
use crate::page_state::{Owner, PageStates};
use crate::sync::Mutex;

/// Why memory does not move. Nothing has changed then.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum OwnershipError {
    /// Not RAM in one piece, or not all of it belongs to whom it should.
    #[error("{0:?} is not all RAM of its giver")]
    NotOwned(AddrRange),
    /// Reserved memory, which no reset wipes.
    #[error("{0:?} is reserved")]
    Reserved(AddrRange),
    /// Not shared, or shared already.
    #[error("{0:?} is not all the guest's, or not shared as it should be")]
    NotShared(AddrRange),
    /// A guest can reach some of it.
    #[error("{0:?} is in use by a guest")]
    Leased(AddrRange),
    /// There is no such lease.
    #[error("{0:?} is not leased")]
    NotLeased(AddrRange),
    /// EL2's heap is used up.
    #[error("EL2's heap is used up")]
    NoHeap,
    /// The host's stage 2 needs this many more table pages.
    #[error("the host's stage 2 lacks {0} table pages")]
    NoTables(usize),
    /// The host's stage 2 refuses.
    #[error(transparent)]
    HostMap(HostMapError),
}

impl From<HostMapError> for OwnershipError {
    fn from(error: HostMapError) -> Self {
        match error {
            HostMapError::Map(MapError::NoMemory { needed }) => Self::NoTables(needed),
            other => Self::HostMap(other),
        }
    }
}

/// Bytes whose owners are looked at in one step.
const STEP: u64 = 1 << 30;

/// Memory of the host that an unprotected guest may reach.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Lease {
    range: AddrRange,
    vm: u8,
    /// Up to here all of it is known to be the host's, and stays so.
    checked_to: u64,
}

/// Owners of all pages, and leases.
#[derive(Debug)]
pub struct Ownership<'a> {
    pages: PageStates<'a>,
    leases: Mutex<Vec<Lease>>,
}

impl<'a> Ownership<'a> {
    /// Over the states that boot has filled in; no leases.
    #[must_use]
    pub fn new(pages: PageStates<'a>) -> Self {
        Self {
            pages,
            leases: Mutex::new(Vec::new()),
        }
    }

    /// The states, for reading.
    #[must_use]
    pub const fn pages(&self) -> &PageStates<'a> {
        &self.pages
    }

    /// Takes pages from the host for `owner`. Their contents and what caches hold of them are the
    /// host's: the new owner maintains and initialises them.
    ///
    /// # Errors
    ///
    /// [`OwnershipError`].
    pub fn donate(
        &self,
        host: &impl HostReach,
        range: AddrRange,
        owner: Owner,
    ) -> Result<(), OwnershipError> {
        let leases = self.leases.lock();
        self.check_free(&leases, range)?;
        host.take_away(range, owner)?;
        let moved = self.pages.transfer(range, Owner::Host, owner);
        debug_assert!(moved, "checked above, and the lock is held");
        Ok(())
    }

    /// Whether [`Self::donate`] would find nothing wrong with these pages now.
    ///
    /// # Errors
    ///
    /// What it would find.
    pub fn may_donate(&self, range: AddrRange) -> Result<(), OwnershipError> {
        self.check_free(&self.leases.lock(), range)
    }

    fn check_free(&self, leases: &[Lease], range: AddrRange) -> Result<(), OwnershipError> {
        if !self.pages.all_owned_by(range, Owner::Host) {
            return Err(OwnershipError::NotOwned(range));
        }
        if !self.pages.all_shared(range, Owner::Host, false) {
            return Err(OwnershipError::Reserved(range));
        }
        if leases.iter().any(|lease| lease.range.overlaps(range)) {
            return Err(OwnershipError::Leased(range));
        }
        Ok(())
    }

    /// Gives pages of `owner` back to the host. The owner has wiped them, to the point of
    /// coherency: the host may map them non-cacheable.
    ///
    /// # Errors
    ///
    /// [`OwnershipError`].
    pub fn give_back(
        &self,
        host: &impl HostReach,
        range: AddrRange,
        owner: Owner,
    ) -> Result<(), OwnershipError> {
        let _leases = self.leases.lock();
        if owner == Owner::Host || !self.pages.all_owned_by(range, owner) {
            return Err(OwnershipError::NotOwned(range));
        }
        host.give_back(range)?;
        let moved = self.pages.transfer(range, owner, Owner::Host);
        debug_assert!(moved, "checked above, and the lock is held");
        Ok(())
    }

    /// Passes pages that EL2 has prepared on to a guest.
    ///
    /// # Errors
    ///
    /// [`OwnershipError::NotOwned`] if they are not all EL2's.
    pub fn hand_over(&self, range: AddrRange, guest: u8) -> Result<(), OwnershipError> {
        let _leases = self.leases.lock();
        let (from, to) = (Owner::Hypervisor, Owner::Guest(guest));
        if self.pages.transfer(range, from, to) {
            Ok(())
        } else {
            Err(OwnershipError::NotOwned(range))
        }
    }

    /// Takes pages from a guest that can't reach them any more, to be wiped: of two who want them,
    /// one gets them. They are not shared: the host can't reach them, either.
    ///
    /// # Errors
    ///
    /// [`OwnershipError::NotShared`] if they are not all the guest's own.
    pub fn take_from(&self, range: AddrRange, guest: u8) -> Result<(), OwnershipError> {
        let _leases = self.leases.lock();
        let (from, to) = (Owner::Guest(guest), Owner::Hypervisor);
        let is_its_own = self.pages.all_shared(range, from, false);
        if is_its_own && self.pages.transfer(range, from, to) {
            Ok(())
        } else {
            Err(OwnershipError::NotShared(range))
        }
    }

    /// Lets the host reach pages of a guest, which stay the guest's.
    ///
    /// # Errors
    ///
    /// [`OwnershipError::NotShared`] if they are not all the guest's, or one is shared already;
    /// [`OwnershipError::NoTables`].
    pub fn share(
        &self,
        host: &impl HostReach,
        range: AddrRange,
        guest: u8,
    ) -> Result<(), OwnershipError> {
        let _leases = self.leases.lock();
        if !self.pages.all_shared(range, Owner::Guest(guest), false) {
            return Err(OwnershipError::NotShared(range));
        }
        host.give_back(range)?;
        self.pages.set_shared(range, true);
        Ok(())
    }

    /// Ends that: the host can't reach them any more when this returns. What caches hold of them
    /// may be the host's.
    ///
    /// # Errors
    ///
    /// As [`Self::share`], the other way round.
    pub fn unshare(
        &self,
        host: &impl HostReach,
        range: AddrRange,
        guest: u8,
    ) -> Result<(), OwnershipError> {
        let _leases = self.leases.lock();
        let owner = Owner::Guest(guest);
        if !self.pages.all_shared(range, owner, true) {
            return Err(OwnershipError::NotShared(range));
        }
        host.take_away(range, owner)?;
        self.pages.set_shared(range, false);
        Ok(())
    }

    /// The next step in which VM `vm` gets to reach memory of the host, which stays the host's: from
    /// the first one on nobody takes it from the host, and behind the last one the VM may reach it. A
    /// step for another range gives up what this VM has begun. Leases may overlap.
    ///
    /// # Errors
    ///
    /// [`OwnershipError::NotOwned`] or [`OwnershipError::NoHeap`]; nothing is leased then.
    pub fn lease(&self, range: AddrRange, vm: u8) -> Result<Progress, OwnershipError> {
        let mut leases = self.leases.lock();
        let begun = |l: &Lease| l.vm == vm && l.checked_to < l.range.end();
        let begun = leases.iter().position(begun);
        let begun = begun.map(|at| leases.swap_remove(at));
        let begun = begun.filter(|l| l.range == range);
        leases.try_reserve(1).map_err(|_| OwnershipError::NoHeap)?;
        let start = begun.map_or(range.start(), |l| l.checked_to);
        let checked_to = start.saturating_add(STEP).min(range.end());
        let part = AddrRange::new(start, checked_to).ok_or(OwnershipError::NotOwned(range))?;
        if !self.pages.all_owned_by(part, Owner::Host) {
            return Err(OwnershipError::NotOwned(range));
        }
        leases.push(Lease {
            range,
            vm,
            checked_to,
        });
        Ok(if checked_to == range.end() {
            Progress::Done
        } else {
            Progress::More
        })
    }

    /// Ends one lease, when no leaf and no TLB entry of the VM refers to the memory any more.
    ///
    /// # Errors
    ///
    /// [`OwnershipError::NotLeased`].
    pub fn end_lease(&self, range: AddrRange, vm: u8) -> Result<(), OwnershipError> {
        let mut leases = self.leases.lock();
        let checked_to = range.end();
        let lease = Lease {
            range,
            vm,
            checked_to,
        };
        let at = leases.iter().position(|l| *l == lease);
        leases.swap_remove(at.ok_or(OwnershipError::NotLeased(range))?);
        Ok(())
    }

    /// Ends all leases of a VM whose stage 2 is gone.
    pub fn end_all_leases(&self, vm: u8) {
        self.leases.lock().retain(|lease| lease.vm != vm);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use core::sync::atomic::AtomicU32;
    use std::vec::Vec;

    use board::RangeList;
    use proptest::prelude::*;
    use stage2::Pa;
    use stage2::testing::{Arch, FakeMachine};

    use super::*;
    use crate::features::{Features, IdRegisters};
    use crate::host_map::{self, Answer, HostMap};

    const GIB: u64 = 1 << 30;
    const PAGES: u64 = 1024;

    fn range(start: u64, pages: u64) -> AddrRange {
        AddrRange::with_size(GIB + start * 4096, pages * 4096).unwrap()
    }

    fn words() -> Vec<AtomicU32> {
        (0..PAGES).map(|_| AtomicU32::new(0)).collect()
    }

    /// 4 MiB of RAM at 1 GiB; the last 16 pages are EL2's.
    struct World<'a> {
        machine: &'a FakeMachine,
        host: HostMap<&'a FakeMachine>,
        own: Ownership<'a>,
    }

    impl<'a> World<'a> {
        fn new(machine: &'a FakeMachine, words: &'a [AtomicU32]) -> Self {
            let features = Features::decode(&IdRegisters {
                mmfr0: 0x10_1122,
                mmfr1: 0x1021_2122,
                ..IdRegisters::default()
            });
            let mut memory = RangeList::new();
            memory.insert(range(0, PAGES), "ram").unwrap();
            let el2 = range(PAGES - 16, 16);
            let pages = PageStates::new(memory.clone(), words).unwrap();
            assert!(pages.transfer(el2, Owner::Host, Owner::Hypervisor));
            let format = host_map::format(&features).unwrap();
            let host = HostMap::new(format, machine, Default::default(), memory, el2).unwrap();
            machine.attach(Pa::new(host.root()));
            let own = Ownership::new(pages);
            Self { machine, host, own }
        }

        fn host_reaches(&self, page: u64) -> bool {
            self.host.fault(GIB + page * 4096) != Answer::Refused
        }
    }

    fn machine(tables: usize) -> FakeMachine {
        FakeMachine::new(Arch::arm_4k(1, 40, false), tables)
    }

    #[test]
    fn a_donated_page_is_out_of_the_hosts_reach_until_it_comes_back() {
        let (machine, words) = (machine(32), words());
        let world = World::new(&machine, &words);
        assert!(world.host_reaches(5));
        world
            .own
            .donate(&world.host, range(5, 2), Owner::Hypervisor)
            .unwrap();
        assert!(world.host_reaches(4) && !world.host_reaches(5));
        assert!(!world.host_reaches(6) && world.host_reaches(7));
        world
            .own
            .give_back(&world.host, range(5, 2), Owner::Hypervisor)
            .unwrap();
        assert!(world.host_reaches(5) && world.host_reaches(6));
        assert_eq!(world.machine.finish(), Vec::<std::string::String>::new());
    }

    #[test]
    fn what_is_not_the_hosts_is_neither_donated_nor_leased() {
        let (machine, words) = (machine(32), words());
        let world = World::new(&machine, &words);
        let own = &world.own;
        for wrong in [range(PAGES - 17, 2), range(PAGES - 1, 2), range(PAGES, 1)] {
            let refused = Err(OwnershipError::NotOwned(wrong));
            assert_eq!(own.donate(&world.host, wrong, Owner::Guest(0)), refused);
            assert_eq!(own.lease(wrong, 0).map(drop), refused);
        }
        let el2 = range(PAGES - 16, 16);
        let refused = Err(OwnershipError::NotOwned(el2));
        assert_eq!(own.give_back(&world.host, el2, Owner::Guest(0)), refused);
        assert_eq!(own.give_back(&world.host, el2, Owner::Host), refused);
    }

    #[test]
    fn leased_memory_is_not_donated_before_the_last_lease_ends() {
        let (machine, words) = (machine(32), words());
        let world = World::new(&machine, &words);
        let own = &world.own;
        assert_eq!(own.lease(range(8, 8), 1), Ok(Progress::Done));
        assert_eq!(own.lease(range(12, 8), 2), Ok(Progress::Done));
        let donate = |at| own.donate(&world.host, range(at, 1), Owner::Hypervisor);
        assert_eq!(donate(15), Err(OwnershipError::Leased(range(15, 1))));
        own.end_lease(range(8, 8), 1).unwrap();
        assert_eq!(donate(15), Err(OwnershipError::Leased(range(15, 1))));
        assert_eq!(donate(8), Ok(()));
        own.end_all_leases(2);
        assert_eq!(donate(15), Ok(()));
        assert_eq!(
            own.end_lease(range(12, 8), 2),
            Err(OwnershipError::NotLeased(range(12, 8)))
        );
    }

    /// 3 GiB of RAM, of which the last page is EL2's.
    #[test]
    fn a_large_lease_is_made_in_steps_and_keeps_donations_out_from_the_first_on() {
        let words: Vec<_> = (0..3 << 18).map(|_| AtomicU32::new(0)).collect();
        let mut memory = RangeList::new();
        let ram = AddrRange::with_size(GIB, 3 * GIB).unwrap();
        memory.insert(ram, "ram").unwrap();
        let own = Ownership::new(PageStates::new(memory, &words).unwrap());
        let last = AddrRange::with_size(4 * GIB - 4096, 4096).unwrap();
        assert!(own.pages.transfer(last, Owner::Host, Owner::Hypervisor));
        let most = AddrRange::new(GIB, last.start()).unwrap();
        let inside = AddrRange::with_size(last.start() - 4096, 4096).unwrap();
        let not_yet = OwnershipError::NotLeased(most);
        for expected in [Progress::More, Progress::More, Progress::Done] {
            assert_eq!(own.may_donate(inside).is_ok(), own.leases.lock().is_empty());
            assert_eq!(own.end_lease(most, 1), Err(not_yet.clone()));
            assert_eq!(own.lease(most, 1), Ok(expected));
        }
        assert_eq!(own.end_lease(most, 1), Ok(()));
        // Another range in its place; another VM has its own.
        assert_eq!(own.lease(most, 1), Ok(Progress::More));
        assert_eq!(own.lease(most, 2), Ok(Progress::More));
        assert_eq!(own.lease(inside, 1), Ok(Progress::Done));
        assert_eq!(own.leases.lock().len(), 2);
        // Refused at the end of it: nothing is left.
        own.end_all_leases(2);
        assert_eq!(own.lease(ram, 2), Ok(Progress::More));
        assert_eq!(own.lease(ram, 2), Ok(Progress::More));
        assert_eq!(own.lease(ram, 2), Err(OwnershipError::NotOwned(ram)));
        assert_eq!(own.leases.lock().len(), 1);
    }

    #[test]
    fn reserved_memory_is_leased_but_never_donated() {
        let (machine, words) = (machine(32), words());
        let World { host, own, .. } = World::new(&machine, &words);
        own.pages().reserve(range(8, 2));
        for (at, pages) in [(8, 1), (9, 4), (7, 2), (0, 16)] {
            let refused = Err(OwnershipError::Reserved(range(at, pages)));
            assert_eq!(own.may_donate(range(at, pages)), refused);
            assert_eq!(
                own.donate(&host, range(at, pages), Owner::Guest(0)),
                refused
            );
        }
        assert_eq!(own.lease(range(8, 1), 0), Ok(Progress::Done));
        assert_eq!(own.donate(&host, range(10, 4), Owner::Hypervisor), Ok(()));
    }

    #[test]
    fn a_donation_that_lacks_tables_changes_nothing() {
        let (machine, words) = (machine(4), words());
        let world = World::new(&machine, &words);
        assert!(world.host_reaches(0));
        let before = machine.snapshot();
        let refused = world
            .own
            .donate(&world.host, range(5, 1), Owner::Hypervisor);
        assert!(matches!(refused, Err(OwnershipError::NoTables(_))));
        assert_eq!(machine.snapshot(), before);
        assert_eq!(world.own.pages().owner(GIB + 5 * 4096), Some(Owner::Host));
    }

    proptest! {
        /// After any transitions: the host reaches exactly what it owns, and what is leased is its.
        #[test]
        fn any_transitions_keep_the_invariant(
            steps in prop::collection::vec((0u8..4, 0u64..PAGES, 1u64..40, 0u8..3), 1..40)
        ) {
            let (machine, words) = (machine(64), words());
            let world = World::new(&machine, &words);
            let own = &world.own;
            for (kind, at, pages, vm) in steps {
                let at = range(at, pages);
                let done = match kind {
                    0 => own.donate(&world.host, at, Owner::Guest(vm)).is_ok(),
                    1 => own.give_back(&world.host, at, Owner::Guest(vm)).is_ok(),
                    2 => own.lease(at, vm).is_ok(),
                    _ => own.end_lease(at, vm).is_ok(),
                };
                let _: bool = done;
            }
            for page in 0..PAGES {
                let owner = own.pages().owner(GIB + page * 4096).unwrap();
                prop_assert_eq!(world.host_reaches(page), owner == Owner::Host, "{}", page);
                let leased = own.leases.lock().iter().any(|l| l.range.overlaps(range(page, 1)));
                prop_assert!(!leased || owner == Owner::Host);
            }
        }
    }
}
