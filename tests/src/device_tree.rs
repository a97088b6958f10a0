//! Device trees for the emulator: the board's own with `/chosen` edited, or damaged on purpose.

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node, Property};
use std::ops::Range;

/// A way to damage a device tree, and with it what EL2 is told about the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Damage {
    /// The header is right; from the middle of the nodes on there are zeros.
    Truncated,
    /// The magic number is wrong.
    BadMagic,
    /// The header's own size field says 4 GiB.
    HugeSize,
    /// A byte in each 64 of the structure block is flipped.
    Scrambled,
    /// No `memory` node.
    NoMemory,
    /// A `memory` node with one page of RAM.
    TinyMemory,
    /// One more CPU than there is.
    PhantomCpu,
    /// No `psci` node.
    NoPsci,
    /// CPUs without `enable-method`.
    NoEnableMethod,
}

/// Parses a flattened tree for editing.
///
/// # Errors
/// The bytes are no device tree.
pub fn parse(dtb: &[u8]) -> Result<DeviceTree> {
    let fdt = Fdt::new(dtb).map_err(|e| anyhow!("not a device tree: {e}"))?;
    Ok(DeviceTree::from_fdt(&fdt))
}

/// Sets a string property of `/chosen`, which is made if need be.
///
/// # Errors
/// The name is no valid property name.
pub fn set_chosen(tree: &mut DeviceTree, name: &str, value: &str) -> Result<()> {
    if tree.find_node("/chosen").is_none() {
        tree.root.add_child(node("chosen")?);
    }
    let chosen = tree.find_node_mut("/chosen").context("no /chosen")?;
    set(chosen, name, value)
}

/// Marks a node as not there (`status = "disabled"`), which every well-behaved driver heeds.
///
/// # Errors
/// There is no such node.
pub fn disable(tree: &mut DeviceTree, path: &str) -> Result<()> {
    let node = tree
        .find_node_mut(path)
        .with_context(|| format!("the tree has no {path}"))?;
    set(node, "status", "disabled")
}

/// Removes a node with everything below it.
///
/// # Errors
/// There is no such node.
pub fn remove(tree: &mut DeviceTree, path: &str) -> Result<()> {
    let (parent, name) = path
        .rsplit_once('/')
        .with_context(|| format!("'{path}' is no path"))?;
    let parent = tree.find_node_mut(if parent.is_empty() { "/" } else { parent });
    let removed = parent.and_then(|parent| parent.remove_child(name));
    removed
        .map(drop)
        .with_context(|| format!("the tree has no {path}"))
}

/// Adds an RNG200 to a bus; `reg` in the bus's cells.
///
/// # Errors
/// There is no such bus.
pub fn add_generator(tree: &mut DeviceTree, bus: &str, reg: &[u32]) -> Result<()> {
    let bus = tree.find_node_mut(bus).context("no such bus")?;
    let first = reg.first().context("no address")?;
    let mut generator = node(&format!("rng@{first:x}"))?;
    set(&mut generator, "compatible", "brcm,bcm2711-rng200")?;
    let reg: Vec<_> = reg.iter().copied().flat_map(u32::to_be_bytes).collect();
    set_bytes(&mut generator, "reg", &reg)?;
    bus.add_child(generator);
    Ok(())
}

/// Reserves memory that may be mapped, as firmware does for its own.
///
/// # Errors
/// There is reserved memory already, in other cells.
pub fn reserve(tree: &mut DeviceTree, start: u32, size: u32) -> Result<()> {
    const PATH: &str = "/reserved-memory";
    if tree.find_node(PATH).is_none() {
        let mut parent = node("reserved-memory")?;
        for name in ["#address-cells", "#size-cells"] {
            set_bytes(&mut parent, name, &2u32.to_be_bytes())?;
        }
        set_bytes(&mut parent, "ranges", &[])?;
        tree.root.add_child(parent);
    }
    let parent = tree.find_node_mut(PATH).context(PATH)?;
    let cells = |name| -> Result<usize> {
        let property = parent.property(name).context(name)?;
        Ok(property.value().last().copied().context(name)?.into())
    };
    let mut words = Vec::new();
    for (value, name) in [(start, "#address-cells"), (size, "#size-cells")] {
        words.extend(vec![0; cells(name)?.saturating_sub(1)]);
        words.push(value);
    }
    let reg: Vec<_> = words.iter().copied().flat_map(u32::to_be_bytes).collect();
    let mut child = node(&format!("kept@{start:x}"))?;
    set_bytes(&mut child, "reg", &reg)?;
    parent.add_child(child);
    Ok(())
}

