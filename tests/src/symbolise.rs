//! Reads a panic's backtrace and adds function names and source lines to it.
//!
//! EL2 prints one line per frame, `  #3 0x000000007fe12345 (image+0x12345)`. The number behind `image+` is the
//! distance from the image's first byte, which is the address in the ELF file less the ELF's lowest one.

use anyhow::{Result, anyhow};
use object::read::elf::{ElfFile64, ProgramHeader};
use std::fmt::Write as _;
use std::path::Path;

/// Looks image offsets up in one ELF file with debug information.
pub struct Symboliser {
    loader: addr2line::Loader,
    base: u64,
}

impl std::fmt::Debug for Symboliser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Symboliser {{ base: {:#x} }}", self.base)
    }
}

impl Symboliser {
    /// Opens the ELF file that the running image was made from.
    ///
    /// # Errors
    /// The file cannot be read, or is no ELF file.
    pub fn open(elf: &Path) -> Result<Self> {
        let bytes = crate::files::read(elf, "run `make build` first")?;
        let base = lowest_address(&bytes)?;
        let loader = addr2line::Loader::new(elf)
            .map_err(|e| anyhow!("cannot read {}: {e}", elf.display()))?;
        Ok(Self { loader, base })
    }

    /// `function at file:line` for each frame (inlined ones first) at this distance from the image's start.
    ///
    /// Frames hold return addresses; the call is the instruction before, so one instruction less is looked up.
    #[must_use]
    pub fn describe(&self, offset: u64) -> Option<String> {
        let address = self.base.checked_add(offset)?.checked_sub(4)?;
        let mut text = String::new();
        let mut frames = self.loader.find_frames(address).ok()?;
        while let Ok(Some(frame)) = frames.next() {
            let Some(name) = frame
                .function
                .as_ref()
                .and_then(|f| f.demangle().ok().map(|n| n.into_owned()))
            else {
                continue;
            };
            if !text.is_empty() {
                text.push_str(", inlined in ");
            }
            text.push_str(&name);
            if let Some(place) = frame.location {
                let _ = write!(
                    text,
                    " at {}:{}",
                    place.file.unwrap_or("?"),
                    place.line.unwrap_or(0)
                );
            }
        }
        if text.is_empty() {
            self.loader.find_symbol(address).map(str::to_owned)
        } else {
            Some(text)
        }
    }

    /// The line as it came, with the description behind it where it holds a frame that can be resolved.
    #[must_use]
    pub fn annotate(&self, line: &str) -> String {
        match frame_offset(line).and_then(|offset| self.describe(offset)) {
            Some(text) => format!("{line} {text}"),
            None => line.to_owned(),
        }
    }
}

/// The offset in a backtrace line, if it is one.
#[must_use]
pub fn frame_offset(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("(image+0x")?;
    let (digits, _) = rest.split_once(')')?;
    u64::from_str_radix(digits, 16).ok()
}

fn lowest_address(elf: &[u8]) -> Result<u64> {
    let file = ElfFile64::<object::Endianness>::parse(elf)?;
    let endian = file.endian();
    file.elf_program_headers()
        .iter()
        .filter(|header| header.p_type(endian) == object::elf::PT_LOAD)
        .map(|header| header.p_vaddr(endian))
        .min()
        .ok_or_else(|| anyhow!("the ELF file has no loadable segment"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_is_read_from_a_frame_line_only() {
        assert_eq!(
            frame_offset("  #3 0x000000007fe12345 (image+0x12345)"),
            Some(0x12345)
        );
        assert_eq!(frame_offset("ravelin: PANIC at el2/src/main.rs:3"), None);
        assert_eq!(frame_offset("  #3 0x1 (image+0xzz)"), None);
    }

    /// This test's own executable has debug information: the address of one of its functions must give its name.
    #[test]
    fn own_function_is_found_with_file_and_line() {
        let path = std::env::current_exe().unwrap();
        let symboliser = Symboliser::open(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = ElfFile64::<object::Endianness>::parse(&*bytes).unwrap();
        let symbol = object::Object::symbols(&file)
            .find(|s| {
                object::ObjectSymbol::name(s)
                    .is_ok_and(|n| n.contains("frame_offset") && n.contains("symbolise"))
            })
            .unwrap();
        let offset = object::ObjectSymbol::address(&symbol) - symboliser.base + 8;
        let line = symboliser.annotate(&format!("  #0 0x0 (image+{offset:#x})"));
        assert!(
            line.contains("frame_offset") && line.contains("symbolise.rs:"),
            "{line}"
        );
    }
}
