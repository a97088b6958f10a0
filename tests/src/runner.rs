//! Runs scenarios, two machines at a time, and reports one line for each.

use anyhow::{Result, ensure};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines of the console that a failure shows.
const LAST_LINES: usize = 15;

/// What a scenario does.
type Body = Box<dyn Fn(&Context) -> Result<()> + Send + Sync>;

/// One thing to try. Its body passes by returning `Ok`; everything it needs, it prepares itself.
pub struct Scenario {
    /// `suite/what/on-what`, unique.
    pub name: String,
    /// Emulated CPUs beyond what one host core carries: how many of the runner's slots it takes (1 or more).
    pub weight: usize,
    body: Body,
}

impl std::fmt::Debug for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scenario")
            .field("name", &self.name)
            .field("weight", &self.weight)
            .finish_non_exhaustive()
    }
}

/// What a scenario's body is given.
#[derive(Debug)]
pub struct Context {
    /// Folder of its own for logs and files that it makes.
    pub folder: PathBuf,
    /// Factor on all time limits.
    pub patience: u32,
}

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Slots: how many machines at a time (1 or more).
    pub jobs: usize,
    /// Only scenarios whose name contains this.
    pub filter: String,
    /// Factor on all time limits, for slow machines.
    pub patience: u32,
    /// Folder for the scenarios' folders.
    pub logs: PathBuf,
}

/// What came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Scenarios that passed.
    pub passed: usize,
    /// Scenarios that failed.
    pub failed: usize,
}

impl Scenario {
    /// A scenario of one slot.
    pub fn new(
        name: impl Into<String>,
        body: impl Fn(&Context) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            weight: 1,
            body: Box::new(body),
        }
    }

    /// The same, taking as many slots as a machine with `cpus` CPUs should.
    #[must_use]
    pub fn for_cpus(mut self, cpus: u32) -> Self {
        self.weight = if cpus > 4 { 2 } else { 1 };
        self
    }
}

/// Runs those that the filter selects and writes one line for each to `out`, with how many have ended by then; at the
/// end the names of those that failed, and `N passed, N failed`.
///
/// # Errors
/// The filter selects nothing: an empty run must not look like success. Or `out` can't be written: no further scenario
/// is begun then, and those that run come to their end.
pub fn run_all(
    scenarios: &[Scenario],
    options: &Options,
    out: &mut (impl Write + Send),
) -> Result<Report> {
    let selected: Vec<_> = scenarios
        .iter()
        .filter(|s| s.name.contains(&options.filter))
        .collect();
    ensure!(
        !selected.is_empty(),
        "no scenario's name contains '{}': see --list",
        options.filter
    );
    let slots = Slots::new(options.jobs.max(1));
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Results::new(selected.len(), out));
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                while locked(&results).written.is_ok()
                    && let Some(scenario) = selected.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let outcome = run_one(scenario, options, &slots);
                    locked(&results).add(&outcome);
                }
            });
        }
    });
    let results = results.into_inner();
    results.unwrap_or_else(PoisonError::into_inner).close()
}

fn run_one<'a>(scenario: &'a Scenario, options: &Options, slots: &Slots) -> Outcome<'a> {
    let _slot = slots.take(scenario.weight);
    let context = Context {
        folder: options.logs.join(&scenario.name),
        patience: options.patience,
    };
    let start = Instant::now();
    let prepared = std::fs::create_dir_all(&context.folder).map_err(anyhow::Error::from);
    let result = prepared.and_then(|()| (scenario.body)(&context));
    Outcome {
        name: &scenario.name,
        elapsed: start.elapsed(),
        failure: result
            .err()
            .map(|error| format!("        {error:#}\n{}\n", last_lines(&context.folder))),
    }
}

/// How one scenario went.
struct Outcome<'a> {
    name: &'a str,
    elapsed: Duration,
    /// Lines that say why it failed.
    failure: Option<String>,
}

