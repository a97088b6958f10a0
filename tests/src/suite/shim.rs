//! Our own host: its scenarios, its report, and EL2's panics on purpose.

use crate::emulate::{self, Boot};
use crate::machine::{Board, Gic, Machine};
use crate::process::Reply;
use crate::runner::{Context, Scenario};
use crate::symbolise::{Symboliser, frame_offset};
use crate::verdict;
use anyhow::{Result, ensure};
use std::time::Duration;

/// Checks that `shim.run=all` makes at least, on a machine without an IOMMU.
pub(super) const SCENARIO_CHECKS: u32 = 105;
/// Checks of a machine that is given nothing to run.
const REPORT_CHECKS: u32 = 2;
/// Refused accesses of the host that EL2 says at its usual level.
const REFUSALS_SAID: usize = 16;
/// Wall-clock limit of the soak: half a million calls and accesses on an emulator.
const SOAK: Duration = Duration::from_secs(2 * 60 * 60);
/// Frames of a panic's backtrace that must have a function's name.
const NAMED_FRAMES: usize = 3;

/// `BOARD/KIND/CPU/GIC/smpN`.
pub(super) fn name(machine: &Machine, kind: &str) -> String {
    let gic = match machine.gic {
        Gic::V2 => "gicv2",
        Gic::V3 => "gicv3",
    };
    match machine.board {
        Board::Virt => format!("virt/{kind}/{}/{gic}/smp{}", machine.cpu, machine.cpus),
        Board::Raspi4b => format!("raspi4b/{kind}"),
    }
}

/// All scenarios of our host on this machine.
pub(super) fn all(machine: Machine) -> Scenario {
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "shim"), move |context| {
        let transcript = Boot::shim(&machine, "shim.run=all").run(context, "console")?;
        boots(&transcript)?;
        names_owners(&transcript)?;
        verdict::closes(&transcript, SCENARIO_CHECKS)
    })
    .for_cpus(cpus)
}

/// Attacks from every core for as long as it takes.
pub(super) fn soak(machine: Machine) -> Scenario {
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "soak"), move |context| {
        let mut boot = Boot::shim(&machine, "shim.run=soak");
        boot.timeout = SOAK;
        let transcript = boot.run(context, "console")?;
        boots(&transcript)?;
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

/// Nothing to run: the report, and the guest that is linked in, which is answered.
pub(super) fn demo(machine: Machine) -> Scenario {
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "demo"), move |context| {
        let mut boot = Boot::shim(&machine, "");
        boot.replies = vec![Reply {
            cue: "Who are you? ".into(),
            send: "Ada\r".into(),
        }];
        let transcript = boot.run(context, "console")?;
        boots(&transcript)?;
        let vcpus = machine.cpus.min(4);
        verdict::line_with(&transcript, &format!("CPUs: {vcpus} came up"))?;
        verdict::line_with(&transcript, "Nice to meet you, Ada.")?;
        verdict::closes(&transcript, REPORT_CHECKS)
    })
    .for_cpus(cpus)
}

/// EL2 says how long its boot took and what it keeps.
fn boots(transcript: &crate::process::Transcript) -> Result<()> {
    verdict::line_with(transcript, "ravelin: boot: ")?;
    verdict::line_with(transcript, "ravelin: memory: ")?;
    Ok(())
}

/// Of the thousands of accesses that were refused EL2 has said the first ones, with address and owner.
fn names_owners(transcript: &crate::process::Transcript) -> Result<()> {
    verdict::line_with(transcript, ": EL2's; PC 0x")?;
    let said = transcript
        .lines
        .iter()
        .filter(|line| {
            line.contains("host: ") && line.contains(" refused (") && line.contains(", IPA 0x")
        })
        .count();
    ensure!(
        said == REFUSALS_SAID,
        "{said} lines about refused accesses, {REFUSALS_SAID} expected"
    );
    Ok(())
}

/// EL2 panics on purpose: a complete block, a halt, and a backtrace that can be read.
pub(super) fn self_test(machine: Machine, kind: &'static str) -> Scenario {
    Scenario::new(
        name(&machine, &format!("self-test-{kind}")),
        move |context| {
            let boot = Boot::shim(&machine, "").chosen(context, &[("ravelin,self-test", kind)])?;
            let transcript = boot.run(context, "console")?;
            let count = transcript
                .lines
                .iter()
                .filter(|line| line.contains("ravelin: PANIC"))
                .count();
            ensure!(count == 1, "expected one panic, found {count}");
            ensure!(
                transcript.end == crate::process::End::Stopped,
                "no line '{}' after the panic",
                verdict::HALTED
            );
            ensure!(
                transcript
                    .lines
                    .iter()
                    .all(|line| verdict::closing_line(line).is_none()),
                "the host ran on after the panic"
            );
            if kind != "panic" {
                // An exception: the block has the syndrome and where it happened.
                for register in ["ESR", "FAR", "ELR"] {
                    verdict::line_with(&transcript, register)?;
                }
            }
            let frames = named_frames(&transcript.lines)?;
            ensure!(
                frames.len() >= NAMED_FRAMES,
                "only {} frames of the backtrace have a name",
                frames.len()
            );
            let culprit = frames
                .iter()
                .any(|frame| frame.contains("self_test") && frame.contains(".rs:"));
            ensure!(
                culprit,
                "no frame names the self-test's function and line: {frames:?}"
            );
            Ok(())
        },
    )
}

/// Function and line of each frame that has them.
fn named_frames(lines: &[String]) -> Result<Vec<String>> {
    let symboliser = Symboliser::open(&emulate::ravelin_elf())?;
    let offsets = lines.iter().filter_map(|line| frame_offset(line));
    Ok(offsets
        .filter_map(|offset| symboliser.describe(offset))
        .collect())
}

/// The level set in `/chosen` changes how much EL2 says, and does not change what the host finds.
pub(super) fn log_levels(machine: Machine) -> Scenario {
    Scenario::new(name(&machine, "log-levels"), move |context| {
        let said = |level: &str| lines_at(&machine, context, level);
        let (off, info, trace) = (said("off")?, said("info")?, said("trace")?);
        ensure!(
            off < info && info < trace,
            "lines by EL2: off {off}, info {info}, trace {trace}"
        );
        Ok(())
    })
}

fn lines_at(machine: &Machine, context: &Context, level: &str) -> Result<usize> {
    let boot = Boot::shim(machine, "").chosen(context, &[("ravelin,log-level", level)])?;
    let transcript = boot.run(context, level)?;
    verdict::closes(&transcript, REPORT_CHECKS)?;
    Ok(transcript
        .lines
        .iter()
        .filter(|line| line.starts_with("ravelin: "))
        .count())
}
