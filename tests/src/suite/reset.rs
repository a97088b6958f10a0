//! A machine that is reset again and again: what its memory then shows.

use super::shim::name;
use crate::emulate::Boot;
use crate::machine::{Board, Machine};
use crate::runner::Scenario;
use crate::{device_tree, files, verdict};
use anyhow::{Result, ensure};

/// What EL2 says when it finds that memory may hold secrets.
const WIPES: &str = "secrets from before the reset: wiping";
/// What our host says in each boot, and EL2 before it in those that wipe.
const BOOTS: [&str; 7] = [
    "step 0 of",
    WIPES,
    "step 1 of",
    "step 2 of",
    "step 3 of",
    WIPES,
    "step 4 of",
];
/// Reserved memory that may be mapped, in bytes.
const RESERVED: u32 = 0x1_0000;

/// Five boots of one machine: a reset while there is a protected guest, finished or not, is followed by a wipe of all
/// memory but what the board has reserved; one without is not.
pub(super) fn leak(machine: Machine) -> Scenario {
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "reset-leak"), move |context| {
        let tree = machine.device_tree(&context.folder.join("board.dtb"))?;
        let mut tree = device_tree::parse(&tree)?;
        let start = match machine.board {
            Board::Virt => 0x6000_0000,
            Board::Raspi4b => 0x2000_0000,
        };
        device_tree::reserve(&mut tree, start, RESERVED)?;
        let path = context.folder.join("edited.dtb");
        files::write(&path, &tree.to_dtb())?;
        let mut boot = Boot::shim(&machine, "shim.run=reset-leak");
        boot.software.dtb = Some(path);
        let transcript = boot.run(context, "console")?;
        verdict::closes(&transcript, 5)?;
        let said = |line: &String| BOOTS.iter().copied().find(|text| line.contains(text));
        let boots: Vec<_> = transcript.lines.iter().filter_map(said).collect();
        ensure!(boots == BOOTS, "expected {BOOTS:?}, found {boots:?}");
        Result::Ok(())
    })
    .for_cpus(cpus)
}
