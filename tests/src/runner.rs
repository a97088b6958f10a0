//! Runs scenarios, two machines at a time, and reports one line for each.

use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
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

/// Runs those that the filter selects and prints one line for each, then `N passed, N failed`.
///
/// # Errors
/// The filter selects nothing: an empty run must not look like success.
pub fn run_all(scenarios: &[Scenario], options: &Options) -> Result<Report> {
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
    let failed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                while let Some(scenario) = selected.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !run_one(scenario, options, &slots) {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    let report = Report {
        passed: selected.len() - failed,
        failed,
    };
    println!("{} passed, {} failed", report.passed, report.failed);
    Ok(report)
}

fn run_one(scenario: &Scenario, options: &Options, slots: &Slots) -> bool {
    let _slot = slots.take(scenario.weight);
    let context = Context {
        folder: options.logs.join(&scenario.name),
        patience: options.patience,
    };
    let start = Instant::now();
    let prepared = std::fs::create_dir_all(&context.folder).map_err(anyhow::Error::from);
    let result = prepared.and_then(|()| (scenario.body)(&context));
    print(scenario, &context.folder, start.elapsed(), &result);
    result.is_ok()
}

/// One print call, so that lines of two workers do not mix.
fn print(scenario: &Scenario, folder: &Path, elapsed: Duration, result: &Result<()>) {
    let line = format!("{:<58} {:>6.1} s", scenario.name, elapsed.as_secs_f64());
    match result {
        Ok(()) => println!("ok      {line}"),
        Err(error) => println!("FAILED  {line}\n        {error:#}\n{}", last_lines(folder)),
    }
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
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
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
        *self
            .slots
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner) += self.count;
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
        let logs = tempfile::tempdir()?;
        let options = Options {
            jobs: 2,
            filter: filter.into(),
            patience: 1,
            logs: logs.path().into(),
        };
        run_all(scenarios, &options)
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
}
