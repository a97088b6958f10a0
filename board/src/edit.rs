//! The device tree that the host gets: the machine less what EL2 keeps.
//!
//! Invariant: the patched tree describes the bare machine, except that EL2's memory is reserved
//! (`no-map`), every CPU is started by PSCI through HVC, a CPU that did not come up is marked
//! `status = "fail"`, and an IOMMU that EL2 drives is not there.
//!
//! Properties are edited with dtoolkit; adding a node, which it can't do in place, is done here.

use core::fmt::Write;

use dtoolkit::fdt::Fdt;
use dtoolkit::fdt_mut::{FdtMut, FdtNodeMut, SliceBuffer};
use dtoolkit::standard::{AddressSpaceProperties, NodeStandard};
use dtoolkit::{Node, ToPropertyValue};
use heapless::{String, Vec};

use crate::info::MPIDR_AFFINITY;
use crate::iommu::SMMU;
use crate::tree::{is_any, number};
use crate::{AddrRange, EditError};

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
/// Header of a version-17 tree: ten words (Devicetree Specification 5.2).
const HEADER: usize = 40;

/// What the host is told.
#[derive(Clone, Copy, Debug)]
pub struct HostTree<'a> {
    /// EL2's memory.
    pub el2: AddrRange,
    /// Affinity values of the CPUs that the host may start, the boot CPU included.
    pub cpus: &'a [u64],
    /// Phandle of the IOMMU that EL2 drives: the host is not told that there is one.
    pub iommu: Option<u32>,
}

/// Writes the host's tree into `buffer` and gives its length in bytes.
///
/// # Errors
///
/// [`EditError::NoRoom`] if the buffer is too small (8 KiB more than the original always do),
/// [`EditError::NoNode`] if there is no `/cpus`, [`EditError::Cells`] if what is reserved could not be
/// read.
pub fn patch_for_host(
    original: Fdt<'_>,
    buffer: &mut [u8],
    host: &HostTree<'_>,
) -> Result<usize, EditError> {
    copy_packed(original.data(), buffer)?;
    reserve_el2(buffer, original, host.el2)?;
    let psci: String<32> = psci_path(original);
    if original.find_node(&psci).is_none() {
        add_child(buffer, "/", "psci")?;
    }
    let mut tree = FdtMut::from_slice(buffer)?;
    set(
        &mut tree,
        &psci,
        "compatible",
        &b"arm,psci-1.0\0arm,psci-0.2\0"[..],
    )?;
    set(&mut tree, &psci, "method", "hvc")?;
    set_cpus(&mut tree, host.cpus)?;
    if let Some(phandle) = host.iommu {
        hide_iommu(&mut tree.root_mut(), phandle, 0)?;
    }
    Ok(tree.as_read_only().data().len())
}

type TreeMut<'a> = FdtMut<SliceBuffer<'a>>;

/// Sets a property, adding it if it is not there.
fn set<T: ToPropertyValue>(
    tree: &mut TreeMut<'_>,
    path: &str,
    name: &str,
    value: T,
) -> Result<(), EditError> {
    let mut node = tree
        .find_node_mut(path)
        .ok_or(EditError::NoNode("that was just found or added"))?;
    if let Some(mut property) = node.property_mut(name) {
        property.set_value(value)?;
    } else {
        node.add_property(name, value)?;
    }
    Ok(())
}

/// The path of the PSCI node, existing or to be.
fn psci_path(tree: Fdt<'_>) -> String<32> {
    let existing = tree.root().children().find(|node| {
        node.compatible()
            .is_some_and(|mut list| list.any(|name| name.starts_with("arm,psci")))
    });
    let mut path = String::new();
    let name = existing.map_or("psci", |node| node.name());
    if write!(path, "/{name}").is_err() {
        path.clear();
        // A name that long is not a PSCI node of any binding; our own takes its place.
        let fits = path.push_str("/psci");
        debug_assert!(fits.is_ok());
    }
    path
}

