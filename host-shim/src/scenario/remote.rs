//! A guest by remote control: the scenario says which call it makes and which address it touches.

use abi::{DonationKind, Exit};
use board::PAGE_SIZE;
use vmm::platform::{RAM, UART};

use super::guests::Memory;
use super::kit::{RAM_SLOT, config, load, words};
use crate::arch::{guest, mem};
use crate::vm::Vm;

/// Runs that may end for the host's own interrupts during one command.
const PATIENCE: u32 = 10_000;

const HVC: u64 = 1;
const LOAD: u64 = 2;
const STORE: u64 = 3;

/// Pages that hold the guest's code.
pub(super) const CODE_PAGES: u64 = 2;

/// Why a command was not done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stopped {
    /// The host has to do something first.
    Exit(Exit),
    /// The guest's access gave an abort with this ESR_EL1.
    Abort(u64),
    /// A hypercall failed, or the guest does what it should not.
    Broken(&'static str),
}

impl From<Stopped> for &'static str {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Exit(exit) => {
                crate::console::line(format_args!("  unexpected {exit:?}"));
                "the guest left for another reason"
            }
            Stopped::Abort(esr) => {
                crate::console::line(format_args!("  unexpected abort, ESR {esr:#x}"));
                "the guest took an abort"
            }
            Stopped::Broken(why) => why,
        }
    }
}

/// A VM of one vCPU, ready to run this code at [`RAM`].
pub(super) fn ready(memory: &Memory, code: &[u8], protected: bool) -> Result<Vm, &'static str> {
    load(memory.ram, code)?;
    let vm = words(Vm::create(config(protected), memory.state))?;
    words(vm.create_slot(RAM_SLOT, RAM, memory.ram))?;
    words(vm.create_vcpu(0))?;
    if protected {
        words(vm.donate_memory(RAM, CODE_PAGES, DonationKind::Contents))?;
        words(vm.seal(RAM, 0))?;
    } else {
        words(vm.start_vcpu(0, RAM, 0))?;
    }
    Ok(vm)
}

/// The guest, and how far it is with a command.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) vm: Vm,
    command: [u64; 5],
    given: usize,
    loaded: u64,
    answer: [u64; 3],
    taken: usize,
}

impl Remote {
    /// For a VM that starts with the code at RAM.
    pub(super) const fn new(vm: Vm) -> Self {
        Self {
            vm,
            command: [0; 5],
            given: 0,
            loaded: 0,
            answer: [0; 3],
            taken: 0,
        }
    }

    /// Makes a call with `x0` to `x3`; gives `x0` to `x2`.
    pub(super) fn call(&mut self, id: u32, args: [u64; 3]) -> Result<[u64; 3], Stopped> {
        let [a, b, c] = args;
        self.start([HVC, u64::from(id), a, b, c]);
        self.go_on()
    }

    /// Loads a doubleword.
    pub(super) fn load(&mut self, ipa: u64) -> Result<u64, Stopped> {
        self.start([LOAD, 0, ipa, 0, 0]);
        self.access().map(|[value, ..]| value)
    }

    /// Stores a doubleword.
    pub(super) fn store(&mut self, ipa: u64, value: u64) -> Result<(), Stopped> {
        self.start([STORE, 0, ipa, value, 0]);
        self.access().map(drop)
    }

    /// Goes on with a load or store that stopped.
    pub(super) fn access(&mut self) -> Result<[u64; 3], Stopped> {
        let answer = self.go_on()?;
        match answer[1] {
            0 => Ok(answer),
            esr => Err(Stopped::Abort(esr)),
        }
    }

    /// Powers it off; whoever runs it once more does not make it go on.
    pub(super) fn off(&mut self) -> Result<(), Stopped> {
        self.start([0; 5]);
        match self.go_on() {
            Err(Stopped::Exit(Exit::SystemOff)) => {}
            Err(other) => return Err(other),
            Ok(_) => return Err(Stopped::Broken("the guest goes on")),
        }
        match words(self.vm.run(0, 0, false)) {
            Ok(Exit::VcpuOff) => Ok(()),
            _ => Err(Stopped::Broken("it went on behind SYSTEM_OFF")),
        }
    }

