//! FP and SIMD registers: nothing of the host's reaches a guest, nothing of a guest's the host.

use abi::Exit;

use super::guests::Memory;
use super::kit::{end, expect, words, wrote};
use crate::arch::{fp, guest};
use crate::report::Report;
use crate::vm::Vm;

/// What the host has in its registers, and each one's number.
const HOSTS: u64 = 0x4057_0000_0000_0000;

pub(super) fn run(memory: &Memory, report: &mut Report) {
    let check = |protected| crossed(memory, protected);
    report.check("fp_registers_cross_no_border", check(false));
    report.check("fp_registers_of_a_protected_guest", check(true));
}

fn crossed(memory: &Memory, protected: bool) -> Result<(), &'static str> {
    let vm = super::remote::ready(memory, guest::fp(), protected)?;
    fp::fill(HOSTS);
    let exits = [(); 3].map(|()| next_exit(vm));
    end(vm)?;
    let [first, second, last] = exits;
    expect(
        first.0 == Ok(wrote(0, 0)),
        "a guest finds something in them",
    )?;
    expect(first.1 && second.1, "the host finds something else in them")?;
    expect(second.0 == Ok(wrote(8, 0)), "a guest lost its own")?;
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
