//! QEMU's `raspi4b` with Debian's real Pi 4 device tree: spin table, no SMC, true addresses.

use super::vm_linux::{self, DEFAULT, Setting};
use super::{bad_input, guests, linux, reset, shim};
use crate::device_tree::Damage;
use crate::machine::Machine;
use crate::payload::Payloads;
use crate::runner::Scenario;
use std::sync::Arc;

pub(super) fn scenarios(payloads: &Arc<Payloads>) -> Vec<Scenario> {
    let machine = Machine::raspi4b;
    let damaged = |damage, reasons| bad_input::damaged(machine(), damage, reasons);
    let left_out = |damage, line| bad_input::cpu_left_out(machine(), damage, line);
    let large = Setting {
        vcpus: 4,
        memory_mib: 512,
        ..DEFAULT
    };
    let mut all = vec![
        vm_linux::shell(machine(), payloads, large, ""),
        vm_linux::protected(machine(), payloads, DEFAULT, false),
        linux::selfcheck(machine(), payloads),
        shim::all(machine()),
        shim::demo(machine()),
        reset::leak(machine()),
        shim::self_test(machine(), "panic"),
        bad_input::no_tree(machine(), 0),
        // What this machine hands over without a device tree: an ATAG list at 0x100.
        bad_input::no_tree(machine(), 0x100),
        damaged(Damage::Truncated, &["device tree"]),
        damaged(Damage::NoMemory, &["memory"]),
        left_out(Damage::PhantomCpu, "did not come up"),
        left_out(Damage::NoEnableMethod, "no enable-method"),
    ];
    all.extend(guests::all(&machine(), payloads));
    all.push(guests::talking(&machine(), payloads));
    all
}
