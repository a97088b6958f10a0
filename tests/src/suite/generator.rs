//! A tree that names a Raspberry Pi's random number generator, where there is something else. QEMU models none.

use super::bad_input::launch;
use super::shim::{SCENARIO_CHECKS, name};
use crate::device_tree;
use crate::launcher::Argument;
use crate::machine::Machine;
use crate::runner::{Context, Scenario};
use crate::verdict;
use anyhow::{Context as _, Result, ensure};
use dtoolkit::model::DeviceTreeProperty;
use dtoolkit::{Node, Property};

/// The second flash device of `virt`, which is empty.
const FLASH: u64 = 0x0400_0000;
/// Bytes that are taken from the end of RAM.
const TAKEN: u32 = 0x1_0000;

/// Every register reads as zero: EL2 says that it does not answer, and the host keeps it.
pub(super) fn silent(machine: Machine) -> Scenario {
    Scenario::new(name(&machine, "generator-silent"), move |context| {
        let tree = machine.device_tree(&context.folder.join("board.dtb"))?;
        let lines = [
            "entropy for guests: none, the board's RNG200 does not answer",
            "host: a generator is the host's",
        ];
        all(&machine, context, &named(&tree, FLASH)?, lines)
    })
}

/// It keeps what is written to it, which looks like a generator whose tests always fail: EL2 takes it from the host,
/// which asks TRNG in vain, as guests do.
pub(super) fn failing(machine: Machine) -> Scenario {
    Scenario::new(name(&machine, "generator-failing"), move |context| {
        let tree = machine.device_tree(&context.folder.join("board.dtb"))?;
        let (tree, end) = with_less_memory(&tree)?;
        let lines = [
            "entropy for guests: the board's RNG200",
            "host: a generator is EL2's",
        ];
        all(&machine, context, &named(&tree, end)?, lines)
    })
}

/// Boots with this tree: EL2's line and the host's are there, and all of the host's checks pass.
fn all(machine: &Machine, context: &Context, tree: &[u8], lines: [&str; 2]) -> Result<()> {
    let transcript = launch(machine, context, Argument::Bytes(tree))?;
    for line in lines {
        verdict::line_with(&transcript, line)?;
    }
    verdict::closes(&transcript, SCENARIO_CHECKS)
}

/// The tree of `virt` with a generator at an address below 4 GiB.
fn named(dtb: &[u8], address: u64) -> Result<Vec<u8>> {
    let mut tree = device_tree::parse(dtb)?;
    let reg = [0, u32::try_from(address)?, 0, 0x28];
    device_tree::add_generator(&mut tree, "/", &reg)?;
    device_tree::set_chosen(&mut tree, "bootargs", "shim.run=all")?;
    Ok(tree.to_dtb())
}

/// The tree of `virt` less the end of RAM, and where that is.
fn with_less_memory(dtb: &[u8]) -> Result<(Vec<u8>, u64)> {
    let mut tree = device_tree::parse(dtb)?;
    let memory = tree.find_node_mut("/memory@40000000").context("no RAM")?;
    let reg = memory.property("reg").context("RAM without reg")?;
    let word = |at: usize| -> Result<u32> {
        let bytes = reg.value().get(4 * at..4 * at + 4).context("short reg")?;
        Ok(u32::from_be_bytes(bytes.try_into()?))
    };
    let (start, size) = (word(1)?, word(3)?);
    ensure!(word(2)? == 0 && size > TAKEN, "RAM of 4 GiB or more");
    let reg = [0, start, 0, size - TAKEN];
    memory.remove_property("reg");
    memory.add_property(DeviceTreeProperty::new("reg", reg)?);
    Ok((tree.to_dtb(), u64::from(start) + u64::from(size - TAKEN)))
}
