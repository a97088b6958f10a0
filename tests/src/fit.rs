//! Builds a FIT (flattened image tree): the one file in which payloads reach the host.
//!
//! Format: the Flat Image Tree specification, version 1.0: a device tree with the data of each image in `/images`
//! and the sets that belong together in `/configurations`. Two properties of a configuration are ours:
//! `ravelin,role` ("host") and `bootargs`.

use crate::device_tree::{node, set};
use anyhow::{Context, Result, anyhow};
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node, Property};
use sha2::{Digest, Sha256};

/// Alignment of the kernel's bytes in the file. The format gives 4, and whoever copies 40 MiB with strict alignment
/// then needs several times the instructions.
const DATA_ALIGN: usize = 64;
/// Token, length and name of a property (Devicetree Specification 5.4.1).
const PROPERTY_HEADER: usize = 12;

/// A Linux that boots as the host.
#[derive(Debug, Clone, Copy)]
pub struct HostLinux<'a> {
    /// Raw arm64 Image.
    pub kernel: &'a [u8],
    /// Initramfs.
    pub ramdisk: &'a [u8],
    /// Command line; `None`: that of `/chosen`.
    pub arguments: Option<&'a str>,
}

/// A guest of the FIT. Several may share files.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// arm64 Image or raw binary.
    pub kernel: &'a [u8],
    /// Initramfs.
    pub ramdisk: Option<&'a [u8]>,
    /// Command line.
    pub arguments: &'a str,
    /// RAM in MiB, a multiple of 2.
    pub memory_mib: u64,
    /// vCPUs, 1 to 8.
    pub vcpus: u32,
    /// Memory is a locked slot.
    pub lock: bool,
    /// There is a device that does not snoop.
    pub noncoherent: bool,
    /// The host can't see its memory.
    pub protected: bool,
    /// Its virtio disk.
    pub disk: Disk<'a>,
}

/// The disk of a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Disk<'a> {
    /// It has none.
    #[default]
    None,
    /// A copy of these bytes, which ends with the VM.
    Image(&'a [u8]),
    /// The machine's own, if no other guest has it.
    Machine,
    /// PCI functions of the machine, such as "00:01.0", which are the guest's own.
    Functions(&'a [&'a str]),
}

/// The FIT with one configuration, `linux`, whose role is "host".
///
/// # Errors
/// The data does not fit into the format.
pub fn host_linux(linux: &HostLinux<'_>) -> Result<Vec<u8>> {
    let images = || {
        Ok(vec![
            image("kernel", "Linux", "kernel", linux.kernel)?,
            image("ramdisk", "initramfs", "ramdisk", linux.ramdisk)?,
        ])
    };
    aligned("Linux as Ravelin's host", images, || {
        configurations(linux.arguments)
    })
}

/// The FIT with a configuration `vm1`, `vm2`, ... for each guest. Equal files are stored once.
///
/// # Errors
/// The data does not fit into the format.
pub fn guests(guests: &[Guest<'_>]) -> Result<Vec<u8>> {
    let files = shared_files(guests);
    let images = || {
        let each = files
            .iter()
            .map(|(name, kind, data)| image(name, name, kind, data));
        each.collect()
    };
    aligned("Ravelin's guests", images, || {
        let mut configurations = node("configurations")?;
        set(&mut configurations, "default", "vm1")?;
        for (guest, number) in guests.iter().zip(1..) {
            let configuration = guest_configuration(guest, number, &files)?;
            configurations.add_child(configuration);
        }
        Ok(configurations)
    })
}

/// Name, type and bytes of each different file; the first is a kernel.
type SharedFiles<'a> = Vec<(String, &'static str, &'a [u8])>;

fn shared_files<'a>(guests: &[Guest<'a>]) -> SharedFiles<'a> {
    let mut files = SharedFiles::new();
    let kernels = guests.iter().map(|guest| ("kernel", guest.kernel));
    let ramdisks = guests
        .iter()
        .filter_map(|guest| Some(("ramdisk", guest.ramdisk?)));
    let disks = guests.iter().filter_map(|guest| match guest.disk {
        Disk::Image(bytes) => Some(("disk", bytes)),
        Disk::None | Disk::Machine | Disk::Functions(_) => None,
    });
    for (kind, data) in kernels.chain(ramdisks).chain(disks) {
        if !files.iter().any(|(_, k, d)| *k == kind && *d == data) {
            let number = files.iter().filter(|(_, k, _)| *k == kind).count();
            let name = if number == 0 {
                kind.to_owned()
            } else {
                format!("{kind}-{number}")
            };
            files.push((name, kind, data));
        }
    }
    files
}

