//! An unprotected VM over fake tables, driven by the steps of [`super::plain`]: what the host does goes
//! through its registers, as on the board.

use abi::{Call, SlotWord, VmConfig};
use el2::guest_memory::VmMemory;
use el2::machine::VirtualMachine;
use el2::ownership::Ownership;
use el2::testing::{FakeBoard, Ground, NoContents, RAM, page_range};
use el2::vm_error::Refusal;
use el2::vm_table::FIRST_HANDLE;
use memslot::addr::Gfn;
use memslot::fault::{Access, FaultKind, FaultOutcome, Stage2Fault};
use stage2::Ipa;
use stage2::testing::{FakeMachine, RawLeaf};

use super::plain::{PLACES, Plain, Said, Step};

const PAGE: u64 = 4096;
/// The only VM.
const VM: u64 = FIRST_HANDLE;
/// Its slot.
const SLOT: u64 = 0;
/// Pages of the largest step: where nothing is mapped that owes cleaning.
const STEP: u64 = 32 * 512;

/// Memory for so many pages of the slot; EL2's and the VM's state are behind them.
pub(crate) fn ground(pages: usize) -> Ground {
    Ground::new(pages + 2, pages, 1)
}

/// The library's state.
pub(crate) struct PlainWorld<'a> {
    ground: &'a Ground,
    board: FakeBoard<'a, NoContents, 1>,
    pages: u64,
}

/// What an answer says: the value in its first register, or in the second one.
fn said(answer: [u64; 4]) -> Said {
    match answer {
        [value, 0, 0, 0] => abi::from_register(value).map_or_else(Said::No, Said::Value),
        [0, value, 0, 0] => Said::Value(value),
        other => panic!("{other:?}"),
    }
}

/// The slot's word.
fn word(logged: bool) -> u64 {
    let word = SlotWord {
        id: SLOT as u16,
        device: false,
        flags: logged.into(),
    };
    word.bits()
}

impl<'a> PlainWorld<'a> {
    pub(crate) fn new(ground: &'a Ground, ownership: &'a Ownership<'a>, pages: usize) -> Self {
        let world = Self {
            ground,
            board: FakeBoard::new(ground, ownership, NoContents),
            pages: pages as u64,
        };
        assert_eq!(world.ask(Call::VmReserve, []), [VM, 0, 0, 0]);
        let config = VmConfig {
            vcpus: 1,
            protected: false,
            devices: false,
        };
        let state = page_range(pages + 1, 1).start();
        let created = world.ask(Call::VmCreate, [VM, state, 1, config.bits()]);
        assert_eq!(created, [1, 0, 0, 0]);
        world
    }

    /// A call of the host.
    fn ask<const N: usize>(&self, call: Call, args: [u64; N]) -> [u64; 4] {
        let mut registers = [0; 6];
        registers[..N].copy_from_slice(&args);
        self.board.call(call, registers)
    }

    /// The VM's memory, for what the guest does.
    fn with<R>(&self, act: impl FnOnce(&VmMemory<'a, &'a FakeMachine>) -> R) -> R {
        let lent = self.board.vms.with(VM, |vm| Ok(act(&vm.state().memory)));
        lent.expect("nobody ends it")
    }

    fn machine(&self) -> &FakeMachine {
        self.ground.guest(0).expect("it has been created")
    }

    /// The first page of a place: half of the slot lies before a boundary.
    fn base(&self, place: usize) -> Gfn {
        let boundary = STEP * (1 + place as u64);
        Gfn::try_new(boundary - self.pages / 2).expect("small")
    }

    fn address(&self, place: usize) -> u64 {
        self.base(place).get() * PAGE
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
        let fault = Stage2Fault { ipa, access, kind };
        match self.with(|memory| memory.handle_fault(&fault, &())) {
            Ok(FaultOutcome::Resolved) => Said::Value(0),
            Ok(FaultOutcome::NoFrame(_)) => Said::Missing,
            Ok(FaultOutcome::Mmio) => Said::Device,
            Ok(FaultOutcome::Retry) => Said::Waits,
            other => panic!("{other:?}"),
        }
    }

    fn leaf(&self, gfn: u64) -> Option<RawLeaf> {
        let leaves = self.machine().leaves();
        let leaf = leaves.into_iter().find(|(start, ..)| *start == gfn * PAGE);
        leaf.map(|(_, _, leaf)| leaf)
    }

    /// Does a step.
    pub(crate) fn step(&self, what: Step) -> Said {
        said(match what {
            Step::Touch(place, page, writes) => return self.touch(place, page, writes),
            Step::Enter => {
                let entered = self.with(|memory| memory.enter().map(drop));
                return entered.map_or_else(
                    |error| Said::No(Refusal::from(error).code),
                    |()| Said::Value(0),
                );
            }
            Step::Create(place, logged) => {
                let args = [VM, word(logged), self.address(place), self.pages, RAM];
                self.ask(Call::SlotCreate, args)
            }
            Step::Unshare(first, count) => {
                self.ask(Call::SlotUnshare, [VM, SLOT, first as u64, count as u64])
            }
            Step::Share(first, count) => {
                self.ask(Call::SlotShare, [VM, SLOT, first as u64, count as u64])
            }
            Step::Young(first, count, clear) => {
                let args = [VM, SLOT, first as u64, count as u64, clear.into()];
                self.ask(Call::SlotYoung, args)
            }
            Step::Relax(page, writes) => {
                let permissions = if writes { 3 } else { 1 };
                self.ask(Call::SlotRelax, [VM, SLOT, page as u64, permissions])
            }
            Step::Dirty => self.ask(Call::SlotDirty, [VM, SLOT, 0]),
            Step::Delete => self.ask(Call::SlotDelete, [VM, SLOT]),
            Step::Move(place) => self.ask(Call::SlotMove, [VM, SLOT, self.address(place)]),
            Step::Log(on) => self.ask(Call::SlotFlags, [VM, word(on)]),
            Step::Reset => self.ask(Call::VmReset, [VM]),
            Step::Device(comes) => self.ask(Call::DmaDevice, [VM, 0, comes.into()]),
        })
    }

    /// Compares every mapping with the model, by an independent walk.
    pub(crate) fn agrees(&self, model: &Plain) -> Result<(), String> {
        let mut expected = 0;
        for (number, page) in model.pages.iter().enumerate() {
            let Some(wanted) = page.leaf else { continue };
            let place = model.place.unwrap_or(PLACES);
            let found = self.leaf(self.base(place).get() + number as u64);
            let pa = RAM + number as u64 * PAGE;
            let same = found.is_some_and(|leaf| {
                (leaf.pa, leaf.write, leaf.young) == (pa, wanted.writable, wanted.young)
            });
            if !same {
                return Err(format!("page {number}: {wanted:?}, but {found:?}"));
            }
            expected += 1;
        }
        let found = self.machine().leaves();
        if found.len() == expected {
            Ok(())
        } else {
            Err(format!("{expected} leaves, but {found:?}"))
        }
    }

    /// What the protocol checker of the tables found wrong.
    pub(crate) fn violations(&self) -> Vec<String> {
        let machines = self.ground.machines();
        machines.flat_map(FakeMachine::finish).collect()
    }
}
