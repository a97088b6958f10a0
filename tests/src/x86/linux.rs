//! What the x86 hypervisor's Linux guest boots: Debian's kernel, a file system with busybox, a command line.

use super::disk::File;
use crate::{files, initramfs};
use anyhow::Result;

/// No local APIC, no ACPI: the guest is a PC with 8259 and 8254. Mitigations cost exits and protect nobody here.
const ARGUMENTS: &str = "console=ttyS0,115200 acpi=off nolapic noapic nokaslr mitigations=off tsc=reliable \
     random.trust_cpu=on cryptomgr.notests=1 panic=-1 reboot=kbd";

const SETUP: &str = "run scripts/setup-x86-payload.sh";

/// The files, in memory.
#[derive(Debug)]
pub struct Linux {
    kernel: Vec<u8>,
    ramdisk: Vec<u8>,
    command_line: String,
}

impl Linux {
    /// Reads what set-up fetched; `test` is the value of `ravelin.test`.
    ///
    /// # Errors
    /// Something has not been fetched.
    pub fn prepare(test: &str) -> Result<Self> {
        let folder = files::build("debian-x86");
        let init = files::root().join("tests/linux/init-x86");
        let init = files::read(&init, "the source tree is incomplete")?;
        let busybox = files::read(&folder.join("busybox"), SETUP)?;
        Ok(Self {
            kernel: files::read(&folder.join("vmlinux"), SETUP)?,
            ramdisk: initramfs::linux_host(&busybox, &init, &[])?,
            command_line: format!("{ARGUMENTS} ravelin.test={test}"),
        })
    }

    /// As files of a payload.
    #[must_use]
    pub fn files(&self) -> [File<'_>; 3] {
        [
            File {
                name: "kernel",
                bytes: &self.kernel,
            },
            File {
                name: "initrd",
                bytes: &self.ramdisk,
            },
            File {
                name: "command-line",
                bytes: self.command_line.as_bytes(),
            },
        ]
    }
}
