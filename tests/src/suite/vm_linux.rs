//! Debian's kernel as a guest: what `make run` shows, on every machine that it is promised for.

use super::shim::name;
use crate::emulate::{Boot, LINUX_ARGUMENTS};
use crate::fit::{self, Guest};
use crate::machine::{Board, Machine};
use crate::payload::Payloads;
use crate::process::Reply;
use crate::runner::{Context, Scenario};
use crate::{files, verdict};
use anyhow::{Result, ensure};
use std::sync::Arc;

/// Wall-clock limit, in seconds.
const SECONDS: u64 = 240;
/// The shell's prompt.
const PROMPT: &str = "/ # ";
/// Opens the monitor's prompt.
const MONITOR: &str = "\u{1}c";

/// How the VMs are set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    pub(super) vms: usize,
    pub(super) vcpus: u32,
    pub(super) memory_mib: u64,
    pub(super) lock: bool,
    pub(super) noncoherent: bool,
}

/// What `make run` does.
pub(super) const DEFAULT: Setting = Setting {
    vms: 1,
    vcpus: 1,
    memory_mib: 256,
    lock: true,
    noncoherent: false,
};

/// One VM: a shell that answers, the monitor's prompt beside it, and `poweroff`, which ends the machine.
pub(super) fn shell(
    machine: Machine,
    payloads: &Arc<Payloads>,
    setting: Setting,
    kind: &str,
) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, &format!("vm-linux{kind}")), move |context| {
        let mut boot = boot(&machine, &payloads, context, setting)?;
        boot.replies = vec![
            reply(PROMPT, "echo $((6 * 7)) CPUs $(nproc)\n"),
            reply(PROMPT, &format!("{MONITOR}vm list\r")),
            reply("MiB", &format!("{MONITOR}vm stat 1\r")),
            reply("table pages", "poweroff\n"),
        ];
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        let answer = format!("42 CPUs {}", setting.vcpus);
        let said = |text: &str| transcript.lines.iter().any(|line| line.contains(text));
        ensure!(said(&answer), "the guest's shell did not answer '{answer}'");
        ensure!(said("VM 1  running"), "the monitor did not list the VM");
        ensure!(
            said("injected exceptions 0"),
            "EL2 injected exceptions into Linux"
        );
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

/// Several VMs at once, each with its own console, all of which power off.
pub(super) fn several(machine: Machine, payloads: &Arc<Payloads>, setting: Setting) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "vm-linux-several"), move |context| {
        let mut boot = boot(&machine, &payloads, context, setting)?;
        // The first one takes its time, so that the others are at their prompts when they are spoken to.
        let mut cue = "[vm1] Enter 'help'".to_owned();
        for vm in 1..=setting.vms {
            let rest = if vm == 1 { 8 } else { 1 };
            let command = format!("\u{1}{vm}sleep {rest}; echo I am $((40 + {vm}))\n");
            boot.replies.push(reply(&cue, &command));
            let answer = format!("[vm{vm}] I am {}", 40 + vm);
            boot.replies.push(reply(&answer, "poweroff\n"));
            cue = format!("VM {vm}: powered off");
        }
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        for vm in 1..=setting.vms {
            let answer = format!("[vm{vm}] I am {}", 40 + vm);
            ensure!(
                transcript.lines.iter().any(|line| line.contains(&answer)),
                "no line '{answer}'"
            );
        }
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

/// A reset from inside: the VM starts over, on the memory that stays locked.
pub(super) fn reset(machine: Machine, payloads: &Arc<Payloads>) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "vm-linux-reset"), move |context| {
        let mut boot = boot(&machine, &payloads, context, DEFAULT)?;
        boot.replies = vec![
            reply(PROMPT, "reboot\n"),
            reply("VM 1: reset", ""),
            reply(PROMPT, "poweroff\n"),
        ];
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        let boots = transcript
            .lines
            .iter()
            .filter(|line| line.contains("Booting Linux on physical CPU"))
            .count();
        ensure!(boots == 2, "Linux booted {boots} times, not twice");
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

fn reply(cue: &str, send: &str) -> Reply {
    Reply {
        cue: cue.into(),
        send: send.into(),
    }
}

fn boot(
    machine: &Machine,
    payloads: &Payloads,
    context: &Context,
    setting: Setting,
) -> Result<Boot<'static>> {
    let kernel = files::read(&payloads.linux, "run `make setup`")?;
    let ramdisk = files::read(&payloads.initramfs, "run `make build`")?;
    let arguments = format!("{LINUX_ARGUMENTS} ravelin.under=guest");
    let guest = Guest {
        kernel: &kernel,
        ramdisk: Some(&ramdisk),
        arguments: &arguments,
        memory_mib: setting.memory_mib,
        vcpus: setting.vcpus,
        lock: setting.lock,
        noncoherent: setting.noncoherent,
    };
    let path = context.folder.join("guests.fit");
    files::write(&path, &fit::guests(&vec![guest; setting.vms])?)?;
    let mut boot = Boot::shim(machine, "");
    boot.timeout = std::time::Duration::from_secs(SECONDS);
    boot.software.initrd = Some(path);
    // Ctrl-A is the monitor's, not QEMU's.
    boot.extra = &["-echr", "0x14"];
    // Two UARTs share the terminal; input goes to the mini UART, which Debian's own tree names.
    boot.software.dtb = (machine.board == Board::Raspi4b)
        .then(|| crate::machine::debian_dtb("bcm2711-rpi-4-b.dtb"));
    Ok(boot)
}
