//! What a core of the storm does with a handle, a VM and pages that no other core touches, while the others
//! do what they like with theirs: here each answer is determined by what the core itself did before, so it is
//! compared, the code, too.

use abi::{Call, DonationKind, ErrorCode, Exit};
use board::{Gic, PAGE_SIZE};
use vmm::platform::RAM;

use super::kit::{RAM_SLOT, config};
use super::remote::CODE_PAGES;
use crate::arch::{fault, gic, guest};
use crate::vm::{Vm, call};

/// Pages of one core: for the VM's state, then for its guest.
pub(super) const PAGES: u64 = STATE_PAGES + RAM_PAGES;
const STATE_PAGES: u64 = 22;
const RAM_PAGES: u64 = 8;
/// A word that the guest stores; nobody else may ever see it.
const SECRET: u64 = 0x5ec2_e7de;
/// Repetitions of a call that another core's calls hold up, and runs of a guest.
const PATIENCE: u32 = 100_000;

/// How a turn went.
pub(super) enum Turn {
    /// To its end, with the answers that it must have.
    Done,
    /// There was no handle, or EL2 had no heap.
    CutShort,
    /// The step with this number, from 1, had this answer: an error code as in a register, or 0.
    Wrong(u64, u64),
}

/// Why a turn ends before its end.
enum Stop {
    NoHeap,
    Wrong(u64),
}

/// What a call answers.
type Answer = Result<(), ErrorCode>;

struct Script<'a> {
    gic: &'a Gic,
    handle: u64,
    state: u64,
    ram: u64,
    /// Whether the guest waits for a command.
    asked: bool,
    /// Whether the handle is free again.
    gone: bool,
    step: u64,
}

/// All of it: a VM's life. `pages` is this core's memory; the handles below `beyond` others attack.
pub(super) fn turn(gic: &Gic, pages: u64, beyond: u64) -> Turn {
    let Some(handle) = reserve(beyond) else {
        return Turn::CutShort;
    };
    let mut script = Script {
        gic,
        handle,
        state: pages,
        ram: pages + STATE_PAGES * PAGE_SIZE,
        asked: false,
        gone: false,
        step: 0,
    };
    let lived = script.live();
    if lived.is_err() && !script.gone {
        // Whatever it is: a later turn starts from nothing.
        let vm = Vm::from_handle(handle);
        for _ in 0..PATIENCE {
            if vm.destroy().is_ok() && matches!(vm.reclaim(), Ok(None)) {
                break;
            }
        }
    }
    match lived {
        Ok(()) => Turn::Done,
        Err(Stop::NoHeap) => Turn::CutShort,
        Err(Stop::Wrong(answer)) => Turn::Wrong(script.step, answer),
    }
}

/// A handle that no other core guesses.
fn reserve(beyond: u64) -> Option<u64> {
    (0..8).find_map(|_| {
        let vm = Vm::reserve().ok()?;
        (vm.handle() >= beyond).then_some(vm.handle())
    })
}

