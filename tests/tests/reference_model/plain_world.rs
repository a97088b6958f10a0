//! The library's memory of an unprotected VM over fake tables, driven by the steps of [`super::plain`].

use std::sync::atomic::AtomicU32;

use abi::ErrorCode;
use board::{AddrRange, RangeList};
use el2::guest_frames::GuestFrames;
use el2::guest_memory::VmMemory;
use el2::page_state::PageStates;
use el2::vm_error::Refusal;
use memslot::addr::Gfn;
use memslot::edge::Dma;
use memslot::error::Error;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use memslot::policy::{ArmCaches, ArmPolicy};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::steps::Progress;
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use stage2::testing::{Arch, FakeMachine, RawLeaf};
use stage2::{Aging, Ipa, Perms, Stage2};

use super::plain::{PLACES, Plain, Said, Step};
use super::world::format;

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const SLOT: SlotId = SlotId(0);
/// Pages of the largest step: where nothing is mapped that owes cleaning.
const STEP: u64 = 32 * 512;

/// What lives as long as a world.
pub(crate) struct PlainGround {
    machine: FakeMachine,
    words: Vec<AtomicU32>,
}

impl PlainGround {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            machine: FakeMachine::new(Arch::arm_4k(1, 39, false), 16),
            words: (0..pages).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    pub(crate) fn states(&self) -> PageStates<'_> {
        let mut memory = RangeList::new();
        let size = self.words.len() as u64 * PAGE;
        let ram = AddrRange::with_size(GIB, size).expect("not empty");
        memory.insert(ram, "ram").expect("one");
        PageStates::new(memory, &self.words).expect("as many words as pages")
    }
}

/// The library's state.
pub(crate) struct PlainWorld<'a> {
    machine: &'a FakeMachine,
    memory: VmMemory<'a, &'a FakeMachine>,
    pages: u64,
}

fn refused(error: Error) -> Said {
    Said::No(Refusal::from(error).code)
}

fn value(result: Result<u64, Error>) -> Said {
    result.map_or_else(refused, Said::Value)
}

fn unit(result: Result<(), Error>) -> Said {
    value(result.map(|()| 0))
}

fn step(result: Result<Progress, Error>) -> Said {
    match result {
        Ok(Progress::More) => Said::No(ErrorCode::Again),
        other => unit(other.map(drop)),
    }
}

impl<'a> PlainWorld<'a> {
    pub(crate) fn new(ground: &'a PlainGround, states: &'a PageStates<'a>) -> Self {
        let machine = &ground.machine;
        let table = Stage2::new(format(), machine, Default::default()).expect("there are tables");
        machine.attach(table.root());
        let config = VmConfig {
            max_slots: 64,
            gfn_limit: 1 << 27,
            kind: VmKind::Unprotected,
        };
        let policy = ArmPolicy {
            caches: ArmCaches::Maintenance,
        };
        let memory = GuestMemory::new(config, policy, GuestFrames::leased(states), table);
        let pages = ground.words.len() as u64;
        Self {
            machine,
            memory,
            pages,
        }
    }

    /// The first page of a place: half of the slot lies before a boundary.
    fn base(&self, place: usize) -> Gfn {
        let boundary = STEP * (1 + place as u64);
        Gfn::try_new(boundary - self.pages / 2).expect("small")
    }

    fn create(&self, place: usize, logged: bool) -> Said {
        let flags = if logged {
            SlotFlags::DIRTY_LOG
        } else {
            SlotFlags::empty()
        };
        let kind = SlotKind::Ram;
        let slot = Memslot::new(SLOT, self.base(place), self.pages, GIB / PAGE, flags, kind);
        let slot = slot.expect("a slot");
        step(self.memory.create_in_steps(slot, || false))
    }