fn guest_configuration(
    guest: &Guest<'_>,
    number: usize,
    files: &SharedFiles<'_>,
) -> Result<DeviceTreeNode> {
    let name_of = |wanted: &str, data: &[u8]| {
        let file = files
            .iter()
            .find(|(_, kind, d)| *kind == wanted && *d == data);
        file.map(|(name, ..)| name.clone())
            .context("a file of a guest is not stored")
    };
    let mut configuration = node(&format!("vm{number}"))?;
    set(&mut configuration, "description", &format!("VM {number}"))?;
    set(&mut configuration, "ravelin,role", "guest")?;
    set(
        &mut configuration,
        "kernel",
        &name_of("kernel", guest.kernel)?,
    )?;
    if let Some(ramdisk) = guest.ramdisk {
        set(&mut configuration, "ramdisk", &name_of("ramdisk", ramdisk)?)?;
    }
    match guest.disk {
        Disk::None => {}
        Disk::Image(bytes) => set(&mut configuration, "ravelin,disk", &name_of("disk", bytes)?)?,
        Disk::Machine => flag(&mut configuration, "ravelin,host-disk"),
        Disk::Functions(names) => {
            let list: Vec<u8> = names
                .iter()
                .flat_map(|name| [name.as_bytes(), b"\0"].concat())
                .collect();
            configuration.add_property(DeviceTreeProperty::new_unchecked("ravelin,assigned", list));
        }
    }
    set(&mut configuration, "bootargs", guest.arguments)?;
    let bytes = guest.memory_mib << 20;
    configuration.add_property(DeviceTreeProperty::new_unchecked("ravelin,memory", bytes));
    configuration.add_property(DeviceTreeProperty::new_unchecked(
        "ravelin,vcpus",
        guest.vcpus,
    ));
    if !guest.lock {
        flag(&mut configuration, "ravelin,no-lock");
    }
    if guest.noncoherent {
        flag(&mut configuration, "ravelin,non-coherent");
    }
    if guest.protected {
        flag(&mut configuration, "ravelin,protected");
    }
    Ok(configuration)
}

/// Sets a property without a value.
fn flag(node: &mut DeviceTreeNode, name: &str) {
    node.add_property(DeviceTreeProperty::new_unchecked(name, Vec::<u8>::new()));
}

/// Builds the tree twice: the second time with as much before the images as aligns the first one.
fn aligned(
    description: &str,
    images: impl Fn() -> Result<Vec<DeviceTreeNode>>,
    configurations: impl Fn() -> Result<DeviceTreeNode>,
) -> Result<Vec<u8>> {
    let loose = build(description, images()?, configurations()?, 0)?;
    let offset = kernel_offset(&loose)? + PROPERTY_HEADER;
    let pad = offset.next_multiple_of(DATA_ALIGN) - offset + PROPERTY_HEADER;
    build(description, images()?, configurations()?, pad)
}

/// Builds the tree with a property in front of the kernel that takes `pad` bytes, header included; 0: none.
fn build(
    description: &str,
    list: Vec<DeviceTreeNode>,
    configurations: DeviceTreeNode,
    pad: usize,
) -> Result<Vec<u8>> {
    let mut tree = DeviceTree::new();
    set(&mut tree.root, "description", description)?;
    // Zero, not now: the same inputs give the same file.
    tree.root
        .add_property(DeviceTreeProperty::new_unchecked("timestamp", 0u32));
    tree.root
        .add_property(DeviceTreeProperty::new_unchecked("#address-cells", 1u32));
    let mut images = node("images")?;
    if let Some(zeros) = pad.checked_sub(PROPERTY_HEADER) {
        images.add_property(DeviceTreeProperty::new_unchecked(
            "ravelin,pad",
            vec![0u8; zeros],
        ));
    }
    list.into_iter().for_each(|image| images.add_child(image));
    tree.root.add_child(images);
    tree.root.add_child(configurations);
    Ok(tree.to_dtb())
}

/// Where in the file the kernel's bytes begin.
fn kernel_offset(fit: &[u8]) -> Result<usize> {
    let fdt = Fdt::new(fit).map_err(|e| anyhow!("our own FIT is no device tree: {e}"))?;
    let kernel = fdt
        .find_node("/images/kernel")
        .context("our own FIT has no kernel")?;
    let data = kernel
        .property("data")
        .context("our own FIT's kernel has no data")?;
    let start = data.value().as_ptr().addr();
    start
        .checked_sub(fit.as_ptr().addr())
        .context("the kernel lies outside the FIT")
}

fn configurations(arguments: Option<&str>) -> Result<DeviceTreeNode> {
    let mut linux = node("linux")?;
    set(&mut linux, "description", "Linux as host")?;
    set(&mut linux, "kernel", "kernel")?;
    set(&mut linux, "ramdisk", "ramdisk")?;
    set(&mut linux, "ravelin,role", "host")?;
    if let Some(arguments) = arguments {
        set(&mut linux, "bootargs", arguments)?;
    }
    let mut configurations = node("configurations")?;
    set(&mut configurations, "default", "linux")?;
    configurations.add_child(linux);
    Ok(configurations)
}

