//! Chain-loading Linux as host, from a FIT image that the boot loader left as the initrd.
//!
//! A FIT (flattened image tree: a device tree whose `/images/*` nodes hold `data`) has one
//! configuration per VM; the one with `ravelin,role = "host"` names the host's `kernel` and
//! `ramdisk` and may give `bootargs`.

use board::dtoolkit::fdt::{Fdt, FdtNode};
use board::dtoolkit::fdt_mut::FdtMut;
use board::dtoolkit::{Node, Property};
use board::{AddrRange, Placement, lowest_free};
use vmm::image;

use crate::arch::{cpu, mem};
use crate::console::line;
use crate::machine::Machine;

/// Alignment of a kernel (arm64 boot protocol).
const KERNEL_ALIGN: u64 = 2 << 20;
/// Bytes that EL2 left behind the device tree for our changes; see el2/src/boot.rs.
const TREE_SLACK: u64 = 0x6000;

/// What is to be booted.
struct Payload<'a> {
    kernel: &'a [u8],
    ramdisk: Option<AddrRange>,
    bootargs: Option<&'a str>,
}

/// Boots the host's Linux from the FIT at `fit`. Returns, with the reason, only if it can't.
pub(crate) fn boot(machine: &Machine, fit: AddrRange) -> &'static str {
    match prepare(machine, fit) {
        Ok((kernel, tree)) => {
            line(format_args!(
                "host: starting Linux at {kernel:#x}, device tree at {tree:#x}"
            ));
            cpu::enter(kernel, tree)
        }
        Err(why) => why,
    }
}

fn prepare(machine: &Machine, fit: AddrRange) -> Result<(u64, u64), &'static str> {
    let blob = fit_blob(mem::bytes(fit))?;
    let tree = Fdt::new(blob).map_err(|_| "the FIT image is corrupt")?;
    let payload = payload(tree, fit)?;
    let kernel = load_kernel(machine, payload.kernel)?;
    let tree = patch_tree(machine, &payload)?;
    Ok((kernel, tree))
}

/// The FIT without what the boot loader's rounding adds behind it.
fn fit_blob(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let header = bytes
        .first_chunk::<8>()
        .ok_or("the initrd is too small for a FIT image")?;
    let [a, b, c, d, e, f, g, h] = *header;
    if u32::from_be_bytes([a, b, c, d]) != 0xd00d_feed {
        return Err("the initrd is no FIT image (build one with: ravelin fit)");
    }
    let size = u32::from_be_bytes([e, f, g, h]) as usize;
    bytes.get(..size).ok_or("the FIT image is truncated")
}

fn payload<'a>(fit: Fdt<'a>, at: AddrRange) -> Result<Payload<'a>, &'static str> {
    let configurations = fit
        .find_node("/configurations")
        .ok_or("the FIT image has no configurations")?;
    let host = configurations
        .children()
        .find(|node| text(node, "ravelin,role") == Some("host"))
        .ok_or("the FIT image has no configuration with ravelin,role = \"host\"")?;
    let kernel = text(&host, "kernel")
        .and_then(|name| data(fit, name))
        .ok_or("the host's configuration names no kernel with data")?;
    let ramdisk = match text(&host, "ramdisk") {
        None => None,
        Some(name) => Some(data(fit, name).ok_or("the host's ramdisk has no data")?),
    };
    let place = |data: &[u8]| {
        let offset = data.as_ptr().addr() - fit.data().as_ptr().addr();
        AddrRange::with_size(at.start() + offset as u64, data.len() as u64)
    };
    Ok(Payload {
        kernel,
        ramdisk: ramdisk.and_then(place),
        bootargs: text(&host, "bootargs"),
    })
}

fn text<'a>(node: &FdtNode<'a>, name: &str) -> Option<&'a str> {
    node.property(name)?.value_as().ok()
}

/// The data of `/images/NAME`.
fn data<'a>(fit: Fdt<'a>, name: &str) -> Option<&'a [u8]> {
    let image = fit
        .find_node("/images")?
        .children()
        .find(|node| node.name() == name)?;
    if !matches!(text(&image, "compression"), None | Some("none")) {
        return None;
    }
    image.property("data")?.value_as().ok()
}

/// Copies the kernel to the lowest free memory; gives its entry.
fn load_kernel(machine: &Machine, kernel: &[u8]) -> Result<u64, &'static str> {
    let (offset, size) = image::header(kernel).ok_or("the kernel is no arm64 Image")?;
    let size = size.max(kernel.len() as u64);
    let want = Placement {
        size: offset
            .checked_add(size)
            .ok_or("the kernel's header is absurd")?,
        align: KERNEL_ALIGN,
        limit: u64::MAX,
    };
    let place = lowest_free(&machine.board.memory, &machine.board.reserved, want)
        .ok_or("no free memory is large enough for the kernel")?;
    let entry = place.start() + offset;
    let target = AddrRange::with_size(entry, size).ok_or("the kernel's header is absurd")?;
    let bytes = mem::bytes_mut(target);
    mem::copy(kernel, &mut bytes[..kernel.len()]);
    // The rest is the kernel's bss: it clears that itself, but no stale line may surface later.
    mem::clean_invalidate_to_poc(target);
    Ok(entry)
}

/// Tells the kernel its ramdisk and command line; gives the device tree's address.
fn patch_tree(machine: &Machine, payload: &Payload<'_>) -> Result<u64, &'static str> {
    const FULL: &str = "no room in the device tree for the kernel's arguments";
    let start = machine.tree_range.start();
    let room = AddrRange::with_size(start, machine.tree_range.size() + TREE_SLACK).ok_or(FULL)?;
    let mut tree =
        FdtMut::from_slice(mem::bytes_mut(room)).map_err(|_| "the device tree is corrupt")?;
    let mut chosen = tree
        .find_node_mut("/chosen")
        .ok_or("the device tree has no /chosen")?;
    chosen.remove_property("linux,initrd-start");
    chosen.remove_property("linux,initrd-end");
    if let Some(ramdisk) = payload.ramdisk {
        chosen
            .add_property("linux,initrd-start", ramdisk.start())
            .map_err(|_| FULL)?;
        chosen
            .add_property("linux,initrd-end", ramdisk.end())
            .map_err(|_| FULL)?;
    }
    if let Some(bootargs) = payload.bootargs {
        chosen.remove_property("bootargs");
        chosen
            .add_property("bootargs", bootargs)
            .map_err(|_| FULL)?;
    }
    mem::clean_invalidate_to_poc(room);
    Ok(start)
}
