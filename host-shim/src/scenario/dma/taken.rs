//! Functions that the host has given away: their DMA goes nowhere, until they are back.

use abi::{Call, ErrorCode, Features, VmConfig};
use board::AddrRange;
use vmm::pci::Function;
use vmm::platform::RAM;

use super::setup::Setup;
use crate::arch::mem;
use crate::edu::{Direction, MAX_BYTES};
use crate::scenario::kit::{RAM_SLOT, code, config, end, expect, words};
use crate::scenario::remote;
use crate::vm::{self, Vm};

const CANARY: u8 = 0xc3;
const BLANK: u8 = 0x77;

fn uniform(page: AddrRange, byte: u8) -> bool {
    let moved = mem::bytes(page).iter().take(MAX_BYTES as usize);
    moved.copied().all(|found| found == byte)
}

/// DMA of a function that is taken aborts; when it is given back, it works again.
pub(super) fn aborts(setup: &Setup<'_>) -> Result<(), &'static str> {
    let device = setup.devices[0];
    let function = device.function().requester();
    let [from, to] = [setup.filled(0, CANARY)?, setup.filled(1, BLANK)?];
    let move_to = |direction, page: AddrRange| {
        setup.transfers(direction, [page.start()].into_iter(), MAX_BYTES)
    };
    move_to(Direction::FromMemory, from)?;
    words(vm::take_device(function))?;
    let result = move_to(Direction::ToMemory, to)
        .and_then(|()| expect(uniform(to, BLANK), "a taken device wrote memory"))
        .and_then(|()| {
            mem::bytes_mut(from).fill(0x5a);
            move_to(Direction::FromMemory, from)
        });
    words(vm::give_device(function))?;
    result?;
    move_to(Direction::ToMemory, to)?;
    expect(!uniform(to, 0x5a), "a taken device read memory")?;
    expect(!uniform(to, BLANK), "a device that is back does not write")?;
    move_to(Direction::FromMemory, from)?;
    move_to(Direction::ToMemory, to)?;
    expect(uniform(to, 0x5a), "a device that is back does not read")
}

/// What is refused, and with which error.
pub(super) fn refusals(setup: &Setup<'_>) -> Result<(), &'static str> {
    let function = setup.devices[0].function().requester();
    let config = VmConfig {
        devices: true,
        ..config(false)
    };
    let vm = words(Vm::create(config, setup.guest.state))?;
    let result = of_a_vm(setup, vm, function);
    let still = code(vm::give_device(function));
    // The VM's end takes the device from it, not from who took it.
    end(vm)?;
    result?;
    expect(
        still == Some(ErrorCode::NotPermitted),
        "a VM's device was given to the host",
    )?;
    words(vm::give_device(function))?;
    of_a_protected_vm(setup, function)?;
    if setup.machine.has(Features::FORCE_WRITE_BACK) {
        return of_a_forced_vm(setup, function);
    }
    Ok(())
}

/// Arguments that no call can have.
fn absurd(vm: Vm) -> Result<(), &'static str> {
    let handle = vm.handle();
    let calls = [
        (Call::DeviceTake, [1 << 16, 0, 0]),
        (Call::DeviceGive, [1 << 16, 0, 0]),
        (Call::DeviceFaults, [1 << 32, 0, 0]),
        (Call::DeviceAttach, [handle, 1 << 16, 0]),
        (Call::DeviceAttach, [handle, 8, 2]),
        (Call::DeviceDetach, [handle, u64::MAX, 0]),
        (Call::DeviceTake, [8, 1, 0]),
    ];
    for (call, [a, b, c]) in calls {
        let answer = vm::call(call, [a, b, c, 0, 0, 0]);
        if answer.is_ok() {
            crate::console::line(format_args!("  {call:?} {a:#x} {b:#x} {c:#x}"));
            return Err("an absurd call was answered");
        }
    }
    Ok(())
}

/// The IOMMU of the emulator knows no forced write-back: it can't walk tables that rely on it.
fn of_a_forced_vm(setup: &Setup<'_>, function: u16) -> Result<(), &'static str> {
    let vm = words(Vm::create(config(false), setup.guest.state))?;
    words(vm::take_device(function))?;
    let attached = words(vm.create_slot(RAM_SLOT, RAM, setup.guest.ram))
        .and_then(|()| words(vm.lock_slot(RAM_SLOT.id)))
        .map(|()| code(vm.attach_device(function, true)));
    end(vm)?;
    words(vm::give_device(function))?;
    expect(
        attached? == Some(ErrorCode::Mismatch),
        "a device was attached to tables that its IOMMU can't walk",
    )
}

fn of_a_vm(setup: &Setup<'_>, vm: Vm, function: u16) -> Result<(), &'static str> {
    let not_permitted = Some(ErrorCode::NotPermitted);
    let hosts = [
        code(vm::give_device(function)),
        code(vm.attach_device(function, true)),
        code(vm.detach_device(function)),
    ];
    words(vm::take_device(function))?;
    let twice = code(vm::take_device(function));
    let unlocked = code(vm.attach_device(function, true));
    words(vm.create_slot(RAM_SLOT, RAM, setup.guest.ram))?;
    words(vm.lock_slot(RAM_SLOT.id))?;
    let unattached = code(vm.detach_device(function));
    let nobody = code(Vm::from_handle(0xffff).attach_device(function, true));
    words(vm.attach_device(function, true))?;
    let attached_twice = code(vm.attach_device(function, true));
    let uncounted = code(vm.forget_snooped_device());
    let pinned = [
        code(vm.top_up(setup.guest.ram)),
        code(vm.delete_slot(RAM_SLOT.id)),
    ];
    let taken = code(vm::take_device(function));
    let other = setup.devices.get(1).map(|device| device.function());
    let not_its = code(vm.detach_device(other.map_or(1, Function::requester)));
    expect(
        hosts == [not_permitted; 3],
        "a device of the host's was used",
    )?;
    expect(twice == Some(ErrorCode::Exists), "it was taken twice")?;
    expect(
        unlocked == not_permitted,
        "it was attached to pages that come and go",
    )?;
    expect(
        unattached == not_permitted,
        "it was detached from where it was not",
    )?;
    expect(nobody.is_some(), "it was attached to no VM")?;
    expect(attached_twice.is_some(), "it was attached twice")?;
    expect(
        uncounted.is_some(),
        "an attached device counts no longer by the other call",
    )?;
    expect(taken == Some(ErrorCode::Exists), "a VM's device was taken")?;
    expect(not_its == not_permitted, "another device was detached")?;
    expect(
        pinned == [Some(ErrorCode::Busy); 2],
        "memory of a device was taken away",
    )?;
    absurd(vm)
}

fn of_a_protected_vm(setup: &Setup<'_>, function: u16) -> Result<(), &'static str> {
    let mut guest = remote::protected(&setup.guest)?;
    words(vm::take_device(function))?;
    let attached = code(guest.vm.attach_device(function, true));
    words(vm::give_device(function))?;
    guest.off()?;
    end(guest.vm)?;
    expect(
        attached == Some(ErrorCode::NotPermitted),
        "a protected VM got a device",
    )
}
