//! What a console must say for a scenario to pass. Silence, a time-out and an early exit never pass.

use crate::process::{End, Transcript};
use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeMap;

/// The last line of a machine that stays halted on purpose.
pub const HALTED: &str = "ravelin: halted";
/// Begins the one line that explains a boot that cannot go on.
pub const FATAL: &str = "ravelin: fatal: ";
/// Console text that is a failure wherever it stands (hypervisor, Linux).
const ALARMS: [&str; 6] = [
    "ravelin: PANIC",
    "ravelin: fatal",
    "Kernel panic",
    "Internal error: ",
    "------------[ cut here ]",
    "Unable to handle kernel",
];

/// The machine counted its own checks: its closing line says at least `at_least` passed and none failed, no line
/// says otherwise, and the machine then switched itself off (or halted, where `end` allows that).
///
/// # Errors
/// Says which of these is not so.
pub fn closes(transcript: &Transcript, at_least: u32) -> Result<()> {
    no_alarm(transcript)?;
    no_failed_check(transcript)?;
    match closings(transcript, "")[..] {
        [] => bail!(
            "no closing line (N passed, N failed){}",
            explain(&transcript.end)
        ),
        [(passed, 0)] => ensure!(
            passed >= at_least,
            "only {passed} checks ran, expected at least {at_least}"
        ),
        [(_, failed)] => bail!("{failed} checks failed"),
        _ => bail!(
            "{} closing lines: the machine ran more than once",
            closings(transcript, "").len()
        ),
    }
    ended_well(transcript)
}

/// Each guest counted its own checks, VM n of them at least `at_least[n - 1]`, and our host said that all of them
/// powered off, counted its own, and switched the machine off. With several VMs their lines begin with `[vmN] `.
///
/// # Errors
/// Says which of these is not so.
pub fn guests_close(transcript: &Transcript, at_least: &[u32]) -> Result<()> {
    no_alarm(transcript)?;
    no_failed_check(transcript)?;
    let mut unlabelled = closings(transcript, "");
    let host = unlabelled.pop();
    for (number, least) in (1..).zip(at_least) {
        let lines = if at_least.len() > 1 {
            closings(transcript, &format!("[vm{number}] "))
        } else {
            std::mem::take(&mut unlabelled)
        };
        guest_closed(&lines, *least)
            .with_context(|| format!("VM {number}{}", explain(&transcript.end)))?;
    }
    ensure!(
        matches!(host, Some((1.., 0))) && unlabelled.is_empty(),
        "no closing line of the host behind its guests'{}",
        explain(&transcript.end)
    );
    ended_well(transcript)
}

/// The closing lines that begin with `label`.
fn closings(transcript: &Transcript, label: &str) -> Vec<(u32, u32)> {
    let lines = transcript.lines.iter();
    lines
        .filter_map(|line| closing_line(line.strip_prefix(label)?))
        .collect()
}

fn guest_closed(closings: &[(u32, u32)], at_least: u32) -> Result<()> {
    match closings {
        [(passed, 0)] => ensure!(
            *passed >= at_least,
            "only {passed} checks ran, expected at least {at_least}"
        ),
        [(_, failed)] => bail!("{failed} checks failed"),
        lines => bail!("{} closing lines (N passed, N failed)", lines.len()),
    }
    Ok(())
}

fn no_failed_check(transcript: &Transcript) -> Result<()> {
    let mut lines = transcript.lines.iter();
    match lines.find(|line| line.contains(" FAILED")) {
        Some(line) => bail!("a check failed: {line}"),
        None => Ok(()),
    }
}

/// The machine switched itself off, or said that it halted.
///
/// # Errors
/// It was ended by its time limit, by too much output, or exited with a status that is not 0.
pub fn ended_well(transcript: &Transcript) -> Result<()> {
    match transcript.end {
        End::Exited(Some(0)) | End::Stopped => Ok(()),
        ref end => bail!("the machine did not switch itself off{}", explain(end)),
    }
}

/// No panic, no fatal error, no kernel warning.
///
/// # Errors
/// Gives the line.
pub fn no_alarm(transcript: &Transcript) -> Result<()> {
    match transcript
        .lines
        .iter()
        .find(|line| ALARMS.iter().any(|alarm| line.contains(alarm)))
    {
        Some(line) => bail!("alarm on the console: {line}"),
        None => Ok(()),
    }
}

/// Bad input: exactly one line `ravelin: fatal: ...` that contains one of `reasons`, then `ravelin: halted`.
///
/// # Errors
/// No such line, another reason, more than one line, or no halt after it.
pub fn fatal(transcript: &Transcript, reasons: &[&str]) -> Result<()> {
    let lines: Vec<_> = transcript
        .lines
        .iter()
        .filter_map(|line| line.strip_prefix(FATAL))
        .collect();
    let [line] = lines[..] else {
        bail!(
            "expected one line '{FATAL}...', found {}{}",
            lines.len(),
            explain(&transcript.end)
        );
    };
    ensure!(
        reasons.iter().any(|reason| line.contains(reason)),
        "the reason is '{line}', expected one of {reasons:?}"
    );
    ensure!(
        transcript.end == End::Stopped,
        "no line '{HALTED}' after it{}",
        explain(&transcript.end)
    );
    Ok(())
}

/// Some line contains `text`; returns the first.
///
/// # Errors
/// None does.
pub fn line_with<'a>(transcript: &'a Transcript, text: &str) -> Result<&'a str> {
    match transcript.lines.iter().find(|line| line.contains(text)) {
        Some(line) => Ok(line),
        None => bail!("no line with '{text}'{}", explain(&transcript.end)),
    }
}