impl Script<'_> {
    /// Makes a call, again while others hold it up; it must answer this.
    fn must(&mut self, id: Call, args: [u64; 5], expected: Answer) -> Result<(), Stop> {
        self.step += 1;
        let [a, b, c, d, e] = args;
        let mut answer = Err(ErrorCode::Busy);
        for _ in 0..PATIENCE {
            answer = call(id, [a, b, c, d, e, 0]).map(drop).map_err(|r| r.code);
            if !matches!(answer, Err(ErrorCode::Busy | ErrorCode::Again)) {
                break;
            }
        }
        self.judge(answer, expected)
    }

    fn judge(&self, answer: Answer, expected: Answer) -> Result<(), Stop> {
        match answer {
            _ if answer == expected => Ok(()),
            Err(ErrorCode::NoHeap) => Err(Stop::NoHeap),
            Err(code) => Err(Stop::Wrong(code.to_register())),
            Ok(()) => Err(Stop::Wrong(0)),
        }
    }

    /// The call about this VM, with these arguments behind the handle.
    fn vm(&mut self, id: Call, [a, b, c, d]: [u64; 4], expected: Answer) -> Result<(), Stop> {
        self.must(id, [self.handle, a, b, c, d], expected)
    }

    /// The host's load from a page of its guest, or of the VM's state: what it finds, if anything.
    fn found(&mut self, page: u64, expected: Option<u64>) -> Result<(), Stop> {
        self.step += 1;
        let found = fault::try_load(page).ok();
        match found == expected {
            true => Ok(()),
            false => Err(Stop::Wrong(found.unwrap_or(1))),
        }
    }

    fn live(&mut self) -> Result<(), Stop> {
        self.load_guest();
        self.before_it_is()?;
        self.build()?;
        self.seal()?;
        self.guests_own_calls()?;
        self.take_a_page()?;
        self.end()
    }

    fn load_guest(&self) {
        for (place, bytes) in (self.ram..).step_by(8).zip(guest::storm().chunks(8)) {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = *from;
            }
            let _ = fault::try_store(place, u64::from_ne_bytes(word));
        }
    }

    fn before_it_is(&mut self) -> Result<(), Stop> {
        let none = Err(ErrorCode::NotFound);
        self.vm(Call::VcpuRun, [0; 4], none)?;
        self.vm(Call::VmSeal, [RAM, 0, 0, 0], none)?;
        self.vm(Call::MemoryDonate, [RAM, 1, 0, 0], none)?;
        let create = [self.state, STATE_PAGES, config(true).bits(), 0];
        self.vm(Call::VmCreate, create, Ok(()))?;
        self.vm(Call::VmCreate, create, Err(ErrorCode::Exists))?;
        self.vm(Call::VmReclaim, [0; 4], Err(ErrorCode::Invalid))
    }

    fn build(&mut self) -> Result<(), Stop> {
        let (ram, refused) = (self.ram, Err(ErrorCode::NotPermitted));
        let slot = [RAM_SLOT.bits(), RAM, RAM_PAGES, ram];
        self.vm(Call::SlotCreate, slot, Ok(()))?;
        self.vm(Call::SlotCreate, slot, refused)?;
        self.vm(Call::VcpuCreate, [0; 4], Ok(()))?;
        self.vm(Call::VcpuCreate, [0; 4], Err(ErrorCode::Exists))?;
        self.vm(Call::VcpuCreate, [1, 0, 0, 0], Err(ErrorCode::Invalid))?;
        self.vm(Call::VcpuStart, [0, RAM, 0, 0], refused)?;
        self.vm(Call::VcpuRun, [0; 4], refused)?;
        self.found(self.state, None)?;
        let contents = DonationKind::Contents as u64;
        let code = [RAM, CODE_PAGES, contents, 0];
        self.vm(Call::MemoryDonate, code, Ok(()))?;
        self.vm(Call::MemoryDonate, code, refused)?;
        let (zeros, rest) = (RAM + CODE_PAGES * PAGE_SIZE, RAM_PAGES - CODE_PAGES);
        let behind = [zeros, rest + 1, 0, 0];
        self.vm(Call::MemoryDonate, behind, Err(ErrorCode::NotFound))?;
        self.vm(Call::MemoryDonate, [zeros, rest - 1, 0, 0], Ok(()))?;
        self.found(ram, None)?;
        self.vm(Call::VmTopUp, [ram, 1, 0, 0], refused)?;
        self.must(Call::DonateHeap, [ram, 1, 0, 0, 0], refused)
    }

    fn seal(&mut self) -> Result<(), Stop> {
        let refused = Err(ErrorCode::NotPermitted);
        self.vm(Call::VmSeal, [RAM, 0, 0, 0], Ok(()))?;
        self.vm(Call::VmSeal, [RAM, 0, 0, 0], refused)?;
        self.vm(Call::VmMapping, [RAM, 0, 0, 0], refused)?;
        self.vm(Call::VmReset, [0; 4], refused)?;
        self.vm(Call::SlotDelete, [0; 4], refused)?;
        self.vm(Call::VcpuStart, [0, RAM, 0, 0], refused)?;
        let last = RAM + (RAM_PAGES - 1) * PAGE_SIZE;
        let contents = DonationKind::Contents as u64;
        self.vm(Call::MemoryDonate, [last, 1, contents, 0], refused)?;
        self.vm(Call::MemoryDonate, [last, 1, 0, 0], Ok(()))?;
        self.found(self.ram + (last - RAM), None)
    }

    /// The guest stores a secret, shares its page, ends that, and gives the page away.
    fn guests_own_calls(&mut self) -> Result<(), Stop> {
        const PAGE: u64 = 4;
        let (page, command) = (self.ram + PAGE * PAGE_SIZE, PAGE << 8);
        gic::stop_timer();
        let secret = SECRET << 32 | command;
        self.tell(secret, None)?;
        self.found(page, None)?;
        self.tell(command | 1, Some(0))?;
        self.found(page, Some(secret))?;
        self.tell(command | 2, Some(0))?;
        self.found(page, None)?;
        self.tell(command | 3, Some(0))?;
        self.found(page, Some(0))
    }

    /// Lets the guest do one thing, which has this answer if it is a call.
    fn tell(&mut self, command: u64, answer: Option<u64>) -> Result<(), Stop> {
        self.step += 1;
        let mut given = self.asked.then_some(command);
        self.asked = false;
        for _ in 0..PATIENCE {
            while gic::take(self.gic).is_some() {}
            let vm = Vm::from_handle(self.handle);
            let exit = match vm.run(0, given.unwrap_or(0), false) {
                Err(refused) if matches!(refused.code, ErrorCode::Busy | ErrorCode::Again) => {
                    continue;
                }
                Err(refused) => return self.judge(Err(refused.code), Ok(())),
                Ok(exit) => exit,
            };
            match exit {
                Exit::Interrupted => {}
                Exit::MmioRead { .. } if given.is_none() => given = Some(command),
                Exit::MmioRead { .. } if answer.is_none() => {
                    self.asked = true;
                    return Ok(());
                }
                Exit::MmioWrite { value, .. } if Some(value) == answer => return Ok(()),
                Exit::NeedPages { .. } => return Err(Stop::NoHeap),
                other => return Err(Stop::Wrong(other.to_registers()[0] << 32)),
            }
        }
        Err(Stop::Wrong(2))
    }

    /// The host takes a page back: the guest has lost it, and nothing else changes.
    fn take_a_page(&mut self) -> Result<(), Stop> {
        let (taken, kept) = (self.ram + 5 * PAGE_SIZE, self.ram + 6 * PAGE_SIZE);
        let none = Err(ErrorCode::NotFound);
        self.must(Call::MemoryReclaim, [taken, 0, 0, 0, 0], Ok(()))?;
        self.must(Call::MemoryReclaim, [taken, 0, 0, 0, 0], none)?;
        self.must(Call::MemoryReclaim, [self.state, 0, 0, 0, 0], none)?;
        self.found(taken, Some(0))?;
        self.found(kept, None)?;
        let again = [RAM + 5 * PAGE_SIZE, 1, 0, 0];
        self.vm(Call::MemoryDonate, again, Err(ErrorCode::NotPermitted))?;
        self.vm(Call::VmReclaim, [0; 4], Err(ErrorCode::Invalid))
    }

    /// It ends; its memory comes back, wiped, and not before it is asked for.
    fn end(&mut self) -> Result<(), Stop> {
        let none = Err(ErrorCode::NotFound);
        let kept = self.ram + 6 * PAGE_SIZE;
        self.vm(Call::VmDestroy, [0; 4], Ok(()))?;
        self.vm(Call::VcpuRun, [0; 4], none)?;
        self.vm(Call::MemoryDonate, [RAM, 1, 0, 0], none)?;
        self.must(Call::MemoryReclaim, [kept, 0, 0, 0, 0], none)?;
        self.found(kept, None)?;
        self.found(self.state, None)?;
        self.step += 1;
        loop {
            match Vm::from_handle(self.handle).reclaim() {
                Ok(None) => break,
                Ok(Some(_)) => {}
                Err(refused) if refused.code == ErrorCode::Busy => {}
                Err(refused) => return self.judge(Err(refused.code), Ok(())),
            }
        }
        self.gone = true;
        for page in (self.state..).step_by(4096).take(PAGES as usize) {
            self.found(page, Some(0))?;
            self.found(page + PAGE_SIZE - 8, Some(0))?;
        }
        Ok(())
    }
}
