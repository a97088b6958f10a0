//! Guests: the payload of `tests/guests/payload`, one part of the platform at a time, in VMs of our own host; and on
//! the board itself, which checks the payload.

use super::monitored;
use super::shim::name;
use crate::emulate::{Boot, SECONDS};
use crate::fit::{self, Guest};
use crate::machine::{Board, Entry, Gic, Machine, Software};
use crate::payload::Payloads;
use crate::runner::{Context, Scenario};
use crate::{files, verdict};
use anyhow::{Result, ensure};
use std::path::PathBuf;
use std::sync::Arc;

/// RAM of each guest.
pub(super) const MEMORY_MIB: u64 = 128;
/// Bytes of the ramdisk, filled with [`PATTERN`].
const RAMDISK: u64 = 512 << 10;
/// Word n of the ramdisk is n times this, modulo 2^64: the payload knows it, too.
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the payload is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Payload {
    /// `run=` of its command line.
    pub(super) run: &'static str,
    /// More of it.
    pub(super) arguments: &'static str,
    pub(super) vcpus: u32,
    /// Checks that it makes at least.
    pub(super) checks: u32,
}

pub(super) const fn payload(run: &'static str, vcpus: u32, checks: u32) -> Payload {
    Payload {
        run,
        arguments: "",
        vcpus,
        checks,
    }
}

/// Lines that `run=talk` prints.
const LINES: u32 = 150;

/// Under the hypervisor, on every machine.
const EVERYWHERE: [Payload; 14] = [
    payload("hello", 1, 6),
    payload("reader", 1, 3),
    payload("code", 1, 3),
    payload("faults", 4, 4),
    payload("fp", 4, 3),
    payload("gic", 1, 23),
    payload("smp", 4, 13),
    payload("timer", 4, 23),
    payload("power", 4, 31),
    payload("reset", 1, 2),
    payload("sysreg", 1, 66),
    payload("mmio", 1, 23),
    payload("nowhere", 1, 8),
    payload("flood", 1, 2),
];

/// On the board itself, entered at EL1: those that make sense there, with the checks that are left.
const BARE: [Payload; 11] = [
    payload("hello", 1, 6),
    payload("reader", 1, 3),
    payload("code", 1, 3),
    payload("faults", 4, 4),
    payload("fp", 4, 3),
    payload("gic", 1, 23),
    payload("smp", 4, 13),
    payload("timer", 4, 23),
    payload("power", 4, 20),
    payload("reset", 1, 2),
    payload("mmio", 1, 11),
];

/// How a VM is set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    lock: bool,
    noncoherent: bool,
    protected: bool,
}

pub(super) const LOCKED: Setting = Setting {
    lock: true,
    noncoherent: false,
    protected: false,
};

/// Every payload on this machine, several VMs at once, and the ways memory can be set up.
pub(super) fn all(machine: &Machine, payloads: &Arc<Payloads>) -> Vec<Scenario> {
    let one = |payload, setting, kind: &str| single(machine, payloads, payload, setting, kind);
    let mut all: Vec<_> = EVERYWHERE
        .iter()
        .map(|payload| one(*payload, LOCKED, payload.run))
        .collect();
    for (name, setting) in [
        ("locked", LOCKED),
        (
            "on-demand",
            Setting {
                lock: false,
                ..LOCKED
            },
        ),
        (
            "noncoherent",
            Setting {
                noncoherent: true,
                ..LOCKED
            },
        ),
        (
            "noncoherent-on-demand",
            Setting {
                lock: false,
                noncoherent: true,
                ..LOCKED
            },
        ),
    ] {
        let probe = attributes(&machine.cpu, setting);
        all.push(one(probe, setting, &format!("attributes-{name}")));
        if name != "locked" {
            all.push(one(
                payload("faults", 4, 4),
                setting,
                &format!("faults-{name}"),
            ));
        }
    }
    let secret = Setting {
        protected: true,
        ..LOCKED
    };
    for (kind, payload) in [
        ("protected", payload("protected", 1, 19)),
        ("protected-fp", payload("fp", 4, 3)),
        ("protected-smp", payload("smp", 4, 13)),
        ("protected-power", payload("power", 4, 31)),
        ("protected-mmio", payload("mmio", 1, 23)),
    ] {
        all.push(one(payload, secret, kind));
    }
    all.push(together(machine, payloads));
    all.extend(monitored::all(machine, payloads));
    all
}

/// The prober, told what stage 2 should say (memory types on arm64: 0xF without forced write-back, else 6, or 7 with
/// a device that does not snoop).
fn attributes(cpu: &str, setting: Setting) -> Payload {
    let arguments = match (has_fwb(cpu), setting.noncoherent) {
        (false, _) => "fwb=0 s2-ram=15",
        (true, false) => "fwb=1 s2-ram=6",
        (true, true) => "fwb=1 s2-ram=7",
    };
    Payload {
        arguments,
        ..payload("attributes", 1, 11)
    }
}

/// Whether QEMU's model has FEAT_S2FWB.
pub(super) fn has_fwb(cpu: &str) -> bool {
    matches!(cpu, "neoverse-v1" | "neoverse-n2" | "max")
}

