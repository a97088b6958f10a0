//! The hypervisor's library over fake memory, driven by the same steps.
//!
//! What runs is the board's code: the VM table with the life of each VM, transitions, ownership, page states,
//! guests' memory and tables, the host's map. What stands here in place of the binary: which call leads where
//! and the checks of its arguments (`calls.rs`), what a VM consists of besides its memory (`vm.rs`; its end
//! takes two steps here), that only a sealed VM runs (`vcpu.rs`), and what is in a page.

use std::cell::RefCell;
use std::sync::atomic::AtomicU32;

use abi::{DonationKind, ErrorCode, Exit};
use board::{AddrRange, RangeList};
use el2::features::{Features, IdRegisters};
use el2::guest::protected::MemoryCall;
use el2::guest_frames::GuestFrames;
use el2::guest_memory::{Contents, GuestPages, Moved, VmMemory};
use el2::host_map::{self, HostMap};
use el2::measure::Start;
use el2::ownership::Ownership;
use el2::page_state::{self, PageStates};
use el2::protection::Protection;
use el2::vm_error::Refusal;
use el2::vm_table::{Estate, FIRST_HANDLE, Teardown, VmTable};
use memslot::addr::Gfn;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::policy::{ArmCaches, ArmPolicy};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::steps::Progress;
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use stage2::testing::{Arch, FakeMachine};
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Granule, Ipa, Pa, Stage2,
    WideAddresses,
};

use super::model::{BORROWERS, Content, GUESTS, Life, Model, Note, Owner, Said, Step};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// First address of each guest's slot.
const IPA: u64 = 0x4000_0000;
/// Index of the first unprotected VM that leases.
const UNPROTECTED: u8 = 9;
const _: () = assert!(UNPROTECTED as usize + BORROWERS <= 255);

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
type Answer = Result<u64, Refusal>;
type Pages<'p, 'a> = GuestPages<'p, 'a, Table<'a>, HostMap<&'a FakeMachine>, Tags>;

struct Vm<'a> {
    protection: Protection,
    memory: VmMemory<'a, &'a FakeMachine>,
    machine: &'a FakeMachine,
}

