//! Races and shortages of a protected guest's pages, on the library's own tables.

use core::cell::Cell;
use core::sync::atomic::AtomicU32;
use std::vec::Vec;

use board::RangeList;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::frames::FrameSource;
use memslot::policy::ArmCaches;
use memslot::slot::{Memslot, SlotFlags, SlotKind};
use memslot::vm::{VmConfig, VmKind};
use stage2::Pa;
use stage2::testing::{Arch, FakeMachine};

use super::*;
use crate::features::{Features, IdRegisters};
use crate::host_map::{self, Answer, HostMap};
use crate::page_state::PageStates;

const GIB: u64 = 1 << 30;
const PAGES: u64 = 1024;
const GUEST: u8 = 3;
/// Pages of the slot, a block, all of which are the guest's.
const SLOT_PAGES: u64 = 512;

fn range(start: u64, pages: u64) -> AddrRange {
    AddrRange::with_size(GIB + start * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

fn format() -> ArmStage2 {
    let features = Features::decode(&IdRegisters {
        mmfr0: 0x10_1122,
        mmfr1: 0x1021_2122,
        ..IdRegisters::default()
    });
    host_map::format(&features).unwrap()
}

fn slot() -> Memslot {
    let first = range(0, SLOT_PAGES).start() / PAGE_SIZE;
    let base = Gfn::try_new(0).unwrap();
    let (flags, kind) = (SlotFlags::empty(), SlotKind::Ram);
    Memslot::new(SlotId(0), base, SLOT_PAGES, first, flags, kind).unwrap()
}

/// What lives as long as a world: machines, and the words of 4 MiB of RAM at 1 GiB.
struct Ground {
    hosts: FakeMachine,
    guests: FakeMachine,
    words: Vec<AtomicU32>,
}

impl Ground {
    fn new() -> Self {
        let machine = || FakeMachine::new(Arch::arm_4k(1, 40, false), 64);
        Self {
            hosts: machine(),
            guests: machine(),
            words: (0..PAGES).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    fn ram() -> RangeList<{ board::MAX_MEMORY }> {
        let mut ram = RangeList::new();
        ram.insert(range(0, PAGES), "ram").unwrap();
        ram
    }

    /// The last 16 pages are EL2's.
    fn ownership(&self) -> Ownership<'_> {
        let states = PageStates::new(Self::ram(), &self.words).unwrap();
        let el2 = range(PAGES - 16, 16);
        assert!(states.transfer(el2, Owner::Host, Owner::Hypervisor));
        Ownership::new(states)
    }
}

type Pages<'p, 'a, C> =
    GuestPages<'p, 'a, Stage2<ArmStage2, &'a FakeMachine>, HostMap<&'a FakeMachine>, C>;

/// A host, and a guest with one slot.
struct World<'a> {
    ground: &'a Ground,
    ownership: &'a Ownership<'a>,
    host: HostMap<&'a FakeMachine>,
    memory: VmMemory<'a, &'a FakeMachine>,
}

impl<'a> World<'a> {
    fn new(ground: &'a Ground, ownership: &'a Ownership<'a>) -> Self {
        let (hosts, guests) = (&ground.hosts, &ground.guests);
        let el2 = range(PAGES - 16, 16);
        let host = HostMap::new(format(), hosts, Default::default(), Ground::ram(), el2).unwrap();
        hosts.attach(Pa::new(host.root()));
        let table = Stage2::new(format(), guests, Default::default()).unwrap();
        guests.attach(table.root());
        let config = VmConfig {
            max_slots: 4,
            gfn_limit: 1 << 20,
            kind: VmKind::Protected,
        };
        let policy = ArmPolicy {
            caches: ArmCaches::Maintenance,
        };
        let frames = GuestFrames::owned(ownership.pages(), GUEST);
        let memory = GuestMemory::new(config, policy, frames, table);
        memory.create_slot(slot()).unwrap();
        let owner = Owner::Guest(GUEST);
        ownership
            .donate(&host, range(0, SLOT_PAGES), owner)
            .unwrap();
        Self {
            ground,
            ownership,
            host,
            memory,
        }
    }

    fn with<C: Contents, R>(&self, contents: &C, act: impl FnOnce(&Pages<'_, 'a, C>) -> R) -> R {
        act(&GuestPages {
            memory: &self.memory,
            ownership: self.ownership,
            host: &self.host,
            contents,
            index: GUEST,
        })
    }

    fn finish(&self) {
        let wrong = [&self.ground.hosts, &self.ground.guests].map(FakeMachine::finish);
        assert_eq!(wrong, [const { Vec::<std::string::String>::new() }; 2]);
    }
}

/// Does something in the middle of the first wipe.
struct Meanwhile<'a> {
    other: &'a dyn Fn() -> Moved,
    saw: Cell<Option<Moved>>,
}

impl Contents for Meanwhile<'_> {
    fn wipe(&self, _: AddrRange) {
        if self.saw.get().is_none() {
            self.saw.set(Some((self.other)()));
        }
    }
    fn settle(&self, _: AddrRange) {}
    fn show(&self, _: AddrRange, _: &mut dyn FnMut(&[u8])) {}
}

