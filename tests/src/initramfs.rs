//! A Linux initramfs: a `newc` cpio archive written without any outside tool.
//!
//! Format: kernel documentation `driver-api/early-userspace/buffer-format.rst`. Each entry is a header of magic
//! "070701" and thirteen 8-digit hexadecimal numbers, the name with a NUL, padding to 4 bytes, the data, padding.

use anyhow::{Result, ensure};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// What the header says about one entry, besides its name and data.
#[derive(Default)]
struct Entry {
    mode: u32,
    device: (u32, u32),
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder that everybody may read.
    ///
    /// # Errors
    /// The archive is too large for the format.
    pub fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(
            name,
            &Entry {
                mode: DIRECTORY | 0o755,
                ..Entry::default()
            },
            &[],
        )
    }

    /// Adds a file that everybody may read and execute.
    ///
    /// # Errors
    /// The file is 4 GiB or larger.
    pub fn program(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.entry(
            name,
            &Entry {
                mode: FILE | 0o755,
                ..Entry::default()
            },
            data,
        )
    }

    /// Adds a character device node, so that there is a console before devtmpfs is mounted.
    ///
    /// # Errors
    /// The archive is too large for the format.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        self.entry(
            name,
            &Entry {
                mode: CHARACTER_DEVICE | 0o600,
                device: (major, minor),
            },
            &[],
        )
    }

    /// Closes the archive and returns its bytes, a multiple of 4 long.
    ///
    /// # Errors
    /// The archive is too large for the format.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", &Entry::default(), &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, entry: &Entry, data: &[u8]) -> Result<()> {
        ensure!(
            !name.starts_with('/'),
            "names in an initramfs are relative: {name}"
        );
        let size = u32::try_from(data.len())?;
        let name_size = u32::try_from(name.len() + 1)?;
        self.entries += 1;
        let links = if entry.mode & DIRECTORY == 0 { 1 } else { 2 };
        let (major, minor) = entry.device;
        let fields = [
            self.entries,
            entry.mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The initramfs of the Linux host: busybox, our `/init`, and the programs that measure and test,
/// or modules.
///
/// # Errors
/// A file is 4 GiB or larger.
pub fn linux_host(busybox: &[u8], init: &[u8], programs: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.directory(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.character_device("dev/null", 1, 3)?;
    archive.program("bin/busybox", busybox)?;
    for (name, bytes) in programs {
        archive.program(&format!("bin/{name}"), bytes)?;
    }
    archive.program("init", init)?;
    archive.finish()
}

/// An archive to put behind another one (the kernel unpacks both): more programs or modules in `/bin`.
///
/// # Errors
/// A file is 4 GiB or larger.
pub fn more_programs(programs: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for (name, bytes) in programs {
        archive.program(&format!("bin/{name}"), bytes)?;
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_is_byte_for_byte_newc() {
        let mut archive = Archive::new();
        archive.program("a", b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        let header = "070701".to_owned()
            + "00000001" // inode
            + "000081ed" // regular file, 0755
            + "00000000" + "00000000" // owner, group
            + "00000001" // links
            + "00000000" // time
            + "00000005" // size
            + "00000000" + "00000000" + "00000000" + "00000000" // devices
            + "00000002" // name and NUL
            + "00000000"; // check
        assert_eq!(&bytes[..110], header.as_bytes());
        assert_eq!(&bytes[110..120], b"a\0hello\0\0\0");
        assert!(bytes[120..].starts_with(b"070701"));
    }

    #[test]
    fn every_header_is_aligned_and_the_trailer_is_last() {
        let bytes = linux_host(b"12345", b"#!x", &[("t".to_owned(), b"9".to_vec())]).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let headers: Vec<_> = (0..bytes.len() - 6)
            .filter(|&i| bytes[i..].starts_with(b"070701"))
            .collect();
        assert!(headers.iter().all(|at| at % 4 == 0));
        let last = *headers.last().unwrap();
        assert_eq!(&bytes[last + 110..last + 121], b"TRAILER!!!\0");
        assert_eq!(headers.len(), 5 + 2 + 3 + 1);
    }

    #[test]
    fn absolute_name_is_refused() {
        assert!(Archive::new().program("/init", b"").is_err());
    }
}
