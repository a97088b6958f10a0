//! Disks on the PCI bus, and what must be true of every run that uses them behind the IOMMU.

use crate::machine::pci_disk_args;
use crate::process::Transcript;
use crate::runner::Context;
use crate::{files, verdict};
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};

/// Bytes of a disk.
const SIZE: u64 = 16 << 20;
/// Where ext2 keeps its magic number 0xef53.
const EXT2_MAGIC: usize = 1024 + 56;

/// Disks by their device numbers, with the files that hold their bytes.
pub(super) struct Disks(Vec<(u8, PathBuf)>);

/// Disks with these device numbers, empty.
pub(super) fn disks_of_zeros(context: &Context, numbers: &[u8]) -> Result<Disks> {
    let file = |number: &u8| (*number, context.folder.join(format!("disk{number}")));
    let disks: Vec<_> = numbers.iter().map(file).collect();
    for (_, file) in &disks {
        files::write_zeros(file, SIZE)?;
    }
    Ok(Disks(disks))
}

impl Disks {
    /// QEMU's arguments.
    pub(super) fn args(&self, queues: u32) -> Vec<String> {
        let disks: Vec<(u8, &Path)> = self
            .0
            .iter()
            .map(|(n, file)| (*n, file.as_path()))
            .collect();
        pci_disk_args(&disks, queues)
    }

    /// Their functions, as a FIT names them.
    pub(super) fn functions(&self) -> Vec<String> {
        let name = |(number, _): &(u8, PathBuf)| format!("00:{number:02x}.0");
        self.0.iter().map(name).collect()
    }

    /// Each holds a file system, and in it this text.
    pub(super) fn hold(&self, text: &[u8]) -> Result<()> {
        for (_, file) in &self.0 {
            let bytes = files::read(file, "QEMU had it as a disk")?;
            let magic = bytes.get(EXT2_MAGIC..EXT2_MAGIC + 2);
            ensure!(
                magic == Some(&[0x53, 0xef]),
                "{} has no file system",
                file.display()
            );
            let mut windows = bytes.windows(text.len());
            ensure!(
                windows.any(|window| window == text),
                "{} does not hold '{}'",
                file.display(),
                String::from_utf8_lossy(text)
            );
        }
        Ok(())
    }
}

/// EL2 drives the IOMMU, and has refused no DMA.
pub(super) fn isolated(transcript: &Transcript) -> Result<()> {
    verdict::line_with(transcript, "DMA of PCI devices goes through stage 2")?;
    let mut lines = transcript.lines.iter();
    match lines.find(|line| line.contains("smmu:") && line.contains("may not")) {
        Some(line) => anyhow::bail!("DMA was refused: {line}"),
        None => Ok(()),
    }
}
