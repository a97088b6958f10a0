//! Two VMs with a device each, at the same addresses: each device reaches its own VM only, and what one
//! VM loses the other keeps. No guest runs: the host drives the devices.

use abi::VmConfig;
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::RAM;

use super::setup::{Setup, faults};
use crate::arch::mem;
use crate::edu::{Direction, Edu, MAX_BYTES};
use crate::scenario::kit::{RAM_SLOT, config, end, expect, words};
use crate::vm::{self, Vm};

/// Bytes of each VM's memory.
const SIZE: u64 = 2 << 20;
/// What each VM's device finds there, and what it writes elsewhere.
const CONTENTS: [u8; 2] = [0xa5, 0x5a];
const BLANK: u8 = 0x77;

struct Neighbour {
    vm: Vm,
    device: Edu,
    backing: AddrRange,
}

pub(super) fn apart(setup: &Setup<'_>) -> Result<(), &'static str> {
    let [Some(first), Some(second)] = [0, 1].map(|n| setup.devices.get(n).copied()) else {
        return Err("it takes two devices");
    };
    let memory = &setup.memory;
    let part = |n| AddrRange::with_size(memory.ram.start() + n * SIZE, SIZE).ok_or("wraps");
    let (a, b) = (part(0)?, part(1)?);
    with_neighbour(memory.state, first, a, |a| {
        with_neighbour(memory.more_state, second, b, |b| both(setup, [a, b]))
    })
}

/// A VM with a device, for as long as `story` takes.
fn with_neighbour(
    state: AddrRange,
    device: Edu,
    backing: AddrRange,
    story: impl FnOnce(&Neighbour) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    let config = VmConfig {
        devices: true,
        ..config(false)
    };
    let function = device.function().requester();
    let vm = words(Vm::create(config, state))?;
    words(vm::take_device(function))?;
    let neighbour = Neighbour {
        vm,
        device,
        backing,
    };
    let result = words(vm.create_slot(RAM_SLOT, RAM, backing))
        .and_then(|()| words(vm.lock_slot(RAM_SLOT.id)))
        .and_then(|()| words(vm.attach_device(function, true)))
        .and_then(|()| story(&neighbour));
    end(vm)?;
    words(vm::give_device(function))?;
    result
}

impl Neighbour {
    /// A page of its memory: 0 is read, the others are written.
    fn page(&self, number: u64) -> Result<AddrRange, &'static str> {
        let start = self.backing.start() + number * PAGE_SIZE;
        AddrRange::with_size(start, PAGE_SIZE).ok_or("wraps")
    }

    fn wrote(&self, number: u64, byte: u8) -> Result<bool, &'static str> {
        let mut bytes = mem::bytes(self.page(number)?).iter();
        Ok(bytes.all(|found| *found == byte))
    }
}

fn both(setup: &Setup<'_>, vms: [&Neighbour; 2]) -> Result<(), &'static str> {
    for (vm, byte) in vms.iter().zip(CONTENTS) {
        mem::bytes_mut(vm.page(0)?).fill(byte);
        mem::bytes_mut(vm.page(1)?).fill(BLANK);
        mem::bytes_mut(vm.page(2)?).fill(BLANK);
    }
    read_and_write(setup, 1)?;
    for (vm, byte) in vms.iter().zip(CONTENTS) {
        expect(vm.wrote(1, byte)?, "a device reached another VM's memory")?;
    }
    let [first, second] = vms;
    let before = [faults(first.device)?.count, faults(second.device)?.count];
    words(first.vm.unlock_slot(RAM_SLOT.id))?;
    words(first.vm.delete_slot(RAM_SLOT.id))?;
    read_and_write(setup, 2)?;
    let after = [faults(first.device)?.count, faults(second.device)?.count];
    expect(
        first.wrote(2, BLANK)?,
        "a device writes what its VM has lost",
    )?;
    expect(after[0] > before[0], "EL2 has no record of it")?;
    expect(
        second.wrote(2, CONTENTS[1])? && after[1] == before[1],
        "the other VM's device is refused, too",
    )
}

/// Both devices read page 0 and write this one, each by two transfers, for a page has twice their
/// bytes.
fn read_and_write(setup: &Setup<'_>, page: u64) -> Result<(), &'static str> {
    let all = |at: u64| core::iter::repeat_n(RAM + at, 2);
    setup.transfers(Direction::FromMemory, all(0), MAX_BYTES)?;
    for half in [0, MAX_BYTES] {
        setup.transfers(Direction::ToMemory, all(page * PAGE_SIZE + half), MAX_BYTES)?;
    }
    Ok(())
}
