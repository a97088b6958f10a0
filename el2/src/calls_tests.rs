//! What the dispatch of calls refuses, and that each argument goes where the ABI says. What accepted calls
//! do is the reference model's (`tests/tests/reference_model`), which drives the same code.

use super::*;
use crate::guest_memory::HOST_SLOTS;
use crate::measure::{Measurer, Start};
use crate::testing::{FakeBoard, Ground, NoContents, RAM, page_range};
use crate::vgic::Kicks;
use crate::vm_table::FIRST_HANDLE;
use memslot::fault::{Access, FaultKind, Stage2Fault};
use stage2::Ipa;

#[path = "calls_vcpu_tests.rs"]
mod vcpus;

/// Pages of RAM; the last one is EL2's.
const PAGES: usize = 32;
/// Of the slot that VMs have here: four pages from page 8, at this address.
const IPA: u64 = 0x4000_0000;
const VM: u64 = FIRST_HANDLE;

type Board<'a> = FakeBoard<'a, NoContents, 2>;

fn on_a_board(check: impl FnOnce(&Board<'_>)) {
    let ground = Ground::new(PAGES, PAGES - 1, 2);
    let ownership = ground.ownership();
    check(&FakeBoard::new(&ground, &ownership, NoContents));
}

fn raw<const N: usize>(board: &Board<'_>, call: Call, args: [u64; N]) -> [u64; 4] {
    let mut registers = [0; 6];
    registers[..N].copy_from_slice(&args);
    board.call(call, registers)
}

fn ask<const N: usize>(board: &Board<'_>, call: Call, args: [u64; N]) -> Result<u64, ErrorCode> {
    abi::from_register(raw(board, call, args)[0])
}

fn page(number: usize) -> u64 {
    page_range(number, 1).start()
}

fn slot(id: u16, flags: u32) -> u64 {
    let device = false;
    SlotWord { id, device, flags }.bits()
}

/// A VM of two vCPUs, the first of which exists, with slot 0.
fn create(board: &Board<'_>, protected: bool) {
    let config = VmConfig {
        vcpus: 2,
        protected,
        devices: false,
    };
    assert_eq!(ask(board, Call::VmReserve, []), Ok(VM));
    let created = ask(board, Call::VmCreate, [VM, page(0), 2, config.bits()]);
    assert_eq!(created, Ok(1));
    let slot = [VM, slot(0, 0), IPA, 4, page(8)];
    assert_eq!(ask(board, Call::SlotCreate, slot), Ok(0));
    assert_eq!(ask(board, Call::VcpuCreate, [VM, 0]), Ok(0));
}

fn with_a_vm(check: impl FnOnce(&Board<'_>)) {
    on_a_board(|board| {
        create(board, false);
        check(board);
    });
}

fn with_a_protected_vm(check: impl FnOnce(&Board<'_>)) {
    on_a_board(|board| {
        create(board, true);
        check(board);
    });
}

fn with_a_sealed_vm(check: impl FnOnce(&Board<'_>)) {
    with_a_protected_vm(|board| {
        assert_eq!(ask(board, Call::VmSeal, [VM, IPA, 7]), Ok(0));
        check(board);
    });
}

/// Arguments of each call, counted in the ABI's documentation.
const ARGUMENTS: [(Call, usize); 38] = [
    (Call::DonateHeap, 2),
    (Call::VmReserve, 0),
    (Call::VmCreate, 4),
    (Call::VmTopUp, 3),
    (Call::VmDestroy, 1),
    (Call::VmReclaim, 1),
    (Call::VmReset, 1),
    (Call::VmCounter, 2),
    (Call::VmMapping, 2),
    (Call::VmExpect, 5),
    (Call::VmSeal, 3),
    (Call::VmMeasurement, 2),
    (Call::SlotCreate, 5),
    (Call::SlotDelete, 2),
    (Call::SlotMove, 3),
    (Call::SlotFlags, 2),
    (Call::SlotLock, 4),
    (Call::SlotState, 2),
    (Call::SlotDirty, 3),
    (Call::DmaDevice, 3),
    (Call::MemoryDonate, 4),
    (Call::MemoryReclaim, 1),
    (Call::SlotUnshare, 4),
    (Call::SlotShare, 4),
    (Call::SlotYoung, 5),
    (Call::SlotRelax, 4),
    (Call::VcpuCreate, 2),
    (Call::VcpuStart, 4),
    (Call::VcpuRun, 4),
    (Call::VcpuState, 2),
    (Call::IrqLine, 3),
    (Call::DeviceTake, 1),
    (Call::DeviceGive, 1),
    (Call::DeviceAttach, 3),
    (Call::DeviceDetach, 2),
    (Call::DeviceFaults, 1),
    // Not about VMs: nothing hangs on their number here.
    (Call::Version, 6),
    (Call::Features, 6),
];

#[test]
fn every_call_about_vms_has_as_many_arguments_as_the_abi_says() {
    for call in Call::ALL.iter().filter(|call| **call != Call::HostCounter) {
        let said = ARGUMENTS.iter().find(|(other, _)| other == call);
        assert_eq!(
            said.map(|(_, count)| *count),
            Some(arguments(*call)),
            "{call:?}"
        );
    }
}

#[test]
fn an_argument_that_a_call_does_not_have_is_invalid() {
    on_a_board(|board| {
        for (call, count) in ARGUMENTS {
            for surplus in count..6 {
                let mut args = [0; 6];
                args[surplus] = 1;
                let answer = board.call(call, args);
                let invalid = ErrorCode::Invalid.to_register();
                assert_eq!(answer, [invalid, 0, 0, 0], "{call:?}, {surplus}");
            }
        }
    });
}

#[test]
fn calls_that_are_not_about_vms_are_invalid_here() {
    with_a_vm(|board| {
        for call in [Call::Version, Call::Features, Call::HostCounter] {
            assert_eq!(ask(board, call, [VM]), Err(ErrorCode::Invalid));
        }
    });
}

#[test]
fn where_guests_can_not_run_no_call_is_permitted() {
    on_a_board(|board| {
        board.has_guests.set(false);
        for (call, _) in ARGUMENTS {
            let refused = ask(board, call, []);
            assert_eq!(refused, Err(ErrorCode::NotPermitted), "{call:?}");
        }
    });
}

#[test]
fn memory_that_is_not_whole_pages_inside_the_address_space_is_invalid() {
    on_a_board(|board| {
        let ill = [
            (RAM + 1, 1),
            (RAM, 0),
            (RAM, u64::MAX),
            (u64::MAX - 4095, 2),
        ];
        assert_eq!(ask(board, Call::VmReserve, []), Ok(VM));
        for (address, count) in ill {
            let answers = [
                ask(board, Call::DonateHeap, [address, count]),
                ask(board, Call::VmCreate, [VM, address, count, 1]),
                ask(board, Call::VmTopUp, [VM, address, count]),
                ask(board, Call::SlotCreate, [VM, 0, address, count, RAM]),
                ask(board, Call::MemoryDonate, [VM, address, count, 0]),
            ];
            let (last, others) = answers.split_last().unwrap();
            assert_eq!(others[..3], [Err(ErrorCode::Invalid); 3], "{address:#x}");
            assert!(last.is_err() && others[3].is_err(), "{address:#x}, {count}");
        }
        assert_eq!(
            ask(board, Call::MemoryReclaim, [RAM + 1]),
            Err(ErrorCode::Invalid)
        );
    });
}

#[test]
fn a_slot_is_refused_at_an_address_or_over_memory_that_is_no_page() {
    with_a_vm(|board| {
        let ill = [
            [VM, slot(1, 0), IPA + 0x10_0001, 1, RAM],
            [VM, slot(1, 0), IPA + 0x10_0000, 1, RAM + 1],
            [VM, slot(1, 0), IPA + 0x10_0000, 0, RAM],
        ];
        for args in ill {
            assert_eq!(ask(board, Call::SlotCreate, args), Err(ErrorCode::Invalid));
        }
        assert_eq!(
            ask(board, Call::SlotMove, [VM, 0, IPA + 1]),
            Err(ErrorCode::Invalid)
        );
    });
}

#[test]
fn what_has_no_vm_is_not_found() {
    on_a_board(|board| {
        let no_vm = [
            (Call::VmReset, [VM, 0, 0, 0, 0]),
            (Call::VmSeal, [VM, 0, 0, 0, 0]),
            (Call::VmExpect, [VM, 0, 0, 0, 0]),
            (Call::VmMeasurement, [VM, 0, 0, 0, 0]),
            (Call::VmMapping, [VM, 0, 0, 0, 0]),
            (Call::SlotDirty, [VM, 0, 0, 0, 0]),
            (Call::SlotDelete, [VM, 0, 0, 0, 0]),
            (Call::MemoryDonate, [VM, IPA, 1, 0, 0]),
            (Call::VmTopUp, [VM, RAM, 1, 0, 0]),
            (Call::VcpuRun, [VM, 0, 0, 0, 0]),
            (Call::VcpuCreate, [VM, 0, 0, 0, 0]),
            (Call::IrqLine, [VM, 32, 1, 0, 0]),
        ];
        for (call, args) in no_vm {
            assert_eq!(ask(board, call, args), Err(ErrorCode::NotFound), "{call:?}");
        }
        assert_eq!(
            ask(board, Call::MemoryReclaim, [RAM]),
            Err(ErrorCode::NotFound)
        );
    });
}

#[test]
fn a_vm_of_no_vcpu_or_with_unknown_properties_is_invalid() {
    on_a_board(|board| {
        assert_eq!(ask(board, Call::VmReserve, []), Ok(VM));
        assert_eq!(
            ask(board, Call::VmCreate, [VM, RAM, 1, 0]),
            Err(ErrorCode::Invalid)
        );
        assert_eq!(
            ask(board, Call::VmCreate, [VM, RAM, 1, 1 << 10 | 1]),
            Err(ErrorCode::Invalid)
        );
    });
}

/// What a host does to a VM's memory, devices and vCPUs while it runs.
const NOT_WITH_A_PROTECTED_VM: [(Call, [u64; 5]); 13] = [
    (Call::VmReset, [VM, 0, 0, 0, 0]),
    (Call::VmMapping, [VM, IPA, 0, 0, 0]),
    (Call::SlotDelete, [VM, 0, 0, 0, 0]),
    (Call::SlotMove, [VM, 0, IPA, 0, 0]),
    (Call::SlotFlags, [VM, 0, 0, 0, 0]),
    (Call::SlotUnshare, [VM, 0, 0, 1, 0]),
    (Call::SlotShare, [VM, 0, 0, 1, 0]),
    (Call::SlotYoung, [VM, 0, 0, 1, 0]),
    (Call::SlotRelax, [VM, 0, 0, 1, 0]),
    (Call::DmaDevice, [VM, 0, 1, 0, 0]),
    (Call::DeviceAttach, [VM, 8, 0, 0, 0]),
    (Call::DeviceDetach, [VM, 8, 0, 0, 0]),
    (Call::VcpuStart, [VM, 0, IPA, 0, 0]),
];

fn shows_and_changes_nothing(board: &Board<'_>) {
    for (call, args) in NOT_WITH_A_PROTECTED_VM {
        let refused = ask(board, call, args);
        assert_eq!(refused, Err(ErrorCode::NotPermitted), "{call:?}");
    }
}

#[test]
fn a_protected_vm_refuses_what_shows_or_changes_it_before_and_behind_its_seal() {
    with_a_protected_vm(shows_and_changes_nothing);
    with_a_sealed_vm(shows_and_changes_nothing);
}

#[test]
fn an_unprotected_vm_has_nothing_to_seal_or_to_measure() {
    with_a_vm(|board| {
        let refused = [
            ask(board, Call::VmExpect, [VM, 1, 2, 3, 4]),
            ask(board, Call::VmSeal, [VM, IPA, 0]),
            ask(board, Call::VmMeasurement, [VM, 0]),
            ask(board, Call::MemoryDonate, [VM, IPA, 1, 0]),
        ];
        assert_eq!(refused, [Err(ErrorCode::NotPermitted); 4]);
    });
}

#[test]
fn behind_the_seal_nothing_is_added_to_a_vm_but_zeros() {
    with_a_sealed_vm(|board| {
        let refused = [
            ask(
                board,
                Call::SlotCreate,
                [VM, slot(1, 0), IPA + 0x10_0000, 1, page(20)],
            ),
            ask(board, Call::SlotLock, [VM, 1, 0, 1]),
            ask(board, Call::VmSeal, [VM, IPA, 7]),
            ask(board, Call::VmExpect, [VM, 1, 2, 3, 4]),
            ask(board, Call::MemoryDonate, [VM, IPA, 1, 1]),
        ];
        assert_eq!(refused, [Err(ErrorCode::NotPermitted); 5]);
        assert_eq!(ask(board, Call::MemoryDonate, [VM, IPA, 1, 0]), Ok(0));
    });
}

#[test]
fn a_protected_vm_is_not_sealed_without_its_first_vcpu() {
    on_a_board(|board| {
        assert_eq!(ask(board, Call::VmReserve, []), Ok(VM));
        let created = ask(board, Call::VmCreate, [VM, page(0), 1, 1 << 8 | 1]);
        assert_eq!(created, Ok(1));
        assert_eq!(
            ask(board, Call::VmSeal, [VM, IPA, 0]),
            Err(ErrorCode::NotFound)
        );
    });
}

#[test]
fn the_seal_measures_entry_and_context_in_their_order() {
    with_a_sealed_vm(|board| {
        let start = Start {
            vcpus: 2,
            entry: IPA,
            context: 7,
        };
        let expected = Measurer::new().finish(&start);
        let halves = [0, 1].map(|half| raw(board, Call::VmMeasurement, [VM, half]));
        let words = halves.map(|[zero, a, b, rest]| {
            assert_eq!((zero, rest), (0, 0));
            [a.to_le_bytes(), b.to_le_bytes()].concat()
        });
        assert_eq!(words.concat(), expected);
        let third = ask(board, Call::VmMeasurement, [VM, 2]);
        assert_eq!(third, Err(ErrorCode::Invalid));
    });
}

#[test]
fn what_was_expected_is_in_the_order_of_its_arguments() {
    with_a_protected_vm(|board| {
        let start = Start {
            vcpus: 2,
            entry: IPA,
            context: 0,
        };
        let bytes = Measurer::new().finish(&start);
        let words: std::vec::Vec<_> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|w| u64::from_le_bytes(*w))
            .collect();
        let expect = [VM, words[0], words[1], words[2], words[3]];
        assert_eq!(ask(board, Call::VmExpect, expect), Ok(0));
        assert_eq!(
            ask(board, Call::VmExpect, expect),
            Err(ErrorCode::NotPermitted)
        );
        assert_eq!(ask(board, Call::VmSeal, [VM, IPA, 0]), Ok(0));
    });
    with_a_protected_vm(|board| {
        assert_eq!(ask(board, Call::VmExpect, [VM, 1, 2, 3, 4]), Ok(0));
        assert_eq!(
            ask(board, Call::VmSeal, [VM, IPA, 0]),
            Err(ErrorCode::Mismatch)
        );
    });
}

#[test]
fn a_slot_number_that_is_not_the_hosts_is_invalid() {
    with_a_vm(|board| {
        for id in [u64::from(HOST_SLOTS), 0x1_0000, u64::MAX] {
            let word = SlotWord::from_bits(id).map_or(id, SlotWord::bits);
            let refused = [
                ask(board, Call::SlotCreate, [VM, word, IPA + 0x10_0000, 1, RAM]),
                ask(board, Call::SlotDelete, [VM, id]),
                ask(board, Call::SlotMove, [VM, id, IPA]),
                ask(board, Call::SlotLock, [VM, 1, id, 1]),
                ask(board, Call::SlotLock, [VM, 2, id, 0]),
                ask(board, Call::SlotState, [VM, id]),
                ask(board, Call::SlotDirty, [VM, id, 0]),
                ask(board, Call::SlotUnshare, [VM, id, 0, 1]),
                ask(board, Call::SlotShare, [VM, id, 0, 1]),
                ask(board, Call::SlotYoung, [VM, id, 0, 1]),
                ask(board, Call::SlotRelax, [VM, id, 0, 1]),
            ];
            // 0x1_0000 is a device with number 0 in a word: its memory is RAM, so it is not permitted.
            let (created, others) = refused.split_first().unwrap();
            assert!(created.is_err(), "{id:#x}: {created:?}");
            assert_eq!(others, [Err(ErrorCode::Invalid); 10], "{id:#x}");
        }
        let eights = ask(board, Call::SlotFlags, [VM, HOST_SLOTS.into()]);
        assert_eq!(eights, Err(ErrorCode::Invalid));
    });
}

#[test]
fn numbers_without_a_meaning_are_invalid() {
    with_a_vm(|board| {
        let refused = [
            ask(board, Call::VmCounter, [VM, VmCounter::COUNT as u64]),
            ask(
                board,
                Call::SlotCreate,
                [VM, 1 << 17, IPA + 0x10_0000, 1, RAM],
            ),
            ask(
                board,
                Call::SlotCreate,
                [VM, slot(1, 4), IPA + 0x10_0000, 1, RAM],
            ),
            ask(board, Call::SlotFlags, [VM, 1 << 17]),
            ask(board, Call::SlotFlags, [VM, slot(0, 4)]),
            ask(board, Call::SlotLock, [VM, 3, 0, 1]),
            ask(board, Call::SlotLock, [VM, 1, 0, 4]),
            ask(board, Call::SlotLock, [VM, 2, 0, LOCK_BLOCKS]),
            ask(board, Call::SlotYoung, [VM, 0, 0, 1, 2]),
            ask(board, Call::SlotRelax, [VM, 0, 0, 8]),
            ask(board, Call::DmaDevice, [VM, 2, 1]),
            ask(board, Call::DmaDevice, [VM, 0, 2]),
            ask(board, Call::DeviceAttach, [VM, 8, 2]),
            ask(board, Call::MemoryDonate, [VM, IPA, 1, 2]),
            ask(board, Call::IrqLine, [VM, 32, 3]),
            ask(board, Call::IrqLine, [VM, 31, 1]),
            ask(board, Call::IrqLine, [VM, 1020, 1]),
            ask(board, Call::IrqLine, [VM, 1 << 32 | 32, 1]),
            ask(board, Call::VcpuRun, [VM, 0, 0, 2]),
            ask(board, Call::VcpuRun, [VM, 0, 0, 0, 1]),
            ask(board, Call::VmMapping, [VM, 1 << 39 | 1]),
        ];
        for (number, refused) in refused.into_iter().enumerate() {
            assert_eq!(refused, Err(ErrorCode::Invalid), "number {number}");
        }
    });
}

#[test]
fn a_device_of_a_guest_is_neither_memory_nor_a_protected_vms() {
    let device = |board: &Board<'_>, at| {
        let word = 1 << 16 | 1;
        ask(board, Call::SlotCreate, [VM, word, IPA + 0x10_0000, 1, at])
    };
    with_a_vm(|board| {
        assert_eq!(device(board, RAM), Err(ErrorCode::NotPermitted));
        assert_eq!(device(board, 0x900_0000), Ok(0));
    });
    with_a_protected_vm(|board| {
        assert_eq!(device(board, 0x900_0000), Err(ErrorCode::NotPermitted));
    });
}

#[test]
fn a_protected_vm_has_no_page_behind_two_addresses() {
    with_a_protected_vm(|board| {
        let again = [VM, slot(1, 0), IPA + 0x10_0000, 1, page(8)];
        assert_eq!(
            ask(board, Call::SlotCreate, again),
            Err(ErrorCode::NotPermitted)
        );
        let other = [VM, slot(1, 0), IPA + 0x10_0000, 1, page(12)];
        assert_eq!(ask(board, Call::SlotCreate, other), Ok(0));
    });
}

#[test]
fn unlocking_one_slot_leaves_the_others_locked() {
    with_a_vm(|board| {
        let second = [VM, slot(1, 0), IPA + 0x10_0000, 4, page(12)];
        assert_eq!(ask(board, Call::SlotCreate, second), Ok(0));
        for id in [0, 1] {
            while ask(board, Call::SlotLock, [VM, 1, id, 3]) == Err(ErrorCode::Again) {}
        }
        while ask(board, Call::SlotLock, [VM, 2, 0, 0]) == Err(ErrorCode::Again) {}
        let states = [0, 1].map(|id| ask(board, Call::SlotState, [VM, id]));
        let locked = abi::SlotState::LockedDirty as u64;
        assert_eq!(states, [Ok(0), Ok(locked)]);
    });
}

#[test]
fn looking_for_young_pages_leaves_them_young_and_clearing_does_not() {
    with_a_vm(|board| {
        let touched = board.vms.with(VM, |vm| {
            let fault = Stage2Fault {
                ipa: Ipa::new(IPA),
                access: Access::Read,
                kind: FaultKind::Translation,
            };
            let _outcome = vm.state().memory.handle_fault(&fault, &())?;
            Ok(())
        });
        assert_eq!(touched, Ok(()));
        let young = |clear: u64| ask(board, Call::SlotYoung, [VM, 0, 0, 1, clear]);
        let (test, clear) = (0, 1);
        let found = [test, test, clear, test, clear].map(young);
        assert_eq!(found, [Ok(1), Ok(1), Ok(1), Ok(0), Ok(0)]);
    });
}

#[test]
fn a_locked_slot_is_mapped_where_and_as_it_was_asked_for() {
    with_a_vm(|board| {
        while ask(board, Call::SlotLock, [VM, 1, 0, 3]) == Err(ErrorCode::Again) {}
        let [ipa, pa, info, rest] = raw(board, Call::VmMapping, [VM, IPA + 5]);
        let info = abi::LeafInfo::from_bits(info);
        assert_eq!((ipa, pa, rest), (IPA, page(8), 0));
        assert_eq!((info.pages, info.level), (4, 3));
        assert_eq!(info.permissions & 3, 3);
        assert_eq!(
            ask(board, Call::SlotState, [VM, 0]),
            Ok(abi::SlotState::LockedDirty as u64)
        );
        let second = ask(board, Call::SlotLock, [VM, 1, 0, 3]);
        assert!(second.is_err(), "{second:?}");
        while ask(board, Call::SlotLock, [VM, 2, 0, 1]) == Err(ErrorCode::Again) {}
        assert_eq!(ask(board, Call::SlotState, [VM, 0]), Ok(0));
        assert_eq!(
            ask(board, Call::VmMapping, [VM, IPA]),
            Err(ErrorCode::NotFound)
        );
    });
}

#[test]
fn a_device_that_was_not_named_is_not_taken_back() {
    with_a_vm(|board| {
        for kind in [0, 1] {
            let gone = |board| ask(board, Call::DmaDevice, [VM, kind, 0]);
            assert_eq!(gone(board), Err(ErrorCode::Invalid));
            while ask(board, Call::DmaDevice, [VM, kind, 1]) == Err(ErrorCode::Again) {}
            assert_eq!(
                ask(board, Call::DmaDevice, [VM, 1 - kind, 0]),
                Err(ErrorCode::Invalid)
            );
            while gone(board) == Err(ErrorCode::Again) {}
            assert_eq!(gone(board), Err(ErrorCode::Invalid));
        }
    });
}

#[test]
fn without_an_iommu_there_is_no_function() {
    with_a_vm(|board| {
        let calls = [Call::DeviceTake, Call::DeviceGive, Call::DeviceFaults];
        for call in calls {
            assert_eq!(ask(board, call, [8]), Err(ErrorCode::NotFound));
            assert_eq!(ask(board, call, [0x1_0000]), Err(ErrorCode::Invalid));
        }
        for call in [Call::DeviceAttach, Call::DeviceDetach] {
            assert_eq!(ask(board, call, [VM, 8]), Err(ErrorCode::NotFound));
            assert_eq!(ask(board, call, [VM, 0x1_0000]), Err(ErrorCode::Invalid));
        }
    });
}