impl Teardown for Vm<'_> {
    /// Whether the first step is still to come.
    type Left = bool;

    fn begin(&self) -> bool {
        true
    }

    fn go_on(&self, first: &mut bool) -> Progress {
        if core::mem::take(first) {
            return Progress::More;
        }
        self.machine.detach();
        Progress::Done
    }
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
    vms: VmTable<Vm<'a>, GUESTS>,
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
        Self {
            ground,
            ownership,
            host,
            tags: Tags(
                RefCell::new(vec![Content::Zero; ground.pages]),
                RefCell::new(vec![true; ground.pages]),
            ),
            vms: VmTable::new(),
        }
    }

    fn estate(&self) -> Estate<'_, 'a, HostMap<&'a FakeMachine>, Tags> {
        Estate {
            ownership: self.ownership,
            host: &self.host,
            contents: &self.tags,
        }
    }

    /// EL2 makes objects in pages that were the host's.
    fn use_for_el2(&self, pages: AddrRange) {
        for page in numbers(pages) {
            assert!(
                self.tags.is_settled(page),
                "EL2 uses page {page}, but caches may hold the host's lines"
            );
            self.tags.set(page, Content::El2s);
        }
    }

    fn build(&self, guest: usize) -> Vm<'a> {
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
        Vm {
            protection: Protection::new(),
            memory,
            machine,
        }
    }

    fn create(&self, guest: usize, page: usize) -> Answer {
        let memory = range(page, 1);
        let create = |index: u8| {
            assert_eq!(usize::from(index), guest, "a handle is an index");
            self.use_for_el2(memory);
            Some((self.build(guest), 1))
        };
        self.vms
            .create(&self.estate(), handle(guest), (memory, 1), create)
    }

    fn top_up(&self, guest: usize, memory: AddrRange) -> Answer {
        let add = |_: &Vm<'a>| self.use_for_el2(memory);
        self.vms.top_up(&self.estate(), handle(guest), memory, add)
    }

    fn donate_heap(&self, memory: AddrRange) -> Answer {
        self.estate().donate(memory)?;
        self.use_for_el2(memory);
        Ok(0)
    }

    /// The library's transitions for a guest that exists.
    fn with<R>(
        &self,
        guest: usize,
        act: impl FnOnce(&Pages<'_, 'a>, &Protection) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        self.vms.with(handle(guest), |vm| {
            act(&self.pages(guest, vm), &vm.protection)
        })
    }

    fn pages<'p>(&'p self, guest: usize, vm: &'p Vm<'a>) -> Pages<'p, 'a> {
        GuestPages {
            memory: &vm.memory,
            ownership: self.ownership,
            host: &self.host,
            contents: &self.tags,
            index: guest as u8,
        }
    }

    /// A call of a guest, which runs only behind its seal.
    fn call(&self, guest: usize, call: MemoryCall, first: usize, count: usize) -> Said {
        let moved = self.with(guest, |pages, protection| {
            if !protection.is_sealed() {
                return Err(ErrorCode::NotPermitted.into());
            }
            Ok(pages.call(call, ipa(first), count as u64))
        });
        let said = match moved {
            Ok(Moved::Pages(count)) => Said::Done(count as usize),
            Ok(Moved::After(Exit::MemoryMissing { .. })) => Said::Missing,
            Ok(Moved::Refused) | Err(_) => Said::Refused,
            Ok(Moved::After(other)) => panic!("{other:?}"),
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

    fn donate(&self, guest: usize, first: usize, count: usize, keep: bool) -> Answer {
        let kind = if keep {
            DonationKind::Contents
        } else {
            DonationKind::Zeros
        };
        self.vms.donate_memory(handle(guest), |vm| {
            let pages = self.pages(guest, vm);
            let mut stage = vm.protection.stage();
            let memory = pages.donate(&mut stage, ipa(first), count as u64, kind)?;
            assert_eq!(memory, range(first, count));
            Ok(memory)
        })
    }

    fn seal(&self, guest: usize) -> Answer {
        let start = Start {
            vcpus: 1,
            entry: IPA,
            context: 0,
        };
        self.with(guest, |_, protection| protection.seal(&start, || Ok(())))
    }

    fn reclaim(&self, page: usize) -> Answer {
        let page = range(page, 1);
        self.vms.with_owner(self.ownership, page, |vm| {
            let owner = self.ownership.pages().owner(page.start());
            let Some(page_state::Owner::Guest(guest)) = owner else {
                panic!("nobody has moved it meanwhile");
            };
            self.pages(guest.into(), vm).reclaim_page(page)
        })
    }

    fn guest_writes(&self, guest: usize, page: usize) -> Said {
        let fault = Stage2Fault {
            ipa: Ipa::new(ipa(page)),
            access: Access::Write,
            kind: FaultKind::Translation,
        };
        let outcome = self.with(guest, |pages, protection| {
            if !protection.is_sealed() {
                return Err(ErrorCode::NotPermitted.into());
            }
            Ok(match pages.memory.handle_fault(&fault, &()) {
                Ok(FaultOutcome::Resolved) => Said::Done(1),
                Ok(FaultOutcome::NoFrame(_)) if !pages.is_poisoned(ipa(page)) => Said::Missing,
                Ok(FaultOutcome::NoFrame(_)) => Said::Refused,
                other => panic!("{other:?}"),
            })
        });
        let said = outcome.unwrap_or(Said::Refused);
        if said == Said::Done(1) {
            self.written_by_guest(guest, page);
        }
        said
    }

    fn written_by_guest(&self, guest: usize, page: usize) {
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

    fn host_writes(&self, page: usize) -> Said {
        if self.host.fault(range(page, 1).start()) == host_map::Answer::Refused {
            return Said::Refused;
        }
        let found = self.tags.get(page);
        assert!(
            !matches!(found, Content::Secret(_) | Content::El2s),
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

    /// The same while a vCPU runs.
    fn destroy_in_use(&self, guest: usize) -> Answer {
        self.with(guest, |_, _| {
            self.vms.destroy(self.ownership, handle(guest))
        })
    }

    fn take_back(&self, guest: usize) -> Said {
        // What has come back before is passed over, so much of it at a time.
        let back = loop {
            match self.vms.reclaim(&self.estate(), handle(guest)) {
                Err(refusal) if refusal.code == ErrorCode::Again => {}
                other => break other,
            }
        };
        match back {
            Ok(Some(pages)) => {
                let numbers = numbers(pages);
                Said::Back(numbers.start, numbers.len())
            }
            Ok(None) => Said::Done(0),
            Err(refusal) => Said::No(refusal.code),
        }
    }

    /// Does a step.
    pub(crate) fn step(&self, step: Step) -> Said {
        let borrower = |vm: usize| UNPROTECTED + vm as u8;
        let answer = match step {
            Step::Share(guest, first, count) => {
                return self.call(guest, MemoryCall::Share, first, count);
            }
            Step::Unshare(guest, first, count) => {
                return self.call(guest, MemoryCall::Unshare, first, count);
            }
            Step::Relinquish(guest, first, count) => {
                return self.call(guest, MemoryCall::Relinquish, first, count);
            }
            Step::GuestWrites(guest, page) => return self.guest_writes(guest, page),
            Step::HostWrites(page) => return self.host_writes(page),
            Step::TakeBack(guest) => return self.take_back(guest),
            Step::Reserve => {
                let reserved = self.vms.reserve().map(|handle| handle - FIRST_HANDLE);
                reserved.map_err(Refusal::from)
            }
            Step::Create(guest, page) => self.create(guest, page),
            Step::TopUp(guest, first, count) => self.top_up(guest, range(first, count)),
            Step::DonateHeap(first, count) => self.donate_heap(range(first, count)),
            Step::Donate(guest, first, count, keep) => self.donate(guest, first, count, keep),
            Step::Seal(guest) => self.seal(guest),
            Step::Reclaim(page) => self.reclaim(page),
            Step::Lease(vm, first, count) => {
                let lent = self.ownership.lease(range(first, count), borrower(vm));
                lent.map(|progress| u64::from(progress == Progress::More))
                    .map_err(Refusal::from)
            }
            Step::EndLease(vm, first, count) => {
                let ended = self.ownership.end_lease(range(first, count), borrower(vm));
                ended.map(|()| 0).map_err(Refusal::from)
            }
            Step::EndLeases(vm) => {
                self.ownership.end_all_leases(borrower(vm));
                Ok(0)
            }
            Step::Destroy(guest) => self.vms.destroy(self.ownership, handle(guest)),
            Step::DestroyInUse(guest) => self.destroy_in_use(guest),
        };
        answer.map_or_else(
            |refusal| Said::No(refusal.code),
            |value| Said::Done(value as usize),
        )
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
                Owner::Heap | Owner::State(_) => page_state::Owner::Hypervisor,
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
            let refused = self.host.fault(here.start()) == host_map::Answer::Refused;
            if refused == model.host_reaches(number) {
                return Err(format!(
                    "page {number}: {page:?}, but refused to the host: {refused}"
                ));
            }
        }
        self.has_the_same_vms(model)?;
        self.walk_host(model)?;
        (0..GUESTS).try_for_each(|guest| self.walk_guest(guest, model))
    }

    /// What later steps hang on, and this one may not have shown: else worlds that differ would pass for one.
    fn has_the_same_vms(&self, model: &Model) -> Result<(), String> {
        for (number, page) in model.pages.iter().enumerate() {
            let found = self.ownership.may_donate(range(number, 1));
            let found = found.map_err(|error| Refusal::from(error).code);
            if found != model.may_leave_the_host(number, 1) {
                return Err(format!("page {number}: {page:?}, its donation: {found:?}"));
            }
        }
        for (number, guest) in model.guests.iter().enumerate() {
            let found = self.with(number, |pages, protection| {
                let poisoned = |note: &usize| pages.is_poisoned(ipa(*note));
                let poisoned: Vec<_> = (0..guest.notes.len()).filter(poisoned).collect();
                Ok((protection.is_sealed(), poisoned))
            });
            let poisoned = |note: &usize| guest.notes[*note] == Some(Note::Poisoned);
            let poisoned: Vec<_> = (0..guest.notes.len()).filter(poisoned).collect();
            let expected = match guest.life {
                Life::Building => Ok((false, poisoned)),
                Life::Sealed => Ok((true, poisoned)),
                _ => Err(ErrorCode::NotFound.into()),
            };
            if found != expected {
                return Err(format!("guest {number}: {guest:?}, but {found:?}"));
            }
        }
        Ok(())
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
            // Nobody walks the tables of one that ends, but they are there until it has ended.
            let ends = model.guests[guest].life == Life::Dying;
            let its = model.pages[page].owner == Owner::Guest(guest);
            let reaches = model.guest_reaches(guest, page) || ends && its;
            if raw.pa != range(page, 1).start() || !reaches {
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

const fn handle(guest: usize) -> u64 {
    FIRST_HANDLE + guest as u64
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
