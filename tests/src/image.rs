//! ELF file to flat binary, as a boot loader wants it: `PT_LOAD` segments at their distance from the lowest one.
//!
//! Gaps between segments are zeros; memory behind the last file byte (`.bss`) is left out, because the image
//! clears it itself. A `.bss` that lies *between* two segments is a gap like any other.

use anyhow::{Context, Result, bail, ensure};
use object::elf::PT_LOAD;
use object::read::elf::{ElfFile64, ProgramHeader};

/// Largest image written, in bytes: a hole in the addresses must not become a file that fills the disk.
const MAX_IMAGE: u64 = 1 << 30;

/// One loadable segment: physical address in bytes, and what the file holds for it.
struct Segment<'a> {
    address: u64,
    bytes: &'a [u8],
}

/// Lays the loadable segments of `elf` out by physical address and returns the flat bytes.
///
/// # Errors
/// Not a 64-bit ELF file, no loadable segment, segments that overlap, or an image larger than 1 GiB.
pub fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let file = ElfFile64::<object::Endianness>::parse(elf).context("not a 64-bit ELF file")?;
    let segments = loadable(&file)?;
    let Some(first) = segments.first() else {
        bail!("the ELF file has no loadable segment");
    };
    let base = first.address;
    let mut image = Vec::new();
    for segment in &segments {
        let offset = segment.address - base;
        ensure!(
            offset + segment.bytes.len() as u64 <= MAX_IMAGE,
            "segment at {:#x} makes the image larger than 1 GiB",
            segment.address
        );
        let offset = usize::try_from(offset)?;
        ensure!(
            offset >= image.len(),
            "segment at {:#x} overlaps the one before it",
            segment.address
        );
        image.resize(offset, 0);
        image.extend_from_slice(segment.bytes);
    }
    Ok(image)
}

/// The segments that have file bytes, lowest address first.
fn loadable<'a>(file: &ElfFile64<'a, object::Endianness>) -> Result<Vec<Segment<'a>>> {
    let endian = file.endian();
    let mut segments = Vec::new();
    for header in file.elf_program_headers() {
        if header.p_type(endian) != PT_LOAD || header.p_filesz(endian) == 0 {
            continue;
        }
        let Ok(bytes) = header.data(endian, file.data()) else {
            bail!("a segment's bytes lie outside the ELF file");
        };
        segments.push(Segment {
            address: header.p_paddr(endian),
            bytes,
        });
    }
    segments.sort_by_key(|segment| segment.address);
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file made by hand (ELF-64 specification, figures 2 and 6): header, program headers, bytes.
    fn elf(segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend(2u16.to_le_bytes()); // ET_EXEC
        file.extend(183u16.to_le_bytes()); // EM_AARCH64
        file.extend(1u32.to_le_bytes());
        file.extend(0u64.to_le_bytes()); // entry
        file.extend(64u64.to_le_bytes()); // program headers follow
        file.extend(0u64.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(64u16.to_le_bytes());
        file.extend(56u16.to_le_bytes());
        file.extend(u16::try_from(segments.len()).unwrap().to_le_bytes());
        file.extend([64, 0, 0, 0, 0, 0]);
        let mut offset = 64 + 56 * segments.len() as u64;
        for (address, bytes, memory) in segments {
            file.extend(1u32.to_le_bytes()); // PT_LOAD
            file.extend(5u32.to_le_bytes());
            for word in [offset, *address, *address, bytes.len() as u64, *memory, 1] {
                file.extend(word.to_le_bytes());
            }
            offset += bytes.len() as u64;
        }
        for (_, bytes, _) in segments {
            file.extend_from_slice(bytes);
        }
        file
    }

    #[test]
    fn gap_between_segments_is_zero() {
        let image = flatten(&elf(&[(0x1000, b"ab", 2), (0x1005, b"c", 1)])).unwrap();
        assert_eq!(image, b"ab\0\0\0c");
    }

    #[test]
    fn segments_are_sorted_by_address() {
        let image = flatten(&elf(&[(0x2002, b"b", 1), (0x2000, b"a", 1)])).unwrap();
        assert_eq!(image, b"a\0b");
    }

    #[test]
    fn bss_at_the_end_is_left_out() {
        assert_eq!(flatten(&elf(&[(0, b"abc", 0x1000)])).unwrap(), b"abc");
    }

    #[test]
    fn overlap_is_refused() {
        assert!(flatten(&elf(&[(0, b"abc", 3), (2, b"d", 1)])).is_err());
    }

    #[test]
    fn far_away_segment_is_refused() {
        assert!(flatten(&elf(&[(0, b"a", 1), (1 << 40, b"b", 1)])).is_err());
    }

    #[test]
    fn no_segment_is_refused() {
        assert!(flatten(&elf(&[])).is_err());
        assert!(flatten(b"#!/bin/sh").is_err());
    }
}