fn idle<'a>() -> Meanwhile<'a> {
    Meanwhile {
        other: &|| Moved::Refused,
        saw: Cell::new(None),
    }
}

/// Two vCPUs give the same pages away. Were both to wipe them, the second would do it to what the
/// host has given to somebody else by then. And what a third has resolved before is not the
/// guest's any more.
#[test]
fn pages_are_given_away_once() {
    let ground = Ground::new();
    let ownership = ground.ownership();
    let world = World::new(&ground, &ownership);
    let frames = GuestFrames::owned(ownership.pages(), GUEST);
    let third = Gfn::try_new(3).unwrap();
    let resolved = frames.resolve(&slot(), third, Access::Read).unwrap();
    assert!(frames.is_current(&slot(), &resolved));
    let give = |contents: &Meanwhile<'_>| {
        world.with(contents, |pages| pages.call(MemoryCall::Relinquish, 0, 8))
    };
    let second = || give(&idle());
    let first = Meanwhile {
        other: &second,
        saw: Cell::new(None),
    };
    assert_eq!(give(&first), Moved::Pages(8));
    assert_eq!(first.saw.get(), Some(Moved::Refused));
    assert!(ownership.pages().all_owned_by(range(0, 8), Owner::Host));
    assert!(!frames.is_current(&slot(), &resolved));
    world.finish();
}

/// A donation that is refused for want of a table changes nothing: that the guest gave the page away
/// before is still known.
#[test]
fn a_refused_donation_leaves_the_note_of_a_relinquished_page() {
    let ground = Ground::new();
    let ownership = ground.ownership();
    let world = World::new(&ground, &ownership);
    let give = |p: &Pages<'_, '_, _>| p.call(MemoryCall::Relinquish, 0, SLOT_PAGES);
    assert_eq!(world.with(&idle(), give), Moved::Pages(SLOT_PAGES));
    // The host maps all of it by one block, which the donation of a page has to cut.
    assert_ne!(world.host.fault(range(0, 1).start()), Answer::Refused);
    let donate = |pages| {
        let stage = &mut Stage::Sealed([0; 32]);
        let kind = DonationKind::Zeros;
        world.with(&idle(), |p| p.donate(stage, 2 * PAGE_SIZE, pages, kind))
    };
    ground.hosts.allow_allocations(Some(0));
    assert!(donate(1).is_err());
    ground.hosts.allow_allocations(None);
    // Several at once are refused only where one was given away.
    assert_eq!(donate(2), Err(ErrorCode::NotPermitted.into()));
    assert_eq!(donate(1), Ok(range(2, 1)));
    world.finish();
}