/// The tree with the damage done.
///
/// # Errors
/// The bytes are no device tree, or have nothing that this damage could remove.
pub fn damage(dtb: &[u8], damage: Damage) -> Result<Vec<u8>> {
    match damage {
        Damage::Truncated => truncate(dtb),
        Damage::BadMagic => Ok(with_word(dtb, 0, 0xdead_beef)),
        Damage::HugeSize => Ok(with_word(dtb, 4, u32::MAX)),
        Damage::Scrambled => scramble(dtb),
        _ => damage_content(dtb, damage),
    }
}

fn damage_content(dtb: &[u8], damage: Damage) -> Result<Vec<u8>> {
    let mut tree = parse(dtb)?;
    match damage {
        Damage::NoMemory => remove_memory(&mut tree)?,
        Damage::TinyMemory => shrink_memory(&mut tree)?,
        Damage::PhantomCpu => add_phantom_cpu(&mut tree)?,
        Damage::NoPsci => ensure!(
            tree.root.remove_child("psci").is_some(),
            "the tree has no /psci"
        ),
        _ => remove_enable_methods(&mut tree)?,
    }
    Ok(tree.to_dtb())
}

/// Zeros from the middle of the structure block on: a tree of which only the beginning was loaded.
fn truncate(dtb: &[u8]) -> Result<Vec<u8>> {
    let block = structure_block(dtb)?;
    let mut bytes = dtb.to_vec();
    bytes[block.start.midpoint(block.end)..].fill(0);
    Ok(bytes)
}

/// Replaces the 32-bit big-endian word at a byte offset of the header.
fn with_word(dtb: &[u8], at: usize, word: u32) -> Vec<u8> {
    let mut bytes = dtb.to_vec();
    if let Some(field) = bytes.get_mut(at..at + 4) {
        field.copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

fn scramble(dtb: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = dtb.to_vec();
    let block = structure_block(dtb)?;
    bytes[block]
        .iter_mut()
        .skip(7)
        .step_by(64)
        .for_each(|byte| *byte = !*byte);
    Ok(bytes)
}

/// Where the nodes are: offset in header word 2, size in word 9 (Devicetree Specification 5.2).
fn structure_block(dtb: &[u8]) -> Result<Range<usize>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = dtb.get(at..at + 4).context("the tree has no header")?;
        Ok(usize::try_from(u32::from_be_bytes(bytes.try_into()?))?)
    };
    let (offset, size) = (word(8)?, word(36)?);
    let end = offset.checked_add(size).filter(|end| *end <= dtb.len());
    Ok(offset..end.context("the structure block lies outside the tree")?)
}

fn memory_nodes(tree: &DeviceTree) -> Vec<String> {
    let is_memory = |name: &str| name == "memory" || name.starts_with("memory@");
    tree.root
        .children()
        .map(|child| child.name().to_owned())
        .filter(|name| is_memory(name))
        .collect()
}

fn remove_memory(tree: &mut DeviceTree) -> Result<()> {
    let nodes = memory_nodes(tree);
    ensure!(!nodes.is_empty(), "the tree has no memory node");
    for name in nodes {
        tree.root.remove_child(&name);
    }
    Ok(())
}

/// Makes every bank 4 KiB long. The length is the last cell of `reg`, whatever the address takes.
fn shrink_memory(tree: &mut DeviceTree) -> Result<()> {
    let nodes = memory_nodes(tree);
    ensure!(!nodes.is_empty(), "the tree has no memory node");
    for name in nodes {
        let memory = tree.root.child_mut(&name).context("memory node")?;
        let reg = memory
            .property_mut("reg")
            .context("the memory node has no reg")?;
        let mut cells = (&*reg).value().to_vec();
        let length = cells.len().checked_sub(8).context("reg is too short")?;
        cells[length..].copy_from_slice(&0x1000u64.to_be_bytes());
        reg.set_value(cells);
    }
    Ok(())
}

/// A copy of the last CPU with a number that no CPU has.
fn add_phantom_cpu(tree: &mut DeviceTree) -> Result<()> {
    const NUMBER: u32 = 0x77;
    let cpus = tree
        .find_node_mut("/cpus")
        .context("the tree has no /cpus")?;
    let last = cpus
        .children()
        .filter(|child| child.name().starts_with("cpu@"))
        .last()
        .context("the tree has no CPU")?;
    let width = last
        .property("reg")
        .context("the CPU has no reg")?
        .value()
        .len();
    let mut phantom = node(&format!("cpu@{NUMBER:x}"))?;
    for property in last
        .properties()
        .filter(|p| !["reg", "phandle"].contains(&p.name()))
    {
        phantom.add_property(property.clone());
    }
    let mut reg = vec![0; width];
    reg[width - 4..].copy_from_slice(&NUMBER.to_be_bytes());
    phantom.add_property(DeviceTreeProperty::new_unchecked("reg", reg));
    cpus.add_child(phantom);
    Ok(())
}

