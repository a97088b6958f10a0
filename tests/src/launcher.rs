//! An image that starts another one with an `x0` of our choice: for hand-overs that QEMU's loader would repair.
//!
//! Layout: arm64 Image header whose first word branches to byte 64; six instructions there; the device tree at
//! 4 KiB; the image at the next multiple of 2 MiB. Position independent.

use anyhow::{Result, ensure};

/// What the started image finds in `x0`.
#[derive(Debug, Clone, Copy)]
pub enum Argument<'a> {
    /// This number.
    Number(u32),
    /// The address of a copy of these bytes.
    Bytes(&'a [u8]),
}

const CODE: usize = 64;
const LITERALS: usize = 88;
const TREE: usize = 4096;
const ALIGN: usize = 2 << 20;

/// Builds the image that starts `image`.
///
/// # Errors
/// The result would be 1 GiB or larger.
pub fn launcher(image: &[u8], argument: Argument<'_>) -> Result<Vec<u8>> {
    let bytes = if let Argument::Bytes(bytes) = argument {
        bytes
    } else {
        &[]
    };
    let start = (TREE + bytes.len()).next_multiple_of(ALIGN);
    let size = start + image.len();
    ensure!(size < 1 << 30, "the image is too large");
    let mut out = vec![0; size];
    put(&mut out, 0, &header(u64::try_from(size)?));
    put(&mut out, CODE, &code(argument));
    let x0 = if let Argument::Number(number) = argument {
        u64::from(number)
    } else {
        TREE as u64
    };
    put(&mut out, LITERALS, &x0.to_le_bytes());
    put(&mut out, LITERALS + 8, &(start as u64).to_le_bytes());
    put(&mut out, TREE, bytes);
    put(&mut out, start, image);
    Ok(out)
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

/// arm64 Image header (kernel documentation `arch/arm64/booting.rst`): text offset 0, 4 KiB pages, placed anywhere.
fn header(size: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(CODE);
    header.extend(0x1400_0010u32.to_le_bytes()); // b . + 64
    header.extend(0u32.to_le_bytes());
    for field in [0, size, 0b1010, 0, 0, 0] {
        header.extend(u64::to_le_bytes(field));
    }
    header.extend(b"ARM\x64");
    header.extend(0u32.to_le_bytes());
    header
}

/// Arm ARM C6.2: ADR, LDR (literal), ADD (shifted register), NOP, BR.
fn code(argument: Argument<'_>) -> Vec<u8> {
    let relative = match argument {
        Argument::Number(_) => 0xd503_201f, // nop
        Argument::Bytes(_) => 0x8b09_0000,  // add x0, x0, x9
    };
    let words: [u32; 6] = [
        0x10ff_fe09, // adr x9, . - 64: the first byte of the header
        0x5800_00a0, // ldr x0, . + 20: the first literal
        0x5800_00c1, // ldr x1, . + 24: the second
        relative,
        0x8b09_0021, // add x1, x1, x9
        0xd61f_0020, // br x1
    ];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_as_documented() {
        let out = launcher(b"image", Argument::Bytes(b"tree")).unwrap();
        assert_eq!(&out[56..60], b"ARM\x64");
        assert_eq!(&out[TREE..TREE + 4], b"tree");
        assert_eq!(&out[ALIGN..], b"image");
        assert_eq!(out[16..24], (out.len() as u64).to_le_bytes());
        assert_eq!(out[LITERALS..LITERALS + 8], 4096u64.to_le_bytes());
        assert_eq!(out[LITERALS + 8..LITERALS + 16], (2u64 << 20).to_le_bytes());
    }

    /// LDR (literal) and ADR are re-derived here: the offset is imm19 * 4 (bits 23:5), or immhi:immlo (bits 23:5, 30:29).
    #[test]
    fn instructions_reach_their_literals() {
        let out = launcher(b"", Argument::Number(0)).unwrap();
        let word = |at: usize| u32::from_le_bytes(out[at..at + 4].try_into().unwrap());
        let literal = |at: usize| at + usize::try_from((word(at) >> 5) & 0x7_ffff).unwrap() * 4;
        assert_eq!(literal(CODE + 4), LITERALS);
        assert_eq!(literal(CODE + 8), LITERALS + 8);
        let adr = word(CODE);
        let immediate = (((adr >> 5) & 0x7_ffff) << 2) | ((adr >> 29) & 3);
        assert_eq!(
            immediate,
            (1 << 21) - 64,
            "adr reaches 64 bytes back (21-bit two's complement)"
        );
    }

    #[test]
    fn number_is_passed_as_it_is() {
        let out = launcher(b"", Argument::Number(0x100)).unwrap();
        assert_eq!(out[LITERALS..LITERALS + 8], 0x100u64.to_le_bytes());
        assert_eq!(out[CODE + 12..CODE + 16], 0xd503_201fu32.to_le_bytes());
    }
}
