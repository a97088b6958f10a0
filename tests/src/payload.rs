//! The files that machines boot: Debian's kernel, our initramfs, and the FIT that holds both.

use crate::machine::debian_dtb;
use crate::{device_tree, files, fit, initramfs};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Where the built payloads are.
#[derive(Debug, Clone)]
pub struct Payloads {
    /// Raw arm64 Linux Image.
    pub linux: PathBuf,
    /// Initramfs with busybox and our `/init`.
    pub initramfs: PathBuf,
    /// FIT of both, for the host.
    pub fit: PathBuf,
    /// Debian's Pi 4 device tree, less what QEMU's `raspi4b` does not model and Linux' built-in drivers touch.
    pub pi4_tree: PathBuf,
}

/// Devices of the Pi 4's HDMI block, which QEMU 10 does not model: an access is an external abort.
const UNMODELLED: [&str; 6] = [
    "/soc/interrupt-controller@7ef00100",
    "/soc/clock@7ef00000",
    "/soc/i2c@7ef04500",
    "/soc/i2c@7ef09500",
    "/soc/hdmi@7ef00700",
    "/soc/hdmi@7ef05700",
];
/// On the board the first PL011 serves Bluetooth, and Linux then makes no terminal of it.
const BLUETOOTH: &str = "/soc/serial@7e201000/bluetooth";

/// Paths only, for what does not read them.
impl Default for Payloads {
    fn default() -> Self {
        Self {
            linux: files::build("debian/Image"),
            initramfs: files::build("work/initramfs.cpio"),
            fit: files::build("work/host-linux.fit"),
            pi4_tree: files::build("work/rpi4-linux.dtb"),
        }
    }
}

/// Drivers of a guest's virtio devices, which Debian does not link into the kernel, in the order of loading.
const MODULES: [&str; 3] = ["virtio_mmio", "virtio_blk", "virtio-rng"];

/// What ext2 needs of Debian's modules, in the order of loading.
const FILE_SYSTEM_MODULES: [&str; 5] = ["crc16", "mbcache", "jbd2", "crc32c_generic", "ext4"];

const SETUP: &str = "run `make setup`";

/// Builds initramfs and FIT from what set-up fetched and built.
///
/// # Errors
/// Something has not been fetched or built, or `build/` cannot be written.
pub fn prepare() -> Result<Payloads> {
    let payloads = Payloads::default();
    let kernel = files::read(&payloads.linux, SETUP)?;
    let busybox = files::read(&files::build("debian/busybox"), SETUP)?;
    let init = files::read(
        &files::root().join("tests/linux/init"),
        "the source tree is incomplete",
    )?;
    let ticks = files::read(&files::build("guests/ticks"), "run scripts/build-guests.sh")?;
    let mut programs = vec![("ticks".to_owned(), ticks)];
    programs.extend(modules(&MODULES)?);
    let ramdisk = initramfs::linux_host(&busybox, &init, &programs)?;
    let host = fit::HostLinux {
        kernel: &kernel,
        ramdisk: &ramdisk,
        arguments: None,
    };
    files::write(&payloads.initramfs, &ramdisk)?;
    files::write(&payloads.fit, &fit::host_linux(&host)?)?;
    files::write(&payloads.pi4_tree, &pi4_tree()?)?;
    Ok(payloads)
}

impl Payloads {
    /// The same with the modules of a file system behind the initramfs, in files of their own in `folder`: a boot that
    /// has no disk need not unpack 2 MiB more.
    ///
    /// # Errors
    /// The modules have not been fetched, or the folder cannot be written.
    pub fn with_file_system(&self, folder: &Path) -> Result<Self> {
        let mut ramdisk = files::read(&self.initramfs, "run `make build`")?;
        ramdisk.extend(initramfs::more_programs(&modules(&FILE_SYSTEM_MODULES)?)?);
        let payloads = Self {
            initramfs: folder.join("initramfs-disk.cpio"),
            fit: folder.join("host-linux-disk.fit"),
            ..self.clone()
        };
        let host = fit::HostLinux {
            kernel: &files::read(&self.linux, SETUP)?,
            ramdisk: &ramdisk,
            arguments: None,
        };
        files::write(&payloads.initramfs, &ramdisk)?;
        files::write(&payloads.fit, &fit::host_linux(&host)?)?;
        Ok(payloads)
    }
}

/// Modules by their file names, with their bytes.
fn modules(names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |module| {
        let name = format!("{module}.ko");
        let bytes = files::read(&files::build("debian/modules").join(&name), SETUP)?;
        Ok((name, bytes))
    };
    names.iter().map(read).collect()
}

fn pi4_tree() -> Result<Vec<u8>> {
    let mut tree = device_tree::parse(&files::read(&debian_dtb("bcm2711-rpi-4-b.dtb"), SETUP)?)?;
    UNMODELLED
        .iter()
        .try_for_each(|path| device_tree::disable(&mut tree, path))?;
    device_tree::remove(&mut tree, BLUETOOTH)?;
    // The tree names the mini UART; this way EL2 talks on the line that Linux calls ttyAMA0.
    device_tree::set_chosen(&mut tree, "stdout-path", "serial0:115200n8")?;
    Ok(tree.to_dtb())
}