/// Wherever tables are lacking, a page's state and the host's table say the same; and the call that
/// is repeated completes.
#[test]
fn a_forced_reclaim_that_lacks_tables_keeps_state_and_table_in_agreement() {
    for shared in [false, true] {
        for (hosts_left, guests_left) in [(0, 9), (1, 9), (9, 0), (9, 1), (0, 0)] {
            let ground = Ground::new();
            let ownership = ground.ownership();
            let world = World::new(&ground, &ownership);
            let page = range(2, 1);
            if shared {
                let share =
                    |p: &Pages<'_, '_, Meanwhile<'_>>| p.call(MemoryCall::Share, 0, SLOT_PAGES);
                assert_eq!(world.with(&idle(), share), Moved::Pages(SLOT_PAGES));
                // The host maps all of it by one block.
                assert_ne!(world.host.fault(page.start()), Answer::Refused);
            }
            ground.hosts.allow_allocations(Some(hosts_left));
            ground.guests.allow_allocations(Some(guests_left));
            let reclaim = || world.with(&idle(), |p| p.reclaim_page(page));
            let first = reclaim();
            let states = ownership.pages();
            let is_shared = states.all_shared(page, Owner::Guest(GUEST), true);
            let reaches = states.all_owned_by(page, Owner::Host) || is_shared;
            let answer = world.host.fault(page.start());
            assert_eq!(answer != Answer::Refused, reaches, "{first:?}");
            ground.hosts.allow_allocations(None);
            ground.guests.allow_allocations(None);
            if first.is_err() {
                assert_eq!(reclaim(), Ok(0));
            }
            assert!(states.all_owned_by(page, Owner::Host));
            assert!(world.with(&idle(), |p| p.is_poisoned(2 * PAGE_SIZE)));
            world.finish();
        }
    }
}

/// The guest shares the page again behind the first step of a reclaim: the page is not given back
/// with a state that the host's table contradicts.
#[test]
fn what_a_guest_shares_is_not_taken_as_its_own() {
    let ground = Ground::new();
    let ownership = ground.ownership();
    let world = World::new(&ground, &ownership);
    let page = range(0, 1);
    ownership.share(&world.host, page, GUEST).unwrap();
    let taken = ownership.take_from(page, GUEST);
    assert_eq!(taken, Err(OwnershipError::NotShared(page)));
    assert!(
        ownership
            .pages()
            .all_shared(page, Owner::Guest(GUEST), true)
    );
    world.finish();
}

/// What the guest could not give away, because the host's tables were lacking, is its own as before: it may
/// share it instead, and reaches it.
#[test]
fn a_relinquish_that_lacks_tables_leaves_no_note() {
    let ground = Ground::new();
    let ownership = ground.ownership();
    let world = World::new(&ground, &ownership);
    let call = |call, pages| world.with(&idle(), |p| p.call(call, 2 * PAGE_SIZE, pages));
    ground.hosts.allow_allocations(Some(0));
    let refused = call(MemoryCall::Relinquish, 4);
    assert!(
        matches!(refused, Moved::After(Exit::NeedHeap { .. })),
        "{refused:?}"
    );
    ground.hosts.allow_allocations(None);
    let note = world.with(&idle(), |p| p.note(2 * PAGE_SIZE, 4));
    assert_eq!(note, None);
    assert_eq!(call(MemoryCall::Share, 1), Moved::Pages(1));
    assert_eq!(call(MemoryCall::Unshare, 1), Moved::Pages(1));
    assert_eq!(call(MemoryCall::Relinquish, 4), Moved::Pages(4));
    assert!(ownership.pages().all_owned_by(range(2, 4), Owner::Host));
    world.finish();
}

/// A page that is being taken by force has lost its contents: where the last step lacks tables, the guest
/// does not find zeros there, but an abort. One that is refused before has lost nothing.
#[test]
fn a_forced_reclaim_that_lacks_tables_shows_the_guest_no_zeros() {
    for (hosts_left, guests_left, poisoned) in [(0, 9, true), (9, 0, false)] {
        let ground = Ground::new();
        let ownership = ground.ownership();
        let world = World::new(&ground, &ownership);
        let fault = Stage2Fault {
            ipa: Ipa::new(2 * PAGE_SIZE),
            access: Access::Write,
            kind: FaultKind::Translation,
        };
        // The guest maps all of it by one block, which the note has to cut.
        let mapped = world.memory.handle_fault(&fault, &()).unwrap();
        assert_eq!(mapped, FaultOutcome::Resolved);
        ground.hosts.allow_allocations(Some(hosts_left));
        ground.guests.allow_allocations(Some(guests_left));
        let contents = idle();
        let taken = world.with(&contents, |p| p.reclaim_page(range(2, 1)));
        assert!(taken.is_err());
        assert_eq!(contents.saw.get().is_some(), poisoned, "wiped");
        assert_eq!(
            world.with(&idle(), |p| p.is_poisoned(2 * PAGE_SIZE)),
            poisoned
        );
        assert!(
            ownership
                .pages()
                .all_owned_by(range(2, 1), Owner::Guest(GUEST))
        );
        world.finish();
    }
}
