//! The hypervisor's library over fake memory, driven by the same steps.

use std::cell::RefCell;
use std::sync::atomic::AtomicU32;

use abi::{DonationKind, Exit};
use board::{AddrRange, RangeList};
use el2::features::{Features, IdRegisters};
use el2::guest::protected::MemoryCall;
use el2::guest_frames::GuestFrames;
use el2::guest_memory::{Contents, Donations, GuestPages, Moved, VmMemory};
use el2::host_map::{self, Answer, HostMap};
use el2::measure::Start;
use el2::ownership::Ownership;
use el2::page_state::{self, PageStates};
use el2::protection::Protection;
use memslot::addr::Gfn;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::policy::{ArmCaches, ArmPolicy};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use stage2::testing::{Arch, FakeMachine};
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Granule, Ipa, Pa, Stage2,
    WideAddresses,
};

use super::model::{Content, GUESTS, Model, Owner, Said, Step};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// First address of each guest's slot.
const IPA: u64 = 0x4000_0000;
/// Index of the unprotected VM that leases.
const UNPROTECTED: u8 = 9;

/// Tables of the host and of the guests.
pub(crate) struct Machines {
    host: FakeMachine,
    guests: Vec<FakeMachine>,
}

impl Machines {
    pub(crate) fn new() -> Self {
        let guest = || FakeMachine::new(Arch::arm_4k(1, 39, false), 8);
        Self {
            host: FakeMachine::new(Arch::arm_4k(1, 40, false), 16),
            guests: (0..GUESTS).map(|_| guest()).collect(),
        }
    }
}

/// What is in each page, instead of bytes; and whether caches may hold what the host left there.
struct Tags(RefCell<Vec<Content>>, RefCell<Vec<bool>>);

impl Tags {
    fn set(&self, page: usize, content: Content) {
        self.0.borrow_mut()[page] = content;
    }

    fn get(&self, page: usize) -> Content {
        self.0.borrow()[page]
    }

    /// The host may have written it past the caches, or left lines in them.
    fn unsettle(&self, page: usize) {
        self.1.borrow_mut()[page] = true;
    }

    fn is_settled(&self, page: usize) -> bool {
        !self.1.borrow()[page]
    }
}

impl Contents for Tags {
    fn wipe(&self, pages: AddrRange) {
        for page in numbers(pages) {
            self.set(page, Content::Zero);
        }
        self.settle(pages);
    }

    fn settle(&self, pages: AddrRange) {
        for page in numbers(pages) {
            self.1.borrow_mut()[page] = false;
        }
    }

    fn show(&self, pages: AddrRange, to: &mut dyn FnMut(&[u8])) {
        to(&vec![0; pages.size() as usize]);
        for page in numbers(pages) {
            self.set(page, Content::Measured);
        }
        self.settle(pages);
    }
}

fn numbers(pages: AddrRange) -> std::ops::Range<usize> {
    let number = |address: u64| ((address - GIB) / PAGE) as usize;
    number(pages.start())..number(pages.end())
}

fn range(first: usize, count: usize) -> AddrRange {
    AddrRange::with_size(GIB + first as u64 * PAGE, count as u64 * PAGE).expect("not empty")
}

const fn ipa(page: usize) -> u64 {
    IPA + page as u64 * PAGE
}

type Table<'a> = Stage2<ArmStage2, &'a FakeMachine>;
type Pages<'p, 'a> = GuestPages<'p, 'a, Table<'a>, HostMap<&'a FakeMachine>, Tags>;

struct Vm<'a> {
    protection: Protection,
    memory: VmMemory<'a, &'a FakeMachine>,
}

struct Slot<'a> {
    vm: Option<Vm<'a>>,
    donations: Donations,
}

/// What lives as long as a world.
pub(crate) struct Ground {
    machines: Machines,
    words: Vec<AtomicU32>,
    pages: usize,
}

impl Ground {
    pub(crate) fn new(pages: usize) -> Self {
        let words = (0..=pages).map(|_| AtomicU32::new(0)).collect();
        let machines = Machines::new();
        Self {
            machines,
            words,
            pages,
        }
    }

    fn memory(&self) -> RangeList<{ board::MAX_MEMORY }> {
        let mut memory = RangeList::new();
        memory.insert(range(0, self.pages + 1), "ram").expect("one");
        memory
    }

