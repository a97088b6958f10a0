//! Debian's amd64 kernel file (`bzImage`) to the `vmlinux` inside, so that a guest need not unpack it.
//!
//! Formats: kernel documentation `arch/x86/boot.rst` (payload offset and length, in bytes from the protected-mode part
//! on, at 0x248 and 0x24c), and the LZ4 legacy frame and block formats.

use anyhow::{Context, Result, bail, ensure};

/// Largest unpacked kernel accepted, in bytes.
const MAX_KERNEL: usize = 512 << 20;
/// Mark of an LZ4 legacy frame.
const LZ4: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Shortest copy of an LZ4 block.
const MIN_MATCH: usize = 4;

/// Returns the ELF file inside a bzImage whose payload is LZ4.
///
/// # Errors
/// The file is something else, or damaged.
pub fn unpack(file: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        file.get(0x202..0x206) == Some(b"HdrS"),
        "this is no x86 kernel: no \"HdrS\" at byte 0x202"
    );
    let setup_sectors = usize::from(*file.get(0x1f1).context("cut short")?).max(1);
    let start = (setup_sectors + 1) * 512 + word(file, 0x248)?;
    let end = start + word(file, 0x24c)?;
    let payload = file
        .get(start..end)
        .context("the kernel's payload lies outside the file")?;
    if !payload.starts_with(&LZ4) {
        bail!("the kernel's payload is not LZ4: {:x?}", payload.get(..4));
    }
    // The payload ends in the size of what comes out.
    let tail = payload.len() - 4;
    let size = word(payload, tail)?;
    let out = unpack_frame(&payload[4..tail])?;
    ensure!(
        out.len() == size && out.starts_with(b"\x7fELF"),
        "{} bytes came out in place of {size}, or no ELF file",
        out.len()
    );
    Ok(out)
}

fn word(file: &[u8], at: usize) -> Result<usize> {
    let bytes = file.get(at..at + 4).context("the kernel is cut short")?;
    Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
}

/// Blocks, each behind its size.
fn unpack_frame(mut frame: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    while !frame.is_empty() {
        let size = word(frame, 0)?;
        let block = frame
            .get(4..4 + size)
            .context("an LZ4 block is cut short")?;
        unpack_block(block, &mut out)?;
        frame = &frame[4 + size..];
    }
    Ok(out)
}

/// Literals and copies from what came out of this block before, in turns.
fn unpack_block(block: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let begin = out.len();
    let mut input = block.iter().copied();
    while let Some(token) = input.next() {
        let literals = length(usize::from(token >> 4), &mut input)?;
        let before = out.len();
        out.extend(input.by_ref().take(literals));
        ensure!(out.len() == before + literals, "literals are cut short");
        ensure!(out.len() < MAX_KERNEL, "the kernel is too large");
        let Some(low) = input.next() else {
            return Ok(()); // a block ends in literals
        };
        let high = input.next().context("an offset is cut short")?;
        let back = usize::from(u16::from_le_bytes([low, high]));
        let count = length(usize::from(token & 15), &mut input)? + MIN_MATCH;
        ensure!(
            back != 0 && back <= out.len() - begin && count < MAX_KERNEL,
            "a copy reaches outside its block"
        );
        for _ in 0..count {
            out.push(out[out.len() - back]);
        }
    }
    Ok(())
}

/// 15 is continued by bytes up to the first below 255.
fn length(start: usize, input: &mut impl Iterator<Item = u8>) -> Result<usize> {
    let mut total = start;
    if start == 15 {
        loop {
            let byte = input.next().context("a length is cut short")?;
            total += usize::from(byte);
            if byte != 255 {
                break;
            }
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(bytes: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        unpack_block(bytes, &mut out).map(|()| out)
    }

    #[test]
    fn literals_and_overlapping_copies_come_out() {
        // "ab", then 7 bytes from 2 back, then "!".
        let bytes = [0x23, b'a', b'b', 2, 0, 0x10, b'!'];
        assert_eq!(block(&bytes).unwrap(), b"ababababa!");
    }

    #[test]
    fn long_lengths_are_continued() {
        let mut bytes = vec![0xf0, 255, 30];
        bytes.extend([7; 300]);
        assert_eq!(block(&bytes).unwrap(), [7; 300]);
    }

    #[test]
    fn damage_is_an_error() {
        assert!(block(&[0x20, b'a']).is_err());
        assert!(block(&[0x10, b'a', 2, 0]).is_err());
        assert!(block(&[0x10, b'a', 0, 0]).is_err());
        assert!(unpack(b"MZ").is_err());
    }
}
