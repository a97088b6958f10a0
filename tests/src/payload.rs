//! The files that machines boot: Debian's kernel, our initramfs, and the FIT that holds both.

use crate::{files, fit, initramfs};
use anyhow::Result;
use std::path::PathBuf;

/// Where the built payloads are.
#[derive(Debug, Clone)]
pub struct Payloads {
    /// Raw arm64 Linux Image.
    pub linux: PathBuf,
    /// Initramfs with busybox and our `/init`.
    pub initramfs: PathBuf,
    /// FIT of both, for the host.
    pub fit: PathBuf,
}

const SETUP: &str = "run `make setup`";

/// Builds initramfs and FIT from what set-up fetched and built.
///
/// # Errors
/// Something has not been fetched or built, or `build/` cannot be written.
pub fn prepare() -> Result<Payloads> {
    let payloads = Payloads {
        linux: files::build("debian/Image"),
        initramfs: files::build("work/initramfs.cpio"),
        fit: files::build("work/host-linux.fit"),
    };
    let kernel = files::read(&payloads.linux, SETUP)?;
    let busybox = files::read(&files::build("debian/busybox"), SETUP)?;
    let init = files::read(
        &files::root().join("tests/linux/init"),
        "the source tree is incomplete",
    )?;
    let ticks = files::read(&files::build("guests/ticks"), "run scripts/build-guests.sh")?;
    let ramdisk = initramfs::linux_host(&busybox, &init, &[("ticks", &ticks)])?;
    let host = fit::HostLinux {
        kernel: &kernel,
        ramdisk: &ramdisk,
        arguments: None,
    };
    files::write(&payloads.initramfs, &ramdisk)?;
    files::write(&payloads.fit, &fit::host_linux(&host)?)?;
    Ok(payloads)
}
