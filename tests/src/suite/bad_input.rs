//! Boots that cannot go on: each ends in one clear line, never in silence and never in a hang.

use super::shim::name;
use crate::device_tree::{self, Damage};
use crate::emulate::{self, Boot};
use crate::files;
use crate::launcher::{Argument, launcher};
use crate::machine::{Board, Entry, Machine, Software};
use crate::payload::Payloads;
use crate::process::Transcript;
use crate::runner::{Context, Scenario};
use crate::verdict;
use anyhow::Result;
use std::sync::Arc;

/// Wall-clock limit of such a boot, in seconds.
const SECONDS: u64 = 60;

/// A device tree damaged on purpose; `reasons`: any of these words explains it.
pub(super) fn damaged(
    machine: Machine,
    damage: Damage,
    reasons: &'static [&'static str],
) -> Scenario {
    let kind = format!("bad-tree-{damage:?}").to_lowercase();
    Scenario::new(name(&machine, &kind), move |context| {
        let tree = machine.device_tree(&context.folder.join("board.dtb"))?;
        let tree = device_tree::damage(&tree, damage)?;
        let transcript = launch(&machine, context, Argument::Bytes(&tree))?;
        verdict::fatal(&transcript, reasons)
    })
}

/// A number in x0 that is no device tree's address.
pub(super) fn no_tree(machine: Machine, x0: u32) -> Scenario {
    Scenario::new(
        name(&machine, &format!("no-tree-{x0:#x}")),
        move |context| {
            let transcript = launch(&machine, context, Argument::Number(x0))?;
            verdict::fatal(&transcript, &["device tree"])
        },
    )
}

/// Starts the image through a launcher: QEMU itself would repair or refuse a bad tree.
pub(super) fn launch(
    machine: &Machine,
    context: &Context,
    argument: Argument<'_>,
) -> Result<Transcript> {
    let image = files::read(&emulate::ravelin_image(), "run `make build`")?;
    let kernel = context.folder.join("launcher.img");
    files::write(&kernel, &launcher(&image, argument)?)?;
    let software = Software {
        kernel,
        ..Software::default()
    };
    Boot::new(machine, software, SECONDS).run(context, "console")
}

/// A CPU that does not come up, or cannot be started, is said so in one line; the others run all the same.
pub(super) fn cpu_left_out(machine: Machine, damage: Damage, line: &'static str) -> Scenario {
    let kind = format!("cpu-left-out-{damage:?}").to_lowercase();
    Scenario::new(name(&machine, &kind), move |context| {
        let tree = machine.device_tree(&context.folder.join("board.dtb"))?;
        let tree = device_tree::damage(&tree, damage)?;
        let transcript = match machine.board {
            // Given a tree by `-dtb`, QEMU would put the missing nodes of `virt` back.
            Board::Virt => launch(&machine, context, Argument::Bytes(&tree))?,
            Board::Raspi4b => boot_with_tree(&machine, context, &tree)?,
        };
        verdict::line_with(&transcript, line)?;
        verdict::closes(&transcript, 1)
    })
}

fn boot_with_tree(machine: &Machine, context: &Context, tree: &[u8]) -> Result<Transcript> {
    let dtb = context.folder.join("damaged.dtb");
    files::write(&dtb, tree)?;
    let mut boot = Boot::shim(machine, "");
    boot.software.dtb = Some(dtb);
    boot.run(context, "console")
}

/// Entered at EL1: no hypervisor can run there.
pub(super) fn entry_at_el1(machine: &Machine) -> Scenario {
    let machine = machine.entered_at(Entry::El1);
    Scenario::new(name(&machine, "entry-at-el1"), move |context| {
        let transcript = Boot::shim(&machine, "").run(context, "console")?;
        verdict::fatal(&transcript, &["EL1"])
    })
}

/// An initrd that is no FIT, or a damaged one: the host says so and does not boot it.
pub(super) fn bad_initrd(
    machine: Machine,
    payloads: &Arc<Payloads>,
    kind: &'static str,
) -> Scenario {
    let payloads = Arc::clone(payloads);
    Scenario::new(name(&machine, &format!("initrd-{kind}")), move |context| {
        let mut fit = files::read(&payloads.fit, "run `make setup`")?;
        match kind {
            "no-fit" => fit = b"this is no flattened image tree\n".repeat(256),
            "truncated" => fit.truncate(fit.len() / 2),
            _ => fit.truncate(20),
        }
        let initrd = context.folder.join("bad.fit");
        files::write(&initrd, &fit)?;
        let mut boot = Boot::shim(&machine, "");
        boot.software.initrd = Some(initrd);
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        verdict::line_with(&transcript, "FIT")?;
        verdict::ended_well(&transcript)
    })
}