    /// States of all pages; the one behind the last is EL2's.
    pub(crate) fn ownership(&self) -> Ownership<'_> {
        let pages = PageStates::new(self.memory(), &self.words).expect("as many words as pages");
        let (host, el2) = (page_state::Owner::Host, page_state::Owner::Hypervisor);
        assert!(pages.transfer(range(self.pages, 1), host, el2));
        Ownership::new(pages)
    }
}

/// The library's state.
pub(crate) struct World<'a> {
    ground: &'a Ground,
    ownership: &'a Ownership<'a>,
    host: HostMap<&'a FakeMachine>,
    tags: Tags,
    guests: Vec<Slot<'a>>,
}

impl<'a> World<'a> {
    pub(crate) fn new(ground: &'a Ground, ownership: &'a Ownership<'a>) -> Self {
        let features = Features::decode(&IdRegisters {
            mmfr0: 0x10_1122,
            mmfr1: 0x1021_2122,
            ..IdRegisters::default()
        });
        let format = host_map::format(&features).expect("a usual core");
        let machine = &ground.machines.host;
        let el2 = range(ground.pages, 1);
        let host = HostMap::new(format, machine, Default::default(), ground.memory(), el2);
        let host = host.expect("there are tables");
        machine.attach(Pa::new(host.root()));
        let slot = || Slot {
            vm: None,
            donations: Donations::new(),
        };
        Self {
            ground,
            ownership,
            host,
            tags: Tags(
                RefCell::new(vec![Content::Zero; ground.pages]),
                RefCell::new(vec![true; ground.pages]),
            ),
            guests: (0..GUESTS).map(|_| slot()).collect(),
        }
    }

    fn create(&mut self, guest: usize) -> Said {
        if self.guests[guest].vm.is_some() {
            return Said::No;
        }
        let machine = &self.ground.machines.guests[guest];
        let table = Stage2::new(format(), machine, Default::default()).expect("there are tables");
        machine.attach(table.root());
        let config = VmConfig {
            max_slots: 64,
            gfn_limit: 1 << 27,
            kind: VmKind::Protected,
        };
        let frames = GuestFrames::owned(self.ownership.pages(), guest as u8);
        let policy = ArmPolicy {
            caches: ArmCaches::Maintenance,
        };
        let memory = GuestMemory::new(config, policy, frames, table);
        let slot = Memslot::new(
            SlotId(0),
            Gfn::try_new(IPA / PAGE).expect("small"),
            self.ground.pages as u64,
            GIB / PAGE,
            SlotFlags::empty(),
            SlotKind::Ram,
        );
        memory
            .create_slot(slot.expect("a slot"))
            .expect("the first one");
        let protection = Protection::new();
        self.guests[guest].vm = Some(Vm { protection, memory });
        Said::Done(0)
    }

    /// The library's transitions for a guest that exists.
    fn with<R>(
        &self,
        guest: usize,
        act: impl FnOnce(&Pages<'_, 'a>, &Protection) -> R,
    ) -> Option<R> {
        let vm = self.guests[guest].vm.as_ref()?;
        let pages = GuestPages {
            memory: &vm.memory,
            ownership: self.ownership,
            host: &self.host,
            contents: &self.tags,
            index: guest as u8,
        };
        Some(act(&pages, &vm.protection))
    }

    fn call(&self, guest: usize, call: MemoryCall, first: usize, count: usize) -> Said {
        let moved = self.with(guest, |pages, protection| {
            protection
                .is_sealed()
                .then(|| pages.call(call, ipa(first), count as u64))
        });
        let said = match moved.flatten() {
            Some(Moved::Pages(count)) => Said::Done(count as usize),
            Some(Moved::After(Exit::MemoryMissing { .. })) => Said::Missing,
            Some(Moved::Refused) | None => Said::No,
            Some(Moved::After(other)) => panic!("{other:?}"),
        };
        if let (Said::Done(count), false) = (said, call == MemoryCall::Relinquish) {
            for page in first..first + count {
                if matches!(self.tags.get(page), Content::Secret(_) | Content::Measured) {
                    self.tags.set(page, Content::Public);
                }
            }
        }
        said
    }

    fn donate(&mut self, guest: usize, first: usize, count: usize, keep: bool) -> Said {
        let kind = if keep {
            DonationKind::Contents
        } else {
            DonationKind::Zeros
        };
        let donated = self.with(guest, |pages, protection| {
            pages
                .donate(&mut protection.stage(), ipa(first), count as u64, kind)
                .ok()
        });
        let Some(memory) = donated.flatten() else {
            return Said::No;
        };
        assert_eq!(memory, range(first, count));
        let donations = &mut self.guests[guest].donations;
        donations.prepare().expect("std has memory");
        donations.add_memory(memory, guest as u8);
        Said::Done(count)
    }