/// What has come out so far. One worker at a time has it, so that lines of two do not mix.
struct Results<'a, W> {
    total: usize,
    ended: usize,
    failed: Vec<&'a str>,
    out: &'a mut W,
    written: std::io::Result<()>,
}

impl<'a, W: Write> Results<'a, W> {
    fn new(total: usize, out: &'a mut W) -> Self {
        Self {
            total,
            ended: 0,
            failed: Vec::new(),
            out,
            written: Ok(()),
        }
    }

    fn add(&mut self, outcome: &Outcome<'a>) {
        self.ended += 1;
        let (verdict, why) = match &outcome.failure {
            None => ("ok", ""),
            Some(why) => {
                self.failed.push(outcome.name);
                ("FAILED", why.as_str())
            }
        };
        let (name, seconds) = (outcome.name, outcome.elapsed.as_secs_f64());
        let (ended, total) = (self.ended, self.total);
        let width = total.to_string().len();
        self.write(&format!(
            "{verdict:<6}  {name:<58} {seconds:>6.1} s  {ended:>width$} of {total}\n{why}"
        ));
    }

    /// The closing lines. Those that failed may have scrolled by long before.
    fn close(mut self) -> Result<Report> {
        let failed = std::mem::take(&mut self.failed);
        let report = Report {
            passed: self.ended - failed.len(),
            failed: failed.len(),
        };
        for name in failed {
            self.write(&format!("failed: {name}\n"));
        }
        self.write(&format!(
            "{} passed, {} failed\n",
            report.passed, report.failed
        ));
        self.written?;
        Ok(report)
    }

    fn write(&mut self, text: &str) {
        if self.written.is_ok() {
            self.written = self.out.write_all(text.as_bytes());
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The end of the newest log in the scenario's folder.
fn last_lines(folder: &Path) -> String {
    let logs = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let logs = logs.filter(|path| path.extension().is_some_and(|e| e == "log"));
    let Some(newest) = logs.max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok())
    else {
        return String::new();
    };
    let text = std::fs::read(&newest).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let tail = lines
        .iter()
        .skip(lines.len().saturating_sub(LAST_LINES))
        .map(|line| format!("        | {}\n", line.trim_end()));
    format!(
        "        last lines of {}:\n{}",
        newest.display(),
        tail.collect::<String>()
    )
}

/// A counting semaphore.
struct Slots {
    total: usize,
    free: Mutex<usize>,
    freed: Condvar,
}

struct Slot<'a> {
    slots: &'a Slots,
    count: usize,
}

impl Slots {
    fn new(total: usize) -> Self {
        Self {
            total,
            free: Mutex::new(total),
            freed: Condvar::new(),
        }
    }

