//! The board's hypercalls over fake memory, driven by the same steps.
//!
//! What the host does goes through its registers: [`FakeBoard::call`] is where the image's calls go, too. So
//! what runs is the board's code: which call leads where, the checks of its arguments, the VM table with the
//! life of each VM, transitions, ownership, page states, guests' memory and tables, the host's map. What
//! stands here, or in `el2::testing`, in place of the binary: where a VM's parts lie (`vm.rs`; its end takes
//! two steps here), a run of a vCPU (`vcpu.rs`), and what is in a page. What guests do has no registers here.

use std::cell::{Cell, RefCell};

use abi::{Call, DonationKind, ErrorCode, Exit, SlotWord, VmConfig};
use board::AddrRange;
use el2::guest::protected::MemoryCall;
use el2::guest_memory::{Contents, GuestPages, Moved};
use el2::host_map::{self, HostMap};
use el2::machine::{Machine, VirtualMachine};
use el2::ownership::Ownership;
use el2::page_state;
use el2::protection::Protection;
use el2::testing::{FakeBoard, Ground, PageContents, RAM, page_range as range};
use el2::vm_error::Refusal;
use el2::vm_table::FIRST_HANDLE;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use stage2::testing::{Arch, FakeMachine, RawLeaf};
use stage2::{ArmStage2, Ipa, Stage2};

use super::model::{BORROWERS, Content, GUESTS, Life, Model, Note, Owner, Said, Step};

const PAGE: u64 = 4096;
/// First address of each guest's slot.
const IPA: u64 = 0x4000_0000;
/// Pages of each address of an unprotected VM's slot: more than a step lends.
const STRIDE: u64 = 64;
/// A slot that no unprotected VM has.
const NO_SLOT: u16 = 62;
/// Each has a handle from the start, so that the next free one is a guest's: unprotected VMs, then guests.
const VMS: usize = BORROWERS + GUESTS;

/// Memory for so many pages of the model; EL2's and the state of unprotected VMs are behind them.
pub(crate) fn ground(pages: usize) -> Ground {
    Ground::new(pages + 1 + BORROWERS, pages, VMS)
}

/// What is in each page, instead of bytes; and whether caches may hold what the host left there.
struct Tags(RefCell<Vec<Content>>, RefCell<Vec<bool>>);

impl Tags {
    fn new(pages: usize) -> Self {
        let (contents, unsettled) = (vec![Content::Zero; pages], vec![true; pages]);
        Self(RefCell::new(contents), RefCell::new(unsettled))
    }

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

impl PageContents for Tags {
    fn use_for_el2(&self, pages: AddrRange) {
        for page in numbers(pages) {
            assert!(
                self.is_settled(page),
                "EL2 uses page {page}, but caches may hold the host's lines"
            );
            self.set(page, Content::El2s);
        }
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
    let number = |address: u64| ((address - RAM) / PAGE) as usize;
    number(pages.start())..number(pages.end())
}

const fn ipa(page: usize) -> u64 {
    IPA + page as u64 * PAGE
}

type Board<'a> = FakeBoard<'a, Tags, VMS>;
type Pages<'p, 'a> =
    GuestPages<'p, 'a, Stage2<ArmStage2, &'a FakeMachine>, HostMap<&'a FakeMachine>, Tags>;

/// A slot of an unprotected VM, by which it reaches pages: the VM, first page and number, and its number.
type Lent = (usize, usize, usize, u16);

/// The library's state.
pub(crate) struct World<'a> {
    ground: &'a Ground,
    board: Board<'a>,
    pages: usize,
    /// Unprotected VMs are created when they first reach something.
    exists: [Cell<bool>; BORROWERS],
    lent: RefCell<Vec<Lent>>,
}

/// What a call's answer says that has no other value than its first.
fn said([value, rest @ ..]: [u64; 4]) -> Said {
    assert_eq!(rest, [0; 3], "nobody asked for that");
    match abi::from_register(value) {
        Ok(value) => Said::Done(value as usize),
        Err(code) => Said::No(code),
    }
}

impl<'a> World<'a> {
    pub(crate) fn new(ground: &'a Ground, ownership: &'a Ownership<'a>, pages: usize) -> Self {
        let tags = Tags::new(pages + 1 + BORROWERS);
        let board = FakeBoard::new(ground, ownership, tags);
        for vm in 0..BORROWERS {
            let reserved = board.call(Call::VmReserve, [0; 6]);
            assert_eq!(reserved, [borrower(vm), 0, 0, 0]);
        }
        Self {
            ground,
            board,
            pages,
            exists: Default::default(),
            lent: RefCell::default(),
        }
    }

    /// A call of the host.
    fn ask<const N: usize>(&self, call: Call, args: [u64; N]) -> [u64; 4] {
        let mut registers = [0; 6];
        registers[..N].copy_from_slice(&args);
        self.board.call(call, registers)
    }