    fn seal(&self, guest: usize) -> Said {
        let start = Start {
            vcpus: 1,
            entry: IPA,
            context: 0,
        };
        let sealed = self.with(guest, |_, protection| {
            protection.seal(&start, || Ok(())).is_ok()
        });
        done(sealed == Some(true), 0)
    }

    fn reclaim(&self, page: usize) -> Said {
        let owner = self.ownership.pages().owner(range(page, 1).start());
        let Some(page_state::Owner::Guest(guest)) = owner else {
            return Said::No;
        };
        let taken = self.with(guest.into(), |pages, _| {
            pages.reclaim_page(range(page, 1)).is_ok()
        });
        done(taken == Some(true), 1)
    }

    fn guest_writes(&self, guest: usize, page: usize) -> Said {
        let fault = Stage2Fault {
            ipa: Ipa::new(ipa(page)),
            access: Access::Write,
            kind: FaultKind::Translation,
        };
        let outcome = self.with(guest, |pages, protection| {
            if !protection.is_sealed() {
                return Said::No;
            }
            match pages.memory.handle_fault(&fault, &()) {
                Ok(FaultOutcome::Resolved) => Said::Done(1),
                Ok(FaultOutcome::NoFrame(_)) if !pages.is_poisoned(ipa(page)) => Said::Missing,
                Ok(FaultOutcome::NoFrame(_)) => Said::No,
                other => panic!("{other:?}"),
            }
        });
        let said = outcome.unwrap_or(Said::No);
        if said == Said::Done(1) {
            assert!(self.guest_leaf(guest, page), "resolved, but not mapped");
            let found = self.tags.get(page);
            let mine = [
                Content::Zero,
                Content::Measured,
                Content::Public,
                Content::Secret(guest),
            ];
            assert!(
                mine.contains(&found),
                "guest {guest} finds {found:?} in page {page}"
            );
            let states = self.ownership.pages();
            let owner = page_state::Owner::Guest(guest as u8);
            let content = if states.all_shared(range(page, 1), owner, true) {
                Content::Public
            } else {
                assert!(
                    self.tags.is_settled(page),
                    "guest {guest} has page {page} to itself, but caches may hold the host's lines"
                );
                Content::Secret(guest)
            };
            self.tags.set(page, content);
        }
        said
    }

    fn host_writes(&self, page: usize) -> Said {
        if self.host.fault(range(page, 1).start()) == Answer::Refused {
            return Said::No;
        }
        let found = self.tags.get(page);
        assert!(
            !matches!(found, Content::Secret(_)),
            "the host finds {found:?} in page {page}"
        );
        self.tags.unsettle(page);
        let owner = self.ownership.pages().owner(range(page, 1).start());
        let content = if owner == Some(page_state::Owner::Host) {
            Content::Hosts
        } else {
            Content::Public
        };
        self.tags.set(page, content);
        Said::Done(1)
    }

    /// Ends a VM: its tables are gone when this returns.
    fn destroy(&mut self, guest: usize) -> Said {
        let machine = &self.ground.machines.guests[guest];
        let Some(vm) = self.guests[guest].vm.take() else {
            return Said::No;
        };
        machine.detach();
        drop(vm);
        self.ownership.end_all_leases(guest as u8);
        Said::Done(0)
    }

    fn take_back(&mut self, guest: usize, is_dead: bool) -> Said {
        if !is_dead {
            return Said::No;
        }
        let donations = &mut self.guests[guest].donations;
        let back = loop {
            let back = donations.take_back(self.ownership, &self.host, &self.tags);
            let back = back.expect("there are tables");
            if back.is_some() || donations.is_empty() {
                break back;
            }
        };
        match back {
            Some(pages) => {
                let numbers = numbers(pages);
                Said::Back(numbers.start, numbers.len())
            }
            None => Said::Done(0),
        }
    }

