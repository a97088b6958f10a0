//! The trusted computing base in figures: how much code runs at EL2, and every `unsafe` in it.
//!
//! [`write()`] makes `docs/tcb.md` and `docs/unsafe.md`; [`check`] fails if an `unsafe` has no reason or the
//! inventory is not that of the sources. Lines are counted on the syntax tree (see `source`), for the packages,
//! features and conditions that the image is built with; bytes are read from the image and its line table.

mod conditions;
mod image;
mod inventory;
mod packages;
mod report;
mod source;

use crate::{emulate, files, output};
use anyhow::{Result, bail, ensure};
pub(crate) use conditions::Conditions;
use inventory::Use;
use packages::Crate;
pub(crate) use source::{SourceFile, code_lines};
use std::io::Write as _;
use std::path::PathBuf;

/// A use of `unsafe` and its file, from the root of the tree.
type Found = (String, Use);

fn inventory_file() -> PathBuf {
    files::root().join("docs/unsafe.md")
}

/// Writes both files, puts the figures into the README, and prints them.
///
/// # Errors
/// Sources or `build/ravelin.elf` cannot be read, or a file cannot be written.
pub fn write() -> Result<()> {
    let crates = packages::crates()?;
    let found = all_uses(&crates);
    let sizes = image::measure(&emulate::ravelin_elf())?;
    let figures = report::Figures::new(&crates, &found, &sizes);
    files::write(&inventory_file(), report::inventory(&found).as_bytes())?;
    let page = report::page(&figures, &crates, &sizes);
    files::write(&files::root().join("docs/tcb.md"), page.as_bytes())?;
    let readme = files::root().join("README.md");
    let text = report::with_row(&std::fs::read_to_string(&readme)?, &figures.row())?;
    files::write(&readme, text.as_bytes())?;
    writeln!(output::stdout(), "{}", figures.row())?;
    Ok(())
}

/// Fails if a use of `unsafe` has no reason, or `docs/unsafe.md` is out of date.
///
/// # Errors
/// That, or sources cannot be read.
pub fn check() -> Result<()> {
    let found = all_uses(&packages::crates()?);
    every_use_has_a_reason(&found)?;
    let written = String::from_utf8(files::read(&inventory_file(), "run `make tcb`")?)?;
    ensure!(
        written == report::inventory(&found),
        "docs/unsafe.md is out of date: run `make tcb`"
    );
    let count = found.len();
    writeln!(
        output::stdout(),
        "{count} uses of unsafe, each with its reason"
    )?;
    Ok(())
}

fn every_use_has_a_reason(found: &[Found]) -> Result<()> {
    let missing: Vec<_> = found
        .iter()
        .filter(|(_, one)| one.needs_reason() && one.reason.is_none())
        .map(|(file, one)| format!("{file}:{}: unsafe {}", one.line, one.kind))
        .collect();
    if !missing.is_empty() {
        bail!("without a SAFETY comment:\n{}", missing.join("\n"));
    }
    Ok(())
}

/// Every use in our crates of the image, by file and line.
fn all_uses(crates: &[Crate]) -> Vec<Found> {
    let files = crates.iter().filter(|c| c.ours).flat_map(|c| &c.files);
    let mut found: Vec<Found> = files
        .flat_map(|file| {
            let name = report::from_root(&file.path);
            file.uses.iter().map(move |one| (name.clone(), one.clone()))
        })
        .collect();
    found.sort_by(|a, b| (&a.0, a.1.line).cmp(&(&b.0, b.1.line)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unsafe_of_the_image_has_a_reason() {
        let found = all_uses(&packages::crates().unwrap());
        assert!(
            found.len() > 20,
            "only {} uses of unsafe were found",
            found.len()
        );
        every_use_has_a_reason(&found).unwrap();
    }

    #[test]
    fn one_without_a_reason_is_named() {
        let one = Use {
            line: 7,
            kind: inventory::Kind::Block,
            within: "f".into(),
            reason: None,
        };
        let error = every_use_has_a_reason(&[("a.rs".into(), one)]).unwrap_err();
        assert!(error.to_string().contains("a.rs:7"), "{error}");
    }
}
