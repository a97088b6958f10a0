//! The results as a table and as a plot.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::path::Path;
use std::time::Duration;

use criterion::Criterion;

use crate::Case;
use crate::stage2_memory::Counts;
use crate::stage2_ours::{Work, counted};

/// One row: the same work done by several.
pub struct Row {
    pub name: &'static str,
    entries: u64,
    counts: Option<fn() -> Counts>,
    least: u64,
    cases: Vec<(&'static str, Case)>,
}

impl Row {
    pub fn of<W: Work>(name: &'static str, entries: u64) -> Self {
        Self {
            counts: Some(counted::<W>),
            ..Self::uncounted(name, entries)
        }
    }

    pub fn uncounted(name: &'static str, entries: u64) -> Self {
        Self {
            name,
            entries,
            counts: None,
            least: 0,
            cases: Vec::new(),
        }
    }

    /// With the least number of entries that the work must look at: each on the way to what
    /// changes, once, and each that changes, as what it says decides about its maintenance.
    pub const fn at_least(mut self, visits: u64) -> Self {
        self.least = visits;
        self
    }

    pub fn case(mut self, name: &'static str, case: Case) -> Self {
        self.cases.push((name, case));
        self
    }

    pub fn find(&self, name: &str) -> Option<Case> {
        self.cases
            .iter()
            .find(|(case, _)| *case == name)
            .map(|(_, run)| *run)
    }
}

const CASES: usize = 5;
const COLUMNS: [&str; CASES] = ["ours", "aarch64-paging", "multiarch", "x86_64", "floor"];
const COLOURS: [&str; CASES] = ["#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d96a3"];

/// Nanoseconds of each case, in the order of [`COLUMNS`], and what ours asks of the machine.
struct Measured {
    name: &'static str,
    entries: u64,
    times: [Option<f64>; CASES],
    counts: Option<Counts>,
    least: u64,
}

pub struct Report(Vec<Measured>);

/// Runs a case under criterion. Returns nanoseconds of its fastest run: on a machine that others
/// use, too, noise only ever adds.
fn run(harness: &mut Criterion, row: &str, name: &str, case: Case) -> f64 {
    let best = Cell::new(Duration::MAX);
    let timed = || {
        let time = case();
        best.set(best.get().min(time));
        time
    };
    harness.bench_function(&format!("{row}/{name}"), |bencher| {
        bencher.iter_custom(|runs| (0..runs).map(|_| timed()).sum());
    });
    best.get().as_nanos() as f64
}

impl Report {
    pub fn measure(rows: &[Row], mut harness: Criterion) -> Self {
        Self::of(rows, |row, column| {
            let case = row.find(column)?;
            Some(run(&mut harness, row.name, column, case))
        })
    }

    /// Without times.
    pub fn count(rows: &[Row]) -> Self {
        Self::of(rows, |_, _| None)
    }

    fn of(rows: &[Row], mut time: impl FnMut(&Row, &str) -> Option<f64>) -> Self {
        let of = |row: &Row| Measured {
            name: row.name,
            entries: row.entries,
            times: COLUMNS.map(|column| time(row, column)),
            counts: row.counts.map(|counts| counts()),
            least: row.least,
        };
        Self(rows.iter().map(of).collect())
    }

    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::write(folder.join("stage2-results.md"), self.to_string())?;
        std::fs::write(folder.join("stage2.svg"), self.plot().unwrap_or_default())
    }

    /// Bars relative to ours, on a logarithmic scale.
    fn plot(&self) -> Result<String, fmt::Error> {
        let rows: Vec<_> = self
            .0
            .iter()
            .filter(|row| row.times[1..].iter().any(Option::is_some))
            .collect();
        let height = rows.len() * 92 + 60;
        let mut svg = String::new();
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" font-family="sans-serif" font-size="12">"#
        )?;
        writeln!(
            svg,
            r#"<rect width="100%" height="100%" fill="white"/><text x="10" y="20">time for the same work, ours = 1 (shorter is better, logarithmic)</text>"#
        )?;
        for (n, Measured { name, times, .. }) in rows.iter().enumerate() {
            let top = 40 + n * 92;
            writeln!(svg, r#"<text x="10" y="{}">{name}</text>"#, top + 14)?;
            let ours = times[0].unwrap_or(1.0);
            let present = times
                .iter()
                .enumerate()
                .filter_map(|(c, t)| t.map(|t| (c, t)));
            for (place, (column, time)) in present.enumerate() {
                let ratio = time / ours;
                let width = ((ratio.log2() + 4.0).max(0.1)) * 40.0;
                let y = top + place * 17;
                writeln!(
                    svg,
                    r#"<rect x="130" y="{y}" width="{width:.0}" height="13" fill="{}"/>"#,
                    COLOURS[column]
                )?;
                writeln!(
                    svg,
                    r#"<text x="{:.0}" y="{}">{} {ratio:.2}</text>"#,
                    136.0 + width,
                    y + 11,
                    COLUMNS[column]
                )?;
            }
        }
        svg.push_str("</svg>\n");
        Ok(svg)
    }
}

impl Report {
    fn times(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = COLUMNS.map(|c| format!("{c}, µs")).join(" | ");
        writeln!(f, "| row | entries | {columns} | best peer / ours |")?;
        writeln!(f, "|---|{}", "---:|".repeat(CASES + 2))?;
        for Measured {
            name,
            entries,
            times,
            ..
        } in &self.0
        {
            let cell = |t: &Option<f64>| t.map_or("—".into(), |t| format!("{:.2}", t / 1000.0));
            let peers = times[1..CASES - 1].iter().flatten().copied();
            let ratio = times[0]
                .zip(peers.reduce(f64::min))
                .map_or("—".into(), |(o, p)| format!("{:.2}", p / o));
            let cells = times.each_ref().map(cell).join(" | ");
            writeln!(f, "| {name} | {entries} | {cells} | {ratio} |")?;
        }
        Ok(())
    }

    fn counts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Counts::NAMES.join(" | ");
        writeln!(f, "\n| row | {names} | entries to visit at least |")?;
        writeln!(f, "|---|{}", "---:|".repeat(Counts::NAMES.len() + 1))?;
        for row in &self.0 {
            if let Some(counts) = &row.counts {
                let cells = counts.values().map(|n| n.to_string()).join(" | ");
                writeln!(f, "| {} | {cells} | {} |", row.name, row.least)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.times(f)?;
        self.counts(f)
    }
}
