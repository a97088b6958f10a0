//! Debian's arm64 kernel file to a raw `Image`: it may be raw, gzip, or an EFI "zboot" image with gzip inside.
//!
//! Formats: kernel documentation `arch/arm64/booting.rst` (Image header: magic "ARM\x64" at byte 56); the zboot
//! header has "MZ" at 0, "zimg" at 4, payload offset and size (little endian) at 8 and 12, and the name of the
//! compression at 24.

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;
use std::io::Read;

/// Largest unpacked kernel accepted, in bytes.
const MAX_KERNEL: u64 = 512 << 20;

/// Returns the raw arm64 Image inside `file`.
///
/// # Errors
/// The file is none of the three formats, is cut short, or names a compression other than gzip.
pub fn unpack(file: &[u8]) -> Result<Vec<u8>> {
    let image = match file {
        [0x1f, 0x8b, ..] => gunzip(file)?,
        [b'M', b'Z', _, _, b'z', b'i', b'm', b'g', ..] => unpack_zboot(file)?,
        _ => file.to_vec(),
    };
    ensure!(
        is_arm64_image(&image),
        "this is no arm64 kernel Image: no \"ARM\\x64\" magic at byte 56"
    );
    Ok(image)
}

/// Whether the bytes start with an arm64 Image header.
#[must_use]
pub fn is_arm64_image(bytes: &[u8]) -> bool {
    bytes.get(56..60) == Some(b"ARM\x64")
}

fn unpack_zboot(file: &[u8]) -> Result<Vec<u8>> {
    let compression = file.get(24..28).context("zboot header is cut short")?;
    if compression != b"gzip" {
        bail!(
            "zboot image uses compression {:?}: only gzip is supported",
            String::from_utf8_lossy(compression)
        );
    }
    let offset = word(file, 8)?;
    let end = offset
        .checked_add(word(file, 12)?)
        .context("zboot payload size overflows")?;
    gunzip(
        file.get(offset..end)
            .context("zboot payload lies outside the file")?,
    )
}

fn word(file: &[u8], at: usize) -> Result<usize> {
    let bytes = file.get(at..at + 4).context("zboot header is cut short")?;
    Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
}

fn gunzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    GzDecoder::new(bytes)
        .take(MAX_KERNEL)
        .read_to_end(&mut out)
        .context("gzip data of the kernel is damaged")?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn raw() -> Vec<u8> {
        let mut image = vec![0; 128];
        image[56..60].copy_from_slice(b"ARM\x64");
        image[100] = 7;
        image
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zboot(payload: &[u8], compression: &[u8; 4]) -> Vec<u8> {
        let mut file = b"MZ\0\0zimg".to_vec();
        file.extend(64u32.to_le_bytes());
        file.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        file.resize(24, 0);
        file.extend(compression);
        file.resize(64, 0);
        file.extend(payload);
        file
    }

    #[test]
    fn all_three_formats_give_the_same_image() {
        assert_eq!(unpack(&raw()).unwrap(), raw());
        assert_eq!(unpack(&gzip(&raw())).unwrap(), raw());
        assert_eq!(unpack(&zboot(&gzip(&raw()), b"gzip")).unwrap(), raw());
    }

    #[test]
    fn other_compression_is_refused_by_name() {
        let error = unpack(&zboot(&gzip(&raw()), b"zstd")).unwrap_err();
        assert!(error.to_string().contains("zstd"));
    }

    #[test]
    fn truncated_zboot_is_refused() {
        let file = zboot(&gzip(&raw()), b"gzip");
        assert!(unpack(&file[..file.len() - 1]).is_err());
        assert!(unpack(&file[..20]).is_err());
    }

    #[test]
    fn other_file_is_refused() {
        assert!(unpack(b"hello").is_err());
    }
}
