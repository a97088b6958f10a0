//! Guests: the payload of `tests/guests/payload`, one part of the platform at a time, in VMs of our own host; and on
//! the board itself, which checks the payload.

use super::shim::name;
use crate::emulate::Boot;
use crate::fit::{self, Disk, Guest};
use crate::machine::{Board, Entry, Gic, Machine, Software};
use crate::payload::Payloads;
use crate::process::{Reply, Transcript};
use crate::runner::{Context, Scenario};
use crate::{device_tree, files, verdict};
use anyhow::{Result, ensure};
use std::path::PathBuf;
use std::sync::Arc;

/// Wall-clock limit of a machine that runs payloads, in seconds.
const SECONDS: u64 = 90;
/// RAM of each guest.
const MEMORY_MIB: u64 = 128;
/// Bytes of a cache line of all models.
const LINE: u64 = 64;
/// Bytes of the ramdisk, filled with [`PATTERN`].
const RAMDISK: u64 = 512 << 10;
/// Word n of the ramdisk is n times this, modulo 2^64: the payload knows it, too.
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the payload is asked for.
#[derive(Debug, Clone, Copy)]
struct Payload {
    /// `run=` of its command line.
    run: &'static str,
    /// More of it.
    arguments: &'static str,
    vcpus: u32,
    /// Checks that it makes at least.
    checks: u32,
}

const fn payload(run: &'static str, vcpus: u32, checks: u32) -> Payload {
    Payload {
        run,
        arguments: "",
        vcpus,
        checks,
    }
}

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
    payload("sysreg", 1, 64),
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
struct Setting {
    lock: bool,
    noncoherent: bool,
    protected: bool,
}

const LOCKED: Setting = Setting {
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
    all.push(spinning(machine, payloads));
    all.push(resetting(machine, payloads));
    all.push(maintenance(machine, payloads));
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
fn has_fwb(cpu: &str) -> bool {
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

/// A VM that never gives its CPU back, its interrupts masked, beside one that needs its time, and the monitor's
/// prompt. All share one core.
fn spinning(machine: &Machine, payloads: &Arc<Payloads>) -> Scenario {
    let machine = one_core(machine);
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-spinning"), move |context| {
        let vms = [payload("spin", cpus, 0), payload("timer", 1, 23)];
        let transcript = beside_endless(&machine, &payloads, context, vms)?;
        verdict::line_with(&transcript, "[vm1] spinning")?;
        Ok(())
    })
    .for_cpus(cpus)
}

/// A VM that resets itself for ever, beside another on the same core, which runs on to its end.
fn resetting(machine: &Machine, payloads: &Arc<Payloads>) -> Scenario {
    let machine = one_core(machine);
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-resetting"), move |context| {
        let for_ever = Payload {
            // Its counter has eight bits.
            arguments: "resets=1000",
            ..payload("reset", cpus, 0)
        };
        let vms = [for_ever, payload("gic", 1, 23)];
        let transcript = beside_endless(&machine, &payloads, context, vms)?;
        let resets = transcript.lines.iter();
        let resets = resets.filter(|line| line.contains("host: VM 1: reset"));
        ensure!(
            resets.count() > RESETS,
            "the VM did not reset again and again"
        );
        verdict::line_with(&transcript, &format!("[vm1] boot {RESETS}"))?;
        Ok(())
    })
    .for_cpus(cpus)
}

/// Resets that a VM in a loop makes at least.
const RESETS: usize = 3;

/// Only one core, on boards that can have that; the first vCPUs of all VMs are on one in any case, if those before
/// the last have as many vCPUs as the machine CPUs.
fn one_core(machine: &Machine) -> Machine {
    let cpus = match machine.board {
        Board::Virt => 1,
        Board::Raspi4b => machine.cpus,
    };
    Machine {
        cpus,
        ..machine.clone()
    }
}

/// Runs a VM that never ends, and one that does; then the monitor stops the first.
fn beside_endless(
    machine: &Machine,
    payloads: &Payloads,
    context: &Context,
    vms: [Payload; 2],
) -> Result<Transcript> {
    let passed = format!("[vm2] {} passed, 0 failed", vms[1].checks + 1);
    let vms = vms.map(|one| (one, LOCKED));
    let mut boot = boot(machine, payloads, context, &vms)?;
    typed(machine, &mut boot);
    boot.replies = vec![reply("host: VM 2: powered off", "vm stop 1")];
    let transcript = boot.run(context, "console")?;
    verdict::no_alarm(&transcript)?;
    verdict::line_with(&transcript, &passed)?;
    verdict::line_with(&transcript, "host: VM 1: stopped")?;
    verdict::ended_well(&transcript)?;
    Ok(transcript)
}

/// Lets what is typed reach the monitor.
fn typed(machine: &Machine, boot: &mut Boot<'_>) {
    boot.extra = &["-echr", "0x14"]; // Ctrl-A is for the monitor, not for QEMU.
    if machine.board == Board::Raspi4b {
        // Its two UARTs share the terminal; input goes to the mini UART, which Debian's own tree names.
        boot.software.dtb = Some(crate::machine::debian_dtb("bcm2711-rpi-4-b.dtb"));
    }
}

