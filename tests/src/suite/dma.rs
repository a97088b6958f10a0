//! DMA isolation: devices of the host and of a guest behind an SMMU, and what a machine without one says.

use super::shim::{SCENARIO_CHECKS, name};
use crate::emulate::Boot;
use crate::machine::{Clock, Machine, edu_args};
use crate::process::Transcript;
use crate::runner::Scenario;
use crate::smmu_trace::{self, Trace};
use crate::verdict;
use anyhow::{Context as _, Result, ensure};
use std::fs;

/// Devices: so many DMAs are on their way at a time.
const DEVICES: u32 = 16;
/// Checks of `shim.run=dma` with an SMMU, and without, where one of them is that there is none.
const CHECKS: u32 = 15;
const CHECKS_WITHOUT: u32 = 2;
/// Streams of the devices that VMs are given, and under which VMID: 00:01.0 is the guest's that drives it, 00:02.0
/// that of another VM. The host's VMID is 0.
const ASSIGNED: [(u32, u16); 2] = [(0x8, 1), (0x10, 2)];
/// Where a guest's memory begins.
const GUEST_RAM: u64 = 0x4000_0000;
/// Lines about refused DMA: a few per device, however many there were.
const MOST_LINES: usize = 40 * DEVICES as usize;

/// The host's and a guest's DMA, right and wrong.
pub(super) fn isolation(machine: Machine) -> Scenario {
    let kind = match machine.clock {
        Clock::Real => "dma",
        Clock::Instructions => "dma-repeatable",
    };
    behind_smmu(machine, kind, "shim.run=dma", CHECKS)
}

/// The same among all scenarios of our host, with calls about devices from every core after it.
pub(super) fn isolation_and_all(machine: Machine) -> Scenario {
    behind_smmu(
        machine,
        "dma-and-all",
        "shim.run=all",
        SCENARIO_CHECKS - 1 + CHECKS,
    )
}

fn behind_smmu(
    machine: Machine,
    kind: &'static str,
    arguments: &'static str,
    checks: u32,
) -> Scenario {
    let machine = machine.with_iommu();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, kind), move |context| {
        let file = context.folder.join("smmu.trace");
        let mut args = edu_args(DEVICES);
        args.extend(smmu_trace::args(&file.to_string_lossy()));
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let mut boot = Boot::shim(&machine, arguments);
        boot.extra = &args;
        let transcript = boot.run(context, "console")?;
        verdict::closes(&transcript, checks)?;
        refusals_are_told(&transcript)?;
        let trace = fs::read_to_string(&file).context("QEMU has written no trace")?;
        walks(&Trace::parse(&trace))
    })
    .for_cpus(cpus)
}

/// Without an SMMU nobody says that DMA is isolated.
pub(super) fn without(machine: Machine) -> Scenario {
    Scenario::new(name(&machine, "dma-not-isolated"), move |context| {
        let args = edu_args(2);
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let mut boot = Boot::shim(&machine, "shim.run=dma");
        boot.extra = &args;
        let transcript = boot.run(context, "console")?;
        verdict::line_with(&transcript, "DMA is not isolated")?;
        verdict::closes(&transcript, CHECKS_WITHOUT)
    })
}

/// EL2 has a line for some refusals, not for all of a storm.
fn refusals_are_told(transcript: &Transcript) -> Result<()> {
    let about = |whose: &str| {
        let lines = transcript.lines.iter();
        lines
            .filter(|line| {
                line.contains("smmu:") && line.contains("may not") && line.contains(whose)
            })
            .count()
    };
    let (host, vm) = (about(" of the host "), about(" of VM "));
    ensure!(
        host > 0 && vm > 0,
        "lines about refused DMA: {host} of the host's devices, {vm} of a VM's"
    );
    ensure!(host + vm <= MOST_LINES, "{} lines fill the log", host + vm);
    Ok(())
}

/// A VM's device was translated by its VM's tables, from one root, at its VM's addresses; all others by the host's.
fn walks(trace: &Trace) -> Result<()> {
    for (stream, vmid) in ASSIGNED {
        let its = trace.translations.get(&(stream, vmid));
        let its = its.with_context(|| format!("no translation carries VMID {vmid}"))?;
        ensure!(
            its.lowest >= GUEST_RAM,
            "a VM's tables translated {:#x}",
            its.lowest
        );
    }
    for (stream, vmid) in trace.translations.keys() {
        let known = *vmid == 0 || ASSIGNED.contains(&(*stream, *vmid));
        ensure!(known, "stream {stream:#x} was translated under VMID {vmid}");
    }
    for (vmid, roots) in &trace.roots {
        ensure!(roots.len() == 1, "VMID {vmid} has the roots {roots:#x?}");
    }
    ensure!(
        trace.untranslated.is_empty(),
        "DMA went past the SMMU: {:?}",
        trace.untranslated
    );
    Ok(())
}
