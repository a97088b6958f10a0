//! Every call about VMs with every argument wrong, and any mixture: each is answered, and what was
//! there before still works.

use abi::{Call, SlotWord, VmConfig};
use board::{AddrRange, Gic, PAGE_SIZE};

use super::guests::{Memory, converse};
use super::kit::{config, end, words};
use crate::arch::gic;
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::{Vm, call};

/// How many mixtures are tried.
const MIXTURES: u32 = 20_000;

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let Some(memory) = Memory::find(machine) else {
        report.check("any_call", Err("there is no free memory"));
        return;
    };
    let Some(gic) = machine.board.gic.as_ref() else {
        report.check("any_call", Err("no interrupt controller that is known"));
        return;
    };
    report.check("every_argument_is_checked", each_argument(machine, &memory));
    report.check("any_mixture_is_answered", mixtures(machine, &memory, gic));
}

/// Values that no argument of an address, a size or a number may have, and some that may.
fn values(machine: &Machine) -> [u64; 16] {
    let el2 = machine.el2.map_or(0, AddrRange::start);
    let device = machine.board.console.map_or(0, |console| console.base);
    [
        0,
        1,
        2,
        7,
        63,
        0x1000,
        0x1001,
        0x10fe,
        0x10ff,
        el2,
        el2 + PAGE_SIZE - 1,
        device,
        1 << 39,
        1 << 47,
        1 << 63,
        u64::MAX,
    ]
}

/// Calls that take a valid handle first.
fn about_a_vm(call: Call) -> bool {
    !matches!(
        call,
        Call::Version
            | Call::Features
            | Call::HostCounter
            | Call::DonateHeap
            | Call::VmReserve
            | Call::MemoryReclaim
    )
}

/// One argument after the other is something that it can't be, on a VM that is complete; then it
/// still runs. What would end the VM, or run it, is left to the mixtures.
fn each_argument(machine: &Machine, memory: &Memory) -> Result<(), &'static str> {
    memory.load()?;
    let vm = words(memory.vm())?;
    let harmless = |call: &&Call| {
        about_a_vm(**call)
            && !matches!(
                **call,
                Call::VmDestroy | Call::VmReset | Call::VcpuRun | Call::VmReclaim
            )
    };
    for id in Call::ALL.iter().filter(harmless) {
        for place in 1..6 {
            for value in [1 << 39, 1 << 63, u64::MAX, el2_of(machine)] {
                let mut args = [vm.handle(), u64::MAX, u64::MAX, u64::MAX, u64::MAX, 0];
                args[place] = value;
                // Refused or not: EL2 has to answer, and the VM to stay what it is.
                let _: Result<[u64; 4], _> = call(*id, args);
            }
        }
        let beyond = [vm.handle(), 0, 0, 0, 0, 1];
        if call(*id, beyond).is_ok() {
            end(vm)?;
            return Err("an argument that no call has was accepted");
        }
    }
    let result = converse(vm);
    end(vm)?;
    result
}

fn el2_of(machine: &Machine) -> u64 {
    machine.el2.map_or(0, AddrRange::start)
}

/// Random calls with random arguments on a VM, now and then with another VM beside it that must not
/// notice.
fn mixtures(machine: &Machine, memory: &Memory, gic: &Gic) -> Result<(), &'static str> {
    gic::enable(gic)?;
    let values = values(machine);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..MIXTURES {
        let id = Call::ALL[random(Call::ALL.len())];
        let mut args = [0; 6];
        for place in &mut args {
            // Mostly zero, or too many arguments would refuse nearly everything.
            *place = values[random(values.len() * 2).min(values.len()) % values.len()];
        }
        if about_a_vm(id) && random(4) != 0 {
            args[0] = 0x1000 + random(3) as u64;
        }
        if matches!(id, Call::VmCreate) && random(2) == 0 {
            let config = VmConfig {
                vcpus: 2,
                ..config(random(2) == 0)
            };
            let (start, pages) = (memory.state.start(), memory.state.size() / PAGE_SIZE);
            args = [args[0], start, pages, config.bits(), 0, 0];
        }
        if matches!(id, Call::SlotCreate) && random(2) == 0 {
            let word = SlotWord {
                id: random(4) as u16,
                device: false,
                flags: [0, 1, 2, 8][random(4)],
            };
            let (start, pages) = (memory.ram.start(), 1 + random(8) as u64);
            args = [
                args[0],
                word.bits(),
                random(3) as u64 * 0x1000,
                pages,
                start,
                0,
            ];
        }
        let on_pages = match id {
            Call::SlotUnshare | Call::SlotShare | Call::SlotRelax => Some(0),
            Call::SlotYoung => Some(random(2) as u64),
            _ => None,
        };
        if let Some(last) = on_pages.filter(|_| random(2) == 0) {
            let [slot, page, count] = [4, 8, 3].map(|below| random(below) as u64);
            args = [args[0], slot, page, 1 + count, last, 0];
        }
        // A guest that starts in nothing never ends: the host's timer ends its run.
        gic::set_timer(gic::now() + 1000);
        let _: Result<[u64; 4], _> = call(id, args);
        while gic::take(gic).is_some() {}
    }
    gic::stop_timer();
    while gic::take(gic).is_some() {}
    clear()?;
    let vm = words(memory.vm())?;
    memory.load()?;
    let result = converse(vm);
    end(vm)?;
    result
}

/// Ends every VM that the mixtures have left.
fn clear() -> Result<(), &'static str> {
    for handle in 0x1000..0x10ff {
        let vm = Vm::from_handle(handle);
        if vm.destroy().is_ok() {
            while words(vm.reclaim())?.is_some() {}
        }
    }
    Ok(())
}
