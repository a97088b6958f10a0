//! The pages: `docs/tcb.md`, `docs/unsafe.md` and the README's row.

use super::Found;
use super::image::{Code, Sizes, is_library};
use super::inventory::Kind;
use super::packages::{Crate, Summary};
use crate::files;
use anyhow::{Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

/// What the README's row begins with.
const ROW: &str = "| trusted code at EL2";
/// Most lines, `unsafe` blocks and bytes of instructions that we want.
const TARGETS: (usize, usize, u64) = (8_000, 60, 128 * 1024);
/// Modules that the page lists.
const LISTED: usize = 25;

/// The figures that have targets, and those beside them.
#[derive(Debug)]
pub(super) struct Figures {
    rust: usize,
    linked: usize,
    /// Of these, lines of functions that are gone after boot.
    boot: usize,
    assembly: usize,
    others: usize,
    blocks: usize,
    text: u64,
    boot_text: u64,
    rodata: u64,
}

impl Figures {
    pub(super) fn new(crates: &[Crate], found: &[Found], sizes: &Sizes) -> Self {
        let lines = |ours| {
            crates
                .iter()
                .filter(move |c| c.ours == ours)
                .map(Crate::rust_lines)
        };
        Self {
            rust: lines(true).sum(),
            linked: linked_files(crates, sizes)
                .map(|file| file.code_lines)
                .sum(),
            boot: linked_files(crates, sizes)
                .map(|file| boot_lines(file, sizes))
                .sum(),
            assembly: crates.iter().map(Crate::assembly_lines).sum(),
            others: lines(false).sum(),
            blocks: found
                .iter()
                .filter(|(_, one)| one.kind == Kind::Block)
                .count(),
            text: sizes.text,
            boot_text: sizes.boot_text,
            rodata: sizes.rodata,
        }
    }

    /// Lines of ours that stay, Rust and assembly.
    fn ours(&self) -> usize {
        self.linked - self.boot + self.assembly
    }

    /// The README's row.
    pub(super) fn row(&self) -> String {
        let (lines, blocks, text) = TARGETS;
        format!(
            "{ROW} | {} lines of Rust and {} of assembly (target {}; Jailhouse 9,100, Bao 12,400, Xen 50,000), \
             {} `unsafe` blocks (target {}), {} KiB of instructions (target {}; Bao 82, Xen 983); {} more lines and \
             {} KiB leave EL2 before the host runs; see \
             [where they are](docs/tcb.md) and [every `unsafe`](docs/unsafe.md) | `make tcb` |",
            group(self.linked - self.boot),
            group(self.assembly),
            group(lines),
            self.blocks,
            blocks,
            kib(self.text),
            kib(text),
            group(self.boot),
            kib(self.boot_text),
        )
    }

    fn table(&self) -> String {
        let (lines, blocks, text) = TARGETS;
        let met = |is: bool| if is { "met" } else { "missed" };
        format!(
            "| | Ravelin | target | | Jailhouse | Bao | Xen |\n| --- | --- | --- | --- | --- | --- | --- |\n\
             | code lines, ours | {} | {} | {} | 9,100 | 12,400 | 50,000 |\n\
             | of functions that only boot needs, gone before the host runs | {} | | | | | |\n\
             | those that are compiled, too, but nothing in the image calls | {} | | | | | |\n\
             | `unsafe` blocks, ours, boot's included | {} | {} | {} | all | all | all |\n\
             | instructions, KiB | {} | {} | {} | | 82 | 983 |\n\
             | instructions that only boot needs, KiB | {} | | | | | |\n\
             | both, KiB | {} | | | | | |\n\
             | constants, KiB | {} | | | | | |\n\
             | code lines, others' crates | {} | | | | | |\n",
            group(self.ours()),
            group(lines),
            met(self.ours() <= lines),
            group(self.boot),
            group(self.rust - self.linked),
            self.blocks,
            blocks,
            met(self.blocks <= blocks),
            kib(self.text),
            kib(text),
            met(self.text <= text),
            kib(self.boot_text),
            kib(self.text + self.boot_text),
            kib(self.rodata),
            group(self.others),
        )
    }
}

/// Our files that are in the image: all but those of whose functions nothing is left.
fn linked_files<'a>(crates: &'a [Crate], sizes: &'a Sizes) -> impl Iterator<Item = &'a Summary> {
    let files = crates
        .iter()
        .filter(|one| one.ours)
        .flat_map(|one| &one.files);
    files.filter(|file| file.functions.is_empty() || code_of(file, sizes).is_some())
}

/// Lines of the file's functions that have left instructions in the image, none of which stays after boot.
fn boot_lines(file: &Summary, sizes: &Sizes) -> usize {
    let Some(code) = code_of(file, sizes) else {
        return 0;
    };
    let has = |part: &BTreeSet<u32>, lines: &BTreeSet<usize>| {
        let mut lines = lines.iter().filter_map(|&line| u32::try_from(line).ok());
        lines.any(|line| part.contains(&line))
    };
    let only_boot =
        |lines: &&BTreeSet<usize>| has(&code.lines, lines) && !has(&code.resident, lines);
    let functions = file.functions.iter().filter(only_boot);
    functions.map(BTreeSet::len).sum()
}

/// What the file has left in the image.
fn code_of<'a>(file: &Summary, sizes: &'a Sizes) -> Option<&'a Code> {
    let name = from_root(&file.path);
    let code = sizes.by_file.get(&format!("./{name}"));
    code.or_else(|| sizes.by_file.get(&name))
}

