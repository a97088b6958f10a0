//! What the models of two parties are about: a host, two guests, and what must hold when nobody does anything.

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
pub(super) const RAM: u64 = 1 << 30;
pub(super) const PAGES: u64 = 2;
pub(super) const ALL_PAGES: u64 = PAGES + 2;
/// Where each guest has them.
pub(super) const IPA: u64 = 0x4000_0000;
/// The guests; an unprotected VM.
pub(super) const A: u8 = 0;
pub(super) const B: u8 = 1;
pub(super) const UNPROTECTED: u8 = 9;

pub(super) fn range(first: u64, pages: u64) -> AddrRange {
    AddrRange::with_size(RAM + first * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

pub(super) fn page(number: u64) -> AddrRange {
    range(number, 1)
}

pub(super) fn ipa(page: u64) -> u64 {
    IPA + page * PAGE_SIZE
}

/// The host's table: which pages it may reach.
pub(super) struct Reach(Mutex<[bool; ALL_PAGES as usize]>);

impl Reach {
    pub(super) fn set(&self, pages: AddrRange, reaches: bool) {
        let mut all = self.0.lock();
        for number in 0..ALL_PAGES {
            if pages.contains_range(page(number)) {
                all[number as usize] = reaches;
            }
        }
    }

    pub(super) fn reaches(&self, number: u64) -> bool {
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

pub(super) type Memory = GuestMemory<ModelTable, ArmPolicy, GuestFrames<'static>>;

pub(super) struct Vm {
    pub(super) memory: Memory,
    pub(super) index: u8,
}

impl Teardown for Vm {
    type Left = ();

    fn begin(&self) {}

    fn go_on(&self, (): &mut ()) -> Progress {
        Progress::Done
    }
}

pub(super) struct World {
    pub(super) ownership: &'static Ownership<'static>,
    pub(super) reach: Reach,
    /// Guests A and B.
    pub(super) table: VmTable<Vm, 2>,
}

/// What EL2 wipes is in nobody's reach but its own; or it was a guest's that is no more, and the host
/// sees no more of it than what that had shared.
pub(super) struct Wiping<'a>(&'a World, Option<u8>);

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

pub(super) fn vm(ownership: &'static Ownership<'static>, guest: u8) -> Vm {
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
    pub(super) fn empty() -> &'static Self {
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
    pub(super) fn new() -> &'static Self {
        Self::with_guests(&[A, B])
    }

    pub(super) fn with_guests(guests: &[u8]) -> &'static Self {
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

    pub(super) fn estate<'a>(
        &'a self,
        contents: &'a Wiping<'a>,
    ) -> Estate<'a, 'static, Reach, Wiping<'a>> {
        Estate {
            ownership: self.ownership,
            host: &self.reach,
            contents,
        }
    }

    /// The same with a page donated to A.
    pub(super) fn with_page() -> &'static Self {
        let world = Self::new();
        assert!(world.donate(A, 0));
        world
    }

    /// The same, and A shares it.
    pub(super) fn with_shared_page() -> &'static Self {
        let world = Self::with_page();
        assert_eq!(world.call(A, MemoryCall::Share, 0), DONE);
        world
    }

    /// Its memory, for a transition.
    pub(super) fn pages<R>(&self, vm: &Vm, act: impl FnOnce(&Pages<'_>) -> R) -> R {
        act(&GuestPages {
            memory: &vm.memory,
            ownership: self.ownership,
            host: &self.reach,
            contents: &Wiping(self, None),
            index: vm.index,
        })
    }

    /// Uses a VM as a call does that finds it alive.
    pub(super) fn with<R>(
        &self,
        guest: u8,
        use_it: impl FnOnce(&Vm, &Pages<'_>) -> R,
    ) -> Option<R> {
        let used = self.table.with(handle(guest), |vm| {
            Ok(self.pages(vm, |pages| use_it(vm, pages)))
        });
        used.ok()
    }

    /// MemoryDonate of one page; whether it went.
    pub(super) fn donate(&self, guest: u8, number: u64) -> bool {
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
    pub(super) fn top_up(&self, guest: u8, number: u64) -> bool {
        let contents = Wiping(self, None);
        let estate = self.estate(&contents);
        let donated = self
            .table
            .top_up(&estate, handle(guest), page(number), |_| {});
        donated.is_ok()
    }

    pub(super) fn call(&self, guest: u8, call: MemoryCall, number: u64) -> Option<Moved> {
        self.with(guest, |_, pages| pages.call(call, ipa(number), 1))
    }

    /// MemoryReclaim, which finds the owner first.
    pub(super) fn reclaim(&self, number: u64) -> bool {
        let taken = self.table.with_owner(self.ownership, page(number), |vm| {
            self.pages(vm, |pages| pages.reclaim_page(page(number)))
        });
        taken.is_ok()
    }

    /// The guest touches a page: whether it has a leaf behind that.
    pub(super) fn touch(&self, guest: u8, number: u64) -> bool {
        let fault = Stage2Fault {
            ipa: Ipa::new(ipa(number)),
            access: Access::Write,
            kind: FaultKind::Translation,
        };
        let outcome = self.with(guest, |vm, _| vm.memory.handle_fault(&fault, &()).unwrap());
        outcome == Some(FaultOutcome::Resolved)
    }

    /// VmDestroy and all of VmReclaim; whether nobody used the VM.
    pub(super) fn end(&self, guest: u8) -> bool {
        self.destroy(guest) && self.take_back(guest)
    }

    pub(super) fn destroy(&self, guest: u8) -> bool {
        self.table.destroy(self.ownership, handle(guest)).is_ok()
    }

    /// All of VmReclaim; whether this call was the last one.
    pub(super) fn take_back(&self, guest: u8) -> bool {
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

    pub(super) fn owner(&self, number: u64) -> Owner {
        self.ownership.pages().owner(page(number).start()).unwrap()
    }

    /// What must hold when nobody does anything.
    pub(super) fn agree(&self) {
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
pub(super) const DONE: Option<Moved> = Some(Moved::Pages(1));

pub(super) const fn handle(guest: u8) -> u64 {
    FIRST_HANDLE + guest as u64
}

pub(super) type Pages<'p> = GuestPages<'p, 'static, ModelTable, Reach, Wiping<'p>>;
