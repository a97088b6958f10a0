//! How large the image is, and which source its instructions come from.

use anyhow::{Context, Result, anyhow};
use object::{Object, ObjectSection};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Sizes of the image, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    /// Instructions, to the last one that is not padding.
    pub(crate) text: u64,
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
    /// Its lines that instructions come from.
    pub(crate) lines: BTreeSet<u32>,
}

/// Measures an ELF file with debug information.
///
/// # Errors
/// It cannot be read, or has no `.text` or no line table.
pub(crate) fn measure(elf: &Path) -> Result<Sizes> {
    let bytes = crate::files::read(elf, "run `make build` first")?;
    let file = object::File::parse(&*bytes).context("not an object file")?;
    let section = |name: &str| file.section_by_name(name);
    let text = section(".text").context("the image has no .text")?;
    let code = text.data()?;
    let used = code
        .iter()
        .rposition(|&b| b != 0)
        .map_or(0, |last| last + 1);
    let used = u64::try_from(used)?;
    let rodata = [".rodata", ".data.rel.ro"];
    Ok(Sizes {
        text: used,
        rodata: rodata
            .iter()
            .filter_map(|name| section(name))
            .map(|s| s.size())
            .sum(),
        by_file: by_file(elf, text.address(), text.address() + used)?,
    })
}

/// Which source each instruction comes from. Its line is that of the innermost inlined function; its bytes are
/// charged to the innermost one that is not the Rust library's, which is who asked for them.
fn by_file(elf: &Path, start: u64, end: u64) -> Result<BTreeMap<String, Code>> {
    let cannot = |e| anyhow!("cannot read the line table of {}: {e}", elf.display());
    let loader = addr2line::Loader::new(elf).map_err(cannot)?;
    let mut files = BTreeMap::<String, Code>::new();
    for (address, length, location) in loader.find_location_range(start, end).map_err(cannot)? {
        let innermost = location.file.unwrap_or("");
        let code = files.entry(innermost.to_owned()).or_default();
        code.lines.extend(location.line);
        let owner = match is_library(innermost) {
            true => first_outside_library(&loader, address),
            false => None,
        };
        let owner = owner.unwrap_or_else(|| innermost.to_owned());
        files.entry(owner).or_default().bytes += length;
    }
    Ok(files)
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