/// `docs/tcb.md`.
pub(super) fn page(figures: &Figures, crates: &[Crate], sizes: &Sizes) -> String {
    let origins = origins(crates, sizes);
    format!(
        "# Trusted computing base\n\nWritten by `make tcb`. What runs at EL2 and has to be believed. The host that is \
         linked into the same file runs at EL1 and is not part of it.\n\n{}\nA code line holds something besides a \
         comment; tests, documentation and blank lines do not count, nor does what the image's features and \
         conditions leave out, nor, in the first row, modules of whose functions nothing is left in the image (the \
         crates are shared with the x86 sibling). Inline assembly counts as Rust. Peers' lines are of their arm64 builds. Instructions \
         are `.text`, and for boot `.boot.text`, without padding at their end; constants are `.rodata` and \
         `.data.rel.ro`.\n\nWhat only boot needs is no longer at EL2 when the host runs its first instruction: the \
         frames are zeros and the host's ([boot](boot.md)), and `make build` checks that nothing which stays \
         refers to it. A line counts as boot's if its function has left instructions in the image, and none of \
         them stays.\n\n\
         ## By crate\n\nLines with code is how many source lines have left an instruction; bytes are the instructions. An inlined \
         function counts where it is written, but what was inlined from the Rust library counts for who called it, so \
         that the library's own row is what it has as functions.\n\n{}\n\
         ## By module\n\nOur {LISTED} largest by bytes that stay; lines without boot's.\n\n{}",
        figures.table(),
        crate_table(crates, &origins),
        module_table(crates, sizes),
    )
}

fn crate_table(crates: &[Crate], origins: &BTreeMap<String, Code>) -> String {
    let mut text = "| crate | version | Rust lines | assembly lines | `unsafe` blocks | lines with code | bytes | \
                    of these only for boot |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for one in crates {
        let code = origins.get(&one.name).cloned().unwrap_or_default();
        let version = if one.ours { "" } else { &one.version };
        let _ = writeln!(
            text,
            "| {} | {version} | {} | {} | {} | {} | {} | {} |",
            one.name,
            group(one.rust_lines()),
            group(one.assembly_lines()),
            one.unsafe_blocks(),
            group(code.lines.len()),
            group(code.bytes),
            group(code.boot_bytes),
        );
    }
    for (name, code) in origins {
        if !crates.iter().any(|one| one.name == *name) {
            let lines = group(code.lines.len());
            let (bytes, boot) = (group(code.bytes), group(code.boot_bytes));
            let _ = writeln!(text, "| {name} | | | | | {lines} | {bytes} | {boot} |");
        }
    }
    text
}

/// The line table by crate; for each file the lines are kept apart by a running offset.
fn origins(crates: &[Crate], sizes: &Sizes) -> BTreeMap<String, Code> {
    let mut all = BTreeMap::<String, Code>::new();
    let mut first = 0;
    let mut named = 0;
    for (file, code) in &sizes.by_file {
        let sum = all.entry(origin(crates, file)).or_default();
        sum.bytes += code.bytes;
        sum.boot_bytes += code.boot_bytes;
        named += code.bytes;
        sum.lines.extend(code.lines.iter().map(|line| first + line));
        first += code.lines.last().unwrap_or(&0) + 1;
    }
    let unnamed = all.entry("assembly, padding".into()).or_default();
    unnamed.bytes += (sizes.text + sizes.boot_text).saturating_sub(named);
    all
}

