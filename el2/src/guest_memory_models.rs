//! Two parties that want the same page, or the same VM, in every order that can make a difference, without
//! a bound on how often one interrupts the other.
//!
//! The code is the real one: the VM table, transitions, ownership, page states, the guest's memory.
//! The host's and the guests' tables are maps of pages (`stage2` has models of its own). A guest has one
//! slot, and a party does one thing, or two: more parties and longer calls are not explored.

use std::boxed::Box;
use std::sync::Arc;
use std::vec::Vec;

use board::RangeList;
use loom::thread;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::policy::ArmCaches;
use memslot::slot::{Memslot, SlotFlags, SlotKind};
use memslot::steps::Progress;
use memslot::testing::{CacheModel, ModelTable};
use memslot::vm::{VmConfig, VmKind};

use super::*;
use crate::host_map::HostMapError;
use crate::measure::Measurer;
use crate::page_state::PageStates;
use crate::sync::{AtomicU32, Mutex};
use crate::vm_table::{Estate, FIRST_HANDLE, Teardown, VmTable};

/// RAM: two pages, and one for each guest's state.
const RAM: u64 = 1 << 30;
const PAGES: u64 = 2;
const ALL_PAGES: u64 = PAGES + 2;
/// Where each guest has them.
const IPA: u64 = 0x4000_0000;
/// The guests; an unprotected VM.
const A: u8 = 0;
const B: u8 = 1;
const UNPROTECTED: u8 = 9;

fn range(first: u64, pages: u64) -> AddrRange {
    AddrRange::with_size(RAM + first * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

fn page(number: u64) -> AddrRange {
    range(number, 1)
}

fn ipa(page: u64) -> u64 {
    IPA + page * PAGE_SIZE
}

/// The host's table: which pages it may reach.
struct Reach(Mutex<[bool; ALL_PAGES as usize]>);

impl Reach {
    fn set(&self, pages: AddrRange, reaches: bool) {
        let mut all = self.0.lock();
        for number in 0..ALL_PAGES {
            if pages.contains_range(page(number)) {
                all[number as usize] = reaches;
            }
        }
    }

    fn reaches(&self, number: u64) -> bool {
        self.0.lock()[number as usize]
    }
}

impl HostReach for Reach {
    fn take_away(&self, pages: AddrRange, _: Owner) -> Result<(), HostMapError> {
        self.set(pages, false);
        Ok(())
    }

    fn give_back(&self, pages: AddrRange) -> Result<(), HostMapError> {
        self.set(pages, true);
        Ok(())
    }
}

type Memory = GuestMemory<ModelTable, ArmPolicy, GuestFrames<'static>>;

struct Vm {
    memory: Memory,
    index: u8,
}

impl Teardown for Vm {
    type Left = ();

    fn begin(&self) {}

    fn go_on(&self, (): &mut ()) -> Progress {
        Progress::Done
    }
}

struct World {
    ownership: &'static Ownership<'static>,
    reach: Reach,
    /// Guests A and B.
    table: VmTable<Vm, 2>,
}

/// What EL2 wipes is in nobody's reach but its own; or it was a guest's that is no more, and the host
/// sees no more of it than what that had shared.
struct Wiping<'a>(&'a World, Option<u8>);

impl Contents for Wiping<'_> {
    fn wipe(&self, pages: AddrRange) {
        let states = self.0.ownership.pages();
        let dead = self.1.map(Owner::Guest);
        let is_ours = states.all_owned_by(pages, Owner::Hypervisor);
        assert!(is_ours || dead.is_some_and(|owner| states.all_owned_by(pages, owner)));
        for number in (0..ALL_PAGES).filter(|number| pages.contains_range(page(*number))) {
            let was_shared = dead.is_some_and(|owner| states.all_shared(page(number), owner, true));
            assert_eq!(self.0.reach.reaches(number), was_shared, "the host sees it");
        }
    }
    fn settle(&self, _: AddrRange) {}
    fn show(&self, pages: AddrRange, _: &mut dyn FnMut(&[u8])) {
        self.wipe(pages);
    }
}

