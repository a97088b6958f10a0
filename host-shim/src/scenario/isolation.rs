//! The host against EL2's memory: every access, at several addresses, must give an abort in the
//! host and nothing else.

use abi::Counter;
use board::{AddrRange, PAGE_SIZE};

use crate::arch::fault::{self, Fault};
use crate::arch::mem;
use crate::call;
use crate::machine::Machine;
use crate::report::Report;

/// Exception classes at EL1 for aborts from EL1 (ESR_EL1 bits 31:26).
const INSTRUCTION_ABORT: u64 = 0x21;
const DATA_ABORT: u64 = 0x25;
/// Synchronous external abort, not on a table walk.
const EXTERNAL: u64 = 0x10;

type Access = (&'static str, fn(u64), u64);

const ACCESSES: [Access; 6] = [
    ("el2_memory_cannot_be_read", fault::load, DATA_ABORT),
    ("el2_memory_cannot_be_written", fault::store, DATA_ABORT),
    (
        "el2_memory_cannot_be_executed",
        fault::fetch,
        INSTRUCTION_ABORT,
    ),
    (
        "el2_memory_cannot_be_read_in_pairs",
        fault::load_pair,
        DATA_ABORT,
    ),
    (
        "el2_memory_cannot_be_read_exclusively",
        fault::load_exclusive,
        DATA_ABORT,
    ),
    (
        "el2_memory_cannot_be_zeroed_by_block",
        fault::zero_block,
        DATA_ABORT,
    ),
];

/// Registers that only this core has may look behind stage 2.
fn own_registers() -> Result<(), &'static str> {
    for access in [fault::read_l2ctlr, fault::ram_index, fault::read_dl1data] {
        match fault::expect(access) {
            Some(Fault { class: 0, .. }) => {}
            _ => return Err("one answered"),
        }
    }
    Ok(())
}

pub(super) fn run(machine: &Machine, report: &mut Report) {
    report.check("the_cores_own_registers_are_out_of_reach", own_registers());
    let Some(el2) = machine.el2 else {
        report.check(
            "el2_memory_is_reserved",
            Err("the device tree does not say where it is"),
        );
        return;
    };
    for (name, access, class) in ACCESSES {
        report.check(name, everywhere(el2, access, class));
    }
    report.check(
        "cache_operations_on_el2_memory_do_nothing_else",
        cache_operations(el2),
    );
    report.check(
        "el2_neighbours_belong_to_the_host",
        neighbours(machine, el2),
    );
    report.check(
        "what_only_boot_needed_is_the_hosts_and_zero",
        given_away(machine, el2),
    );
    report.check(
        "el2_answers_after_the_attacks",
        call::hypercall(abi::Call::Version, 0)
            .map(|_| ())
            .map_err(|_| "it does not"),
    );
}

/// Cache maintenance by address aborts like a load, but an emulator without caches may treat it as
/// nothing at all: then there is no abort and no refusal either.
fn cache_operations(el2: AddrRange) -> Result<(), &'static str> {
    for operation in [fault::clean_line, fault::invalidate_instruction_line] {
        for address in targets(el2) {
            let before = call::counter(Counter::FaultsRefused).unwrap_or(0);
            let fault = fault::expect(|| operation(address));
            let refused = call::counter(Counter::FaultsRefused).unwrap_or(0) - before;
            match fault {
                Some(fault) => check(fault, DATA_ABORT, address)?,
                None if refused != 0 => return Err("EL2 refused, but the host got no abort"),
                None => {}
            }
        }
    }
    Ok(())
}

/// First and last word, page boundaries, and places spread over the range.
fn targets(el2: AddrRange) -> impl Iterator<Item = u64> {
    let spread = (1..16).map(move |i| el2.start() + ((el2.size() / 16 * i) & !0xfff) + 8 * i);
    [
        el2.start(),
        el2.start() + 0x1000,
        el2.end() - 8,
        el2.end() - 0x1000,
    ]
    .into_iter()
    .chain(spread)
}

fn everywhere(el2: AddrRange, access: fn(u64), class: u64) -> Result<(), &'static str> {
    for address in targets(el2) {
        let before = call::counter(Counter::FaultsRefused).unwrap_or(0);
        let fault =
            fault::expect(|| access(address)).ok_or("there was no abort, or more than one")?;
        check(fault, class, address)?;
        let after = call::counter(Counter::FaultsRefused).unwrap_or(0);
        if after != before + 1 {
            return Err("EL2 did not count exactly one refusal");
        }
    }
    Ok(())
}

fn check(fault: Fault, class: u64, address: u64) -> Result<(), &'static str> {
    match fault {
        Fault { class: c, .. } if c != class => Err("the abort has another exception class"),
        Fault { status, .. } if status != EXTERNAL => Err("the abort is not an external one"),
        // A fetch or a cache operation may report any address in its line.
        Fault { address: a, .. } if a & !0x3f != address & !0x3f => Err("FAR is another address"),
        _ => Ok(()),
    }
}

/// The pages just below and just above are the host's, if they are RAM.
fn neighbours(machine: &Machine, el2: AddrRange) -> Result<(), &'static str> {
    for address in [el2.start() - 8, el2.end()] {
        let free = machine.board.memory.find(address).is_some();
        if free && fault::expect(|| fault::load(address)).is_some() {
            return Err("a page next to EL2's is not accessible");
        }
    }
    Ok(())
}

/// Below what EL2 keeps was what it needed to boot, this host's own file among it: that is ordinary
/// memory now, and nothing is left of it.
fn given_away(machine: &Machine, el2: AddrRange) -> Result<(), &'static str> {
    let size = mem::file_size().next_multiple_of(PAGE_SIZE);
    let start = el2.start().checked_sub(size);
    let range = start.and_then(|start| AddrRange::with_size(start, size));
    let range = range.ok_or("EL2's memory begins too low for that")?;
    let ram = machine.board.memory.find(range.start());
    if ram.is_none_or(|ram| ram.end() < range.end()) {
        return Err("there is no RAM below EL2's memory");
    }
    if machine.board.reserved.overlapping(range).is_some() {
        return Err("it is still reserved");
    }
    for page in (range.start()..range.end()).step_by(PAGE_SIZE as usize) {
        if fault::expect(|| fault::load(page)).is_some() {
            return Err("a page of it is not accessible");
        }
    }
    match mem::bytes(range).iter().all(|&byte| byte == 0) {
        true => Ok(()),
        false => Err("something is left in it"),
    }
}
