//! The host's event counters: they must tell it nothing of what a protected guest does.

use abi::{DonationKind, Exit, SlotWord, VmConfig};

use super::guests::{Memory, end, expect, words};
use super::remote::{CODE_PAGES, RAM};
use crate::arch::{counters, mem};
use crate::report::Report;
use crate::vm::Vm;

const SLOT: SlotWord = SlotWord {
    id: 0,
    device: false,
    flags: 0,
};

pub(super) fn run(memory: &Memory, report: &mut Report) {
    if counters::exist() {
        report.check(
            "the_hosts_counters_stand_still_for_a_protected_guest",
            check(memory),
        );
    }
}

fn check(memory: &Memory) -> Result<(), &'static str> {
    let open = cycles(memory, false)?;
    let protected = cycles(memory, true)?;
    if open / 4 < protected {
        crate::console::line(format_args!(
            "  {open} cycles of a guest, {protected} of a protected one"
        ));
    }
    expect(
        open / 4 >= protected,
        "the cycles of a protected guest count",
    )
}

/// What the host counts while a guest makes 64 million instructions.
fn cycles(memory: &Memory, protected: bool) -> Result<u64, &'static str> {
    let code = counters::spin();
    mem::bytes_mut(memory.ram)
        .get_mut(..code.len())
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
    counters::start();
    let exit = loop {
        match words(vm.run(0, 0, false)) {
            Ok(Exit::Interrupted) => {}
            other => break other,
        }
    };
    let (cycles, counting) = counters::stop();
    end(vm)?;
    expect(exit == Ok(Exit::SystemOff), "it does not end")?;
    expect(counting, "the host's counters do not go on")?;
    Ok(cycles)
}
