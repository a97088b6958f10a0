//! How large the image is, and which source its instructions come from.

use anyhow::{Context, Result, anyhow};
use object::{Object, ObjectSection};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

/// Sizes of the image, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    /// Instructions that stay, to the last one that is not padding.
    pub(crate) text: u64,
    /// Instructions that only boot needs: the host's memory by its first instruction.
    pub(crate) boot_text: u64,
    /// Constants, without the host that is linked in.
    pub(crate) rodata: u64,
    /// By source file, as the line table names it.
    pub(crate) by_file: BTreeMap<String, Code>,
}

/// What a source file has become.
#[derive(Clone, Debug, Default)]
pub(crate) struct Code {
    /// Bytes of instructions that it asked for.
    pub(crate) bytes: u64,
    /// Those of them that are gone after boot.
    pub(crate) boot_bytes: u64,
    /// Its lines that instructions come from.
    pub(crate) lines: BTreeSet<u32>,
    /// Its lines that instructions which stay come from.
    pub(crate) resident: BTreeSet<u32>,
}

/// Measures an ELF file with debug information.
///
/// # Errors
/// It cannot be read, or has no `.text` or no line table.
pub(crate) fn measure(elf: &Path) -> Result<Sizes> {
    let bytes = crate::files::read(elf, "run `make build` first")?;
    let file = object::File::parse(&*bytes).context("not an object file")?;
    let section = |name: &str| file.section_by_name(name);
    let (text, boot_text) = (used(&file, ".text")?, used(&file, ".boot.text")?);
    let rodata = [".rodata", ".data.rel.ro"];
    let mut by_file = BTreeMap::new();
    add_by_file(elf, &text, true, &mut by_file)?;
    add_by_file(elf, &boot_text, false, &mut by_file)?;
    Ok(Sizes {
        text: text.end - text.start,
        boot_text: boot_text.end - boot_text.start,
        rodata: rodata
            .iter()
            .filter_map(|name| section(name))
            .map(|s| s.size())
            .sum(),
        by_file,
    })
}

/// Addresses of a section's bytes, without padding at its end.
fn used(file: &object::File<'_>, name: &str) -> Result<Range<u64>> {
    let section = file.section_by_name(name);
    let section = section.with_context(|| format!("the image has no {name}"))?;
    let last = section.data()?.iter().rposition(|&b| b != 0);
    let used = last.map_or(0, |last| last + 1);
    Ok(section.address()..section.address() + u64::try_from(used)?)
}

/// Which source each instruction comes from. Its line is that of the innermost inlined function; its bytes are
/// charged to the innermost one that is not the Rust library's, which is who asked for them.
fn add_by_file(
    elf: &Path,
    part: &Range<u64>,
    stays: bool,
    files: &mut BTreeMap<String, Code>,
) -> Result<()> {
    let cannot = |e| anyhow!("cannot read the line table of {}: {e}", elf.display());
    let loader = addr2line::Loader::new(elf).map_err(cannot)?;
    let all = loader.find_location_range(part.start, part.end);
    for (address, length, location) in all.map_err(cannot)? {
        let innermost = location.file.unwrap_or("");
        let code = files.entry(innermost.to_owned()).or_default();
        code.lines.extend(location.line);
        if stays {
            code.resident.extend(location.line);
        }
        let owner = match is_library(innermost) {
            true => first_outside_library(&loader, address),
            false => None,
        };
        let owner = owner.unwrap_or_else(|| innermost.to_owned());
        let code = files.entry(owner).or_default();
        code.bytes += length;
        if !stays {
            code.boot_bytes += length;
        }
    }
    Ok(())
}

/// Whether the line table's file is one of `core`, `alloc` or `compiler_builtins`.
pub(crate) fn is_library(file: &str) -> bool {
    file.contains("/library/") && !file.contains("/registry/")
}

fn first_outside_library(loader: &addr2line::Loader, address: u64) -> Option<String> {
    let mut frames = loader.find_frames(address).ok()?;
    while let Ok(Some(frame)) = frames.next() {
        let file = frame.location.and_then(|place| place.file)?;
        if !is_library(file) {
            return Some(file.to_owned());
        }
    }
    None
}
