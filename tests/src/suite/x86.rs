//! The x86 hypervisor on Bochs.

use crate::process::{self, Reply, Run};
use crate::runner::Scenario;
use crate::verdict;
use crate::x86::bochs::{LINUX_MEMORY, Machine, PENRYN, RYZEN, SANDY_BRIDGE, SKYLAKE};
use crate::x86::linux::Linux;
use std::time::Duration;

/// Checks that the hypervisor makes on one CPU, and on more.
const CHECKS_ALONE: u32 = 37;
const CHECKS: u32 = 43;

/// Checks that the Linux guest makes.
const LINUX_CHECKS: u32 = 7;

/// Wall-clock limit of a boot of Linux.
const LINUX_TIMEOUT: Duration = Duration::from_secs(400);
/// Its shell's prompt.
const PROMPT: &str = "/ # ";

/// Every scenario's name begins with `x86/`.
pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        linux(),
        shell(),
        checks(SKYLAKE, 4),
        checks(SKYLAKE, 2),
        checks(SKYLAKE, 1),
        checks(SANDY_BRIDGE, 2),
        refuses(PENRYN, "the CPU has no EPT"),
        refuses(RYZEN, "the CPU has no VMX"),
    ]
}

/// The hypervisor's own scenarios, with guests of its own.
fn checks(model: &'static str, cpus: u32) -> Scenario {
    Scenario::new(format!("x86/checks/{model}/smp{cpus}"), move |context| {
        let transcript = Machine::new(model, cpus, "run=checks").run(context, &[])?;
        let ready = format!("{cpus} CPUs in VMX root operation");
        verdict::line_with(&transcript, &ready)?;
        if model == SANDY_BRIDGE {
            verdict::line_with(&transcript, "no accessed and dirty flags in EPT")?;
            verdict::line_with(&transcript, "no 1 GiB pages in EPT")?;
        }
        let checks = if cpus > 1 { CHECKS } else { CHECKS_ALONE };
        verdict::closes(&transcript, checks)
    })
}

/// Debian's kernel in a VM, up to a shell's checks.
fn linux() -> Scenario {
    Scenario::new("x86/linux", |context| {
        let mut machine = Machine::new(SKYLAKE, 1, "run=linux");
        machine.memory = LINUX_MEMORY;
        machine.timeout = LINUX_TIMEOUT;
        let linux = Linux::prepare("selfcheck")?;
        let transcript = machine.run(context, &linux.files())?;
        verdict::line_with(&transcript, "ravelin: the guest stopped: ")?;
        verdict::closes(&transcript, LINUX_CHECKS)
    })
}

/// What `make run-x86` starts, without a terminal: a shell that answers, `poweroff -f`, and status 0.
fn shell() -> Scenario {
    Scenario::new("x86/shell", |context| {
        let reply = |cue: &str, send: &str| Reply {
            cue: cue.into(),
            send: send.into(),
        };
        let folder = context.folder.join("machine");
        let transcript = process::run(&Run {
            program: std::env::current_exe()?,
            args: vec![
                "x86-run".into(),
                "--folder".into(),
                folder.display().to_string(),
            ],
            timeout: LINUX_TIMEOUT * context.patience,
            log: context.folder.join("console.log"),
            replies: vec![
                // Each line computes, so that what is typed is not taken for the answer.
                reply(PROMPT, "echo I am $((6 * 7))\n"),
                reply("I am 42", ""),
                reply(PROMPT, "poweroff -f\n"),
            ],
            stop_at: Vec::new(),
        })?;
        verdict::no_alarm(&transcript)?;
        verdict::line_with(&transcript, "I am 42")?;
        verdict::line_with(&transcript, "ravelin: the guest stopped: Halted")?;
        verdict::ended_well(&transcript)
    })
}

/// A CPU that lacks what the hypervisor needs: one line says what, and nothing runs.
fn refuses(model: &'static str, reason: &'static str) -> Scenario {
    Scenario::new(format!("x86/refuses/{model}"), move |context| {
        let transcript = Machine::new(model, 1, "run=checks").run(context, &[])?;
        verdict::fatal(&transcript, &[reason])
    })
}
