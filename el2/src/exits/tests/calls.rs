//! HVCs.

use abi::{Exit, VmCounter};

use super::*;
use crate::exits::Registers;
use crate::exits::testing::{DEVICE, OWNED_PAGES};
use crate::guest::psci::Turn;
use crate::measure::{Measurer, Start};
use crate::psci::StartOrder;

const HVC: u64 = 0x16 << 26 | IL;
const NOT_SUPPORTED: u64 = u64::MAX;
/// PSCI (DEN 0022) and KVM's calls of protected guests.
const PSCI_VERSION: u64 = 0x8400_0000;
const CPU_SUSPEND: u64 = 0xc400_0001;
const CPU_OFF: u64 = 0x8400_0002;
const CPU_ON: u64 = 0xc400_0003;
const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;
const SYSTEM_RESET2: u64 = 0xc400_0012;
const MEM_SHARE: u64 = 0xc600_0003;

fn call(vcpu: &mut FakeVcpu<'_, '_>, arguments: [u64; 4]) -> Next {
    vcpu.registers.answer(arguments);
    vcpu.esr = HVC;
    handle(vcpu, SYNC)
}

fn answer(vcpu: &FakeVcpu<'_, '_>) -> [u64; 4] {
    let [x0, x1, x2, x3, ..] = vcpu.registers.0;
    [x0, x1, x2, x3]
}

#[test]
fn an_answer_is_in_four_registers_and_nowhere_else() {
    on(PLAIN, |vcpu| {
        let before = vcpu.registers;
        assert_eq!(call(vcpu, [PSCI_VERSION, 1, 2, 3]), Next::Resume);
        // The HVC's ELR is behind it already.
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM, [].into()));
        assert_eq!(answer(vcpu)[0], 0x1_0001);
        assert_eq!(vcpu.registers.0[4..], before.0[4..]);
        assert_eq!(vcpu.counter(VmCounter::Calls), 1);
    });
}

#[test]
fn a_call_that_nobody_knows_is_not_supported() {
    on(PLAIN, |vcpu| {
        assert_eq!(call(vcpu, [0x1234_5678, 0, 0, 0]), Next::Resume);
        assert_eq!(answer(vcpu)[0], NOT_SUPPORTED);
    });
}

#[test]
fn a_workaround_is_firmwares() {
    on(PLAIN, |vcpu| {
        assert_eq!(call(vcpu, [0x8000_8000, 0, 0, 0]), Next::Resume);
        assert_eq!(vcpu.take_did(), [Did::Firmware(0x8000_8000)]);
        assert_eq!(answer(vcpu)[0], 0);
    });
}

#[test]
fn a_cpu_that_is_turned_on_is_the_hosts_to_run() {
    on(PLAIN, |vcpu| {
        assert_eq!(call(vcpu, [CPU_ON, 1, RAM + 0x100, 9]), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::VcpuOn { index: 1 }));
        assert_eq!(answer(vcpu)[0], 0);
        let (entry, context) = (RAM + 0x100, 9);
        let order = StartOrder { entry, context };
        assert_eq!(vcpu.vm.power.turn(1), Turn::Starts(order));
    });
}

#[test]
fn a_cpu_does_not_start_outside_memory() {
    // Of the host, and of the VM.
    for device in [UART, DEVICE] {
        on(PLAIN, |vcpu| {
            assert_eq!(call(vcpu, [CPU_ON, 1, device, 9]), Next::Resume);
            // INVALID_ADDRESS.
            assert_eq!(answer(vcpu)[0].cast_signed(), -9);
            assert_eq!(vcpu.vm.power.turn(1), Turn::IsOff);
        });
    }
}

#[test]
fn a_cpu_that_turns_itself_off_tells_the_host() {
    on(PLAIN, |vcpu| {
        assert_eq!(call(vcpu, [CPU_OFF, 0, 0, 0]), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::VcpuOff));
    });
}

#[test]
fn behind_the_end_of_the_machine_nothing_runs() {
    let cases = [
        ([SYSTEM_OFF, 0, 0, 0], Exit::SystemOff),
        ([SYSTEM_RESET, 0, 0, 0], Exit::SystemReset { warm: false }),
        ([SYSTEM_RESET2, 0, 0, 0], Exit::SystemReset { warm: true }),
    ];
    for (arguments, exit) in cases {
        on(PLAIN, |vcpu| {
            assert_eq!(vcpu.vm.power.turn(0), Turn::GoesOn);
            assert_eq!(call(vcpu, arguments), Next::Leave);
            assert_eq!(vcpu.exit, Some(exit));
            assert_eq!(vcpu.vm.power.turn(0), Turn::IsOff);
        });
    }
}