    fn start(&mut self, command: [u64; 5]) {
        self.command = command;
        self.given = 0;
        self.taken = 0;
    }

    /// Runs until the command is done, or the host has to do something.
    pub(super) fn go_on(&mut self) -> Result<[u64; 3], Stopped> {
        for _ in 0..PATIENCE {
            let exit = words(self.vm.run(0, self.loaded, false)).map_err(Stopped::Broken)?;
            match exit {
                Exit::Interrupted => {}
                Exit::MmioRead { ipa: UART, size: 8 } => {
                    self.loaded = self.command.get(self.given).copied().unwrap_or(0);
                    self.given += 1;
                }
                Exit::MmioWrite {
                    ipa,
                    size: 8,
                    value,
                } if ipa == UART + 8 * (1 + self.taken as u64) => {
                    if let Some(place) = self.answer.get_mut(self.taken) {
                        *place = value;
                    }
                    self.taken += 1;
                    if self.taken == self.answer.len() {
                        return Ok(self.answer);
                    }
                }
                other => return Err(Stopped::Exit(other)),
            }
        }
        Err(Stopped::Broken("the guest does not get on"))
    }
}

/// A protected VM of that guest, not sealed: its code is donated as measured contents, nothing else.
pub(super) fn unsealed(memory: &Memory) -> Result<Vm, &'static str> {
    unsealed_expecting(memory, None)
}

/// The same, with a measurement that it must have.
pub(super) fn unsealed_expecting(
    memory: &Memory,
    expected: Option<[u64; 4]>,
) -> Result<Vm, &'static str> {
    unsealed_with(memory, guest::remote(), expected)
}

fn unsealed_with(
    memory: &Memory,
    code: &[u8],
    expected: Option<[u64; 4]>,
) -> Result<Vm, &'static str> {
    let ram = mem::bytes_mut(memory.ram);
    ram.fill(0x77);
    let (place, rest) = ram
        .split_at_mut_checked(code.len())
        .ok_or("the code does not fit")?;
    place.copy_from_slice(code);
    let page = (CODE_PAGES * PAGE_SIZE) as usize - code.len();
    rest.iter_mut().take(page).for_each(|byte| *byte = 0);
    let vm = words(Vm::create(config(true), memory.state))?;
    if let Some(expected) = expected {
        words(vm.expect(expected))?;
    }
    words(vm.create_slot(RAM_SLOT, RAM, memory.ram))?;
    words(vm.create_vcpu(0))?;
    words(vm.donate_memory(RAM, CODE_PAGES, DonationKind::Contents))?;
    Ok(vm)
}

/// The same, with zeros in all other pages, sealed: ready to run.
pub(super) fn protected(memory: &Memory) -> Result<Remote, &'static str> {
    let vm = unsealed(memory)?;
    complete(memory, vm).map(Remote::new)
}

fn complete(memory: &Memory, vm: Vm) -> Result<Vm, &'static str> {
    let rest = memory.ram.size() / PAGE_SIZE - CODE_PAGES;
    words(vm.donate_memory(RAM + CODE_PAGES * PAGE_SIZE, rest, DonationKind::Zeros))?;
    words(vm.seal(RAM, 0))?;
    Ok(vm)
}

/// Any VM of this code at the start of its memory, protected or not: ready to run.
pub(super) fn with_code(memory: &Memory, code: &[u8], protected: bool) -> Result<Vm, &'static str> {
    if protected {
        let vm = unsealed_with(memory, code, None)?;
        return complete(memory, vm);
    }
    load(memory.ram, code)?;
    // The guest reads it past the caches.
    mem::clean_invalidate_to_poc(memory.ram);
    words(memory.vm())
}

/// A guest that is not protected, ready to run.
pub(super) fn plain(memory: &Memory) -> Result<Remote, &'static str> {
    load(memory.ram, guest::remote())?;
    words(memory.vm()).map(Remote::new)
}