fn vm(ownership: &'static Ownership<'static>, guest: u8) -> Vm {
    let config = VmConfig {
        max_slots: 2,
        gfn_limit: 1 << 27,
        kind: VmKind::Protected,
    };
    let policy = ArmPolicy {
        caches: ArmCaches::ForcedWriteBack,
    };
    let frames = GuestFrames::owned(ownership.pages(), guest);
    let table = ModelTable::new(Arc::new(CacheModel::new()));
    let memory = GuestMemory::new(config, policy, frames, table);
    let base = Gfn::try_new(IPA / PAGE_SIZE).unwrap();
    let (flags, kind) = (SlotFlags::empty(), SlotKind::Ram);
    let slot = Memslot::new(SlotId(0), base, PAGES, RAM / PAGE_SIZE, flags, kind);
    memory.create_slot(slot.unwrap()).unwrap();
    Vm {
        memory,
        index: guest,
    }
}

impl World {
    /// No guest. Leaked, as EL2's array of states is there for good.
    fn empty() -> &'static Self {
        let words: Vec<_> = (0..ALL_PAGES).map(|_| AtomicU32::new(0)).collect();
        let mut ram = RangeList::new();
        ram.insert(range(0, ALL_PAGES), "ram").unwrap();
        let states = PageStates::new(ram, Box::leak(words.into_boxed_slice())).unwrap();
        Box::leak(Box::new(Self {
            ownership: Box::leak(Box::new(Ownership::new(states))),
            reach: Reach(Mutex::new([true; ALL_PAGES as usize])),
            table: VmTable::new(),
        }))
    }

    /// Both guests exist and own nothing.
    fn new() -> &'static Self {
        Self::with_guests(&[A, B])
    }

    fn with_guests(guests: &[u8]) -> &'static Self {
        let world = Self::empty();
        for guest in guests.iter().copied() {
            assert_eq!(world.table.reserve(), Ok(handle(guest)));
            let state = (page(PAGES + u64::from(guest)), 1);
            let contents = Wiping(world, None);
            let build = |guest| Some((vm(world.ownership, guest), ()));
            world
                .table
                .create(&world.estate(&contents), handle(guest), state, build)
                .unwrap();
        }
        world
    }

    fn estate<'a>(&'a self, contents: &'a Wiping<'a>) -> Estate<'a, 'static, Reach, Wiping<'a>> {
        Estate {
            ownership: self.ownership,
            host: &self.reach,
            contents,
        }
    }

    /// The same with a page donated to A.
    fn with_page() -> &'static Self {
        let world = Self::new();
        assert!(world.donate(A, 0));
        world
    }

    /// The same, and A shares it.
    fn with_shared_page() -> &'static Self {
        let world = Self::with_page();
        assert_eq!(world.call(A, MemoryCall::Share, 0), DONE);
        world
    }

    /// Its memory, for a transition.
    fn pages<R>(&self, vm: &Vm, act: impl FnOnce(&Pages<'_>) -> R) -> R {
        act(&GuestPages {
            memory: &vm.memory,
            ownership: self.ownership,
            host: &self.reach,
            contents: &Wiping(self, None),
            index: vm.index,
        })
    }

    /// Uses a VM as a call does that finds it alive.
    fn with<R>(&self, guest: u8, use_it: impl FnOnce(&Vm, &Pages<'_>) -> R) -> Option<R> {
        let used = self.table.with(handle(guest), |vm| {
            Ok(self.pages(vm, |pages| use_it(vm, pages)))
        });
        used.ok()
    }

    /// MemoryDonate of one page; whether it went.
    fn donate(&self, guest: u8, number: u64) -> bool {
        let donated = self.table.donate_memory(handle(guest), |vm| {
            let mut stage = Stage::Building {
                measurer: Measurer::new(),
                expected: None,
            };
            let kind = DonationKind::Zeros;
            self.pages(vm, |pages| pages.donate(&mut stage, ipa(number), 1, kind))
        });
        donated.is_ok()
    }

    /// VmTopUp with one page; whether it went.
    fn top_up(&self, guest: u8, number: u64) -> bool {
        let contents = Wiping(self, None);
        let estate = self.estate(&contents);
        let donated = self
            .table
            .top_up(&estate, handle(guest), page(number), |_| {});
        donated.is_ok()
    }

    fn call(&self, guest: u8, call: MemoryCall, number: u64) -> Option<Moved> {
        self.with(guest, |_, pages| pages.call(call, ipa(number), 1))
    }

    /// MemoryReclaim, which finds the owner first.
    fn reclaim(&self, number: u64) -> bool {
        let taken = self.table.with_owner(self.ownership, page(number), |vm| {
            self.pages(vm, |pages| pages.reclaim_page(page(number)))
        });
        taken.is_ok()
    }

    /// The guest touches a page: whether it has a leaf behind that.
    fn touch(&self, guest: u8, number: u64) -> bool {
        let fault = Stage2Fault {
            ipa: Ipa::new(ipa(number)),
            access: Access::Write,
            kind: FaultKind::Translation,
        };
        let outcome = self.with(guest, |vm, _| vm.memory.handle_fault(&fault, &()).unwrap());
        outcome == Some(FaultOutcome::Resolved)
    }

    /// VmDestroy and all of VmReclaim; whether nobody used the VM.
    fn end(&self, guest: u8) -> bool {
        self.destroy(guest) && self.take_back(guest)
    }

    fn destroy(&self, guest: u8) -> bool {
        self.table.destroy(self.ownership, handle(guest)).is_ok()
    }

    /// All of VmReclaim; whether this call was the last one.
    fn take_back(&self, guest: u8) -> bool {
        let contents = Wiping(self, Some(guest));
        loop {
            match self.table.reclaim(&self.estate(&contents), handle(guest)) {
                Ok(Some(back)) => assert!(range(0, ALL_PAGES).contains_range(back)),
                Ok(None) => return true,
                Err(refusal) if refusal.code == ErrorCode::Busy => thread::yield_now(),
                Err(_) => return false,
            }
        }
    }

    fn owner(&self, number: u64) -> Owner {
        self.ownership.pages().owner(page(number).start()).unwrap()
    }

    /// What must hold when nobody does anything.
    fn agree(&self) {
        let states = self.ownership.pages();
        for number in 0..PAGES {
            let owner = self.owner(number);
            let shared = states.all_shared(page(number), owner, true);
            assert_ne!(owner, Owner::Hypervisor, "page {number} is half done");
            let reaches = self.reach.reaches(number);
            assert_eq!(reaches, owner == Owner::Host || shared, "page {number}");
            for guest in [A, B] {
                let leaf = self.with(guest, |vm, _| {
                    vm.memory
                        .with_table(|table| table.leaves().contains_key(&ipa(number)))
                });
                let has = leaf == Some(true);
                assert!(!has || owner == Owner::Guest(guest), "{guest} has a leaf");
                let note = self.with(guest, |_, pages| pages.note(ipa(number), 1));
                let is_its_own = owner == Owner::Guest(guest);
                assert!(
                    !is_its_own || note.flatten().is_none(),
                    "{guest} owns what it has lost"
                );
            }
        }
    }
}

/// One page was moved.
const DONE: Option<Moved> = Some(Moved::Pages(1));

const fn handle(guest: u8) -> u64 {
    FIRST_HANDLE + guest as u64
}

type Pages<'p> = GuestPages<'p, 'static, ModelTable, Reach, Wiping<'p>>;

/// Two parties, in every order of their steps; then both tables and the states must agree.
fn race<R: 'static + Send, S: 'static>(
    world: impl Fn() -> &'static World + Send + Sync + 'static,
    first: impl Fn(&World) -> R + Send + Sync + Copy + 'static,
    second: impl Fn(&World) -> S + Send + Sync + Copy + 'static,
    after: impl Fn(&World, R, S) + Send + Sync + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.max_branches = 20_000;
    // loom's own would be part of the model.
    let orders = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&orders);
    model.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let world = world();
        let other = thread::spawn(move || first(world));
        let mine = second(world);
        let theirs = other.join().unwrap();
        world.agree();
        after(world, theirs, mine);
    });
    let orders = orders.load(std::sync::atomic::Ordering::Relaxed);
    std::println!("{orders} orders");
    assert!(orders > 1, "the two have nothing in common");
}

