//! Where in its memory a guest's kernel, ramdisk and device tree go.
//!
//! ```text
//! RAM      device tree (up to 64 KiB)
//! + 512 KiB   a raw binary
//! + 2 MiB     an arm64 Image (its header says how far behind)
//! end      ramdisk, page-aligned
//! ```

use thiserror::Error;

/// Room for the device tree.
pub const TREE_SIZE: u64 = 0x1_0000;
const RAW_OFFSET: u64 = 0x8_0000;
const IMAGE_BASE: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// Why a payload does not fit.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum LayoutError {
    /// The header of an Image contradicts itself.
    #[error("the Image's header is absurd")]
    BadHeader,
    /// Kernel and ramdisk do not fit.
    #[error("kernel and ramdisk need {0} MiB, more than the guest's memory")]
    TooBig(u64),
}

/// Offsets from the start of RAM, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    /// First instruction, where the kernel's file goes.
    pub kernel: u64,
    /// Where the ramdisk goes; its own length follows.
    pub ramdisk: u64,
}

/// `(text_offset, image_size)` of an arm64 Image (Linux's arm64 boot protocol), in bytes as the file says them;
/// `None` for other files.
#[must_use]
pub fn header(kernel: &[u8]) -> Option<(u64, u64)> {
    let header = kernel.get(..64)?;
    if header.get(56..60)? != b"ARM\x64" {
        return None;
    }
    let field = |at: usize| {
        header
            .get(at..at + 8)?
            .try_into()
            .ok()
            .map(u64::from_le_bytes)
    };
    field(8).zip(field(16))
}

/// Places a payload in `memory` bytes of RAM.
///
/// # Errors
///
/// [`LayoutError`].
pub fn layout(kernel: &[u8], ramdisk: u64, memory: u64) -> Result<Layout, LayoutError> {
    let file = kernel.len() as u64;
    let (start, size) = match header(kernel) {
        None => (RAW_OFFSET, file),
        Some((offset, size)) => {
            let start = IMAGE_BASE.checked_add(offset);
            (start.ok_or(LayoutError::BadHeader)?, size.max(file))
        }
    };
    let end = start.checked_add(size).ok_or(LayoutError::BadHeader)?;
    let needed = end
        .checked_add(ramdisk)
        .and_then(|sum| sum.checked_add(PAGE))
        .ok_or(LayoutError::BadHeader)?;
    if needed > memory {
        return Err(LayoutError::TooBig(needed.div_ceil(1 << 20)));
    }
    let ramdisk = memory - ramdisk;
    Ok(Layout {
        kernel: start,
        ramdisk: ramdisk - ramdisk % PAGE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    const MIB: u64 = 1 << 20;

    fn image(offset: u64, size: u64, file: usize) -> Vec<u8> {
        let mut bytes = vec![0; file];
        bytes[8..16].copy_from_slice(&offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&size.to_le_bytes());
        bytes[56..60].copy_from_slice(b"ARM\x64");
        bytes
    }

    #[test]
    fn a_raw_binary_goes_to_512_kib() {
        let layout = layout(&[0; 100], 0, 2 * MIB).unwrap();
        assert_eq!(layout.kernel, 0x8_0000);
    }

    #[test]
    fn an_image_goes_where_its_header_says() {
        let at = |offset| layout(&image(offset, 4096, 64), 0, 8 * MIB).unwrap().kernel;
        assert_eq!(at(0), 0x20_0000);
        assert_eq!(at(0x8_0000), 0x28_0000);
    }

    #[test]
    fn the_ramdisk_ends_with_the_memory_and_starts_at_a_page() {
        let layout = layout(&[0; 100], 5000, 2 * MIB).unwrap();
        assert_eq!(layout.ramdisk, 2 * MIB - 8192);
    }

    #[test]
    fn what_is_too_big_is_refused_by_its_size_in_memory() {
        let kernel = image(0, 9 * MIB, 64);
        let refused = layout(&kernel, 0, 8 * MIB).unwrap_err();
        assert_eq!(refused, LayoutError::TooBig(12));
        assert!(layout(&kernel, 0, 12 * MIB).is_ok());
        assert!(layout(&kernel, MIB, 12 * MIB).is_err());
    }

    #[test]
    fn absurd_headers_are_refused() {
        for (offset, size) in [(u64::MAX, 1), (1, u64::MAX), (u64::MAX - MIB, 0)] {
            let refused = layout(&image(offset, size, 64), 0, 8 * MIB);
            assert!(refused.is_err(), "{offset:#x} {size:#x}");
        }
    }
}
