//! The calls about vCPUs: when they start, run and stop, and what interrupts them.

use super::*;

#[test]
fn vcpus_are_created_once_and_not_more_than_the_vm_has() {
    with_a_vm(|board| {
        assert_eq!(
            ask(board, Call::VcpuCreate, [VM, 0]),
            Err(ErrorCode::Exists)
        );
        for index in [2, 256, u64::MAX] {
            assert_eq!(
                ask(board, Call::VcpuCreate, [VM, index]),
                Err(ErrorCode::Invalid)
            );
        }
        for index in [1, 8, 256, u64::MAX] {
            let absent = [
                ask(board, Call::VcpuStart, [VM, index, IPA]),
                ask(board, Call::VcpuState, [VM, index]),
                ask(board, Call::VcpuRun, [VM, index]),
            ];
            assert_eq!(absent, [Err(ErrorCode::NotFound); 3], "{index}");
        }
        assert_eq!(ask(board, Call::VcpuCreate, [VM, 1]), Ok(0));
        assert_eq!(ask(board, Call::VcpuState, [VM, 1]), Ok(0));
    });
}

#[test]
fn a_vcpu_is_started_once_and_runs_from_then() {
    with_a_vm(|board| {
        let off = abi::Exit::VcpuOff.to_registers();
        assert_eq!(raw(board, Call::VcpuRun, [VM, 0]), off);
        assert_eq!(ask(board, Call::VcpuStart, [VM, 0, IPA, 1]), Ok(0));
        let again = ask(board, Call::VcpuStart, [VM, 0, IPA, 1]);
        assert_eq!(again, Err(ErrorCode::Exists));
        assert_eq!(ask(board, Call::VcpuState, [VM, 0]), Ok(1));
        assert_eq!(board.started.get(), None);
        assert_eq!(raw(board, Call::VcpuRun, [VM, 0]), [0; 4]);
        assert_eq!(board.started.get(), order(IPA, 1));
        assert_eq!(ask(board, Call::VmReset, [VM]), Err(ErrorCode::Again));
    });
}

fn order(entry: u64, context: u64) -> Option<StartOrder> {
    Some(StartOrder { entry, context })
}

#[test]
fn a_run_is_told_what_was_loaded_and_whether_to_wait() {
    with_a_vm(|board| {
        for (loaded, wait) in [(0x1234, 1), (1, 0), (u64::MAX, 1)] {
            let _: [u64; 4] = raw(board, Call::VcpuRun, [VM, 0, loaded, wait]);
            assert_eq!(board.run_with.get(), Some((loaded, wait == 1)));
        }
    });
}

#[test]
fn a_protected_vm_runs_only_behind_its_seal() {
    with_a_protected_vm(|board| {
        assert_eq!(
            ask(board, Call::VcpuRun, [VM, 0]),
            Err(ErrorCode::NotPermitted)
        );
        assert_eq!(ask(board, Call::VcpuRun, [VM, 1]), Err(ErrorCode::NotFound));
        assert_eq!(ask(board, Call::VmSeal, [VM, IPA, 7]), Ok(0));
        assert_eq!(raw(board, Call::VcpuRun, [VM, 0]), [0; 4]);
        assert_eq!(board.started.get(), order(IPA, 7));
    });
}

#[test]
fn a_vm_is_not_sealed_while_a_slot_is_locked_in_part() {
    with_a_protected_vm(|board| {
        // Steps end where the address is a multiple of their size, whatever that is.
        let first = 2 * IPA - PAGE_SIZE;
        let slot = [VM, slot(1, 0), first, 2, page(12)];
        assert_eq!(ask(board, Call::SlotCreate, slot), Ok(0));
        for ipa in [first, first + PAGE_SIZE] {
            assert_eq!(ask(board, Call::MemoryDonate, [VM, ipa, 1, 0]), Ok(0));
        }
        let lock = || ask(board, Call::SlotLock, [VM, 1, 1, 3]);
        assert_eq!(lock(), Err(ErrorCode::Again));
        let unfinished = abi::SlotState::Unfinished as u64;
        assert_eq!(ask(board, Call::SlotState, [VM, 1]), Ok(unfinished));
        let seal = || ask(board, Call::VmSeal, [VM, IPA, 7]);
        assert_eq!(seal(), Err(ErrorCode::Busy));
        while lock() == Err(ErrorCode::Again) {}
        assert_eq!(seal(), Ok(0));
    });
}

#[test]
fn who_runs_is_neither_run_twice_nor_reset_nor_destroyed() {
    with_a_vm(|board| {
        let meanwhile = || {
            [
                ask(board, Call::VcpuRun, [VM, 0]),
                ask(board, Call::VmReset, [VM]),
                ask(board, Call::VmDestroy, [VM]),
                ask(board, Call::VmReclaim, [VM]),
            ]
        };
        let busy = board.while_it_runs((VM, 0), meanwhile);
        assert_eq!(busy, Ok([Err(ErrorCode::Busy); 4]));
    });
}

/// What a guest does first to get the shared interrupt 32, which goes to vCPU 0 then.
fn enable_interrupt_32(board: &Board<'_>) {
    let enabled = board.vms.with(VM, |vm| {
        let (ctlr, isenabler1) = (0, 0x104);
        let _: Kicks = vm.vgic().dist_write(0, ctlr, 4, 3);
        let _: Kicks = vm.vgic().dist_write(0, isenabler1, 4, 1);
        Ok(())
    });
    assert_eq!(enabled, Ok(()));
}

#[test]
fn a_line_that_is_high_is_pending_and_kicks_its_vcpu() {
    with_a_vm(|board| {
        enable_interrupt_32(board);
        let state = || ask(board, Call::VcpuState, [VM, 0]);
        for high in [1, 2] {
            assert_eq!(ask(board, Call::IrqLine, [VM, 32, 0]), Ok(0));
            assert_eq!((state(), board.kicked.take()), (Ok(0), None));
            assert_eq!(ask(board, Call::IrqLine, [VM, 32, high]), Ok(0));
            assert_eq!((state(), board.kicked.take()), (Ok(2), Some(0)));
        }
    });
}

#[test]
fn a_reset_turns_all_vcpus_off_and_forgets_interrupts() {
    with_a_vm(|board| {
        enable_interrupt_32(board);
        assert_eq!(ask(board, Call::VcpuStart, [VM, 0, IPA, 1]), Ok(0));
        assert_eq!(ask(board, Call::IrqLine, [VM, 32, 1]), Ok(0));
        assert_eq!(ask(board, Call::VcpuState, [VM, 0]), Ok(3));
        while ask(board, Call::VmReset, [VM]) == Err(ErrorCode::Again) {}
        assert_eq!(ask(board, Call::VcpuState, [VM, 0]), Ok(0));
    });
}