#[test]
fn share_against_donate() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.donate(B, 0),
        |_, shared, donated| {
            assert_eq!(shared, Some(Moved::Pages(1)));
            assert!(!donated, "shared memory is still the guest's");
        },
    );
}

#[test]
fn share_of_a_page_that_is_just_donated() {
    race(
        World::new,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.donate(A, 0),
        |world, shared, donated| {
            assert!(donated);
            let missing = Moved::After(Exit::MemoryMissing { ipa: ipa(0) });
            assert!(shared == Some(Moved::Pages(1)) || shared == Some(missing));
            assert_eq!(world.owner(0), Owner::Guest(A));
        },
    );
}

#[test]
fn share_against_reclaim() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.reclaim(0),
        |world, _, mut taken| {
            // It is refused where the guest shares behind its first step: repeated, it is not.
            if !taken {
                taken = world.reclaim(0);
                world.agree();
            }
            assert!(taken);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn unshare_against_reclaim() {
    race(
        World::with_shared_page,
        |world| world.call(A, MemoryCall::Unshare, 0),
        |world| world.reclaim(0),
        |world, _, taken| {
            if !taken {
                assert!(world.reclaim(0));
                world.agree();
            }
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn relinquish_against_reclaim() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.reclaim(0),
        |world, _, _| assert_eq!(world.owner(0), Owner::Host),
    );
}

#[test]
fn relinquish_against_teardown() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.end(A),
        |world, given, ended| {
            assert!(ended || given == DONE);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn relinquish_against_share() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.call(A, MemoryCall::Share, 0),
        |world, given, shared| {
            assert!((given == DONE) != (shared == DONE), "one of them gets it");
            assert_eq!(world.owner(0) == Owner::Host, given == DONE);
        },
    );
}

#[test]
fn relinquish_against_relinquish() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world, first, second| {
            assert!((first == DONE) != (second == DONE), "it is given away once");
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn relinquish_against_a_vcpus_fault() {
    race(
        World::with_page,
        |world| world.touch(A, 0),
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world, _, given| {
            assert_eq!(given, DONE);
            assert_eq!(world.owner(0), Owner::Host);
            assert!(!world.touch(A, 0), "what was given away came back");
        },
    );
}

/// The host gives what comes back to the same guest again, where nothing is left of it.
#[test]
fn relinquish_against_donate() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.donate(A, 0),
        |world, given, donated| {
            assert_eq!(given, DONE);
            assert_eq!(world.owner(0) == Owner::Guest(A), donated);
            assert_eq!(world.touch(A, 0), donated);
        },
    );
}

