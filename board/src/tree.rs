//! Walking a device tree with the path kept, and translating bus addresses to CPU addresses.

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node, Property};

use crate::{AddrRange, BoardError};

/// Deepest path that is followed; deeper nodes are not visited (real trees have at most 8).
const MAX_DEPTH: usize = 12;

/// A path from the root to a node: `[root, .., parent, node]`, at least one element.
pub(crate) type Path<'a> = heapless::Vec<FdtNode<'a>, MAX_DEPTH>;

/// A device tree whose structure has been validated.
#[derive(Clone, Copy, Debug)]
pub struct Tree<'a> {
    fdt: Fdt<'a>,
}

impl<'a> Tree<'a> {
    /// Validates the blob; its length must be the header's `totalsize`.
    ///
    /// # Errors
    ///
    /// [`BoardError::Corrupt`] with what is wrong and where.
    pub fn new(blob: &'a [u8]) -> Result<Self, BoardError> {
        Ok(Self {
            fdt: Fdt::new(blob)?,
        })
    }

    /// The underlying parser.
    #[must_use]
    pub fn fdt(&self) -> Fdt<'a> {
        self.fdt
    }

    /// Calls `visit` with the path of every node, parents first, until it answers `Some`.
    pub(crate) fn find_map<R>(&self, mut visit: impl FnMut(&Path<'a>) -> Option<R>) -> Option<R> {
        let mut path = Path::new();
        path.push(self.fdt.root()).ok()?;
        find_below(&mut path, &mut visit)
    }

    /// The path of the node at `path` ("/soc/serial@0"), or of what the alias `path` stands for.
    pub(crate) fn resolve(&self, path: &str) -> Option<Path<'a>> {
        if !path.starts_with('/') {
            let alias = self.fdt.find_node("/aliases")?.property(path)?;
            let target: &'a str = alias.value_as().ok()?;
            return target.starts_with('/').then(|| self.resolve(target))?;
        }
        let mut nodes = Path::new();
        nodes.push(self.fdt.root()).ok()?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let child = nodes.last()?.child(name)?;
            nodes.push(child).ok()?;
        }
        Some(nodes)
    }
}

fn find_below<'a, R>(
    path: &mut Path<'a>,
    visit: &mut impl FnMut(&Path<'a>) -> Option<R>,
) -> Option<R> {
    if let Some(found) = visit(path) {
        return Some(found);
    }
    let node = *path.last()?;
    for child in node.children() {
        if path.push(child).is_err() {
            return None;
        }
        let found = find_below(path, visit);
        path.pop();
        if found.is_some() {
            return found;
        }
    }
    None
}

/// The `index`th entry of the last node's `reg`, as CPU addresses.
///
/// `None` if there is no such entry, its size is 0, or a bus on the way does not map it
/// (Devicetree Specification 2.3.8, `ranges`).
pub(crate) fn cpu_reg(path: &Path<'_>, index: usize) -> Option<AddrRange> {
    let (node, parents) = path.split_last()?;
    let reg = node.reg().ok()??.nth(index)?;
    let start: u64 = cells_to_u64(reg.address.as_ref())?;
    let size: u64 = cells_to_u64(reg.size.as_ref())?;
    // The root has no `ranges`: its children already live in the CPU's address space.
    let buses = parents.get(1..)?;
    let start = buses
        .iter()
        .rev()
        .try_fold(start, |address, bus| translate(bus, address))?;
    AddrRange::with_size(start, size)
}

/// One step up: a child address of `bus` as an address of the parent bus.
fn translate(bus: &FdtNode<'_>, address: u64) -> Option<u64> {
    let property = bus.property("ranges")?;
    if property.value().is_empty() {
        return Some(address);
    }
    bus.ranges().ok()??.find_map(|range| {
        let child = range.child_bus_address::<u64>().ok()?;
        let parent = range.parent_bus_address::<u64>().ok()?;
        let length = range.length::<u64>().ok()?;
        let offset = address.checked_sub(child)?;
        (offset < length).then(|| parent.checked_add(offset))?
    })
}

/// Up to two cells as a number; more cells (PCI) or none are refused.
fn cells_to_u64<C: Copy>(cells: &[C]) -> Option<u64>
where
    u32: From<C>,
{
    if cells.is_empty() || cells.len() > 2 {
        return None;
    }
    Some(
        cells
            .iter()
            .fold(0, |value, cell| (value << 32) | u64::from(u32::from(*cell))),
    )
}

/// Whether the node may be used: no `status`, or "okay" (or the old "ok").
pub(crate) fn is_enabled(node: &FdtNode<'_>) -> bool {
    node.property("status")
        .is_none_or(|status| matches!(status.value(), b"okay\0" | b"ok\0"))
}

/// Whether the node is compatible with any of `names`.
pub(crate) fn is_any(node: &FdtNode<'_>, names: &[&str]) -> bool {
    node.compatible()
        .is_some_and(|mut list| list.any(|name| names.contains(&name)))
}

/// A property of one or two cells as a number.
pub(crate) fn number(node: &FdtNode<'_>, name: &str) -> Option<u64> {
    cells(node.property(name)?.value())
}

/// One or two cells as a number.
pub(crate) fn cells(value: &[u8]) -> Option<u64> {
    match *value {
        [a, b, c, d] => Some(u64::from(u32::from_be_bytes([a, b, c, d]))),
        [a, b, c, d, e, f, g, h] => Some(u64::from_be_bytes([a, b, c, d, e, f, g, h])),
        _ => None,
    }
}

/// A property as a string.
pub(crate) fn string<'a>(node: &FdtNode<'a>, name: &str) -> Option<&'a str> {
    node.property(name)?.value_as().ok()
}
