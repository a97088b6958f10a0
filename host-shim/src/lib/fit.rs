//! The FIT image (flattened image tree) that the boot loader leaves as initrd: one configuration
//! per VM.
//!
//! A FIT is a device tree whose `/images/*` nodes hold `data`. Properties of a configuration that
//! are ours: `ravelin,role` ("host" or "guest"), and for guests `ravelin,memory` (bytes, 64 bits),
//! `ravelin,vcpus`, `ravelin,disk` (the image that is its disk), `ravelin,assigned` (PCI functions of
//! the machine that are its own, such as "00:01.0"), `ravelin,host-disk`, `ravelin,protected`, `ravelin,no-lock`, `ravelin,non-coherent` (flags).

use alloc::vec::Vec;

use board::dtoolkit::fdt::{Fdt, FdtNode};
use board::dtoolkit::{Node, Property};
use thiserror::Error;

use crate::pci::Function;
use crate::platform::MAX_ASSIGNED;

/// Why a FIT can't be used.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum FitError {
    /// Shorter than a header.
    #[error("the initrd is too small for a FIT image")]
    TooSmall,
    /// Another magic.
    #[error("the initrd is no FIT image (build one with: ravelin fit)")]
    NoFit,
    /// Shorter than its header says.
    #[error("the FIT image is truncated")]
    Truncated,
    /// Not a device tree behind the header.
    #[error("the FIT image is corrupt")]
    Corrupt,
    /// No `/configurations`.
    #[error("the FIT image has no configurations")]
    NoConfigurations,
    /// A configuration without a kernel, or one that names no data.
    #[error("a configuration names no kernel with data")]
    NoKernel,
    /// A ramdisk that is named but not there.
    #[error("a configuration names a ramdisk that has no data")]
    NoRamdisk,
    /// A disk that is named but not there.
    #[error("a configuration names a disk that has no data")]
    NoDisk,
    /// A number of vCPUs that no VM can have.
    #[error("ravelin,vcpus must be 1 to 8")]
    BadVcpus,
    /// A size that is no multiple of 2 MiB, or zero.
    #[error("ravelin,memory must be a multiple of 2 MiB, at least 2 MiB")]
    BadMemory,
    /// Too many PCI functions, or one that is not written as it should.
    #[error("ravelin,assigned must be at most {MAX_ASSIGNED} functions such as 00:01.0")]
    BadFunction,
}

/// A guest's configuration.
#[derive(Clone, Debug)]
pub struct GuestConfig<'a> {
    /// Name of the configuration.
    pub name: &'a str,
    /// arm64 Image or raw binary.
    pub kernel: &'a [u8],
    /// Initramfs.
    pub ramdisk: Option<&'a [u8]>,
    /// Contents of its disk, of which it gets a copy.
    pub disk: Option<&'a [u8]>,
    /// Its disk is the host's, if that has one and no other guest got it.
    pub host_disk: bool,
    /// Command line.
    pub bootargs: &'a str,
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// The host must not see its memory.
    pub protected: bool,
    /// Its memory is a locked slot.
    pub lock: bool,
    /// It has a device that does not snoop.
    pub noncoherent: bool,
    /// The machine's PCI functions that are its own.
    pub assigned: Vec<Function>,
}

/// Bytes of RAM of a guest that does not say.
pub const DEFAULT_MEMORY: u64 = 256 << 20;

/// Bytes of RAM of the guest that is linked in.
const DEMO_MEMORY: u64 = 16 << 20;

/// The configuration of the guest that is linked in.
#[must_use]
pub const fn demo(kernel: &[u8], vcpus: u8) -> GuestConfig<'_> {
    GuestConfig {
        name: "demo",
        kernel,
        ramdisk: None,
        disk: None,
        host_disk: false,
        bootargs: "run=demo",
        memory: DEMO_MEMORY,
        vcpus,
        protected: false,
        lock: true,
        noncoherent: false,
        assigned: Vec::new(),
    }
}

/// The FIT without what a boot loader's rounding adds behind it.
///
/// # Errors
///
/// [`FitError::TooSmall`], [`FitError::NoFit`] or [`FitError::Truncated`].
pub fn blob(bytes: &[u8]) -> Result<&[u8], FitError> {
    let header = bytes.first_chunk::<8>().ok_or(FitError::TooSmall)?;
    let [a, b, c, d, e, f, g, h] = *header;
    if u32::from_be_bytes([a, b, c, d]) != 0xd00d_feed {
        return Err(FitError::NoFit);
    }
    let size = u32::from_be_bytes([e, f, g, h]);
    usize::try_from(size)
        .ok()
        .and_then(|size| bytes.get(..size))
        .ok_or(FitError::Truncated)
}

/// A guest, or why it can't be.
pub type Guest<'a> = Result<GuestConfig<'a>, FitError>;

