//! What a guest's way to the host and back costs, and a fault of one page, for `make bench-target`:
//! `bench NAME VALUE`, as in [`super::lock_cost`]. Not a part of `all`.

use board::{AddrRange, PAGE_SIZE};

use super::kit::{end, words};
use super::payload::{Event, Guest, Memory, RAM_SIZE, instructions};
use crate::arch::gic;
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;

/// How often the guest comes.
const ROUNDS: u64 = 1024;
/// RAM of the VM whose pages are mapped one by one.
const PAGED: u64 = RAM_SIZE - (2 << 20);

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let Some(memory) = Memory::find(machine) else {
        return report.check("switch-cost", Err("there is no free memory"));
    };
    report.check("to_the_host_and_back", switches(&memory));
    report.check("faults_of_single_pages", faults(&memory));
}

/// A guest that reads a device in a loop, and a host that answers at once.
fn switches(memory: &Memory) -> Result<(), &'static str> {
    let mut guest = Guest::create(memory, "run=ask")?;
    let result = measured(&mut guest);
    end(guest.vm)?;
    let ticks = result?;
    line(format_args!(
        "bench switch {}",
        (instructions(ticks) + ROUNDS / 2) / ROUNDS
    ));
    Ok(())
}

fn measured(guest: &mut Guest) -> Result<u64, &'static str> {
    // The guest has started, and asks for the first time.
    asks(guest.go_on(1)?)?;
    let before = gic::now();
    for _ in 0..ROUNDS {
        words(guest.vm.run(0, 1, false))?;
    }
    let ticks = gic::now() - before;
    match guest.go_on(0)? {
        Event::Off(_) => Ok(ticks),
        Event::Asks => Err("the guest does not end"),
    }
}

fn asks(event: Event) -> Result<(), &'static str> {
    match event {
        Event::Asks => Ok(()),
        Event::Off(_) => Err("the guest has not asked"),
    }
}

/// RAM that starts a page behind a block's boundary can only be mapped by pages.
fn faults(memory: &Memory) -> Result<(), &'static str> {
    let ram = AddrRange::with_size(memory.ram.start() + PAGE_SIZE, PAGED).ok_or("wraps")?;
    let mut guest = Guest::create_in(memory, ram, "run=bench only=page-fault rounds=1024")?;
    let event = guest.go_on(0);
    end(guest.vm)?;
    match event? {
        Event::Off(_) => Ok(()),
        Event::Asks => Err("the guest asked"),
    }
}