    /// Waits until `count` slots (at most all) are free.
    fn take(&self, count: usize) -> Slot<'_> {
        let count = count.min(self.total);
        let mut free = locked(&self.free);
        while *free < count {
            free = self
                .freed
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *free -= count;
        Slot { slots: self, count }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *locked(&self.slots.free) += self.count;
        self.slots.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{self, Run};
    use crate::verdict;

    /// Two at a time, those that `filter` selects; their logs go with them.
    fn run(scenarios: &[Scenario], filter: &str) -> Result<Report> {
        run_into(scenarios, filter, 2, &mut std::io::sink())
    }

    fn run_into(
        scenarios: &[Scenario],
        filter: &str,
        jobs: usize,
        out: &mut (impl Write + Send),
    ) -> Result<Report> {
        let logs = tempfile::tempdir()?;
        let options = Options {
            jobs,
            filter: filter.into(),
            patience: 1,
            logs: logs.path().into(),
        };
        run_all(scenarios, &options, out)
    }

    /// A scenario whose "emulator" is a shell script.
    fn fake(name: &str, script: &'static str) -> Scenario {
        Scenario::new(name, move |context| {
            let run = Run {
                program: "/bin/sh".into(),
                args: vec!["-c".into(), script.into()],
                timeout: Duration::from_secs(4),
                log: context.folder.join("console.log"),
                replies: Vec::new(),
                stop_at: vec![verdict::HALTED.into()],
            };
            verdict::closes(&process::run(&run)?, 2)
        })
    }

    #[test]
    fn only_the_honest_machine_passes() {
        let scenarios = [
            fake(
                "honest",
                "echo 'a ok'; echo 'b ok'; echo '2 passed, 0 failed'",
            ),
            fake("silent", "true"),
            fake("hangs", "echo 'a ok'; exec sleep 60"),
            fake(
                "hangs-at-the-end",
                "echo '2 passed, 0 failed'; exec sleep 60",
            ),
            fake("lies", "echo 'a FAILED no'; echo '2 passed, 0 failed'"),
            fake("early", "echo 'a ok'; exit 0"),
            fake("crashes", "echo '2 passed, 0 failed'; kill -SEGV $$"),
            fake("too-few", "echo '1 passed, 0 failed'"),
        ];
        let report = run(&scenarios, "").unwrap();
        assert_eq!(
            report,
            Report {
                passed: 1,
                failed: 7
            }
        );
    }

    #[test]
    fn filter_selects_and_an_empty_selection_is_an_error() {
        let scenarios = [
            fake("one", "echo '2 passed, 0 failed'"),
            fake("two", "false"),
        ];
        assert_eq!(
            run(&scenarios, "one").unwrap(),
            Report {
                passed: 1,
                failed: 0
            }
        );
        assert!(run(&scenarios, "three").is_err());
    }

    #[test]
    fn heavy_scenarios_run_alone() {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        let heavy = |name: &str| {
            Scenario::new(name, |_| {
                ensure!(RUNNING.fetch_add(1, Ordering::SeqCst) == 0, "two at a time");
                std::thread::sleep(Duration::from_millis(50));
                RUNNING.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            })
            .for_cpus(8)
        };
        let scenarios = [heavy("a"), heavy("b"), heavy("c")];
        assert_eq!(run(&scenarios, "").unwrap().failed, 0);
    }

    /// A scenario that does nothing but end so.
    fn plain(name: &str, passes: bool) -> Scenario {
        Scenario::new(name, move |_| {
            ensure!(passes, "as asked");
            Ok(())
        })
    }

    #[test]
    fn each_line_says_how_many_have_ended() {
        let scenarios: Vec<_> = (1..=10).map(|n| plain(&format!("n{n}"), true)).collect();
        let mut out = Vec::new();
        run_into(&scenarios, "", 1, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 11, "{text}");
        assert!(lines[0].starts_with("ok      n1 ") && lines[0].ends_with(" s   1 of 10"));
        assert!(lines[9].starts_with("ok      n10 ") && lines[9].ends_with(" s  10 of 10"));
        assert_eq!(lines[10], "10 passed, 0 failed");
    }

    #[test]
    fn what_failed_is_named_again_before_the_closing_line() {
        let scenarios = [plain("a", true), plain("b", false), plain("c", true)];
        let mut out = Vec::new();
        run_into(&scenarios, "", 1, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("\n        as asked\n"), "{text}");
        assert!(
            text.ends_with("3 of 3\nfailed: b\n2 passed, 1 failed\n"),
            "{text}"
        );
    }

    #[test]
    fn nothing_more_is_begun_when_nobody_reads() {
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        let count = |name: &str| {
            Scenario::new(name, |_| {
                BEGUN.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
        };
        let (reader, mut writer) = std::io::pipe().unwrap();
        drop(reader);
        let scenarios = [count("a"), count("b"), count("c")];
        assert!(run_into(&scenarios, "", 1, &mut writer).is_err());
        assert_eq!(BEGUN.load(Ordering::SeqCst), 1);
    }
}
