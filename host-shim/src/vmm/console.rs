//! The one console of all VMs: labelled output, input to one of them, the prompt.
//!
//! With one VM its output goes through unchanged. With several, lines are collected and shown
//! whole behind `[vmN]`; what a VM has not ended by a line break is shown when another one's line
//! comes, or when its line is full.

use core::fmt;

use abi::{Counter, ErrorCode, VmCounter};
use board::PAGE_SIZE;
use vmm::keys::{Command, Key, Keys};

use super::Vmm;
use super::guest::{Guest, RAM_SLOT, State};
use crate::arch::fault;
use crate::call;
use crate::console::{labelled, line, read_byte, text, write_byte};

/// Most VMs whose output is collected.
const VMS: usize = 16;
/// Pages that one call asks about.
const YOUNG_PAGES: u64 = 512;
/// Longest line that is collected.
const LINE: usize = 160;

/// The console.
#[derive(Debug)]
pub(super) struct Console {
    labelled: bool,
    lines: [Collected; VMS],
    keys: Keys,
    /// Number of the VM that gets the input.
    input: u8,
}

#[derive(Clone, Copy, Debug)]
struct Collected {
    bytes: [u8; LINE],
    length: usize,
}

impl Console {
    pub(super) const fn new(labelled: bool) -> Self {
        Self {
            labelled,
            lines: [Collected {
                bytes: [0; LINE],
                length: 0,
            }; VMS],
            keys: Keys::new(),
            input: 1,
        }
    }

    /// A byte of a VM's output.
    pub(super) fn output(&mut self, number: u8, byte: u8) {
        if !self.labelled {
            write_byte(byte);
            return;
        }
        let Some(place) = self.lines.get_mut(usize::from(number)) else {
            return;
        };
        if byte == b'\r' {
            return;
        }
        if byte != b'\n'
            && let Some(free) = place.bytes.get_mut(place.length)
        {
            *free = byte;
            place.length += 1;
        }
        if byte == b'\n' || place.length == LINE {
            place.show(number);
        }
    }

    /// Shows what a VM that waits for input has not ended: its prompt.
    pub(super) fn flush(&mut self, number: u8) {
        if let Some(place) = self.lines.get_mut(usize::from(number))
            && place.length > 0
        {
            place.show(number);
        }
    }
}

impl Collected {
    fn show(&mut self, number: u8) {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        labelled(format_args!("[vm{number}] "), bytes);
        self.length = 0;
    }
}

/// Looks at the keyboard.
pub(super) fn poll(vmm: &Vmm) {
    while let Some(byte) = read_byte() {
        let (key, input) = {
            let mut console = vmm.console.lock();
            let key = console.keys.press(byte);
            if let Key::Switch(number) = key {
                console.input = number;
            }
            (key, console.input)
        };
        handle(vmm, key, input);
    }
}

fn handle(vmm: &Vmm, key: Key, input: u8) {
    match key {
        Key::None => {}
        Key::Guest(byte) => {
            if let Some(guest) = find(vmm, input)
                && !guest.is_gone()
            {
                vmm.console.lock().flush(input);
                let mut devices = guest.devices.lock();
                devices.type_key(guest.vm(), byte);
                if devices.has_work() {
                    super::sched::work(vmm, guest, &mut devices);
                }
            }
        }
        Key::Switch(number) => line(format_args!("\nhost: input goes to VM {number}")),
        Key::OpenPrompt => text(format_args!("\nravelin> ")),
        Key::Echo(byte) => write_byte(byte),
        Key::Rubout => text(format_args!("\x08 \x08")),
        Key::Line => {
            let command = Command::parse(vmm.console.lock().keys.line());
            line(format_args!(""));
            execute(vmm, command);
        }
    }
}

fn find(vmm: &Vmm, number: u8) -> Option<&Guest> {
    vmm.guests.iter().find(|guest| guest.number == number)
}

fn execute(vmm: &Vmm, command: Command) {
    let with = |number: u8, act: &dyn Fn(&Guest)| match find(vmm, number) {
        Some(guest) => act(guest),
        None => line(format_args!("there is no VM {number}: try vm list")),
    };
    match command {
        Command::Help => line(format_args!("{}", Command::HELP)),
        Command::Unknown => line(format_args!("unknown: try help")),
        Command::List => vmm.guests.iter().for_each(list),
        Command::Stat(n) => with(n, &stat),
        Command::Map(n) => with(n, &map),
        Command::Young(n) => with(n, &young),
        Command::Scan(n) => with(n, &scan),
        Command::Pause(n) => with(n, &|g| change(g, State::Running, State::Paused)),
        Command::Resume(n) => with(n, &|g| change(g, State::Paused, State::Running)),
        Command::Reset(n) => with(n, &|g| change(g, State::Running, State::Resetting)),
        Command::Stop(n) => with(n, &Guest::stop),
    }
}