/// The package or part of the Rust library that a file of the line table belongs to.
fn origin(crates: &[Crate], file: &str) -> String {
    let file = file.trim_start_matches("./");
    let owner = crates.iter().find(|one| {
        let folder = if one.ours {
            from_root(&one.folder)
        } else {
            format!("{}-{}", one.name, one.version)
        };
        file.starts_with(&format!("{folder}/")) || file.contains(&format!("/{folder}/"))
    });
    let library = match is_library(file) {
        true => file
            .split_once("/library/")
            .and_then(|(_, rest)| rest.split('/').next()),
        false => None,
    };
    match (owner, library) {
        (Some(one), _) => one.name.clone(),
        (None, Some(part)) => format!("Rust's {part}"),
        (None, None) => "assembly, padding".into(),
    }
}

fn module_table(crates: &[Crate], sizes: &Sizes) -> String {
    let mut rows: Vec<_> = crates
        .iter()
        .filter(|one| one.ours)
        .flat_map(|one| &one.files)
        .map(|file| {
            let stays = code_of(file, sizes).map_or(0, |code| code.bytes - code.boot_bytes);
            let lines = file.code_lines - boot_lines(file, sizes);
            (stays, lines, from_root(&file.path))
        })
        .collect();
    rows.sort_by(|a, b| b.cmp(a));
    let mut text = "| module | Rust lines | bytes |\n| --- | --- | --- |\n".to_owned();
    for (bytes, lines, name) in rows.iter().take(LISTED) {
        let _ = writeln!(text, "| `{name}` | {} | {} |", group(*lines), group(*bytes));
    }
    text
}

/// `docs/unsafe.md`.
pub(super) fn inventory(found: &[Found]) -> String {
    let mut text = "# Every `unsafe` at EL2\n\nWritten by `make tcb`, checked by `make lint`: our crates of the EL2 \
                    image, without tests. The reason is the first sentence of the `SAFETY` comment, or of the \
                    function's `# Safety` section.\n\n"
        .to_owned();
    let kinds = [
        Kind::Block,
        Kind::Function,
        Kind::Impl,
        Kind::Trait,
        Kind::Extern,
        Kind::Attribute,
    ];
    for kind in kinds {
        let count = found.iter().filter(|(_, one)| one.kind == kind).count();
        let _ = writeln!(text, "* {kind}: {count}");
    }
    text.push_str("\n| where | in | what | reason |\n| --- | --- | --- | --- |\n");
    for (file, one) in found {
        let reason = one.reason.as_deref().unwrap_or("").replace('|', "\\|");
        let _ = writeln!(
            text,
            "| {file}:{} | `{}` | {} | {reason} |",
            one.line, one.within, one.kind
        );
    }
    text
}

/// The README with this row in place of the one that it has.
pub(super) fn with_row(readme: &str, row: &str) -> Result<String> {
    let count = readme.lines().filter(|line| line.starts_with(ROW)).count();
    ensure!(
        count == 1,
        "README.md has {count} rows '{ROW} ...', not one"
    );
    let lines = readme
        .lines()
        .map(|line| if line.starts_with(ROW) { row } else { line });
    Ok(lines.collect::<Vec<_>>().join("\n") + "\n")
}

/// A path from the root of the tree; another tree's path stays as it is.
pub(super) fn from_root(path: &Path) -> String {
    path.strip_prefix(files::root())
        .unwrap_or(path)
        .display()
        .to_string()
}

fn kib(bytes: u64) -> u64 {
    bytes.div_ceil(1024)
}

/// A number with commas.
fn group(number: impl TryInto<u64>) -> String {
    let digits = number.try_into().unwrap_or(u64::MAX).to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index != 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::inventory::Use;
    use super::*;

    #[test]
    fn numbers_have_commas() {
        assert_eq!(group(7u64), "7");
        assert_eq!(group(1_234u64), "1,234");
        assert_eq!(group(12_345_678u64), "12,345,678");
    }

    #[test]
    fn row_of_the_readme_is_replaced_once() {
        let text = "a\n| trusted code at EL2 | old | x |\nb\n";
        assert_eq!(with_row(text, "| new |").unwrap(), "a\n| new |\nb\n");
        assert!(with_row("a\n", "| new |").is_err());
    }

    #[test]
    fn inventory_names_place_and_reason() {
        let one = Use {
            line: 3,
            kind: Kind::Block,
            within: "f".into(),
            reason: Some("a | b".into()),
        };
        let text = inventory(&[("x.rs".into(), one)]);
        assert!(
            text.contains("| x.rs:3 | `f` | block | a \\| b |"),
            "{text}"
        );
        assert!(text.contains("* block: 1\n"), "{text}");
    }
}
