//! QEMU's `virt`: every CPU with every interrupt controller.

use super::vm_linux::{self, DEFAULT, Reset, Setting};
use super::{bad_input, dma, generator, guests, left_out, linux, reset, shim};
use crate::device_tree::Damage;
use crate::machine::{CPUS, Clock, Gic, Machine};
use crate::payload::Payloads;
use crate::runner::Scenario;
use std::sync::Arc;

/// Numbers of CPUs that Linux is booted with besides 4.
const OTHER_CPU_COUNTS: [u32; 7] = [8, 7, 6, 5, 3, 2, 1];
/// CPUs that every guest is tried on: both boards', one with forced write-back, and everything.
const GUEST_CPUS: [&str; 4] = ["cortex-a72", "cortex-a76", "neoverse-v1", "max"];
/// What EL2 can be told to do wrong.
pub(super) const SELF_TESTS: [&str; 5] =
    ["panic", "stack-overflow", "write-text", "exec-data", "null"];

pub(super) fn scenarios(payloads: &Arc<Payloads>) -> Vec<Scenario> {
    let a76 = |gic, cpus| Machine::virt("cortex-a76", gic, cpus);
    let mut all = Vec::new();
    all.extend(OTHER_CPU_COUNTS.map(|cpus| linux::selfcheck(a76(Gic::V3, cpus), payloads)));
    all.extend([8, 1].map(|cpus| linux::selfcheck(a76(Gic::V2, cpus), payloads)));
    for cpu in CPUS {
        for gic in [Gic::V2, Gic::V3] {
            all.push(linux::selfcheck(Machine::virt(cpu, gic, 4), payloads));
            all.push(shim::all(Machine::virt(cpu, gic, 4)));
        }
    }
    for gic in [Gic::V2, Gic::V3] {
        all.extend([8, 1].map(|cpus| shim::all(a76(gic, cpus))));
    }
    all.extend(dma_isolation());
    all.extend(linux_guests(payloads));
    all.push(linux::reset(a76(Gic::V3, 2), payloads));
    all.push(reset::leak(a76(Gic::V3, 2)));
    all.push(reset::leak(Machine::virt("max", Gic::V2, 4)));
    all.push(linux::shell(a76(Gic::V3, 2), payloads));
    all.push(linux::disks(a76(Gic::V3, 4).with_iommu(), payloads, 1));
    let max = Machine::virt("max", Gic::V2, 4).with_iommu();
    all.push(linux::disks(max, payloads, 3));
    all.push(shim::demo(a76(Gic::V3, 4)));
    all.push(shim::demo(Machine::virt("max", Gic::V2, 1)));
    all.push(shim::log_levels(a76(Gic::V3, 2)));
    for machine in [
        Machine::virt("cortex-a72", Gic::V2, 2),
        Machine::virt("max", Gic::V3, 2),
    ] {
        all.extend(SELF_TESTS.map(|kind| shim::self_test(machine.clone(), kind)));
    }
    for cpu in GUEST_CPUS {
        for gic in [Gic::V2, Gic::V3] {
            all.extend(guests::all(&Machine::virt(cpu, gic, 4), payloads));
        }
    }
    for gic in [Gic::V2, Gic::V3] {
        all.extend(guests::bare(&a76(gic, 4)));
    }
    all.push(guests::talking(&a76(Gic::V3, 4), payloads));
    all.push(guests::talking(&Machine::virt("max", Gic::V2, 2), payloads));
    all.extend(bad_inputs(payloads));
    all.push(generator::silent(Machine::virt("cortex-a72", Gic::V2, 2)));
    all.push(generator::failing(Machine::virt("cortex-a72", Gic::V2, 2)));
    all.push(left_out::too_big(&a76(Gic::V3, 2)));
    all.push(left_out::without_kernel(&a76(Gic::V3, 2)));
    all.push(left_out::without_iommu(&a76(Gic::V3, 2)));
    all.push(left_out::refused_functions(&a76(Gic::V2, 2)));
    all
}

/// Both interrupt controllers, with and without forced write-back, in real time and repeatable.
fn dma_isolation() -> Vec<Scenario> {
    let repeatable = |cpu, gic, cpus| Machine {
        clock: Clock::Instructions,
        ..Machine::virt(cpu, gic, cpus)
    };
    vec![
        dma::isolation(Machine::virt("cortex-a76", Gic::V3, 4)),
        dma::isolation_and_all(Machine::virt("max", Gic::V2, 4)),
        dma::isolation(repeatable("cortex-a76", Gic::V2, 1)),
        dma::isolation(repeatable("max", Gic::V3, 2)),
        dma::without(Machine::virt("cortex-a76", Gic::V2, 2)),
    ]
}

