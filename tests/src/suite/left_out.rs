//! VMs that can't be: each is named and left out, and the VM beside it runs.

use super::shim::name;
use crate::emulate::Boot;
use crate::fit::{self, Disk, Guest};
use crate::machine::Machine;
use crate::runner::{Context, Scenario};
use crate::{device_tree, files, verdict};
use anyhow::Result;

/// A VM whose kernel does not fit into its memory is named and left out; the other one runs.
pub(super) fn too_big(machine: &Machine) -> Scenario {
    let machine = machine.clone();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-too-big"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        let large = vec![0; 3 << 20];
        let too_big = Guest {
            kernel: &large,
            memory_mib: 2,
            ..hello
        };
        let lines = ["VM 1: kernel and ramdisk need 4 MiB", "VM 1 is left out"];
        beside_hello(&machine, context, &fit::guests(&[too_big, hello])?, &lines)
    })
    .for_cpus(cpus)
}

/// A configuration that names no kernel is told and left out; the other VM runs.
pub(super) fn without_kernel(machine: &Machine) -> Scenario {
    let machine = machine.clone();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-without-kernel"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        let lost = Guest {
            kernel: b"to be removed",
            ..hello
        };
        let mut tree = device_tree::parse(&fit::guests(&[lost, hello])?)?;
        device_tree::remove(&mut tree, "/images/kernel")?;
        let lines = [
            "a configuration names no kernel with data",
            "VM 1 is left out: its configuration can't be used",
        ];
        beside_hello(&machine, context, &tree.to_dtb(), &lines)
    })
    .for_cpus(cpus)
}

/// A VM gets no PCI function whose DMA nothing would confine; the other one runs.
pub(super) fn without_iommu(machine: &Machine) -> Scenario {
    let machine = machine.clone();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-without-iommu"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        let exposed = Guest {
            disk: Disk::Functions(&["00:00.0"]),
            ..hello
        };
        let lines = [
            "DMA is not isolated",
            "VM 1 is left out: no IOMMU of EL2's stands before the PCI function",
        ];
        beside_hello(&machine, context, &fit::guests(&[exposed, hello])?, &lines)
    })
    .for_cpus(cpus)
}

/// What can't be a VM's own, with an IOMMU before it: a function that is not there, one that can't be reset, and any for
/// a VM whose memory may be missing when a device wants it.
pub(super) fn refused_functions(machine: &Machine) -> Scenario {
    let machine = machine.with_iommu();
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "guest-functions-refused"), move |context| {
        let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
        let hello = hello(&kernel);
        for (lock, functions, why) in [
            (true, &["00:1f.0"], "the machine has no such PCI function"),
            (true, &["00:00.0"], "the PCI function can't be reset"),
            (
                false,
                &["00:00.0"],
                "has locked memory that is not protected",
            ),
        ] {
            let refused = Guest {
                lock,
                disk: Disk::Functions(functions),
                ..hello
            };
            let lines = ["VM 1 is left out", why];
            beside_hello(&machine, context, &fit::guests(&[refused, hello])?, &lines)?;
        }
        Ok(())
    })
    .for_cpus(cpus)
}

/// The payload that says hello, in a small VM.
fn hello(kernel: &[u8]) -> Guest<'_> {
    Guest {
        kernel,
        ramdisk: None,
        arguments: "run=hello",
        memory_mib: 16,
        vcpus: 1,
        lock: true,
        noncoherent: false,
        protected: false,
        disk: fit::Disk::None,
    }
}

/// Runs a FIT whose second VM says hello and whose first can't be: these lines say why.
fn beside_hello(machine: &Machine, context: &Context, fit: &[u8], lines: &[&str]) -> Result<()> {
    let path = context.folder.join("guests.fit");
    files::write(&path, fit)?;
    let mut boot = Boot::shim(machine, "");
    boot.software.initrd = Some(path);
    let transcript = boot.run(context, "console")?;
    verdict::no_alarm(&transcript)?;
    let others = ["[vm2] hello from EL1", "only 1 of 2 guests powered off"];
    for line in lines.iter().chain(&others) {
        verdict::line_with(&transcript, line)?;
    }
    verdict::ended_well(&transcript)
}