#[test]
fn relinquish_against_donate_to_another_vm() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.donate(B, 0),
        |world, given, donated| {
            assert_eq!(given, DONE);
            assert_eq!(world.owner(0) == Owner::Guest(B), donated);
            assert_eq!(world.touch(B, 0), donated);
        },
    );
}

#[test]
fn share_against_unshare() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.call(A, MemoryCall::Unshare, 0),
        |world, shared, unshared| {
            assert_eq!(shared, DONE);
            assert_eq!(world.reach.reaches(0), unshared != DONE);
        },
    );
}

#[test]
fn reclaim_against_reclaim() {
    race(
        World::with_shared_page,
        |world| world.reclaim(0),
        |world| world.reclaim(0),
        |world, first, second| {
            assert!(first != second, "it is taken once");
            assert_eq!(world.owner(0), Owner::Host);
            assert!(!world.touch(A, 0));
        },
    );
}

#[test]
fn a_vcpus_fault_against_reclaim() {
    race(
        World::with_page,
        |world| world.touch(A, 0),
        |world| world.reclaim(0),
        |world, _, taken| {
            assert!(taken);
            assert!(!world.touch(A, 0), "a poisoned page came back");
        },
    );
}

#[test]
fn teardown_against_run() {
    race(
        World::with_page,
        |world| world.touch(A, 0),
        |world| world.end(A),
        |world, _, ended| {
            let owner = if ended { Owner::Host } else { Owner::Guest(A) };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn teardown_against_share() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.end(A),
        |world, shared, ended| {
            assert!(ended || shared == Some(Moved::Pages(1)));
            assert_eq!(world.owner(0) == Owner::Host, ended);
        },
    );
}

#[test]
fn teardown_against_unshare() {
    race(
        World::with_shared_page,
        |world| world.call(A, MemoryCall::Unshare, 0),
        |world| world.end(A),
        |world, unshared, ended| {
            assert!(ended || unshared == DONE);
            let owner = if ended { Owner::Host } else { Owner::Guest(A) };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn teardown_against_teardown() {
    race(
        World::with_page,
        |world| world.end(A),
        |world| world.end(A),
        |world, first, second| {
            assert!(first || second);
            assert_eq!(world.owner(0), Owner::Host);
            assert_eq!(world.table.reserve(), Ok(handle(A)), "its handle is free");
        },
    );
}

/// Whatever the host gives to a VM that ends comes back.
#[test]
fn teardown_against_donations_to_it() {
    const ADDED: u64 = PAGES + 1;
    race(
        || World::with_guests(&[A]),
        |world| (world.donate(A, 0), world.top_up(A, ADDED)),
        |world| world.destroy(A),
        |world, (donated, added), destroyed| {
            assert!(destroyed || donated || added);
            assert!(destroyed || world.destroy(A));
            assert!(world.take_back(A));
            assert_eq!(world.owner(0), Owner::Host);
            assert_eq!(world.owner(ADDED), Owner::Host);
            world.agree();
        },
    );
}

#[test]
fn two_get_two_handles() {
    race(
        World::empty,
        |world| world.table.reserve(),
        |world| world.table.reserve(),
        |_, first, second| {
            // Who meets the other one at the same entry takes the next.
            let both = [first.unwrap(), second.unwrap()];
            assert!(both == [handle(A), handle(B)] || both == [handle(B), handle(A)]);
        },
    );
}

#[test]
fn teardown_against_reclaim() {
    race(
        World::with_page,
        |world| world.reclaim(0),
        |world| world.end(A),
        |world, taken, ended| {
            assert!(taken || ended);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

/// A has given page 1 away before it ends; the host gives it to B while it takes A's memory back.
#[test]
fn teardown_against_donate_of_what_came_back_before() {
    race(
        || {
            let world = World::with_page();
            assert!(world.donate(A, 1));
            world.call(A, MemoryCall::Relinquish, 1).unwrap();
            world
        },
        |world| world.donate(B, 1),
        |world| world.end(A),
        |world, donated, ended| {
            assert!(donated && ended);
            assert_eq!(world.owner(0), Owner::Host);
            assert_eq!(world.owner(1), Owner::Guest(B));
        },
    );
}

#[test]
fn donate_against_donate_to_another_vm() {
    race(
        World::new,
        |world| world.donate(A, 0),
        |world| world.donate(B, 0),
        |world, a, b| {
            assert!(a != b, "one of them gets it");
            assert_eq!(world.owner(0), Owner::Guest(if a { A } else { B }));
        },
    );
}

#[test]
fn donate_against_reclaim_from_another_vm() {
    race(
        World::with_page,
        |world| world.donate(B, 0),
        |world| world.reclaim(0),
        |world, donated, taken| {
            assert!(taken);
            let owner = if donated {
                Owner::Guest(B)
            } else {
                Owner::Host
            };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn lend_against_donate() {
    race(
        World::new,
        |world| world.ownership.lease(page(0), UNPROTECTED).is_ok(),
        |world| world.donate(A, 0),
        |world, lent, donated| {
            assert!(lent != donated, "one of them gets it");
            let owner = if donated {
                Owner::Guest(A)
            } else {
                Owner::Host
            };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn the_end_of_a_lease_against_donate() {
    race(
        || {
            let world = World::new();
            assert!(world.ownership.lease(page(0), UNPROTECTED).is_ok());
            world
        },
        |world| world.ownership.end_lease(page(0), UNPROTECTED).is_ok(),
        |world| world.donate(A, 0),
        |world, ended, donated| {
            assert!(ended);
            assert_eq!(world.owner(0) == Owner::Guest(A), donated);
        },
    );
}

/// A lock maps what is the guest's, or nothing.
#[test]
fn lock_against_reclaim() {
    use memslot::lock::LockRequest;
    use memslot::slot::LockFlags;

    race(
        || {
            let world = World::with_page();
            assert!(world.donate(A, 1));
            world
        },
        |world| {
            let request = LockRequest::new(SlotId(0), LockFlags::READ | LockFlags::WRITE);
            let locked = world.with(A, |vm, _| vm.memory.lock_slot(&request).is_ok());
            locked == Some(true)
        },
        |world| world.reclaim(0),
        |world, _, taken| {
            assert!(taken);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

/// A lock against the donation that completes its slot.
#[test]
fn lock_against_donate() {
    use memslot::lock::LockRequest;
    use memslot::slot::LockFlags;

    race(
        World::with_page,
        |world| {
            let request = LockRequest::new(SlotId(0), LockFlags::READ | LockFlags::WRITE);
            let locked = world.with(A, |vm, _| vm.memory.lock_slot(&request).is_ok());
            locked == Some(true)
        },
        |world| world.donate(A, 1),
        |world, locked, donated| {
            assert!(donated);
            let mapped = world.with(A, |vm, _| vm.memory.with_table(|t| t.leaves().len()));
            assert_eq!(mapped, Some(if locked { 2 } else { 0 }));
        },
    );
}