    /// A VM with its state in a page.
    fn create_vm(&self, handle: u64, page: usize, protected: bool) -> [u64; 4] {
        let config = VmConfig {
            vcpus: 1,
            protected,
            devices: false,
        };
        let page = range(page, 1).start();
        self.ask(Call::VmCreate, [handle, page, 1, config.bits()])
    }

    /// A slot of RAM.
    fn create_slot(&self, handle: u64, id: u16, ipa: u64, memory: AddrRange) -> [u64; 4] {
        let word = SlotWord {
            id,
            device: false,
            flags: 0,
        };
        let (word, count) = (word.bits(), memory.size() / PAGE);
        self.ask(Call::SlotCreate, [handle, word, ipa, count, memory.start()])
    }

    /// A guest with a slot of all pages, and a vCPU.
    fn create(&self, guest: usize, page: usize) -> Said {
        let created = said(self.create_vm(handle(guest), page, true));
        if created == Said::Done(1) {
            let slot = self.create_slot(handle(guest), 0, IPA, range(0, self.pages));
            assert_eq!(slot, [0; 4], "an empty slot");
            let vcpu = self.ask(Call::VcpuCreate, [handle(guest), 0]);
            assert_eq!(vcpu, [0; 4], "the first vCPU");
        }
        created
    }

    /// Lends pages to an unprotected VM, by a slot.
    fn lease(&self, vm: usize, first: usize, count: usize) -> Said {
        if !self.exists[vm].replace(true) {
            let created = self.create_vm(borrower(vm), self.pages + 1 + vm, false);
            assert_eq!(created, [1, 0, 0, 0], "there is a page for it");
        }
        let mut lent = self.lent.borrow_mut();
        let is_free = |id: &u16| !lent.iter().any(|(of, .., its)| (*of, *its) == (vm, *id));
        let id = (0..NO_SLOT).find(is_free).expect("not so many slots");
        let ipa = IPA + u64::from(id) * STRIDE * PAGE;
        let done = said(self.create_slot(borrower(vm), id, ipa, range(first, count)));
        if done == Said::Done(0) {
            lent.push((vm, first, count, id));
        }
        done
    }

    fn end_lease(&self, vm: usize, first: usize, count: usize) -> Said {
        let mut lent = self.lent.borrow_mut();
        let is_it = |(a, b, c, _): &Lent| (*a, *b, *c) == (vm, first, count);
        let at = lent.iter().position(is_it);
        let id = at.map_or(NO_SLOT, |at| lent.remove(at).3);
        said(self.ask(Call::SlotDelete, [borrower(vm), id.into()]))
    }

    /// The end of an unprotected VM; another one gets its handle.
    fn end_leases(&self, vm: usize) -> Said {
        if !self.exists[vm].replace(false) {
            return Said::Done(0);
        }
        self.lent.borrow_mut().retain(|(other, ..)| *other != vm);
        let destroy = || said(self.ask(Call::VmDestroy, [borrower(vm)]));
        assert_eq!(destroy(), Said::No(ErrorCode::Again));
        let done = destroy();
        let reclaim = || self.ask(Call::VmReclaim, [borrower(vm)]);
        let state = range(self.pages + 1 + vm, 1).start();
        assert_eq!([reclaim(), reclaim()], [[state, 1, 0, 0], [0; 4]]);
        let reserved = self.ask(Call::VmReserve, []);
        assert_eq!(reserved, [borrower(vm), 0, 0, 0]);
        done
    }

