//! How many instructions the boot takes, from reset to Linux's user space: bare, and under the hypervisor.
//!
//! QEMU's `-icount shift=0` lets virtual time pass by one nanosecond per instruction (and skips waits), so the
//! virtual counter that a program reads in user space counts instructions since reset: repeatable, and blind to
//! what caches and TLBs cost.

mod report;

use crate::emulate::{self, Boot};
use crate::machine::{Clock, Entry, Gic, Machine};
use crate::payload::{self, Payloads};
use crate::process::Transcript;
use crate::runner::Context;
use crate::{files, output, verdict};
use anyhow::{Context as _, Result, ensure};
use std::io::Write as _;
use std::process::ExitCode;

/// Most that the hypervisor may add to the boot, in per cent.
const TARGET_PERCENT: f64 = 2.0;
/// Most instructions of EL2's own boot on 1 GiB, copies of payloads excluded.
const TARGET_EL2_BOOT: u64 = 5_000_000;
/// Most memory that EL2 keeps: 2 MiB, and 0.2 % of RAM, in KiB.
const TARGET_RESIDENT_KIB: u64 = 2048 + MEMORY_MIB * 1024 / 500;
/// RAM of the measured machine, in MiB.
const MEMORY_MIB: u64 = 1024;
const NANOSECONDS: u64 = 1_000_000_000;

/// What was measured on one CPU model. All counts are instructions.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// QEMU's name of the CPU.
    pub cpu: &'static str,
    /// Reset to user space, Linux entered at EL1 on a machine without EL2.
    pub bare_el1: u64,
    /// Reset to user space, Linux entered at EL2 (it then uses EL2 itself).
    pub bare_el2: u64,
    /// Reset to user space with Linux as the hypervisor's host.
    pub under: u64,
    /// Of that, EL2's own boot, from its first instruction to entering the host.
    pub el2_boot: u64,
    /// Memory that EL2 keeps, in KiB.
    pub resident_kib: u64,
    /// How far a machine's boots are apart, in per cent of the least: of the three, the most.
    pub spread_percent: f64,
}

impl Measurement {
    /// What the hypervisor adds to a boot at EL1, in per cent.
    #[must_use]
    pub fn overhead_percent(&self) -> f64 {
        percent_more(self.bare_el1, self.under)
    }

    fn meets_targets(&self) -> bool {
        self.overhead_percent() < TARGET_PERCENT
            && self.el2_boot < TARGET_EL2_BOOT
            && self.resident_kib < TARGET_RESIDENT_KIB
    }
}

/// Measures, writes `docs/benchmarks/boot.md` and `boot.svg`, prints the table; a missed target is a failure.
///
/// # Errors
/// Something has not been built, or a machine did not get to user space.
pub fn run() -> Result<ExitCode> {
    let payloads = payload::prepare()?;
    let image = files::read(&emulate::ravelin_image(), "run `make build`")?;
    let measurements = ["max", "cortex-a76"]
        .iter()
        .map(|cpu| measure(cpu, &payloads))
        .collect::<Result<Vec<_>>>()?;
    let image_kib = image.len().div_ceil(1024);
    let text = report::markdown(&measurements, image_kib);
    write!(output::stdout(), "{text}")?;
    files::write(
        &files::root().join("docs/benchmarks/boot.md"),
        text.as_bytes(),
    )?;
    files::write(
        &files::root().join("docs/benchmarks/boot.svg"),
        report::svg(&measurements).as_bytes(),
    )?;
    let met = measurements.iter().all(Measurement::meets_targets);
    verdict(met)
}

/// Says whether all targets were met, in words and by the exit status.
pub(crate) fn verdict(met: bool) -> Result<ExitCode> {
    let (words, code) = if met {
        ("all targets met", ExitCode::SUCCESS)
    } else {
        ("a target was MISSED", ExitCode::FAILURE)
    };
    writeln!(output::stdout(), "\n{words}")?;
    Ok(code)
}

/// Linux's boot moves by some percent with where things lie in memory, bare or not: each machine is booted with
/// nine sizes of RAM (in MiB, the last one is the one that EL2's own figures are of), and the median counts.
const SIZES: [u32; 9] = [1152, 1136, 1120, 1104, 1088, 1072, 1056, 1040, 1024];

fn measure(cpu: &'static str, payloads: &Payloads) -> Result<Measurement> {
    let machine = Machine {
        clock: Clock::Instructions,
        ..Machine::virt(cpu, Gic::V3, 1)
    };
    let context = Context {
        folder: files::build("logs/bench-boot").join(cpu),
        patience: 1,
    };
    writeln!(
        output::stdout(),
        "{cpu}: booting bare at EL1, bare at EL2, and under the hypervisor, {} times each ...",
        SIZES.len()
    )?;
    let (mut bare_el1, mut bare_el2, mut under) = (Vec::new(), Vec::new(), Vec::new());
    let (mut el2_boot, mut resident_kib) = (0, 0);
    for size in SIZES {
        let machine = Machine {
            memory_mib: size,
            ..machine.clone()
        };
        let run = |boot: &Boot<'_>, log: &str| boot.run(&context, &format!("{log}-{size}"));
        let bare = Boot::linux_bare(&machine, payloads, "ticks");
        bare_el1.push(in_instructions(ticks(&run(&bare, "bare-el1")?)?));
        let mut at_el2 = Boot::linux_bare(&machine, payloads, "ticks");
        at_el2.machine = machine.entered_at(Entry::El2);
        bare_el2.push(in_instructions(ticks(&run(&at_el2, "bare-el2")?)?));
        let console = run(&Boot::linux_host(&machine, payloads, "ticks"), "under")?;
        let (total, frequency) = ticks(&console)?;
        under.push(in_instructions((total, frequency)));
        let el2 = number_after(verdict::line_with(&console, "ravelin: boot: ")?, "boot: ")?;
        el2_boot = in_instructions((el2, frequency));
        resident_kib = number_after(
            verdict::line_with(&console, "ravelin: memory: ")?,
            "memory: ",
        )?;
    }
    let spreads = [&bare_el1, &bare_el2, &under].map(|counts| spread_percent(counts));
    Ok(Measurement {
        cpu,
        spread_percent: spreads.into_iter().fold(0.0, f64::max),
        bare_el1: median(bare_el1),
        bare_el2: median(bare_el2),
        under: median(under),
        el2_boot,
        resident_kib,
    })
}

