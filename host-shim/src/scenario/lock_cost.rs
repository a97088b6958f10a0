//! What locking costs, for `make bench-target`: `bench NAME VALUE`, in ticks of the counter, which
//! under QEMU's `-icount shift=0` are instructions at 1 GHz. Not a part of `all`.

use abi::{SlotWord, VmConfig};
use board::{AddrRange, PAGE_SIZE, Placement, highest_free};

use super::guests::{end, words};
use crate::arch::gic;
use crate::arch::ticks_per_second;
use crate::console::line;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::Vm;

/// The guest's memory.
const RAM: u64 = 1 << 30;
/// Donated: enough for a table for each 2 MiB.
const STATE: u64 = 2 << 20;
/// Instructions per second under `-icount shift=0`.
const SECOND: u64 = 1_000_000_000;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    report.check("lock_by_blocks", measure(machine, true));
    report.check("lock_by_pages", measure(machine, false));
}

fn measure(machine: &Machine, blocks: bool) -> Result<(), &'static str> {
    let want = Placement {
        size: RAM + 2 * STATE,
        align: 2 << 20,
        limit: 1 << 40,
    };
    let range = highest_free(&machine.board.memory, &machine.board.reserved, want)
        .ok_or("it takes 1 GiB of free memory in one piece")?;
    let part = |at: u64, size: u64| AddrRange::with_size(range.start() + at, size).ok_or("wraps");
    let (ram, state) = (part(0, RAM)?, part(RAM, STATE)?);
    let config = VmConfig {
        vcpus: 1,
        protected: false,
    };
    let vm = words(Vm::create(config, state))?;
    let result = lock(vm, ram, blocks);
    end(vm)?;
    result
}

fn lock(vm: Vm, ram: AddrRange, blocks: bool) -> Result<(), &'static str> {
    let word = SlotWord {
        id: 0,
        device: false,
        flags: 0,
    };
    words(vm.create_slot(word, 0x4000_0000, ram))?;
    if !blocks {
        let more = AddrRange::with_size(ram.end() + STATE, STATE).ok_or("wraps")?;
        words(vm.top_up(more))?;
    }
    let before = gic::now();
    let locked = vm.lock_slot_as(0, blocks);
    let ticks = gic::now() - before;
    words(locked)?;
    let instructions = ticks * (SECOND / ticks_per_second());
    if blocks {
        line(format_args!("bench lock-1gib-blocks {instructions}"));
    } else {
        let pages = RAM / PAGE_SIZE;
        line(format_args!("bench lock-page {}", instructions / pages));
    }
    words(vm.unlock_slot(0))
}
