//! Devices of the host that do DMA to where they must not: QEMU's `edu`, several of them, behind an
//! SMMU. Every access to EL2's memory, a protected guest's, or what was just donated is refused and
//! recorded, and no byte changes. Without an IOMMU nothing of that can be promised, and EL2 says so.

mod assigned;
mod attack;
mod measured;
mod neighbours;
mod own;
mod race;
mod setup;
mod storm;
mod taken;

use abi::{ErrorCode, Features};

use super::kit::{code, expect};
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::{self, Vm};
pub(super) use setup::Setup;

/// A handle that was never given.
const NO_VM: u64 = 0xffff;

type Check = fn(&Setup<'_>) -> Result<(), &'static str>;

/// Checks that also hold where DMA is not isolated.
const PLAIN: &[(&str, Check)] = &[("a_device_reaches_the_hosts_memory", own::reached)];

/// Checks of the isolation.
const ISOLATED: &[(&str, Check)] = &[
    ("no_device_reaches_el2s_memory", attack::el2),
    ("a_transfer_into_el2s_memory_ends_before_it", attack::across),
    ("no_device_reaches_a_protected_guest", attack::protected),
    ("no_device_reaches_what_a_vm_is_made_of", attack::state),
    ("a_donated_page_is_out_of_reach_at_once", race::donations),
    ("a_page_is_wiped_before_it_is_back_in_reach", race::returns),
    ("what_is_measured_is_what_a_guest_finds", measured::contents),
    (
        "a_taken_device_reaches_nothing_until_it_is_back",
        taken::aborts,
    ),
    ("a_device_has_one_user", taken::refusals),
    ("a_guest_drives_its_device", assigned::driven),
    (
        "a_guests_memory_changes_under_its_device",
        assigned::changes,
    ),
    (
        "a_guests_device_comes_and_goes",
        assigned::comings_and_goings,
    ),
    ("two_vms_devices_stay_apart", neighbours::apart),
    ("a_storm_of_refused_dma_stops_nobody", storm::survived),
];

pub(super) fn run(machine: &Machine, report: &mut Report) {
    let isolated = machine.has(Features::DMA_ISOLATION);
    if !isolated {
        report.check("without_an_iommu_no_device_is_taken", no_iommu());
    }
    let Some(setup) = Setup::find(machine) else {
        return;
    };
    let guarded = ISOLATED.iter().filter(|_| isolated);
    for (name, check) in PLAIN.iter().chain(guarded) {
        report.check(name, check(&setup));
    }
    setup.end();
}

fn no_iommu() -> Result<(), &'static str> {
    for function in [0, 8, 0xffff] {
        let taken = code(vm::take_device(function));
        let given = code(vm::give_device(function));
        let faults = code(vm::device_faults(function));
        let nobody = Vm::from_handle(NO_VM);
        let attached = code(nobody.attach_device(function, true));
        let detached = code(nobody.detach_device(function));
        let expected = Some(ErrorCode::NotFound);
        expect(
            [taken, given, faults, attached, detached] == [expected; 5],
            "a device is said to be isolated",
        )?;
    }
    Ok(())
}
