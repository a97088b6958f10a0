//! The results as a table and as a plot.

use std::fmt::{self, Write};
use std::path::Path;
use std::time::Duration;

use crate::Case;

/// One row: the same work done by several.
pub struct Row {
    pub name: &'static str,
    entries: u64,
    cases: Vec<(&'static str, Case)>,
}

impl Row {
    pub fn new(name: &'static str, entries: u64, cases: &[(&'static str, Case)]) -> Self {
        Self {
            name,
            entries,
            cases: cases.to_vec(),
        }
    }

    pub fn case(&self, name: &str) -> Option<Case> {
        self.cases
            .iter()
            .find(|(case, _)| *case == name)
            .map(|(_, run)| *run)
    }
}

const COLUMNS: [&str; 4] = ["ours", "aarch64-paging", "multiarch", "floor"];
const COLOURS: [&str; 4] = ["#1b6ca8", "#d1495b", "#edae49", "#8d96a3"];

/// Nanoseconds of each case, in the order of [`COLUMNS`].
pub struct Report(Vec<(&'static str, u64, [Option<f64>; 4])>);

impl Report {
    pub fn measure(rows: &[Row], best: fn(Case) -> Duration) -> Self {
        let of = |row: &Row| {
            COLUMNS.map(|column| row.case(column).map(|case| best(case).as_nanos() as f64))
        };
        Self(
            rows.iter()
                .map(|row| (row.name, row.entries, of(row)))
                .collect(),
        )
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
            .filter(|(_, _, t)| t[1..].iter().any(Option::is_some))
            .collect();
        let height = rows.len() * 76 + 60;
        let mut svg = String::new();
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" font-family="sans-serif" font-size="12">"#
        )?;
        writeln!(
            svg,
            r#"<rect width="100%" height="100%" fill="white"/><text x="10" y="20">time for the same work, ours = 1 (shorter is better, logarithmic)</text>"#
        )?;
        for (n, (name, _, times)) in rows.iter().enumerate() {
            let top = 40 + n * 76;
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

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| row | entries | {} | best peer / ours |",
            COLUMNS.map(|c| format!("{c}, µs")).join(" | ")
        )?;
        writeln!(f, "|---|---:|---:|---:|---:|---:|---:|")?;
        for (name, entries, times) in &self.0 {
            let cell = |t: &Option<f64>| t.map_or("—".into(), |t| format!("{:.1}", t / 1000.0));
            let peers = times[1..3].iter().flatten().copied().reduce(f64::min);
            let ratio = times[0]
                .zip(peers)
                .map_or("—".into(), |(o, p)| format!("{:.2}", p / o));
            let cells: Vec<String> = times.iter().map(cell).collect();
            writeln!(
                f,
                "| {name} | {entries} | {} | {ratio} |",
                cells.join(" | ")
            )?;
        }
        Ok(())
    }
}
