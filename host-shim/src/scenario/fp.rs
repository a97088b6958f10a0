//! FP and SIMD registers: nothing of the host's reaches a guest, nothing of a guest's the host.

use abi::{DonationKind, Exit, SlotWord, VmConfig};

use super::guests::{Memory, end, expect, words};
use super::remote::{CODE_PAGES, RAM};
use crate::arch::{fp, guest, mem};
use crate::report::Report;
use crate::vm::Vm;

const UART: u64 = 0x0900_0000;
/// What the host has in its registers, and each one's number.
const HOSTS: u64 = 0x4057_0000_0000_0000;
const SLOT: SlotWord = SlotWord {
    id: 0,
    device: false,
    flags: 0,
};

pub(super) fn run(memory: &Memory, report: &mut Report) {
    let check = |protected| crossed(memory, protected);
    report.check("fp_registers_cross_no_border", check(false));
    report.check("fp_registers_of_a_protected_guest", check(true));
}

fn crossed(memory: &Memory, protected: bool) -> Result<(), &'static str> {
    let code = guest::fp();
    let ram = mem::bytes_mut(memory.ram);
    ram.get_mut(..code.len())
        .ok_or("the code does not fit")?
        .copy_from_slice(code);
    let config = VmConfig {
        vcpus: 1,
        protected,
        devices: false,
    };
    let vm = words(Vm::create(config, memory.state))?;
    words(vm.create_slot(SLOT, RAM, memory.ram))?;
    words(vm.create_vcpu(0))?;
    if protected {
        words(vm.donate_memory(RAM, CODE_PAGES, DonationKind::Contents))?;
        words(vm.seal(RAM, 0))?;
    } else {
        words(vm.start_vcpu(0, RAM, 0))?;
    }
    fp::fill(HOSTS);
    let exits = [(); 3].map(|()| next_exit(vm));
    end(vm)?;
    let wrote = |at| {
        Ok(Exit::MmioWrite {
            ipa: UART + at,
            size: 8,
            value: 0,
        })
    };
    let [first, second, last] = exits;
    expect(first.0 == wrote(0), "a guest finds something in them")?;
    expect(first.1 && second.1, "the host finds something else in them")?;
    expect(second.0 == wrote(8), "a guest lost its own")?;
    expect(last.0 == Ok(Exit::SystemOff), "it does not go on")
}

/// The guest's next exit, and whether the host's registers are as before.
fn next_exit(vm: Vm) -> (Result<Exit, &'static str>, bool) {
    loop {
        let exit = words(vm.run(0, 0, false));
        if exit != Ok(Exit::Interrupted) {
            return (exit, fp::is_kept(HOSTS));
        }
    }
}
