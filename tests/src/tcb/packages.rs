//! Which packages the EL2 image is linked from, and where their sources are.

use super::conditions::{Conditions, TARGET};
use super::inventory::{Kind, Use, uses};
use super::source::{SourceFile, crate_files};
use crate::files;
use anyhow::{Context, Result, anyhow, ensure};
use cargo_metadata::{MetadataCommand, Package, TargetKind};
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::process::Command;

/// The package that the image is built from.
const IMAGE: &str = "ravelin-el2";

/// Bytes of stack for parsing: some crates' types are nested deeper than a test's thread can follow.
const STACK: usize = 256 << 20;

/// What is counted of a file.
pub(crate) struct Summary {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Lines that hold code.
    pub(crate) code_lines: usize,
    /// The lines of each of its functions.
    pub(crate) functions: Vec<BTreeSet<usize>>,
    /// Each `unsafe`.
    pub(crate) uses: Vec<Use>,
}

impl Summary {
    fn of(file: &SourceFile) -> Self {
        Self {
            path: file.path.clone(),
            code_lines: file.code_lines(),
            functions: file.functions(),
            uses: uses(file),
        }
    }
}

/// A package, and what is compiled of it.
pub(crate) struct Crate {
    /// The package's name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// Where its manifest is.
    pub(crate) folder: PathBuf,
    /// Whether it is this workspace's.
    pub(crate) ours: bool,
    /// What is compiled.
    pub(crate) files: Vec<Summary>,
    /// Files of assembly.
    pub(crate) assembly: Vec<(PathBuf, String)>,
}

impl Crate {
    /// Lines of Rust.
    pub(crate) fn rust_lines(&self) -> usize {
        self.files.iter().map(|file| file.code_lines).sum()
    }

    /// Blocks of `unsafe` code.
    pub(crate) fn unsafe_blocks(&self) -> usize {
        let uses = self.files.iter().flat_map(|file| &file.uses);
        uses.filter(|one| one.kind == Kind::Block).count()
    }

    /// Lines of assembly in files of their own.
    pub(crate) fn assembly_lines(&self) -> usize {
        self.assembly
            .iter()
            .map(|(_, text)| assembly_lines(text))
            .sum()
    }
}

/// Every package that is linked into the image: ours first, each group by name.
///
/// # Errors
/// Cargo cannot be run, or a source cannot be read or parsed.
pub(crate) fn crates() -> Result<Vec<Crate>> {
    let reader = std::thread::Builder::new().stack_size(STACK);
    let thread = reader.spawn(read_all).context("no thread")?;
    thread
        .join()
        .map_err(|_| anyhow!("reading the sources failed"))?
}

fn read_all() -> Result<Vec<Crate>> {
    let image = Conditions::of_image()?;
    let linked = linked()?;
    let metadata = MetadataCommand::new()
        .manifest_path(files::root().join("Cargo.toml"))
        .exec()?;
    let mut crates = Vec::new();
    for package in &metadata.packages {
        let key = (package.name.to_string(), package.version.to_string());
        if let Some(features) = linked.get(&key) {
            let conditions = image.with_features(features.split(',').filter(|f| !f.is_empty()));
            crates.push(read(package, &conditions)?);
        }
    }
    ensure!(
        crates.len() == linked.len(),
        "{} packages are linked, but {} were found",
        linked.len(),
        crates.len()
    );
    crates.sort_by(|a, b| (!a.ours, &a.name).cmp(&(!b.ours, &b.name)));
    Ok(crates)
}

/// Name and version of each package that is linked, with the features that it has there. `cargo metadata`
/// would add the features that only tests ask for.
fn linked() -> Result<HashMap<(String, String), String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(&cargo)
        .current_dir(files::root())
        .args(["tree", "--package", IMAGE, "--target", TARGET])
        .args(["--edges", "normal,no-proc-macro", "--no-dedupe"])
        .args(["--prefix", "none", "--format", "{p}|{f}"])
        .output()
        .with_context(|| format!("cannot run {cargo}"))?;
    ensure!(
        output.status.success(),
        "cargo tree: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)?
        .lines()
        .map(|line| parse_line(line).with_context(|| format!("cargo tree says '{line}'")))
        .collect()
}

/// `name v1.2.3 (folder)|feature,feature`
fn parse_line(line: &str) -> Option<((String, String), String)> {
    let (package, features) = line.split_once('|')?;
    let mut words = package.split(' ');
    let name = words.next()?.to_owned();
    let version = words.next()?.strip_prefix('v')?.to_owned();
    Some(((name, version), features.to_owned()))
}

fn read(package: &Package, conditions: &Conditions) -> Result<Crate> {
    let folder = PathBuf::from(package.manifest_path.parent().context("no folder")?);
    let is_image = package.name == IMAGE;
    let mut files = Vec::new();
    for target in &package.targets {
        let library = target
            .kind
            .iter()
            .any(|k| [TargetKind::Lib, TargetKind::RLib].contains(k));
        if library || is_image && target.kind.contains(&TargetKind::Bin) {
            let found = crate_files(target.src_path.as_std_path(), conditions)?;
            files.extend(found.iter().map(Summary::of));
        }
    }
    let ours = package.source.is_none();
    let assembly = if ours {
        assembly_files(&folder.join("src"))?
    } else {
        Vec::new()
    };
    Ok(Crate {
        name: package.name.to_string(),
        version: package.version.to_string(),
        folder,
        ours,
        files,
        assembly,
    })
}

fn assembly_files(folder: &std::path::Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(assembly_files(&path)?);
        } else if path.extension().is_some_and(|e| e == "S" || e == "s") {
            let text = std::fs::read_to_string(&path)?;
            found.push((path, text));
        }
    }
    found.sort();
    Ok(found)
}

/// Lines that hold something besides a comment (`//`, the only kind that our assembly has).
fn assembly_lines(text: &str) -> usize {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_of_the_tree_is_read() {
        let key = |name: &str, version: &str| (name.to_owned(), version.to_owned());
        assert_eq!(
            parse_line("spin v0.12.3|mutex,once"),
            Some((key("spin", "0.12.3"), "mutex,once".into()))
        );
        assert_eq!(
            parse_line("ravelin-abi v0.1.0 (/x/abi)|"),
            Some((key("ravelin-abi", "0.1.0"), String::new()))
        );
        assert_eq!(parse_line("warning: something"), None);
    }

    #[test]
    fn comments_in_assembly_do_not_count() {
        assert_eq!(
            assembly_lines("// Entry.\n\nstart:\n    nop // trailing\n"),
            2
        );
    }

    #[test]
    fn image_has_no_test_code_and_all_of_our_crates() {
        let crates = crates().unwrap();
        let ours: Vec<_> = crates.iter().filter(|c| c.ours).collect();
        let names: Vec<_> = ours.iter().map(|c| c.name.as_str()).collect();
        assert!(names.contains(&"ravelin-el2") && names.contains(&"ravelin-stage2"));
        assert!(!names.contains(&"ravelin-tests"));
        let all = ours.iter().flat_map(|c| &c.files);
        let testing =
            |path: &std::path::Path| path.components().any(|c| c.as_os_str() == "testing");
        assert!(all.clone().all(|file| !testing(&file.path)));
        assert!(
            all.map(|f| &f.path)
                .any(|path| path.ends_with("arch/world.rs"))
        );
        assert!(crates.iter().all(|one| one.rust_lines() > 0));
    }
}
