//! Devices of the host that do DMA to where they must not: QEMU's `edu`, several of them, behind an
//! SMMU. Every access to EL2's memory, a protected guest's, or what was just donated is refused and
//! recorded, and no byte changes. Without an IOMMU nothing of that can be promised, and EL2 says so.

mod own;

use abi::{ErrorCode, Features};
use alloc::vec::Vec;

use super::guests::expect;
use super::payload;
use crate::console::line;
use crate::edu::{self, Edu};
use crate::machine::Machine;
use crate::pci::Pci;
use crate::report::Report;
use crate::vm::{self, Vm};

/// What the checks use.
struct Setup {
    memory: payload::Memory,
    pci: Pci,
    devices: Vec<Edu>,
}

type Check = fn(&Setup) -> Result<(), &'static str>;

/// A handle that was never given.
const NO_VM: u64 = 0xffff;

/// Checks that also hold where DMA is not isolated.
const PLAIN: [(&str, Check); 1] = [("a_device_reaches_the_hosts_memory", own::reached)];

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let isolated = machine.has(Features::DMA_ISOLATION);
    if !isolated {
        report.check("without_an_iommu_no_device_is_taken", no_iommu());
    }
    let Some(setup) = find(machine) else {
        return;
    };
    for (name, check) in PLAIN {
        report.check(name, check(&setup));
    }
    // What comes next finds them silent.
    for device in &setup.pci.devices {
        setup.pci.reset(device);
    }
}

/// The `edu` devices of the machine, turned on; `None` if it has none.
fn find(machine: &Machine) -> Option<Setup> {
    let memory = payload::Memory::find(machine)?;
    let pci = Pci::start(machine)?;
    let (vendor, device) = edu::ID;
    let open = |device| Edu::open(&pci, device);
    let devices: Vec<Edu> = pci.of(vendor, device).filter_map(open).collect();
    for edu in &devices {
        let function = edu.function();
        let interrupt = pci.interrupt(function).unwrap_or(0);
        line(format_args!("  edu {function}, INTID {interrupt}"));
    }
    let setup = Setup {
        memory,
        pci,
        devices,
    };
    (!setup.devices.is_empty()).then_some(setup)
}

fn no_iommu() -> Result<(), &'static str> {
    for function in [0, 8, 0xffff] {
        let taken = vm::take_device(function).err().map(|refused| refused.code);
        let given = vm::give_device(function).err().map(|refused| refused.code);
        let faults = vm::device_faults(function).err();
        let faults = faults.map(|refused| refused.code);
        let nobody = Vm::from_handle(NO_VM);
        let [attached, detached] = [
            nobody.attach_device(function, true),
            nobody.detach_device(function),
        ]
        .map(|result| result.err().map(|refused| refused.code));
        let expected = Some(ErrorCode::NotFound);
        expect(
            [taken, given, faults, attached, detached] == [expected; 5],
            "a device is said to be isolated",
        )?;
    }
    Ok(())
}