#[test]
fn standby_waits_and_has_succeeded() {
    on(PLAIN, |vcpu| {
        assert_eq!(call(vcpu, [CPU_SUSPEND, 0, 0, 0]), Next::Leave);
        let until = u64::MAX;
        assert_eq!(vcpu.exit, Some(Exit::WaitForInterrupt { until }));
        assert_eq!((answer(vcpu)[0], vcpu.take_did()), (0, [].into()));
    });
}

#[test]
fn power_down_starts_over_and_waits() {
    on(PLAIN, |vcpu| {
        let (entry, context) = (RAM + 0x200, 77);
        let next = call(vcpu, [CPU_SUSPEND, 1 << 16, entry, context]);
        assert_eq!(next, Next::Leave);
        let order = StartOrder { entry, context };
        assert_eq!(vcpu.take_did(), [Did::Restart(order)]);
        assert_eq!(answer(vcpu), [context, 0, 0, 0]);
    });
}

#[test]
fn attributes_are_what_the_core_says() {
    on(PLAIN, |vcpu| {
        let id = u64::from(abi::GUEST_MEMORY_ATTRIBUTES);
        vcpu.attributes = Some((0xff, 3));
        assert_eq!(call(vcpu, [id, RAM, 0, 0]), Next::Resume);
        assert_eq!(answer(vcpu), [0, 0xff, 3, 0]);
        vcpu.attributes = None;
        assert_eq!(call(vcpu, [id, RAM, 0, 0]), Next::Resume);
        assert_eq!(answer(vcpu)[0].cast_signed(), -3);
    });
}

#[test]
fn a_protected_guest_shares_its_pages() {
    on(PROTECTED, |vcpu| {
        assert_eq!(call(vcpu, [MEM_SHARE, RAM + 0x10_0000, 4, 0]), Next::Resume);
        assert_eq!((answer(vcpu), vcpu.exit), ([0, 4, 0, 0], None));
        // Not what it shares already.
        assert_eq!(call(vcpu, [MEM_SHARE, RAM + 0x10_0000, 1, 0]), Next::Resume);
        assert_eq!(answer(vcpu)[0].cast_signed(), -3);
    });
}

#[test]
fn a_call_about_a_missing_page_is_made_again() {
    on(PROTECTED, |vcpu| {
        let ipa = RAM + OWNED_PAGES * 0x1000;
        assert_eq!(call(vcpu, [MEM_SHARE, ipa, 1, 0]), Next::Leave);
        assert_eq!(vcpu.exit, Some(Exit::MemoryMissing { ipa }));
        assert_eq!((vcpu.pc, vcpu.take_did()), (RAM - 4, [Did::Repeat].into()));
        assert_eq!(answer(vcpu), [MEM_SHARE, ipa, 1, 0]);
    });
}

#[test]
fn only_protected_guests_have_pages_to_share() {
    on(PLAIN, |vcpu| {
        assert_eq!(call(vcpu, [MEM_SHARE, RAM, 1, 0]), Next::Resume);
        assert_eq!(answer(vcpu)[0], NOT_SUPPORTED);
    });
}

#[test]
fn a_protected_guest_reads_its_measurement() {
    on(PROTECTED, |vcpu| {
        let expected = Measurer::new().finish(&Start {
            vcpus: 2,
            entry: RAM,
            context: 0,
        });
        let id = u64::from(abi::GUEST_MEASUREMENT);
        let mut told = Vec::new();
        for half in [0, 1] {
            assert_eq!(call(vcpu, [id, half, 0, 0]), Next::Resume);
            let [done, first, second, _] = answer(vcpu);
            assert_eq!(done, 0);
            told.extend([first, second].map(u64::to_le_bytes).concat());
        }
        assert_eq!(told, expected);
    });
}

#[test]
fn an_immediate_is_nobodys() {
    on(PLAIN, |vcpu| {
        vcpu.registers = Registers::default();
        vcpu.registers.set(0, PSCI_VERSION);
        vcpu.esr = HVC | 1;
        assert_eq!(handle(vcpu, SYNC), Next::Resume);
        assert_eq!(answer(vcpu)[0], NOT_SUPPORTED);
    });
}
