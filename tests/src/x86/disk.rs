//! The flat disk image that a PC's BIOS, or Bochs's, boots: eight sectors of boot code, the hypervisor, the payload.
//!
//! | sectors | what | loaded at |
//! |---|---|---|
//! | 0 to 7 | boot code, with the sizes of what follows | 0x7c00 |
//! | 8 on | the hypervisor | 1 MiB |
//! | behind it | the payload: arguments and files for the hypervisor | 32 MiB |

use crate::image;
use anyhow::{Context, Result, ensure};

/// Bytes of a sector.
const SECTOR: usize = 512;
/// Address and size of the boot code.
const BOOT_AT: usize = 0x7c00;
const BOOT_BYTES: usize = 8 * SECTOR;
/// Where the hypervisor is linked.
const HYPERVISOR_AT: usize = 1 << 20;
/// Where the boot code keeps what this module fills in: mark, sectors of the hypervisor, sectors and bytes of the payload.
const HEADER: usize = 0x190;
const MARK: &[u8; 8] = b"RAVELIN1";
/// Bytes of a cylinder of 16 heads and 63 sectors: emulators guess the geometry of a whole number of them.
const CYLINDER: usize = 16 * 63 * SECTOR;
/// Mark of a payload.
const PAYLOAD_MARK: &[u8; 8] = b"RVLNPAY1";
/// Alignment of a file in the payload, in bytes: a page, so that it can be mapped.
const FILE_ALIGN: usize = 4096;

/// A file for the hypervisor.
#[derive(Debug, Clone, Copy)]
pub struct File<'a> {
    /// What it is called, at most 15 bytes.
    pub name: &'a str,
    /// What is in it.
    pub bytes: &'a [u8],
}

/// Builds the image from the hypervisor's ELF file.
///
/// # Errors
/// It is not that file: wrong addresses, or no header in its boot code.
pub fn build(elf: &[u8], files: &[File<'_>]) -> Result<Vec<u8>> {
    let flat = image::flatten(elf)?;
    let hypervisor = flat
        .get(HYPERVISOR_AT - BOOT_AT..)
        .context("the ELF file does not reach from 0x7c00 to beyond 1 MiB")?;
    let mut boot = flat.get(..BOOT_BYTES).context("no boot code")?.to_vec();
    ensure!(
        boot.get(HEADER..HEADER + 8) == Some(MARK) && boot[510..512] == [0x55, 0xaa],
        "the boot code has no header at {HEADER:#x}"
    );
    let payload = payload(files)?;
    let sizes = [
        hypervisor.len().div_ceil(SECTOR),
        payload.len().div_ceil(SECTOR),
        payload.len(),
    ];
    for (n, size) in sizes.into_iter().enumerate() {
        let at = HEADER + MARK.len() + 4 * n;
        boot[at..at + 4].copy_from_slice(&u32::try_from(size)?.to_le_bytes());
    }
    let mut disk = boot;
    for part in [hypervisor, &payload] {
        disk.extend_from_slice(part);
        disk.resize(disk.len().next_multiple_of(SECTOR), 0);
    }
    disk.resize(disk.len().next_multiple_of(CYLINDER).max(2 * CYLINDER), 0);
    Ok(disk)
}

/// The payload: mark, number of files, then for each 16 bytes of name, offset and size (32 bits each); then the files.
fn payload(files: &[File<'_>]) -> Result<Vec<u8>> {
    let mut out = PAYLOAD_MARK.to_vec();
    out.extend(u32::try_from(files.len())?.to_le_bytes());
    let mut at = (out.len() + 24 * files.len()).next_multiple_of(FILE_ALIGN);
    for file in files {
        ensure!(file.name.len() < 16, "'{}' is too long a name", file.name);
        let mut name = [0; 16];
        name[..file.name.len()].copy_from_slice(file.name.as_bytes());
        out.extend(name);
        out.extend(u32::try_from(at)?.to_le_bytes());
        out.extend(u32::try_from(file.bytes.len())?.to_le_bytes());
        at = (at + file.bytes.len()).next_multiple_of(FILE_ALIGN);
    }
    for file in files {
        out.resize(out.len().next_multiple_of(FILE_ALIGN), 0);
        out.extend_from_slice(file.bytes);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    #[test]
    fn files_are_found_where_the_table_says() {
        let files = [
            File {
                name: "arguments",
                bytes: b"run=all",
            },
            File {
                name: "kernel",
                bytes: &[7; 5000],
            },
        ];
        let payload = payload(&files).unwrap();
        assert_eq!(word(&payload, 8), 2);
        for (n, file) in files.iter().enumerate() {
            let entry = 12 + 24 * n;
            assert!(payload[entry..].starts_with(file.name.as_bytes()));
            let (at, size) = (word(&payload, entry + 16), word(&payload, entry + 20));
            assert_eq!(at % FILE_ALIGN, 0);
            assert_eq!(&payload[at..at + size], file.bytes);
        }
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        let file = File {
            name: "sixteen-letters!",
            bytes: b"",
        };
        assert!(payload(&[file]).is_err());
    }
}