fn set_cpus(tree: &mut TreeMut<'_>, usable: &[u64]) -> Result<(), EditError> {
    let mut parent = tree
        .find_node_mut("/cpus")
        .ok_or(EditError::NoNode("/cpus"))?;
    let mut cpus = parent.children_mut();
    while let Some(mut cpu) = cpus.next() {
        let node = cpu.as_read_only();
        let is_cpu = node
            .property("device_type")
            .is_some_and(|p| dtoolkit::Property::value(&p) == b"cpu\0");
        let Some(mpidr) = number(&node, "reg").filter(|_| is_cpu) else {
            continue;
        };
        let up = usable.contains(&(mpidr & MPIDR_AFFINITY));
        cpu.remove_property("cpu-release-addr");
        replace(&mut cpu, "enable-method", "psci")?;
        replace(&mut cpu, "status", if up { "okay" } else { "fail" })?;
    }
    Ok(())
}

/// Deepest node that may name an IOMMU.
const MAX_DEPTH: usize = 12;

/// Disables the IOMMU's node, and lets no device name one.
fn hide_iommu(
    node: &mut FdtNodeMut<'_, SliceBuffer<'_>>,
    phandle: u32,
    depth: usize,
) -> Result<(), EditError> {
    for name in ["iommu-map", "iommu-map-mask", "iommus"] {
        node.remove_property(name);
    }
    let this = node.as_read_only();
    if is_any(&this, SMMU) && number(&this, "phandle") == Some(phandle.into()) {
        replace(node, "status", "disabled")?;
    }
    let mut children = node.children_mut();
    while let Some(mut child) = children.next().filter(|_| depth < MAX_DEPTH) {
        hide_iommu(&mut child, phandle, depth + 1)?;
    }
    Ok(())
}

fn replace(
    node: &mut FdtNodeMut<'_, SliceBuffer<'_>>,
    name: &str,
    value: &str,
) -> Result<(), EditError> {
    if let Some(mut property) = node.property_mut(name) {
        property.set_value(value)?;
    } else {
        node.add_property(name, value)?;
    }
    Ok(())
}

const RESERVED: &str = "/reserved-memory";

/// Cell sizes of what is reserved: those of the root, which `/reserved-memory` must have, too
/// (Devicetree Specification 3.5.1). Linux ignores all of one that has others.
fn reserved_cells(original: Fdt<'_>) -> Result<AddressSpaceProperties, EditError> {
    let root = original.root().address_space();
    let node = original.find_node(RESERVED);
    let own = node.map_or(root, |node| node.address_space());
    let known = [own.address_cells, own.size_cells];
    if own != root || known.iter().any(|cells| !(1..=2).contains(cells)) {
        return Err(EditError::Cells(own.address_cells, own.size_cells));
    }
    Ok(own)
}

/// Adds `/reserved-memory/ravelin@ADDRESS` with `no-map`.
fn reserve_el2(buffer: &mut [u8], original: Fdt<'_>, el2: AddrRange) -> Result<(), EditError> {
    let cells = reserved_cells(original)?;
    if original.find_node(RESERVED).is_none() {
        add_child(buffer, "/", &RESERVED[1..])?;
        let mut tree = FdtMut::from_slice(buffer)?;
        set(&mut tree, RESERVED, "ranges", &b""[..])?;
        set(&mut tree, RESERVED, "#size-cells", cells.size_cells)?;
        set(&mut tree, RESERVED, "#address-cells", cells.address_cells)?;
    }
    let mut name = String::<32>::new();
    let mut path = String::<64>::new();
    let written =
        write!(name, "ravelin@{:x}", el2.start()).and_then(|()| write!(path, "{RESERVED}/{name}"));
    debug_assert!(written.is_ok(), "16 hex digits fit");
    add_child(buffer, RESERVED, &name)?;
    let mut reg = Vec::<u8, 16>::new();
    push_cells(&mut reg, cells.address_cells, el2.start());
    push_cells(&mut reg, cells.size_cells, el2.size());
    let mut tree = FdtMut::from_slice(buffer)?;
    set(&mut tree, &path, "no-map", &b""[..])?;
    set(&mut tree, &path, "reg", &reg[..])
}

fn push_cells(reg: &mut Vec<u8, 16>, cells: u32, value: u64) {
    let bytes = value.to_be_bytes();
    let from = if cells == 1 { 4 } else { 0 };
    let fits = reg.extend_from_slice(&bytes[from..]);
    debug_assert!(fits.is_ok(), "at most two times two cells");
}