/// What `make run` promises, and its settings.
fn linux_guests(payloads: &Arc<Payloads>) -> Vec<Scenario> {
    let mut all = Vec::new();
    let four = Setting {
        vcpus: 4,
        ..DEFAULT
    };
    for (cpu, gic) in [
        ("cortex-a72", Gic::V2),
        ("cortex-a76", Gic::V3),
        ("neoverse-v1", Gic::V3),
        ("max", Gic::V3),
    ] {
        all.push(vm_linux::shell(
            Machine::virt(cpu, gic, 4),
            payloads,
            four,
            "",
        ));
    }
    let a76 = |gic| Machine::virt("cortex-a76", gic, 4);
    all.push(vm_linux::shell(a76(Gic::V2), payloads, DEFAULT, "-single"));
    let loose = Setting {
        lock: false,
        noncoherent: true,
        ..four
    };
    for cpu in ["cortex-a72", "max"] {
        let machine = Machine::virt(cpu, Gic::V3, 2);
        all.push(vm_linux::shell(machine, payloads, loose, "-on-demand"));
    }
    let three = Setting {
        vms: 3,
        vcpus: 2,
        memory_mib: 192,
        ..DEFAULT
    };
    all.push(vm_linux::several(a76(Gic::V3), payloads, three));
    all.push(vm_linux::reset(a76(Gic::V3), payloads));
    let a72 = Machine::virt("cortex-a72", Gic::V2, 4);
    all.push(vm_linux::protected(a72, payloads, four, true));
    let max = Machine::virt("max", Gic::V3, 4);
    all.push(vm_linux::protected(max, payloads, four, false));
    all.push(vm_linux::devices(a76(Gic::V3), payloads, false));
    all.push(vm_linux::devices(a76(Gic::V2), payloads, true));
    all.extend(assigned_disks(payloads, four));
    all
}

/// PCI disks that are guests' own.
fn assigned_disks(payloads: &Arc<Payloads>, four: Setting) -> [Scenario; 4] {
    let disks = |cpu, gic, cpus, setting, numbers, reset| {
        let machine = Machine::virt(cpu, gic, cpus).with_iommu();
        vm_linux::assigned(machine, payloads, setting, numbers, reset)
    };
    let two = Setting {
        vms: 2,
        memory_mib: 192,
        ..DEFAULT
    };
    [
        disks("cortex-a76", Gic::V3, 4, DEFAULT, &[1], Reset::Function),
        disks("max", Gic::V2, 4, four, &[1, 2, 3], Reset::Function),
        disks("cortex-a72", Gic::V2, 2, DEFAULT, &[1], Reset::Status),
        // Devices 1 and 5 share an interrupt, which is two VMs' then.
        disks("cortex-a76", Gic::V3, 2, two, &[1, 5], Reset::Function),
    ]
}

fn bad_inputs(payloads: &Arc<Payloads>) -> Vec<Scenario> {
    let machine = || Machine::virt("cortex-a72", Gic::V2, 2);
    let damaged = |damage, reasons| bad_input::damaged(machine(), damage, reasons);
    let left_out = |damage, line| bad_input::cpu_left_out(machine(), damage, line);
    let mut all = vec![
        bad_input::no_tree(machine(), 0),
        bad_input::no_tree(machine(), 0x100),
        damaged(Damage::Truncated, &["device tree"]),
        damaged(Damage::BadMagic, &["device tree"]),
        damaged(Damage::HugeSize, &["device tree"]),
        damaged(Damage::Scrambled, &["device tree"]),
        damaged(Damage::NoMemory, &["memory"]),
        damaged(Damage::TinyMemory, &["memory"]),
        left_out(Damage::PhantomCpu, "did not come up"),
        left_out(Damage::NoEnableMethod, "no enable-method"),
        left_out(Damage::NoPsci, "no psci node"),
        bad_input::entry_at_el1(&machine()),
    ];
    all.extend(
        ["no-fit", "truncated", "header-only"]
            .map(|kind| bad_input::bad_initrd(machine(), payloads, kind)),
    );
    all
}
