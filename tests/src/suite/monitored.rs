//! VMs beside which somebody types at the monitor's prompt: those that never end by themselves, and what each command
//! does.

use super::guests::{LOCKED, MEMORY_MIB, Payload, boot, has_fwb, payload};
use super::shim::name;
use crate::emulate::Boot;
use crate::machine::{Board, Machine};
use crate::payload::Payloads;
use crate::process::{Reply, Transcript};
use crate::runner::{Context, Scenario};
use crate::verdict;
use anyhow::{Context as _, Result, ensure};
use std::sync::Arc;

/// Bytes of a cache line of all models.
const LINE: u64 = 64;

pub(super) fn all(machine: &Machine, payloads: &Arc<Payloads>) -> [Scenario; 4] {
    [
        spinning(machine, payloads),
        resetting(machine, payloads),
        maintenance(machine, payloads),
        commands(machine, payloads),
    ]
}

/// A VM that never gives its CPU back, its interrupts masked, beside one that needs its time, and the monitor's
/// prompt. All share one core.
fn spinning(machine: &Machine, payloads: &Arc<Payloads>) -> Scenario {
    let machine = one_core(machine);
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-spinning"), move |context| {
        let vms = [payload("spin", cpus, 0), payload("timer", 1, 23)];
        let transcript = beside_endless(&machine, &payloads, context, vms, None)?;
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
        // How many there are while the other runs is the emulator's affair.
        let goes_on = Some("host: VM 1: reset");
        let transcript = beside_endless(&machine, &payloads, context, vms, goes_on)?;
        verdict::line_with(&transcript, &format!("[vm1] boot {AGAIN}"))?;
        Ok(())
    })
    .for_cpus(cpus)
}

/// How often an endless VM has to do again what it does, once the other one has ended.
const AGAIN: usize = 3;

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

/// Runs a VM that never ends, and one that does; then the monitor stops the first, once this line, if there is one,
/// has come a few times more.
fn beside_endless(
    machine: &Machine,
    payloads: &Payloads,
    context: &Context,
    vms: [Payload; 2],
    goes_on: Option<&str>,
) -> Result<Transcript> {
    let passed = format!("[vm2] {} passed, 0 failed", vms[1].checks + 1);
    let vms = vms.map(|one| (one, LOCKED));
    let mut boot = boot(machine, payloads, context, &vms)?;
    typed(machine, &mut boot);
    let behind = goes_on.into_iter().flat_map(|line| [line; AGAIN]);
    let mut cues: Vec<&str> = std::iter::once("host: VM 2: powered off")
        .chain(behind)
        .collect();
    let last = cues.pop().unwrap_or_default();
    let awaited = cues.into_iter().map(|cue| Reply {
        cue: cue.into(),
        send: String::new(),
    });
    boot.replies = awaited.chain([reply(last, "vm stop 1")]).collect();
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

/// A VM that is paused makes no step, and goes on when it is resumed; its leaves are listed; what makes no sense is
/// answered, and changes nothing.
fn commands(machine: &Machine, payloads: &Arc<Payloads>) -> Scenario {
    let (machine, payloads) = (machine.clone(), Arc::clone(payloads));
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-monitor"), move |context| {
        let vms = [(payload("spin", 1, 0), LOCKED)];
        let mut boot = boot(&machine, &payloads, context, &vms)?;
        typed(&machine, &mut boot);
        boot.replies = commands_typed();
        boot.replies.push(reply("vm pause N", "vm stop 1"));
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        verdict::ended_well(&transcript)?;
        let exits = counts(&transcript, " exits ");
        let (paused, resumed) = exits.split_at_checked(WHILE_PAUSED).context("no counts")?;
        // While a slice of time ends, the first counts may still rise.
        let [.., before, after] = paused else {
            anyhow::bail!("no counts of a paused VM: {exits:?}");
        };
        ensure!(before == after, "a paused VM runs: {exits:?}");
        let later = resumed.last().context("no count of a resumed VM")?;
        ensure!(after < later, "a resumed VM does not run: {exits:?}");
        for line in [
            "VM 1 is paused now",
            "VM 1  paused",
            "VM 1 is paused, and stays so",
            "VM 1 is running now",
            "VM 1  running",
            "VM 1 is running, and stays so",
            "host: VM 1: stopped",
        ] {
            verdict::line_with(&transcript, line)?;
        }
        // From the first page of RAM on, by blocks.
        verdict::line_with(&transcript, "0x0040000000..")?;
        verdict::line_with(&transcript, "level 2 rw")?;
        Ok(())
    })
    .for_cpus(cpus)
}

/// How often a paused VM's exits are asked for, and a resumed one's: a slice of time, or the wait of an emulator that
/// does not get to run, lasts longer than an answer.
const WHILE_PAUSED: usize = 12;
const WHILE_RESUMED: usize = 60;

/// What is typed at the prompt, each when its cue has come.
fn commands_typed() -> Vec<Reply> {
    let stat = ("table pages", "vm stat 1");
    let mut all = vec![
        ("spinning", "vm pause 1"),
        ("VM 1 is paused now", "vm list"),
        ("VM 1  paused", "vm stat 1"),
    ];
    all.extend([stat; WHILE_PAUSED - 2]);
    all.extend([
        ("table pages", "vm pause 1"),
        ("VM 1 is paused", "vm stat 1"),
        ("table pages", "vm resume 1"),
        ("VM 1 is running now", "vm list"),
        ("VM 1  running", "vm stat 1"),
    ]);
    all.extend([stat; WHILE_RESUMED - 1]);
    all.extend([
        ("table pages", "vm resume 1"),
        ("VM 1 is running", "vm map 1"),
        ("MemAttr", "vm stop 7"),
        ("there is no VM 7", "no command"),
        ("unknown: try help", "help"),
    ]);
    all.into_iter()
        .map(|(cue, command)| reply(cue, command))
        .collect()
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