/// One VM.
fn single(
    machine: &Machine,
    payloads: &Arc<Payloads>,
    payload: Payload,
    setting: Setting,
    kind: &str,
) -> Scenario {
    let (machine, payloads) = (machine.clone(), Arc::clone(payloads));
    let cpus = machine.cpus;
    Scenario::new(name(&machine, &format!("guest-{kind}")), move |context| {
        let vms = [(payload, setting)];
        let transcript = boot(&machine, &payloads, context, &vms)?.run(context, "console")?;
        verdict::guests_close(&transcript, &[payload.checks])
    })
    .for_cpus(cpus)
}

/// Three VMs at once, one of which floods EL2 with calls: nobody is starved, nothing leaks from one to another.
fn together(machine: &Machine, payloads: &Arc<Payloads>) -> Scenario {
    let (machine, payloads) = (machine.clone(), Arc::clone(payloads));
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guests-together"), move |context| {
        let vms = [
            payload("fp", 4, 3),
            payload("flood", 1, 2),
            payload("smp", 2, 9),
        ];
        let checks = vms.map(|payload| payload.checks);
        let vms = vms.map(|payload| (payload, LOCKED));
        let transcript = boot(&machine, &payloads, context, &vms)?.run(context, "console")?;
        verdict::guests_close(&transcript, &checks)
    })
    .for_cpus(cpus)
}

/// Three VMs that print as fast as they can: each one's lines come whole, in order, and all of them.
pub(super) fn talking(machine: &Machine, payloads: &Arc<Payloads>) -> Scenario {
    let (machine, payloads) = (machine.clone(), Arc::clone(payloads));
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guests-talking"), move |context| {
        let vms = [(payload("talk", 1, 2), LOCKED); 3];
        let transcript = boot(&machine, &payloads, context, &vms)?.run(context, "console")?;
        verdict::guests_close(&transcript, &[2; 3])?;
        let text = "the quick brown fox jumps over the lazy dog";
        for vm in 1..=3 {
            let label = format!("[vm{vm}] line ");
            let got = transcript.lines.iter();
            let got = got.filter_map(|line| line.strip_prefix(&label));
            let want = (0..LINES).map(|number| format!("{number:03} {text}"));
            ensure!(
                got.eq(want),
                "VM {vm}: its lines are not all there, whole and in order"
            );
        }
        Ok(())
    })
    .for_cpus(cpus)
}

/// The payload on the board itself, without a hypervisor.
pub(super) fn bare(machine: &Machine) -> Vec<Scenario> {
    let scenario = |payload: Payload| {
        let machine = machine.entered_at(Entry::El1);
        let cpus = machine.cpus;
        let kind = format!("payload-bare-{}", payload.run);
        Scenario::new(name(&machine, &kind), move |context| {
            let software = Software {
                kernel: files::build("guests/payload"),
                initrd: Some(ramdisk(context)?),
                arguments: format!("under=bare run={} {}", payload.run, payload.arguments),
                dtb: None,
            };
            let transcript = Boot::new(&machine, software, SECONDS).run(context, "console")?;
            verdict::closes(&transcript, payload.checks)
        })
        .for_cpus(cpus)
    };
    BARE.map(scenario).into()
}

/// The image with these VMs.
pub(super) fn boot(
    machine: &Machine,
    payloads: &Payloads,
    context: &Context,
    vms: &[(Payload, Setting)],
) -> Result<Boot<'static>> {
    let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
    let ramdisk = files::read(&ramdisk(context)?, "it was just written")?;
    let arguments: Vec<_> = vms
        .iter()
        .map(|(payload, _)| command_line(machine, payload))
        .collect();
    let guests: Vec<_> = vms
        .iter()
        .zip(&arguments)
        .map(|((payload, setting), arguments)| Guest {
            kernel: &kernel,
            ramdisk: Some(&ramdisk),
            arguments,
            memory_mib: MEMORY_MIB,
            vcpus: payload.vcpus,
            lock: setting.lock,
            noncoherent: setting.noncoherent,
            protected: setting.protected,
            disk: fit::Disk::None,
        })
        .collect();
    let fit = context.folder.join("guests.fit");
    files::write(&fit, &fit::guests(&guests)?)?;
    let mut boot = Boot::shim(machine, "");
    boot.software.initrd = Some(fit);
    // Debian's tree for the Pi names the mini UART; QEMU shows both, and this way they do not mix.
    boot.software.dtb = (machine.board == Board::Raspi4b).then(|| payloads.pi4_tree.clone());
    Ok(boot)
}

/// What the payload must find on this machine.
fn command_line(machine: &Machine, payload: &Payload) -> String {
    let gic = match machine.gic {
        Gic::V2 => 2,
        Gic::V3 => 3,
    };
    // QEMU's counters: 1 GHz for `max`, 62.5 MHz for the others.
    let frequency = if machine.cpu == "max" {
        1_000_000_000
    } else {
        62_500_000
    };
    format!(
        "run={} gic={gic} cpus={} cntfrq={frequency} {}",
        payload.run, payload.vcpus, payload.arguments
    )
}

fn ramdisk(context: &Context) -> Result<PathBuf> {
    let path = context.folder.join("pattern");
    let bytes = (0..RAMDISK / 8).flat_map(|n| n.wrapping_mul(PATTERN).to_le_bytes());
    files::write(&path, &bytes.collect::<Vec<_>>())?;
    Ok(path)
}