/// The guests of a FIT, in its order; none if it only has a host. What is wrong with one does not
/// concern the others.
///
/// # Errors
///
/// [`FitError`] of the whole file.
pub fn guests(bytes: &[u8]) -> Result<Vec<Guest<'_>>, FitError> {
    let fit = Fdt::new(blob(bytes)?).map_err(|_| FitError::Corrupt)?;
    let configurations = fit
        .find_node("/configurations")
        .ok_or(FitError::NoConfigurations)?;
    let guests = configurations
        .children()
        .filter(|node| text(node, "ravelin,role") == Some("guest"))
        .map(|node| guest(fit, &node));
    Ok(guests.collect())
}

fn guest<'a>(fit: Fdt<'a>, node: &FdtNode<'a>) -> Guest<'a> {
    let kernel = text(node, "kernel").and_then(|name| data(fit, name));
    let optional = |property, missing| match text(node, property) {
        None => Ok(None),
        Some(name) => data(fit, name).map(Some).ok_or(missing),
    };
    let ramdisk = optional("ramdisk", FitError::NoRamdisk)?;
    let disk = optional("ravelin,disk", FitError::NoDisk)?;
    let memory = match node.property("ravelin,memory") {
        None => DEFAULT_MEMORY,
        Some(value) => value.value_as::<u64>().map_err(|_| FitError::BadMemory)?,
    };
    if memory == 0 || !memory.is_multiple_of(2 << 20) {
        return Err(FitError::BadMemory);
    }
    let vcpus = match node.property("ravelin,vcpus") {
        None => 1,
        Some(value) => value.value_as::<u32>().map_err(|_| FitError::BadVcpus)?,
    };
    let vcpus = u8::try_from(vcpus).map_err(|_| FitError::BadVcpus)?;
    if vcpus == 0 || vcpus > abi::MAX_VCPUS {
        return Err(FitError::BadVcpus);
    }
    let has = |name| node.property(name).is_some();
    Ok(GuestConfig {
        name: node.name(),
        kernel: kernel.ok_or(FitError::NoKernel)?,
        ramdisk,
        disk,
        host_disk: has("ravelin,host-disk"),
        bootargs: text(node, "bootargs").unwrap_or(""),
        memory,
        vcpus,
        protected: has("ravelin,protected"),
        lock: !has("ravelin,no-lock"),
        noncoherent: has("ravelin,non-coherent"),
        assigned: assigned(node)?,
    })
}

/// A list of strings, one for each function.
fn assigned(node: &FdtNode<'_>) -> Result<Vec<Function>, FitError> {
    let Some(property) = node.property("ravelin,assigned") else {
        return Ok(Vec::new());
    };
    let list = property.value().strip_suffix(b"\0");
    let names = list.ok_or(FitError::BadFunction)?.split(|byte| *byte == 0);
    let functions = names.map(|name| {
        let name = core::str::from_utf8(name).ok();
        name.and_then(|name| name.parse().ok())
            .ok_or(FitError::BadFunction)
    });
    let functions: Vec<Function> = functions.collect::<Result<_, _>>()?;
    if functions.len() > MAX_ASSIGNED {
        return Err(FitError::BadFunction);
    }
    Ok(functions)
}

fn text<'a>(node: &FdtNode<'a>, name: &str) -> Option<&'a str> {
    node.property(name)?.value_as().ok()
}