/// Copies a tree without its slack, in the order header, reservations, structure, strings, which
/// the in-place editor relies on. `original` has been validated by dtoolkit.
fn copy_packed(original: &[u8], buffer: &mut [u8]) -> Result<(), EditError> {
    let word = |at: usize| read_u32(original, at);
    let (structs, strings, reservations) = (word(8), word(12), word(16));
    let (strings_size, structs_size) = (word(32), word(36));
    let reservations_size = reservations_size(original, reservations);
    let new_structs = HEADER + reservations_size;
    let new_strings = new_structs + structs_size;
    let total = new_strings + strings_size;
    if total > buffer.len() {
        let needed = total - buffer.len();
        return Err(EditError::NoRoom { needed });
    }
    buffer[..HEADER].copy_from_slice(&original[..HEADER]);
    buffer[HEADER..new_structs]
        .copy_from_slice(&original[reservations..reservations + reservations_size]);
    buffer[new_structs..new_strings].copy_from_slice(&original[structs..structs + structs_size]);
    buffer[new_strings..total].copy_from_slice(&original[strings..strings + strings_size]);
    write_u32(buffer, 4, total);
    write_u32(buffer, 8, new_structs);
    write_u32(buffer, 12, new_strings);
    write_u32(buffer, 16, HEADER);
    Ok(())
}

/// Bytes of the reservation block with its terminator (two zero doublewords).
fn reservations_size(tree: &[u8], start: usize) -> usize {
    let entries = tree[start..].chunks_exact(16);
    let used = entries
        .take_while(|entry| entry.iter().any(|byte| *byte != 0))
        .count();
    (used + 1) * 16
}

/// Adds an empty node `name` as the last child of the node at `parent`, given by full node names.
///
/// # Errors
///
/// [`EditError::NoNode`] or [`EditError::NoRoom`]; nothing has changed then.
pub fn add_child(buffer: &mut [u8], parent: &str, name: &str) -> Result<(), EditError> {
    let old_total = read_u32(buffer, 4);
    let at = end_of_node(buffer, parent).ok_or(EditError::NoNode("to add a child to"))?;
    let padded = (name.len() + 1).next_multiple_of(4);
    let grow = 4 + padded + 4;
    if old_total + grow > buffer.len() {
        return Err(EditError::NoRoom {
            needed: old_total + grow - buffer.len(),
        });
    }
    buffer.copy_within(at..old_total, at + grow);
    let node = &mut buffer[at..at + grow];
    node.fill(0);
    write_u32(node, 0, BEGIN_NODE as usize);
    node[4..4 + name.len()].copy_from_slice(name.as_bytes());
    write_u32(node, 4 + padded, END_NODE as usize);
    write_u32(buffer, 4, old_total + grow);
    let strings = read_u32(buffer, 12);
    write_u32(buffer, 12, strings + grow);
    let structs_size = read_u32(buffer, 36);
    write_u32(buffer, 36, structs_size + grow);
    Ok(())
}

/// Offset of the END_NODE token of the node at `path`.
fn end_of_node(tree: &[u8], path: &str) -> Option<usize> {
    let names: Vec<&str, 8> = path.split('/').filter(|name| !name.is_empty()).collect();
    let (mut depth, mut matched) = (0, 0);
    let mut at = read_u32(tree, 8);
    let end = at + read_u32(tree, 36);
    while at + 4 <= end {
        let token = u32::try_from(read_u32(tree, at)).ok()?;
        match token {
            BEGIN_NODE => {
                let name = tree[at + 4..end].split(|byte| *byte == 0).next()?;
                let wanted =
                    depth == 0 || names.get(depth - 1).is_some_and(|n| n.as_bytes() == name);
                matched += usize::from(matched == depth && wanted);
                depth += 1;
                at += 4 + (name.len() + 1).next_multiple_of(4);
            }
            END_NODE => {
                if matched == depth && matched == names.len() + 1 {
                    return Some(at);
                }
                matched -= usize::from(matched == depth);
                depth = depth.checked_sub(1)?;
                at += 4;
            }
            PROP => at += 12 + read_u32(tree, at + 4).next_multiple_of(4),
            NOP => at += 4,
            _ => return None,
        }
    }
    None
}

/// A big-endian word; the callers stay inside a validated tree.
fn read_u32(bytes: &[u8], at: usize) -> usize {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word) as usize
}

/// Stores a big-endian word; a tree of at most 2 MiB never has a larger one.
fn write_u32(bytes: &mut [u8], at: usize, value: usize) {
    let value = u32::try_from(value).unwrap_or(u32::MAX);
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}
