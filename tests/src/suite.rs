//! Which scenarios there are.

mod bad_input;
mod dma;
mod generator;
mod guests;
mod left_out;
mod linux;
mod monitored;
mod pci_disks;
mod raspi4b;
mod reset;
mod shim;
mod virt;
mod vm_linux;
mod x86;

use crate::emulate;
use crate::machine::{Gic, Machine};
use crate::payload::{self, Payloads};
use crate::runner::Scenario;
use anyhow::{Result, ensure};
use clap::ValueEnum;
use std::sync::Arc;

/// A set of scenarios with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Everything that an emulator can run.
    All,
    /// QEMU's `virt`: every CPU and interrupt controller.
    Virt,
    /// QEMU's `raspi4b` with Debian's Pi 4 device tree.
    Raspi4b,
    /// The x86 hypervisor on Bochs.
    X86,
    /// What takes long: attacks from every core, many more than in `All`.
    Soak,
}

/// The suite's scenarios, longest first where that shortens the whole.
///
/// # Errors
/// The image or the payloads have not been built.
pub fn scenarios(suite: Suite) -> Result<Vec<Scenario>> {
    if suite == Suite::X86 {
        return Ok(x86::scenarios());
    }
    let image = emulate::ravelin_image();
    ensure!(
        image.exists(),
        "{} is missing: run `make build`",
        image.display()
    );
    let payloads = Arc::new(payload::prepare()?);
    Ok(list(suite, &payloads))
}

/// The same without looking whether anything is built: for listing.
#[must_use]
pub fn list(suite: Suite, payloads: &Arc<Payloads>) -> Vec<Scenario> {
    let virt = || virt::scenarios(payloads);
    let raspi4b = || raspi4b::scenarios(payloads);
    match suite {
        Suite::All => virt().into_iter().chain(raspi4b()).collect(),
        Suite::Virt => virt(),
        Suite::Raspi4b => raspi4b(),
        Suite::X86 => x86::scenarios(),
        Suite::Soak => vec![shim::soak(Machine::virt("max", Gic::V3, 4))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_begin_with_the_board() {
        let payloads = Arc::new(Payloads::default());
        let all = list(Suite::All, &payloads);
        let names: HashSet<_> = all.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        assert!(
            names
                .iter()
                .all(|name| name.starts_with("virt/") || name.starts_with("raspi4b/"))
        );
    }

    #[test]
    fn soak_is_only_run_when_asked_for() {
        let payloads = Arc::new(Payloads::default());
        let soak = list(Suite::Soak, &payloads);
        assert!(!soak.is_empty());
        let all = list(Suite::All, &payloads);
        assert!(
            soak.iter()
                .all(|one| all.iter().all(|other| one.name != other.name))
        );
    }

    #[test]
    fn every_cpu_and_gic_boots_both_hosts() {
        let payloads = Arc::new(Payloads::default());
        let names: HashSet<_> = list(Suite::Virt, &payloads)
            .into_iter()
            .map(|s| s.name)
            .collect();
        for cpu in crate::machine::CPUS {
            for gic in ["gicv2", "gicv3"] {
                for host in ["shim", "linux"] {
                    assert!(
                        names.contains(&format!("virt/{host}/{cpu}/{gic}/smp4")),
                        "{host} {cpu} {gic}"
                    );
                }
            }
        }
    }
}