/// The facts that the Linux host reports, lines `fact NAME=VALUE`.
#[must_use]
pub fn facts(transcript: &Transcript) -> BTreeMap<&str, &str> {
    let fact = |line| str::strip_prefix(line, "fact ")?.split_once('=');
    transcript
        .lines
        .iter()
        .filter_map(|line| fact(line))
        .collect()
}

/// `N passed, N failed`, alone on its line.
#[must_use]
pub fn closing_line(line: &str) -> Option<(u32, u32)> {
    let (passed, failed) = line
        .trim()
        .strip_suffix(" failed")?
        .split_once(" passed, ")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}

fn explain(end: &End) -> String {
    match end {
        End::Exited(Some(0)) => "; it switched itself off".into(),
        End::Exited(Some(code)) => format!("; the emulator exited with status {code}"),
        End::Exited(None) => "; the emulator was killed".into(),
        End::Stopped => "; it halted".into(),
        End::TimedOut => "; its time was up".into(),
        End::Flooded => "; it printed without end".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn transcript(text: &str, end: End) -> Transcript {
        Transcript {
            lines: text.lines().map(str::to_owned).collect(),
            end,
            elapsed: Duration::ZERO,
        }
    }

    const OFF: End = End::Exited(Some(0));

    #[test]
    fn closing_line_and_power_off_pass() {
        closes(&transcript("a ok\nb ok\n2 passed, 0 failed", OFF), 2).unwrap();
    }

    #[test]
    fn silence_fails() {
        assert!(closes(&transcript("", OFF), 0).is_err());
        assert!(closes(&transcript("", End::TimedOut), 0).is_err());
    }

    #[test]
    fn early_exit_fails() {
        let error = closes(&transcript("a ok", OFF), 1).unwrap_err();
        assert!(error.to_string().contains("switched itself off"));
    }

    #[test]
    fn hang_after_the_closing_line_fails() {
        assert!(closes(&transcript("1 passed, 0 failed", End::TimedOut), 1).is_err());
    }

    #[test]
    fn failing_emulator_fails() {
        assert!(closes(&transcript("1 passed, 0 failed", End::Exited(Some(1))), 1).is_err());
        assert!(closes(&transcript("1 passed, 0 failed", End::Exited(None)), 1).is_err());
    }

    #[test]
    fn lie_in_the_closing_line_fails() {
        assert!(closes(&transcript("a FAILED why\n1 passed, 0 failed", OFF), 1).is_err());
        assert!(
            closes(
                &transcript("ravelin: PANIC at x\n1 passed, 0 failed", OFF),
                1
            )
            .is_err()
        );
    }

    #[test]
    fn too_few_or_failed_or_repeated_fails() {
        assert!(closes(&transcript("1 passed, 0 failed", OFF), 2).is_err());
        assert!(closes(&transcript("1 passed, 1 failed", OFF), 1).is_err());
        assert!(
            closes(
                &transcript("1 passed, 0 failed\n1 passed, 0 failed", OFF),
                1
            )
            .is_err()
        );
    }

    #[test]
    fn closing_line_stands_alone() {
        assert_eq!(closing_line("12 passed, 3 failed"), Some((12, 3)));
        assert_eq!(closing_line("so 12 passed, 3 failed"), None);
        assert_eq!(closing_line("-1 passed, 0 failed"), None);
        assert_eq!(closing_line("1 passed, 0 failed!"), None);
    }

    #[test]
    fn fatal_needs_one_clear_line_and_a_halt() {
        let good = "ravelin: fatal: no device tree: x0 is 0x0\nravelin: halted";
        fatal(&transcript(good, End::Stopped), &["no device tree"]).unwrap();
        assert!(fatal(&transcript(good, End::Stopped), &["entered at EL1"]).is_err());
        assert!(fatal(&transcript(good, End::TimedOut), &["no device tree"]).is_err());
        assert!(fatal(&transcript("", End::TimedOut), &[""]).is_err());
        let twice = format!("{good}\n{good}");
        assert!(fatal(&transcript(&twice, End::Stopped), &["no device tree"]).is_err());
    }

    #[test]
    fn one_guest_closes_before_its_host() {
        guests_close(
            &transcript("6 passed, 0 failed\n1 passed, 0 failed", OFF),
            &[6],
        )
        .unwrap();
        for bad in [
            "1 passed, 0 failed",
            "5 passed, 0 failed\n1 passed, 0 failed",
            "6 passed, 1 failed\n1 passed, 0 failed",
            "6 passed, 0 failed\n6 passed, 0 failed\n1 passed, 0 failed",
            "6 passed, 0 failed\n0 passed, 1 failed",
            "6 passed, 0 failed\na FAILED\n1 passed, 0 failed",
        ] {
            assert!(guests_close(&transcript(bad, OFF), &[6]).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_guest_closes_under_its_own_label() {
        let good = "[vm2] 2 passed, 0 failed\n[vm1] 6 passed, 0 failed\n1 passed, 0 failed";
        guests_close(&transcript(good, OFF), &[6, 2]).unwrap();
        assert!(guests_close(&transcript(good, OFF), &[6, 3]).is_err());
        assert!(guests_close(&transcript(good, OFF), &[6, 2, 1]).is_err());
        assert!(guests_close(&transcript(good, End::TimedOut), &[6, 2]).is_err());
    }

    #[test]
    fn facts_are_read() {
        let transcript = transcript("fact a=1\nfact b=x=y\nother c=2", OFF);
        assert_eq!(
            facts(&transcript),
            BTreeMap::from([("a", "1"), ("b", "x=y")])
        );
    }
}