    /// The library's transitions for a guest that exists.
    fn with<R>(
        &self,
        guest: usize,
        act: impl FnOnce(&Pages<'_, 'a>, &Protection) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let board = &self.board;
        board.vms.with(handle(guest), |vm| {
            let (state, estate) = (vm.state(), board.estate());
            act(&state.pages(&estate), state.protection()?)
        })
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
                if matches!(
                    self.board.contents.get(page),
                    Content::Secret(_) | Content::Measured
                ) {
                    self.board.contents.set(page, Content::Public);
                }
            }
        }
        said
    }

    fn donate(&self, guest: usize, first: usize, count: usize, keep: bool) -> Said {
        let kind = if keep {
            DonationKind::Contents
        } else {
            DonationKind::Zeros
        };
        let args = [handle(guest), ipa(first), count as u64, kind as u64];
        said(self.ask(Call::MemoryDonate, args))
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
        let found = self.board.contents.get(page);
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
        let states = self.board.ownership.pages();
        let owner = page_state::Owner::Guest(index(guest));
        let content = if states.all_shared(range(page, 1), owner, true) {
            Content::Public
        } else {
            assert!(
                self.board.contents.is_settled(page),
                "guest {guest} has page {page} to itself, but caches may hold the host's lines"
            );
            Content::Secret(guest)
        };
        self.board.contents.set(page, content);
    }

    fn host_writes(&self, page: usize) -> Said {
        if self.board.host.fault(range(page, 1).start()) == host_map::Answer::Refused {
            return Said::Refused;
        }
        let found = self.board.contents.get(page);
        assert!(
            !matches!(found, Content::Secret(_) | Content::El2s),
            "the host finds {found:?} in page {page}"
        );
        self.board.contents.unsettle(page);
        let owner = self.board.ownership.pages().owner(range(page, 1).start());
        let content = if owner == Some(page_state::Owner::Host) {
            Content::Hosts
        } else {
            Content::Public
        };
        self.board.contents.set(page, content);
        Said::Done(1)
    }

    /// The same while somebody uses the VM.
    fn destroy_in_use(&self, guest: usize) -> Said {
        let destroy = |_: &Pages<'_, '_>, _: &Protection| {
            Ok(said(self.ask(Call::VmDestroy, [handle(guest)])))
        };
        let done = self.with(guest, destroy);
        done.unwrap_or_else(|refusal| Said::No(refusal.code))
    }

    fn take_back(&self, guest: usize) -> Said {
        // What has come back before is passed over, so much of it at a time.
        let again = [ErrorCode::Again.to_register(), 0, 0, 0];
        let back = loop {
            match self.ask(Call::VmReclaim, [handle(guest)]) {
                answer if answer == again => {}
                other => break other,
            }
        };
        match back {
            [start, count, 0, 0] if count > 0 => {
                let pages = AddrRange::with_size(start, count * PAGE).expect("pages");
                let numbers = numbers(pages);
                Said::Back(numbers.start, numbers.len())
            }
            other => said(other),
        }
    }

    /// Does a step.
    pub(crate) fn step(&self, step: Step) -> Said {
        let address = |first| range(first, 1).start();
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
            Step::Create(guest, page) => return self.create(guest, page),
            Step::Donate(guest, first, count, keep) => {
                return self.donate(guest, first, count, keep);
            }
            Step::Lease(vm, first, count) => return self.lease(vm, first, count),
            Step::EndLease(vm, first, count) => return self.end_lease(vm, first, count),
            Step::EndLeases(vm) => return self.end_leases(vm),
            Step::DestroyInUse(guest) => return self.destroy_in_use(guest),
            Step::Reserve => {
                return match said(self.ask(Call::VmReserve, [])) {
                    Said::Done(number) => Said::Done(number - handle(0) as usize),
                    other => other,
                };
            }
            Step::TopUp(guest, first, count) => {
                let args = [handle(guest), address(first), count as u64];
                self.ask(Call::VmTopUp, args)
            }
            Step::DonateHeap(first, count) => {
                self.ask(Call::DonateHeap, [address(first), count as u64])
            }
            Step::Seal(guest) => self.ask(Call::VmSeal, [handle(guest), IPA, 0]),
            Step::Reclaim(page) => self.ask(Call::MemoryReclaim, [address(page)]),
            Step::Destroy(guest) => self.ask(Call::VmDestroy, [handle(guest)]),
        };
        said(answer)
    }

    /// Leaves of a guest, read from memory.
    fn leaves(&self, guest: usize) -> Vec<(u64, i8, RawLeaf)> {
        let machine = self.ground.guest(BORROWERS + guest);
        machine.map_or_else(Vec::new, FakeMachine::leaves)
    }

    fn guest_leaf(&self, guest: usize, page: usize) -> bool {
        self.leaves(guest).iter().any(|(start, level, raw)| {
            let size = 1u64 << Arch::arm_4k(1, 39, false).shift(*level);
            let inside = (*start..*start + size).contains(&ipa(page));
            inside && raw.pa + (ipa(page) - start) == range(page, 1).start()
        })
    }

    /// Compares everything with the model, the tables by an independent walk.
    pub(crate) fn agrees(&self, model: &Model) -> Result<(), String> {
        let states = self.board.ownership.pages();
        for (number, page) in model.pages.iter().enumerate() {
            let here = range(number, 1);
            let owner = match page.owner {
                Owner::Host => page_state::Owner::Host,
                Owner::Heap | Owner::State(_) => page_state::Owner::Hypervisor,
                Owner::Guest(guest) => page_state::Owner::Guest(index(guest)),
            };
            if !states.all_shared(here, owner, page.shared) {
                let found = states.owner(here.start());
                return Err(format!(
                    "page {number}: {page:?}, but the library says {found:?}"
                ));
            }
            if self.board.contents.get(number) != page.content {
                let found = self.board.contents.get(number);
                return Err(format!("page {number}: {page:?}, but it holds {found:?}"));
            }
            let refused = self.board.host.fault(here.start()) == host_map::Answer::Refused;
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
            let found = self.board.ownership.may_donate(range(number, 1));
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
        for (start, level, raw) in self.ground.host().leaves() {
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
        for (start, _, raw) in self.leaves(guest) {
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
        let machines = self.ground.machines();
        machines.flat_map(FakeMachine::finish).collect()
    }
}

/// Index of a guest in the VM table.
const fn index(guest: usize) -> u8 {
    (BORROWERS + guest) as u8
}

const fn handle(guest: usize) -> u64 {
    FIRST_HANDLE + index(guest) as u64
}

const fn borrower(vm: usize) -> u64 {
    FIRST_HANDLE + vm as u64
}
