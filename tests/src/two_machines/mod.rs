//! How much of each path is one source for both machines: the figures of `docs/two-machines.md`.
//!
//! That page lists, event by event, the functions on the path, by file and side. [`write()`] counts their lines of code
//! (no blank line, no comment, no documentation) on the syntax tree and writes the table of figures below the lists.

mod functions;

use crate::{files, output};
use anyhow::{Context, Result, bail, ensure};
use functions::Sources;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

/// Everything behind this line is written by [`write()`].
const FIGURES: &str = "## How much is shared\n";
/// Begins the list of one event.
const EVENT: &str = "### ";

/// Who runs a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Shared,
    Arm64,
    X86,
}

/// A function of the list: its file, and its name, with its type's where a file has several of that name.
type Function = (Side, String, String);

/// One event's list.
#[derive(Debug)]
struct Event {
    name: String,
    functions: BTreeSet<Function>,
}

fn page() -> PathBuf {
    files::root().join("docs/two-machines.md")
}

/// Counts, and writes the figures into the page.
///
/// # Errors
/// The page names a function that is not there, or that is not the only one of that name; or it cannot be written.
pub fn write() -> Result<()> {
    let text = std::fs::read_to_string(page())?;
    let lists = text.split(FIGURES).next().unwrap_or_default();
    let figures = figures(&events(lists)?)?;
    files::write(&page(), format!("{lists}{FIGURES}{figures}").as_bytes())?;
    write!(output::stdout(), "{figures}")?;
    Ok(())
}

/// The lists: `### event`, and rows of side, file, functions.
fn events(text: &str) -> Result<Vec<Event>> {
    let mut events: Vec<Event> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix(EVENT) {
            events.push(Event {
                name: name.to_lowercase(),
                functions: BTreeSet::new(),
            });
        } else if let Some(event) = events.last_mut() {
            event.functions.append(&mut row(line)?);
        }
    }
    ensure!(!events.is_empty(), "the page lists no event");
    Ok(events)
}

/// The functions of a row, none if the line is none.
fn row(line: &str) -> Result<BTreeSet<Function>> {
    let mut cells = line.split('|').map(str::trim).skip(1);
    let side = match cells.next() {
        Some("shared") => Side::Shared,
        Some("arm64") => Side::Arm64,
        Some("x86") => Side::X86,
        _ => return Ok(BTreeSet::new()),
    };
    let quoted = |cell: &str| {
        let words = cell.split('`').skip(1).step_by(2);
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let file = cells.next().map(quoted).and_then(|mut words| words.pop());
    let file = file.with_context(|| format!("no file in '{line}'"))?;
    let names = cells.next().map(quoted).unwrap_or_default();
    ensure!(!names.is_empty(), "no function in '{line}'");
    Ok(names
        .into_iter()
        .map(|name| (side, file.clone(), name))
        .collect())
}

/// Lines by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lines {
    shared: usize,
    arm64: usize,
    x86: usize,
}

impl Lines {
    fn of<'a>(
        functions: impl IntoIterator<Item = &'a Function>,
        sources: &mut Sources,
    ) -> Result<Self> {
        let (mut all, mut wrong) = (Self::default(), Vec::new());
        for (side, file, name) in functions {
            let sum = match side {
                Side::Shared => &mut all.shared,
                Side::Arm64 => &mut all.arm64,
                Side::X86 => &mut all.x86,
            };
            match sources.lines(file, name) {
                Ok(lines) => *sum += lines,
                Err(error) => wrong.push(error.to_string()),
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(all)
    }

    fn row(self, name: &str) -> Result<String> {
        let share = |own: usize| {
            let all = self.shared + own;
            ensure!(all > 0, "nothing is listed for '{name}'");
            Ok((100 * self.shared + all / 2) / all)
        };
        Ok(format!(
            "| {name} | {} | {} | {} | {} % | {} % |\n",
            self.shared,
            self.arm64,
            self.x86,
            share(self.arm64)?,
            share(self.x86)?,
        ))
    }
}

fn figures(events: &[Event]) -> Result<String> {
    let mut sources = Sources::default();
    let mut out = String::from(
        "\nWritten by `scripts/ravelin.sh two-machines`: lines of the functions above, without comments and blank lines.\n\n\
         | event | shared | arm64 only | x86 only | shared of arm64's path | shared of x86's path |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for event in events {
        let lines = Lines::of(&event.functions, &mut sources)?;
        out.push_str(&lines.row(&event.name)?);
    }
    let all: BTreeSet<&Function> = events.iter().flat_map(|e| &e.functions).collect();
    refuse_two_sides(&all)?;
    let lines = Lines::of(all, &mut sources)?;
    write!(
        out,
        "{}\nA function on several paths counts once in the last row.\n",
        lines.row("all")?
    )?;
    Ok(out)
}

/// A function is shared or a machine's own, the same in every list.
fn refuse_two_sides(all: &BTreeSet<&Function>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for (_, file, name) in all {
        if !seen.insert((file, name)) {
            bail!("{name} of {file} is on two sides");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_of_the_page_exists_and_is_the_only_one_of_its_name() {
        let text = std::fs::read_to_string(page()).unwrap();
        let events = events(&text).unwrap();
        assert_eq!(events.len(), 5);
        let figures = figures(&events).unwrap();
        assert_eq!(figures.matches(" % |\n").count(), 6);
    }

    #[test]
    fn rows_are_read() {
        let functions = row("| arm64 | `a/b.rs` | `f`, `T::g` |").unwrap();
        let want = [
            (Side::Arm64, "a/b.rs".into(), "T::g".into()),
            (Side::Arm64, "a/b.rs".into(), "f".into()),
        ];
        assert_eq!(functions, want.into());
        assert!(row("| side | file | functions |").unwrap().is_empty());
        assert!(row("| --- | --- | --- |").unwrap().is_empty());
        assert!(row("| x86 | a | `f` |").is_err() && row("| x86 | `a` | f |").is_err());
    }

    #[test]
    fn a_function_on_two_sides_is_refused() {
        let (a, b) = (
            (Side::Shared, "f.rs".to_owned(), "g".to_owned()),
            (Side::X86, "f.rs".to_owned(), "g".to_owned()),
        );
        assert!(refuse_two_sides(&[&a, &b].into()).is_err());
        assert!(refuse_two_sides(&[&a].into()).is_ok());
    }

    #[test]
    fn shares_are_rounded_to_the_nearest() {
        let lines = Lines {
            shared: 2,
            arm64: 1,
            x86: 0,
        };
        assert_eq!(
            lines.row("x").unwrap(),
            "| x | 2 | 1 | 0 | 67 % | 100 % |\n"
        );
        assert!(Lines::default().row("x").is_err());
    }
}
