//! Code that only boot needs, which leaves EL2 before the host's first instruction (docs/boot.md).
//!
//! [`divide`] finds it and makes the lists for EL2's linker script; [`check`] reads the finished image again,
//! instruction by instruction, and fails if anything that stays refers to what goes.

mod check;
mod decode;
mod graph;

use crate::{files, output};
use anyhow::{Result, bail};
use graph::Graph;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

/// Writes `boot.text.ld` and `boot.tables.ld` into a folder, for the object file of EL2.
///
/// # Errors
/// The file is not such an object file, or the lists cannot be written.
pub fn divide(object: &Path, out: &Path) -> Result<()> {
    let graph = Graph::read(&files::read(object, "the linker's caller names it")?)?;
    let parts = graph.divide();
    let list = |code: bool| {
        let names = parts
            .boot
            .iter()
            .filter(|name| name.starts_with(".text") == code);
        names.fold(String::new(), |mut text, name| {
            let _ = writeln!(text, "*({name})");
            text
        })
    };
    files::write(&out.join("boot.text.ld"), list(true).as_bytes())?;
    files::write(&out.join("boot.tables.ld"), list(false).as_bytes())?;
    let held: String = parts
        .held
        .iter()
        .fold(String::new(), |text, name| text + name + "\n");
    files::write(&out.join("boot.held.txt"), held.as_bytes())?;
    Ok(())
}

/// Fails if what stays of EL2's image refers to what only boot needs.
///
/// # Errors
/// That, or it is not EL2's image.
pub fn check(elf: &Path) -> Result<()> {
    let image = check::Image::read(&files::read(elf, "run `make build` first")?)?;
    let (violations, seen) = image.violations();
    if !violations.is_empty() {
        bail!(
            "EL2's memory is given away after boot, but what stays refers to it:\n{}",
            violations.join("\n")
        );
    }
    writeln!(
        output::stdout(),
        "{}: {seen} references, none to what only boot needs",
        elf.display()
    )?;
    Ok(())
}