    /// Does a step. `before`: the model before it, which knows what the VM table would.
    pub(crate) fn step(&mut self, step: Step, before: &Model) -> Said {
        let life = |guest: usize| before.guests[guest].life;
        match step {
            Step::Create(guest) if life(guest) == super::model::Life::Dead => Said::No,
            Step::Create(guest) => self.create(guest),
            Step::Donate(guest, first, count, keep) => self.donate(guest, first, count, keep),
            Step::Seal(guest) => self.seal(guest),
            Step::Share(guest, first, count) => self.call(guest, MemoryCall::Share, first, count),
            Step::Unshare(guest, first, count) => {
                self.call(guest, MemoryCall::Unshare, first, count)
            }
            Step::Relinquish(guest, page) => self.call(guest, MemoryCall::Relinquish, page, 1),
            Step::Reclaim(page) => self.reclaim(page),
            Step::GuestWrites(guest, page) => self.guest_writes(guest, page),
            Step::HostWrites(page) => self.host_writes(page),
            Step::Lease(page) if before.pages[page].leased => Said::No,
            Step::Lease(page) => done(self.ownership.lease(range(page, 1), UNPROTECTED).is_ok(), 1),
            Step::EndLease(page) => {
                let ended = self.ownership.end_lease(range(page, 1), UNPROTECTED);
                done(ended.is_ok(), 1)
            }
            Step::Destroy(guest) => self.destroy(guest),
            Step::TakeBack(guest) => self.take_back(guest, life(guest) == super::model::Life::Dead),
        }
    }

    fn guest_leaf(&self, guest: usize, page: usize) -> bool {
        let machine = &self.ground.machines.guests[guest];
        machine.leaves().iter().any(|(start, level, raw)| {
            let size = 1u64 << Arch::arm_4k(1, 39, false).shift(*level);
            let inside = (*start..*start + size).contains(&ipa(page));
            inside && raw.pa + (ipa(page) - start) == range(page, 1).start()
        })
    }

    /// Compares everything with the model, the tables by an independent walk.
    pub(crate) fn agrees(&self, model: &Model) -> Result<(), String> {
        let states = self.ownership.pages();
        for (number, page) in model.pages.iter().enumerate() {
            let here = range(number, 1);
            let owner = match page.owner {
                Owner::Host => page_state::Owner::Host,
                Owner::Guest(guest) => page_state::Owner::Guest(guest as u8),
            };
            if !states.all_shared(here, owner, page.shared) {
                let found = states.owner(here.start());
                return Err(format!(
                    "page {number}: {page:?}, but the library says {found:?}"
                ));
            }
            if self.tags.get(number) != page.content {
                let found = self.tags.get(number);
                return Err(format!("page {number}: {page:?}, but it holds {found:?}"));
            }
            let refused = self.host.fault(here.start()) == Answer::Refused;
            if refused == model.host_reaches(number) {
                return Err(format!(
                    "page {number}: {page:?}, but refused to the host: {refused}"
                ));
            }
        }
        self.walk_host(model)?;
        (0..GUESTS).try_for_each(|guest| self.walk_guest(guest, model))
    }

    fn walk_host(&self, model: &Model) -> Result<(), String> {
        let arch = Arch::arm_4k(1, 40, false);
        for (start, level, raw) in self.ground.machines.host.leaves() {
            let size = 1u64 << arch.shift(level);
            if raw.pa != start {
                return Err(format!("the host's {start:#x} leads to {:#x}", raw.pa));
            }
            for page in 0..=model.pages.len() {
                let here = range(page, 1).start();
                let allowed = page < model.pages.len() && model.host_reaches(page);
                if (start..start + size).contains(&here) && !allowed {
                    return Err(format!("the host has a leaf for page {page}"));
                }
            }
        }
        Ok(())
    }

    fn walk_guest(&self, guest: usize, model: &Model) -> Result<(), String> {
        for (start, _, raw) in self.ground.machines.guests[guest].leaves() {
            let page = ((start - IPA) / PAGE) as usize;
            if raw.pa != range(page, 1).start() || !model.guest_reaches(guest, page) {
                return Err(format!("guest {guest} has a leaf for page {page}: {raw:?}"));
            }
        }
        Ok(())
    }

    /// What the protocol checker of the tables found wrong.
    pub(crate) fn violations(&self) -> Vec<String> {
        let machines = &self.ground.machines;
        let all = machines.guests.iter().chain([&machines.host]);
        all.flat_map(FakeMachine::finish).collect()
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        let machines = &self.ground.machines;
        machines.guests.iter().for_each(FakeMachine::detach);
        machines.host.detach();
    }
}

fn done(yes: bool, count: usize) -> Said {
    if yes { Said::Done(count) } else { Said::No }
}

pub(crate) fn format() -> ArmStage2 {
    ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: 39,
        output_bits: 40,
        features: ArmFeatures {
            fwb: ForceWriteBack::Off,
            execute: Execute::Split,
            wide: WideAddresses::Off,
        },
        start: None,
    })
    .expect("a usual format")
}