/// Locked memory owes its cache maintenance once, at the first run, and once more after a reset; nothing where the
/// core forces write-back.
fn maintenance(machine: &Machine, payloads: &Arc<Payloads>) -> Scenario {
    let (machine, payloads) = (machine.clone(), Arc::clone(payloads));
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-maintenance"), move |context| {
        // With its caches off: turning them on is a flush of its own.
        let vms = [(payload("spin-uncached", 1, 0), LOCKED)];
        let mut boot = boot(&machine, &payloads, context, &vms)?;
        typed(&machine, &mut boot);
        boot.replies = vec![
            reply("spinning", "vm stat 1"),
            reply("table pages", "vm reset 1"),
            reply("spinning", "vm stat 1"),
            reply("table pages", "vm stop 1"),
        ];
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        verdict::ended_well(&transcript)?;
        let whole = if has_fwb(&machine.cpu) {
            0
        } else {
            (MEMORY_MIB << 20) / LINE
        };
        let flushed = counts(&transcript, "cache lines flushed ");
        ensure!(
            flushed == [whole, 2 * whole],
            "lines flushed at the first run and after a reset: {flushed:?}, expected {whole} each"
        );
        Ok(())
    })
    .for_cpus(cpus)
}

/// A VM whose kernel does not fit into its memory is named and left out; the other one runs.
pub(super) fn too_big(machine: &Machine) -> Scenario {
    let machine = machine.clone();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-too-big"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        let large = vec![0; 3 << 20];
        let too_big = Guest {
            kernel: &large,
            memory_mib: 2,
            ..hello
        };
        let lines = ["VM 1: kernel and ramdisk need 4 MiB", "VM 1 is left out"];
        beside_hello(&machine, context, &fit::guests(&[too_big, hello])?, &lines)
    })
    .for_cpus(cpus)
}

/// A configuration that names no kernel is told and left out; the other VM runs.
pub(super) fn without_kernel(machine: &Machine) -> Scenario {
    let machine = machine.clone();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-without-kernel"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        let lost = Guest {
            kernel: b"to be removed",
            ..hello
        };
        let mut tree = device_tree::parse(&fit::guests(&[lost, hello])?)?;
        device_tree::remove(&mut tree, "/images/kernel")?;
        let lines = [
            "a configuration names no kernel with data",
            "VM 1 is left out: its configuration can't be used",
        ];
        beside_hello(&machine, context, &tree.to_dtb(), &lines)
    })
    .for_cpus(cpus)
}

/// A VM gets no PCI function whose DMA nothing would confine; the other one runs.
pub(super) fn without_iommu(machine: &Machine) -> Scenario {
    let machine = machine.clone();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-without-iommu"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        let exposed = Guest {
            disk: Disk::Functions(&["00:00.0"]),
            ..hello
        };
        let lines = [
            "DMA is not isolated",
            "VM 1 is left out: no IOMMU of EL2's stands before the PCI function",
        ];
        beside_hello(&machine, context, &fit::guests(&[exposed, hello])?, &lines)
    })
    .for_cpus(cpus)
}

/// What can't be a VM's own, with an IOMMU before it: a function that is not there, one that can't be reset, and any for
/// a VM whose memory may be missing when a device wants it.
pub(super) fn refused_functions(machine: &Machine) -> Scenario {
    let machine = machine.with_iommu();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-functions-refused"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        for (lock, functions, why) in [
            (true, &["00:1f.0"], "the machine has no such PCI function"),
            (true, &["00:00.0"], "the PCI function can't be reset"),
            (
                false,
                &["00:00.0"],
                "has locked memory that is not protected",
            ),
        ] {
            let refused = Guest {
                lock,
                disk: Disk::Functions(functions),
                ..hello
            };
            let lines = ["VM 1 is left out", why];
            beside_hello(&machine, context, &fit::guests(&[refused, hello])?, &lines)?;
        }
        Ok(())
    })
    .for_cpus(cpus)
}

/// The payload that says hello, in a small VM.
fn hello(kernel: &[u8]) -> Guest<'_> {
    Guest {
        kernel,
        ramdisk: None,
        arguments: "run=hello",
        memory_mib: 16,
        vcpus: 1,
        lock: true,
        noncoherent: false,
        protected: false,
        disk: fit::Disk::None,
    }
}

/// Runs a FIT whose second VM says hello and whose first can't be: these lines say why.
fn beside_hello(machine: &Machine, context: &Context, fit: &[u8], lines: &[&str]) -> Result<()> {
    let path = context.folder.join("guests.fit");
    files::write(&path, fit)?;
    let mut boot = Boot::shim(machine, "");
    boot.software.initrd = Some(path);
    let transcript = boot.run(context, "console")?;
    verdict::no_alarm(&transcript)?;
    let others = ["[vm2] hello from EL1", "only 1 of 2 guests powered off"];
    for line in lines.iter().chain(&others) {
        verdict::line_with(&transcript, line)?;
    }
    verdict::ended_well(&transcript)
}

/// What is typed at the monitor's prompt when the cue has come.
fn reply(cue: &str, command: &str) -> Reply {
    Reply {
        cue: cue.into(),
        send: format!("\u{1}c{command}\r"),
    }
}

/// The numbers behind `label`, in their order.
fn counts(transcript: &Transcript, label: &str) -> Vec<u64> {
    let lines = transcript.lines.iter();
    lines
        .filter_map(|line| line.split_once(label)?.1.trim().parse().ok())
        .collect()
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
fn boot(
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