fn change(guest: &Guest, from: State, to: State) {
    let number = guest.number;
    if guest.change(from, to) {
        line(format_args!("VM {number} is {} now", to.name()));
    } else {
        let state = guest.state().name();
        line(format_args!("VM {number} is {state}, and stays so"));
    }
}

fn list(guest: &Guest) {
    line(format_args!(
        "VM {}  {:<11} {} vCPU(s)  {} MiB  {}  {}",
        guest.number,
        guest.state().name(),
        guest.vcpus.len(),
        guest.config.memory >> 20,
        if guest.config.lock {
            "locked"
        } else {
            "on demand"
        },
        guest.config.name
    ));
}

fn stat(guest: &Guest) {
    guest.report_functions();
    for (counter, name) in VmCounter::ALL {
        match guest.vm().counter(counter) {
            Ok(value) => line(format_args!("{name:>26} {value}")),
            Err(refused) => {
                line(format_args!("{}", super::guest::reason(refused)));
                return;
            }
        }
    }
}

/// How much of its memory a guest has used since this was last asked: its working set.
fn young(guest: &Guest) {
    let pages = guest.ram.size() / PAGE_SIZE;
    let mut used = 0;
    for first in (0..pages).step_by(YOUNG_PAGES as usize) {
        let count = YOUNG_PAGES.min(pages - first);
        match guest.vm().young(RAM_SLOT, first, count, true) {
            Ok(young) => used += young,
            Err(refused) if refused.code == ErrorCode::Busy => {
                let number = guest.number;
                return line(format_args!("VM {number} is locked: its pages don't age"));
            }
            Err(refused) => return line(format_args!("{}", super::guest::reason(refused))),
        }
    }
    line(format_args!(
        "VM {}: used {used} of {pages} pages since this was last asked",
        guest.number
    ));
}

/// Of the pages that can't be read, one in so many is written and executed, too.
const SAMPLE: u64 = 61;

/// Tries to read every page of a guest's memory, and a sample of what is refused in other ways; says how many
/// accesses were refused, and how many EL2 has counted meanwhile, which only the host causes.
fn scan(guest: &Guest) {
    let counted = || call::counter(Counter::FaultsRefused).unwrap_or(0);
    let before = counted();
    let (mut readable, mut reads, mut writes, mut fetches, mut reached) = (0, 0, 0, 0, 0);
    for page in (guest.ram.start()..guest.ram.end()).step_by(PAGE_SIZE as usize) {
        if fault::try_load(page).is_ok() {
            readable += 1;
            continue;
        }
        reads += 1;
        if reads % SAMPLE == 0 {
            let stored = fault::try_store(page + 0x7f8, 0).is_ok();
            let fetched = fault::try_fetch(page).is_ok();
            writes += u64::from(!stored);
            fetches += u64::from(!fetched);
            reached += u64::from(stored) + u64::from(fetched);
        }
    }
    let (number, counted) = (guest.number, counted() - before);
    line(format_args!(
        "VM {number}: refused {reads} reads, {writes} writes, {fetches} fetches, {reached} not; EL2 counted {counted}"
    ));
    let all = guest.ram.size() / PAGE_SIZE;
    line(format_args!(
        "VM {number}: the host can read {readable} of {all} pages"
    ));
}

/// Permissions as letters.
struct Letters(u8);

impl fmt::Display for Letters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [(0, 'r'), (1, 'w'), (2, 'x'), (3, 'u')] {
            let shown = if self.0 & 1 << bit == 0 { '-' } else { letter };
            write!(f, "{shown}")?;
        }
        Ok(())
    }
}

fn map(guest: &Guest) {
    let mut ipa = 0;
    let mut lines = 0;
    while let Ok((start, pa, leaf)) = guest.vm().mapping(ipa) {
        let size = leaf.pages << 12;
        line(format_args!(
            "{start:#012x}..{:#012x} -> {pa:#012x} level {} {} MemAttr {:#x}",
            start + size,
            leaf.level,
            Letters(leaf.permissions),
            leaf.mem_attr
        ));
        ipa = start + size;
        lines += 1;
        if lines == 200 {
            line(format_args!("... and more"));
            return;
        }
    }
}
