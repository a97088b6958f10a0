//! Linux as host: its own checks, the comparison with the bare machine, reset and shell.

use super::pci_disks::{disks_of_zeros, isolated};
use super::shim::name;
use crate::emulate::Boot;
use crate::machine::Machine;
use crate::payload::Payloads;
use crate::process::{Reply, Transcript};
use crate::runner::Scenario;
use crate::verdict;
use anyhow::{Context as _, Result, ensure};
use std::sync::Arc;

/// Checks that do not depend on the number of CPUs: CPUs online, kernel log, EL2's memory (3 and 8 accesses).
const FIXED_CHECKS: u32 = 13;
/// Facts that the hypervisor must not change.
const SAME_FACTS: [&str; 8] = [
    "features",
    "cores",
    "online",
    "devices",
    "amba",
    "pci",
    "interrupts",
    "clock",
];
/// How far the loss of free memory may be from the size of EL2's range, in KiB: Linux's page descriptors for it, and
/// QEMU's device tree, which is padded to 1 MiB where the host's is not.
const MEMORY_SLACK_KIB: u64 = 2048;

/// Linux checks itself; what it sees is what a bare boot of the same machine sees, less EL2's memory.
pub(super) fn selfcheck(machine: Machine, payloads: &Arc<Payloads>) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "linux"), move |context| {
        let bare = Boot::linux_bare(&machine, &payloads, "facts").run(context, "bare")?;
        verdict::closes(&bare, 1).context("bare, without the hypervisor")?;
        let host = Boot::linux_host(&machine, &payloads, "selfcheck").run(context, "host")?;
        verdict::closes(&host, expected_checks(machine.cpus))?;
        compare(&bare, &host)
    })
    .for_cpus(cpus)
}

/// One tick check for each CPU, and two for each of the three rounds of hotplug where there is more than one.
fn expected_checks(cpus: u32) -> u32 {
    FIXED_CHECKS + cpus + if cpus > 1 { 6 } else { 0 }
}

fn compare(bare: &Transcript, host: &Transcript) -> Result<()> {
    let (bare, host) = (verdict::facts(bare), verdict::facts(host));
    for fact in SAME_FACTS {
        let (a, b) = (bare.get(fact).context(fact)?, host.get(fact).context(fact)?);
        let (mut a, mut b) = (without_psci(a), without_psci(b));
        if fact == "interrupts" && a.contains("vgic") {
            (a, b) = (without_kvm(&a), without_kvm(&b));
        }
        ensure!(
            a == b,
            "{fact} differ: bare '{a}', under the hypervisor '{b}'"
        );
    }
    let number = |facts: &std::collections::BTreeMap<&str, &str>,
                  name: &'static str|
     -> Result<u64> { facts.get(name).context(name)?.parse().context(name) };
    let el2 = number(&host, "el2-kib")?;
    let lost = |name| -> Result<u64> {
        let (without, with) = (number(&bare, name)?, number(&host, name)?);
        without
            .checked_sub(with)
            .with_context(|| format!("the host has more {name} than the bare machine"))
    };
    let (ram, free) = (lost("ram-kib")?, lost("memory-kib")?);
    ensure!(
        ram == el2,
        "Linux finds {ram} KiB less RAM, EL2 keeps {el2} KiB"
    );
    ensure!(
        free.abs_diff(el2) <= MEMORY_SLACK_KIB,
        "Linux has {free} KiB less to use, EL2 keeps {el2} KiB"
    );
    Ok(())
}

/// PSCI is the one device that the host may have and the bare machine not: a Pi 4 starts its CPUs by spin table.
fn without_psci(list: &str) -> String {
    list.split(' ')
        .filter(|device| *device != "psci")
        .collect::<Vec<_>>()
        .join(" ")
}

/// A bare Linux that is entered at EL2 (raspi4b has no other way) keeps EL2's timer and interrupt for KVM: it names
/// the interrupt controller after that, and its own timer is another one. All other interrupts must be the same.
fn without_kvm(interrupts: &str) -> String {
    const KVM: [&str; 3] = ["vgic", "kvm guest", "arch_timer"];
    let ours = |entry: &&str| !KVM.iter().any(|word| entry.contains(word));
    let entries: Vec<_> = interrupts.split(';').map(str::trim).filter(ours).collect();
    entries.join(";").replace("GICv2 ", "GIC-0 ")
}

/// PSCI SYSTEM_RESET: the machine, told not to start again, ends; EL2's log tells a reset from a power-off.
pub(super) fn reset(machine: Machine, payloads: &Arc<Payloads>) -> Scenario {
    let payloads = Arc::clone(payloads);
    Scenario::new(name(&machine, "linux-reset"), move |context| {
        let mut boot = Boot::linux_host(&machine, &payloads, "reboot");
        boot.extra = &["-action", "reboot=shutdown"];
        let transcript = boot
            .chosen(context, &[("ravelin,log-level", "debug")])?
            .run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        verdict::line_with(&transcript, "reboot: Restarting system")?;
        verdict::line_with(&transcript, "ravelin: DEBUG: system reset")?;
        verdict::ended_well(&transcript)
    })
}

/// What a person gets from `make run HOST=linux`: a shell, whose `poweroff` ends the machine.
pub(super) fn shell(machine: Machine, payloads: &Arc<Payloads>) -> Scenario {
    let payloads = Arc::clone(payloads);
    Scenario::new(name(&machine, "linux-shell"), move |context| {
        let mut boot = Boot::linux_host(&machine, &payloads, "");
        let type_after = |cue: &str, send: &str| Reply {
            cue: cue.into(),
            send: send.into(),
        };
        boot.replies = vec![
            type_after("/ # ", "echo $((6 * 7)) CPUs $(nproc)\n"),
            type_after("/ # ", "poweroff\n"),
        ];
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        let answer = format!("42 CPUs {}", machine.cpus);
        ensure!(
            transcript.lines.iter().any(|line| line.trim() == answer),
            "the shell did not answer '{answer}'"
        );
        verdict::ended_well(&transcript)
    })
}

/// Queues of each disk.
const QUEUES: u32 = 4;

/// File systems on virtio disks behind the IOMMU, all used at once: what Linux wrote is what it reads after another mount,
/// and what the disks then hold.
pub(super) fn disks(machine: Machine, payloads: &Arc<Payloads>, count: u8) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(
        name(&machine, &format!("linux-disks-{count}")),
        move |context| {
            let payloads = payloads.with_file_system(&context.folder)?;
            let disks = disks_of_zeros(context, &(1..=count).collect::<Vec<_>>())?;
            let mut boot = Boot::linux_host(&machine, &payloads, "disks");
            boot.software.arguments += &format!(" ravelin.disks={count}");
            let args = disks.args(QUEUES);
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            boot.extra = &args;
            let transcript = boot.run(context, "console")?;
            isolated(&transcript)?;
            verdict::line_with(&transcript, "fact iommu-groups=0")?;
            verdict::closes(&transcript, 2 * u32::from(count) + 2)?;
            disks.hold(b": kept by a disk of el2")
        },
    )
    .for_cpus(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_kvm_adds_is_left_out_of_the_interrupts() {
        let bare = " GICv2 153 Level uart; GICv2 25 Level vgic; GICv2 27 Level kvm guest vtimer; GICv2 30 Level arch_timer;";
        let host = " GIC-0 153 Level uart; GIC-0 27 Level arch_timer;";
        assert_eq!(without_kvm(bare), without_kvm(host));
        assert_ne!(without_kvm(bare), without_kvm(" GIC-0 154 Level uart;"));
    }
}