/// One image with its SHA-256. No load address: whoever loads it chooses.
fn image(name: &str, description: &str, kind: &str, data: &[u8]) -> Result<DeviceTreeNode> {
    let mut hash = node("hash-1")?;
    hash.add_property(DeviceTreeProperty::new_unchecked(
        "value",
        Sha256::digest(data).as_slice(),
    ));
    set(&mut hash, "algo", "sha256")?;
    let mut image = node(name)?;
    set(&mut image, "description", description)?;
    image.add_property(DeviceTreeProperty::new_unchecked("data", data));
    set(&mut image, "type", kind)?;
    set(&mut image, "arch", "arm64")?;
    set(&mut image, "os", "linux")?;
    set(&mut image, "compression", "none")?;
    image.add_child(hash);
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(arguments: Option<&str>) -> Vec<u8> {
        host_linux(&HostLinux {
            kernel: b"abc",
            ramdisk: b"12345",
            arguments,
        })
        .unwrap()
    }

    fn value(fit: &[u8], path: &str, name: &str) -> Option<Vec<u8>> {
        let fdt = Fdt::new(fit).unwrap();
        let node = fdt.find_node(path).unwrap();
        node.property(name).map(|p| p.value().to_vec())
    }

    #[test]
    fn data_comes_back_and_the_hash_is_that_of_the_standard() {
        let fit = sample(None);
        assert_eq!(value(&fit, "/images/kernel", "data").unwrap(), b"abc");
        assert_eq!(value(&fit, "/images/ramdisk", "data").unwrap(), b"12345");
        // FIPS 180-4's example: SHA-256 of "abc".
        let hash = value(&fit, "/images/kernel/hash-1", "value").unwrap();
        assert_eq!(hash[..8], [0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea]);
        assert_eq!(hash.len(), 32);
    }

    #[test]
    fn default_configuration_is_the_host_and_names_its_images() {
        let fit = sample(Some("console=ttyAMA0"));
        assert_eq!(
            value(&fit, "/configurations", "default").unwrap(),
            b"linux\0"
        );
        let property = |name| value(&fit, "/configurations/linux", name).unwrap();
        assert_eq!(property("kernel"), b"kernel\0");
        assert_eq!(property("ramdisk"), b"ramdisk\0");
        assert_eq!(property("ravelin,role"), b"host\0");
        assert_eq!(property("bootargs"), b"console=ttyAMA0\0");
    }

    #[test]
    fn without_arguments_there_is_no_bootargs() {
        assert_eq!(
            value(&sample(None), "/configurations/linux", "bootargs"),
            None
        );
    }

    #[test]
    fn kernel_is_aligned_whatever_stands_before_it() {
        for arguments in [None, Some("x"), Some("a longer command line")] {
            assert_eq!(kernel_offset(&sample(arguments)).unwrap() % 64, 0);
        }
    }

    #[test]
    fn guests_share_files_and_say_what_they_are() {
        let one = Guest {
            kernel: b"abc",
            ramdisk: Some(b"12345"),
            arguments: "quiet",
            memory_mib: 64,
            vcpus: 2,
            lock: true,
            noncoherent: false,
            protected: false,
            disk: Disk::Image(b"sectors"),
        };
        let two = Guest {
            kernel: b"other",
            lock: false,
            noncoherent: true,
            protected: true,
            disk: Disk::Machine,
            ..one
        };
        let four = Guest {
            disk: Disk::Functions(&["00:01.0", "00:02.0"]),
            ..one
        };
        let fit = guests(&[one, two, one, four]).unwrap();
        let property = |vm: &str, name| value(&fit, &format!("/configurations/{vm}"), name);
        assert_eq!(property("vm1", "kernel").unwrap(), b"kernel\0");
        assert_eq!(property("vm2", "kernel").unwrap(), b"kernel-1\0");
        assert_eq!(property("vm3", "kernel").unwrap(), b"kernel\0");
        assert_eq!(property("vm2", "ramdisk").unwrap(), b"ramdisk\0");
        assert_eq!(
            property("vm1", "ravelin,memory").unwrap(),
            (64u64 << 20).to_be_bytes()
        );
        assert_eq!(
            property("vm1", "ravelin,vcpus").unwrap(),
            2u32.to_be_bytes()
        );
        assert!(property("vm1", "ravelin,no-lock").is_none());
        assert!(property("vm2", "ravelin,no-lock").is_some());
        assert!(property("vm2", "ravelin,non-coherent").is_some());
        assert!(property("vm2", "ravelin,protected").is_some());
        assert!(property("vm1", "ravelin,protected").is_none());
        assert_eq!(value(&fit, "/images/disk", "data").unwrap(), b"sectors");
        assert_eq!(property("vm3", "ravelin,disk").unwrap(), b"disk\0");
        assert!(property("vm2", "ravelin,disk").is_none());
        assert!(property("vm2", "ravelin,host-disk").is_some());
        assert_eq!(
            property("vm4", "ravelin,assigned").unwrap(),
            b"00:01.0\x0000:02.0\0"
        );
        assert!(property("vm1", "ravelin,assigned").is_none());
        assert_eq!(kernel_offset(&fit).unwrap() % 64, 0);
    }

    #[test]
    fn same_input_gives_the_same_file() {
        assert_eq!(sample(None), sample(None));
    }
}