/// The middle one; the list is not empty.
pub(crate) fn median(mut counts: Vec<u64>) -> u64 {
    counts.sort_unstable();
    counts.get(counts.len() / 2).copied().unwrap_or(0)
}

/// How far the largest is above the smallest, in per cent of that.
fn spread_percent(counts: &[u64]) -> f64 {
    let (least, most) = (counts.iter().min(), counts.iter().max());
    percent_more(*least.unwrap_or(&1), *most.unwrap_or(&1))
}

/// Reads `ticks N of F Hz`.
pub(crate) fn ticks(transcript: &Transcript) -> Result<(u64, u64)> {
    verdict::no_alarm(transcript)?;
    // " of " tells it from EL2's own line about its boot.
    let ours = |line: &&String| line.starts_with("ticks ") && line.contains(" of ");
    let line = transcript
        .lines
        .iter()
        .find(ours)
        .context("no line 'ticks N of F Hz'")?;
    let (ticks, frequency) = (number_after(line, "ticks ")?, number_after(line, " of ")?);
    ensure!(frequency > 0, "the counter's frequency is 0");
    Ok((ticks, frequency))
}

/// One instruction takes one nanosecond of virtual time.
pub(crate) fn in_instructions((ticks, frequency): (u64, u64)) -> u64 {
    let instructions = u128::from(ticks) * u128::from(NANOSECONDS) / u128::from(frequency);
    u64::try_from(instructions).unwrap_or(u64::MAX)
}

fn number_after(line: &str, word: &str) -> Result<u64> {
    let rest = line
        .split_once(word)
        .with_context(|| format!("no '{word}' in '{line}'"))?
        .1;
    let digits = rest
        .split(|c: char| !c.is_ascii_digit())
        .next()
        .unwrap_or("");
    digits
        .parse()
        .with_context(|| format!("no number after '{word}' in '{line}'"))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a percentage of counts far below 2^52"
)]
fn percent_more(base: u64, other: u64) -> f64 {
    (other as f64 / base as f64 - 1.0) * 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_instructions_by_the_frequency() {
        assert_eq!(in_instructions((5, NANOSECONDS)), 5);
        assert_eq!(in_instructions((62_500_000, 62_500_000)), NANOSECONDS);
        assert_eq!(in_instructions((u64::MAX, 1)), u64::MAX);
    }

    #[test]
    fn numbers_are_found_behind_their_word() {
        assert_eq!(
            number_after("ravelin: boot: 123 ticks from entry to host", "boot: ").unwrap(),
            123
        );
        assert_eq!(
            number_after("ravelin: memory: 4096 KiB resident at 0x1..0x2", "memory: ").unwrap(),
            4096
        );
        assert!(number_after("boot: many ticks", "boot: ").is_err());
        assert!(number_after("nothing", "boot: ").is_err());
    }

    #[test]
    fn spread_is_from_the_least_to_the_most() {
        assert!((spread_percent(&[1020, 1000, 1030]) - 3.0).abs() < 1e-9);
        assert!(spread_percent(&[7]).abs() < 1e-9);
    }

    #[test]
    fn only_the_programs_own_line_is_read() {
        let text =
            "cmdline: ravelin.test=ticks x=1\nravelin: boot: 7 ticks from entry\nticks 12 of 3 Hz";
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let end = crate::process::End::Exited(Some(0));
        let mut transcript = Transcript {
            lines,
            end,
            elapsed: std::time::Duration::ZERO,
        };
        assert_eq!(ticks(&transcript).unwrap(), (12, 3));
        transcript.lines.pop();
        assert!(ticks(&transcript).is_err());
    }

    #[test]
    fn each_target_counts() {
        let good = Measurement {
            cpu: "max",
            bare_el1: 1000,
            bare_el2: 1000,
            under: 1019,
            el2_boot: 4_999_999,
            resident_kib: 4144,
            spread_percent: 4.0,
        };
        assert!(good.meets_targets());
        assert!(
            !Measurement {
                under: 1021,
                ..good.clone()
            }
            .meets_targets()
        );
        assert!(
            !Measurement {
                el2_boot: 5_000_000,
                ..good.clone()
            }
            .meets_targets()
        );
        assert!(
            !Measurement {
                resident_kib: 4146,
                ..good
            }
            .meets_targets()
        );
    }
}