fn remove_enable_methods(tree: &mut DeviceTree) -> Result<()> {
    let cpus = tree
        .find_node_mut("/cpus")
        .context("the tree has no /cpus")?;
    let removed = cpus
        .children_mut()
        .filter_map(|cpu| cpu.remove_property("enable-method"))
        .count();
    ensure!(removed > 0, "no CPU has an enable-method");
    Ok(())
}

/// A node without properties.
pub(crate) fn node(name: &str) -> Result<DeviceTreeNode> {
    DeviceTreeNode::new(name).map_err(|e| anyhow!("'{name}' is no node name: {e}"))
}

/// Sets a property, replacing what was there.
fn set_bytes(node: &mut DeviceTreeNode, name: &str, value: &[u8]) -> Result<()> {
    node.remove_property(name);
    let property = DeviceTreeProperty::new(name, value)
        .map_err(|e| anyhow!("'{name}' is no property name: {e}"))?;
    node.add_property(property);
    Ok(())
}

/// Sets a string property, replacing what was there.
pub(crate) fn set(node: &mut DeviceTreeNode, name: &str, value: &str) -> Result<()> {
    node.remove_property(name);
    let property = DeviceTreeProperty::new(name, value)
        .map_err(|e| anyhow!("'{name}' is no property name: {e}"))?;
    node.add_property(property);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut tree = DeviceTree::new();
        let mut memory = node("memory@40000000").unwrap();
        memory.add_property(DeviceTreeProperty::new_unchecked(
            "reg",
            [0u32, 0x4000_0000, 0, 0x4000_0000],
        ));
        tree.root.add_child(memory);
        let mut cpu = node("cpu@0").unwrap();
        cpu.add_property(DeviceTreeProperty::new_unchecked("reg", [0u32]));
        set(&mut cpu, "enable-method", "psci").unwrap();
        let mut cpus = node("cpus").unwrap();
        cpus.add_child(cpu);
        tree.root.add_child(cpus);
        tree.root.add_child(node("psci").unwrap());
        tree.to_dtb()
    }

    fn damaged(kind: Damage) -> DeviceTree {
        parse(&damage(&sample(), kind).unwrap()).unwrap()
    }

    #[test]
    fn chosen_is_made_and_a_property_replaced() {
        let mut tree = parse(&sample()).unwrap();
        set_chosen(&mut tree, "ravelin,log-level", "debug").unwrap();
        set_chosen(&mut tree, "ravelin,log-level", "trace").unwrap();
        let again = parse(&tree.to_dtb()).unwrap();
        let chosen = again.find_node("/chosen").unwrap();
        assert_eq!(chosen.properties().count(), 1);
        assert_eq!(
            chosen.property("ravelin,log-level").unwrap().value(),
            b"trace\0"
        );
    }

    #[test]
    fn nodes_are_disabled_and_removed_by_path() {
        let mut tree = parse(&sample()).unwrap();
        disable(&mut tree, "/cpus/cpu@0").unwrap();
        remove(&mut tree, "/psci").unwrap();
        assert_eq!(
            tree.find_node("/cpus/cpu@0")
                .unwrap()
                .property("status")
                .unwrap()
                .value(),
            b"disabled\0"
        );
        assert!(tree.find_node("/psci").is_none());
        assert!(remove(&mut tree, "/psci").is_err());
        assert!(disable(&mut tree, "/soc/uart").is_err());
    }

    #[test]
    fn damage_to_the_bytes_makes_them_unreadable() {
        for kind in [
            Damage::Truncated,
            Damage::BadMagic,
            Damage::HugeSize,
            Damage::Scrambled,
        ] {
            let bytes = damage(&sample(), kind).unwrap();
            assert_ne!(bytes, sample(), "{kind:?}");
            assert!(Fdt::new(&bytes).is_err(), "{kind:?}");
        }
    }

    #[test]
    fn memory_goes_or_shrinks() {
        assert!(memory_nodes(&damaged(Damage::NoMemory)).is_empty());
        let tiny = damaged(Damage::TinyMemory);
        let reg = tiny
            .find_node("/memory@40000000")
            .unwrap()
            .property("reg")
            .unwrap()
            .value()
            .to_vec();
        assert_eq!(reg, [0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0]);
    }

    #[test]
    fn phantom_cpu_has_the_same_method_and_another_number() {
        let tree = damaged(Damage::PhantomCpu);
        let phantom = tree.find_node("/cpus/cpu@77").unwrap();
        assert_eq!(phantom.property("reg").unwrap().value(), [0, 0, 0, 0x77]);
        assert_eq!(
            phantom.property("enable-method").unwrap().value(),
            b"psci\0"
        );
    }

    #[test]
    fn boot_methods_go() {
        assert!(damaged(Damage::NoPsci).find_node("/psci").is_none());
        let tree = damaged(Damage::NoEnableMethod);
        assert!(
            tree.find_node("/cpus/cpu@0")
                .unwrap()
                .property("enable-method")
                .is_none()
        );
    }
}