    /// The guest's access: through a leaf that allows it, or by a fault.
    fn touch(&self, place: usize, page: usize, writes: bool) -> Said {
        let gfn = self.base(place).get() + page as u64;
        let leaf = self.leaf(gfn);
        let kind = match leaf {
            None => FaultKind::Translation,
            Some(leaf) if !leaf.young => FaultKind::AccessFlag,
            Some(leaf) if writes && !leaf.write => FaultKind::Permission,
            Some(_) => return Said::Value(0),
        };
        let access = if writes { Access::Write } else { Access::Read };
        let ipa = Ipa::new(gfn * PAGE);
        match self
            .memory
            .handle_fault(&Stage2Fault { ipa, access, kind }, &())
        {
            Ok(FaultOutcome::Resolved) => Said::Value(0),
            Ok(FaultOutcome::NoFrame(_)) => Said::Missing,
            Ok(FaultOutcome::Mmio) => Said::Device,
            Ok(FaultOutcome::Retry) => Said::Waits,
            other => panic!("{other:?}"),
        }
    }

    fn leaf(&self, gfn: u64) -> Option<RawLeaf> {
        let leaves = self.machine.leaves();
        let leaf = leaves.into_iter().find(|(start, ..)| *start == gfn * PAGE);
        leaf.map(|(_, _, leaf)| leaf)
    }

    /// Does a step.
    pub(crate) fn step(&self, what: Step) -> Said {
        let memory = &self.memory;
        let once = || false;
        match what {
            Step::Create(place, logged) => self.create(place, logged),
            Step::Touch(place, page, writes) => self.touch(place, page, writes),
            Step::Enter => unit(memory.enter().map(drop)),
            Step::Unshare(first, count) => {
                unit(memory.unshare_pages(SLOT, first as u64, count as u64))
            }
            Step::Share(first, count) => unit(memory.share_pages(SLOT, first as u64, count as u64)),
            Step::Young(first, count, clear) => {
                let aging = if clear { Aging::Clear } else { Aging::Test };
                value(memory.age_pages(SLOT, first as u64, count as u64, aging))
            }
            Step::Relax(page, writes) => {
                let add = if writes { Perms::RW } else { Perms::READ };
                unit(memory.relax_page(SLOT, page as u64, add))
            }
            Step::Dirty => value(memory.take_dirty_word(SLOT, 0)),
            Step::Delete => match memory.delete_in_steps(SLOT, once) {
                Ok(None) => Said::No(ErrorCode::Again),
                other => unit(other.map(drop)),
            },
            Step::Move(place) => step(memory.move_in_steps(SLOT, self.base(place), once)),
            Step::Log(on) => {
                let log = SlotFlags::DIRTY_LOG;
                let flags = if on { log } else { SlotFlags::empty() };
                step(memory.set_flags_in_steps(SLOT, flags, once))
            }
            Step::Reset => step(memory.reset_in_steps(once)),
            Step::Device(true) => step(memory.register_in_steps(Dma::Snooping, once)),
            Step::Device(false) => step(memory.unregister_in_steps(Dma::Snooping, once)),
        }
    }

    /// Compares every mapping with the model, by an independent walk.
    pub(crate) fn agrees(&self, model: &Plain) -> Result<(), String> {
        let mut expected = 0;
        for (number, page) in model.pages.iter().enumerate() {
            let Some(wanted) = page.leaf else { continue };
            let place = model.place.unwrap_or(PLACES);
            let found = self.leaf(self.base(place).get() + number as u64);
            let pa = GIB + number as u64 * PAGE;
            let same = found.is_some_and(|leaf| {
                (leaf.pa, leaf.write, leaf.young) == (pa, wanted.writable, wanted.young)
            });
            if !same {
                return Err(format!("page {number}: {wanted:?}, but {found:?}"));
            }
            expected += 1;
        }
        let found = self.machine.leaves();
        if found.len() == expected {
            Ok(())
        } else {
            Err(format!("{expected} leaves, but {found:?}"))
        }
    }

    /// What the protocol checker of the tables found wrong.
    pub(crate) fn violations(&self) -> Vec<String> {
        self.machine.finish()
    }
}

impl Drop for PlainWorld<'_> {
    fn drop(&mut self) {
        self.machine.detach();
    }
}