/// The data of `/images/NAME`, if it is not compressed.
fn data<'a>(fit: Fdt<'a>, name: &str) -> Option<&'a [u8]> {
    let images = fit.find_node("/images")?;
    let image = images.children().find(|node| node.name() == name)?;
    if !matches!(text(&image, "compression"), None | Some("none")) {
        return None;
    }
    image.property("data")?.value_as().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_fdt::FdtWriter;

    fn fit(configure: impl FnOnce(&mut FdtWriter)) -> Vec<u8> {
        let mut writer = FdtWriter::new().unwrap();
        let root = writer.begin_node("").unwrap();
        let images = writer.begin_node("images").unwrap();
        let kernel = writer.begin_node("kernel").unwrap();
        writer.property("data", b"kernel's bytes").unwrap();
        writer.end_node(kernel).unwrap();
        let packed = writer.begin_node("packed").unwrap();
        writer.property("data", b"gzip").unwrap();
        writer.property_string("compression", "gzip").unwrap();
        writer.end_node(packed).unwrap();
        writer.end_node(images).unwrap();
        let configurations = writer.begin_node("configurations").unwrap();
        let one = writer.begin_node("one").unwrap();
        writer.property_string("ravelin,role", "guest").unwrap();
        configure(&mut writer);
        writer.end_node(one).unwrap();
        writer.end_node(configurations).unwrap();
        writer.end_node(root).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn defaults_are_one_vcpu_and_locked_memory() {
        let fit = fit(|w| w.property_string("kernel", "kernel").unwrap());
        let guests = guests(&fit).unwrap();
        let guest = guests[0].as_ref().unwrap();
        assert_eq!((guest.name, guest.kernel), ("one", &b"kernel's bytes"[..]));
        assert_eq!((guest.vcpus, guest.memory), (1, 256 << 20));
        assert!(guest.lock && !guest.protected && !guest.noncoherent);
        assert!(guest.ramdisk.is_none() && guest.bootargs.is_empty());
        assert!(guest.assigned.is_empty());
    }

    #[test]
    fn what_a_configuration_says_is_read() {
        let fit = fit(|w| {
            w.property_string("kernel", "kernel").unwrap();
            w.property_string("bootargs", "quiet").unwrap();
            w.property_u64("ravelin,memory", 64 << 20).unwrap();
            w.property_u32("ravelin,vcpus", 8).unwrap();
            w.property_string("ravelin,disk", "kernel").unwrap();
            w.property_null("ravelin,host-disk").unwrap();
            w.property_null("ravelin,no-lock").unwrap();
            w.property_null("ravelin,non-coherent").unwrap();
            w.property_null("ravelin,protected").unwrap();
            w.property("ravelin,assigned", b"00:01.0\x0002:1f.7\0")
                .unwrap();
        });
        let guest = guests(&fit).unwrap().remove(0).unwrap();
        assert_eq!((guest.vcpus, guest.memory), (8, 64 << 20));
        assert!(!guest.lock && guest.protected && guest.noncoherent);
        assert_eq!(guest.bootargs, "quiet");
        assert_eq!(guest.disk, Some(&b"kernel's bytes"[..]));
        assert!(guest.host_disk);
        let assigned: Vec<_> = guest.assigned.iter().map(|f| f.requester()).collect();
        assert_eq!(assigned, [0x0008, 0x02ff]);
    }

    #[test]
    fn impossible_configurations_are_named() {
        type Configure = fn(&mut FdtWriter);
        let cases: [(Configure, FitError); 6] = [
            (|_| {}, FitError::NoKernel),
            (
                |w| w.property_string("kernel", "packed").unwrap(),
                FitError::NoKernel,
            ),
            (
                |w| {
                    w.property_string("kernel", "kernel").unwrap();
                    w.property_string("ramdisk", "missing").unwrap();
                },
                FitError::NoRamdisk,
            ),
            (
                |w| {
                    w.property_string("kernel", "kernel").unwrap();
                    w.property_string("ravelin,disk", "packed").unwrap();
                },
                FitError::NoDisk,
            ),
            (
                |w| {
                    w.property_string("kernel", "kernel").unwrap();
                    w.property_u32("ravelin,vcpus", 9).unwrap();
                },
                FitError::BadVcpus,
            ),
            (
                |w| {
                    w.property_string("kernel", "kernel").unwrap();
                    w.property_u64("ravelin,memory", 4096).unwrap();
                },
                FitError::BadMemory,
            ),
        ];
        for (configure, error) in cases {
            let fit = fit(configure);
            assert_eq!(guests(&fit).unwrap()[0].as_ref().unwrap_err(), &error);
        }
    }

    #[test]
    fn functions_that_make_no_sense_are_refused() {
        for list in [
            &b""[..],
            b"\0",
            b"00:01.0",
            b"00:20.0\0",
            b"00:01.8\0",
            b"0:1.0\0",
            b"00:01.0 \0",
            b"+0:01.0\0",
            b"00:01.0\0\0",
            b"\xff0:01.0\0",
            b"00:01.0\x0000:02.0\x0000:03.0\x0000:04.0\x0000:05.0\0",
        ] {
            let fit = fit(|w| {
                w.property_string("kernel", "kernel").unwrap();
                w.property("ravelin,assigned", list).unwrap();
            });
            let guests = guests(&fit).unwrap();
            let error = guests[0].as_ref().unwrap_err();
            assert_eq!(error, &FitError::BadFunction, "{list:?}");
        }
    }

    #[test]
    fn wrong_and_truncated_files_are_told_apart() {
        let whole = fit(|w| w.property_string("kernel", "kernel").unwrap());
        assert_eq!(guests(&whole[..7]).unwrap_err(), FitError::TooSmall);
        assert_eq!(guests(&[0; 64]).unwrap_err(), FitError::NoFit);
        let cut = &whole[..whole.len() - 1];
        assert_eq!(guests(cut).unwrap_err(), FitError::Truncated);
        let mut padded = whole.clone();
        padded.extend([0; 100]);
        assert_eq!(guests(&padded).unwrap().len(), 1);
        let mut broken = whole;
        broken[8..12].copy_from_slice(&[0xff; 4]);
        assert_eq!(guests(&broken).unwrap_err(), FitError::Corrupt);
    }
}
