//! HVC: calls that the guest makes.

use abi::{Exit, VmCounter};
use memslot::addr::Gfn;
use memslot::frames::FrameSource;
use memslot::policy::MemTypePolicy;
use memslot::slot::SlotKind;
use memslot::table::GuestTable;
use memslot::vm::GuestMemory;

use super::interrupt::sleep;
use super::{Loaded, Next};
use crate::guest::protected::Request;
use crate::guest::psci::Action as PowerAction;
use crate::guest::smccc::{self, Action};
use crate::guest_memory::Moved;

/// Whether an IPA is in a slot of memory, not of a device.
#[must_use]
pub fn is_memory<T: GuestTable, P: MemTypePolicy, S: FrameSource>(
    memory: &GuestMemory<T, P, S>,
    ipa: u64,
) -> bool {
    let slot = Gfn::try_new(ipa >> 12).and_then(|gfn| memory.find_slot(gfn));
    slot.is_some_and(|(slot, _)| slot.kind == SlotKind::Ram)
}

/// HVC.
#[inline]
pub(super) fn call(run: &mut impl Loaded, immediate: u16) -> Next {
    run.count(VmCounter::Calls);
    let [x0, x1, x2, x3, ..] = run.registers().0;
    let action = smccc::call(immediate, [x0, x1, x2, x3], &run.caller());
    match action {
        Action::Power(action) => power(run, action),
        Action::Return(values) => {
            run.registers().answer(values);
            Next::Resume
        }
        Action::Firmware(id) => {
            run.call_firmware(id);
            answered(run, 0)
        }
        Action::Attributes(address) => attributes(run, address),
        Action::Protected(request) => protected(run, request),
    }
}

/// A protected guest's call about its memory or its devices.
#[inline(never)]
fn protected(run: &mut impl Loaded, request: Request) -> Next {
    let answer = match request {
        Request::Answer(x0, x1) => [x0, x1, 0, 0],
        Request::Measurement { half } => match run.protection().map(|p| p.measurement(half)) {
            Some(Ok([first, second])) => [0, first, second, 0],
            _ => [smccc::INVALID_PARAMETER, 0, 0, 0],
        },
        Request::Memory { call, ipa, pages } => match run.move_pages(call, ipa, pages) {
            Moved::Pages(pages) => [0, pages, 0, 0],
            Moved::Refused => [smccc::INVALID_PARAMETER, 0, 0, 0],
            Moved::After(exit) => {
                run.repeat_call();
                return run.leave(exit);
            }
        },
    };
    run.registers().answer(answer);
    Next::Resume
}

/// How both stages together access an address of the guest.
#[inline(never)]
fn attributes(run: &mut impl Loaded, address: u64) -> Next {
    let answer = match run.memory_attributes(address) {
        Some((attribute, shareability)) => [0, attribute, shareability, 0],
        None => [smccc::INVALID_PARAMETER, 0, 0, 0],
    };
    run.registers().answer(answer);
    Next::Resume
}

fn answered(run: &mut impl Loaded, value: u64) -> Next {
    run.registers().0[0] = value;
    Next::Resume
}

fn power(run: &mut impl Loaded, action: PowerAction) -> Next {
    match action {
        PowerAction::Return(value) => answered(run, value),
        PowerAction::TurnedOn { index } => {
            answered(run, 0);
            run.leave(Exit::VcpuOn { index })
        }
        PowerAction::Off => run.leave(Exit::VcpuOff),
        PowerAction::Standby => {
            answered(run, 0);
            sleep(run)
        }
        PowerAction::PowerDown(order) => {
            run.restart_when_woken(order);
            sleep(run)
        }
        PowerAction::SystemOff => end(run, Exit::SystemOff),
        PowerAction::SystemReset { warm } => end(run, Exit::SystemReset { warm }),
    }
}

/// The guest's own end of the machine: it never goes on behind it.
fn end(run: &mut impl Loaded, exit: Exit) -> Next {
    run.power().end();
    run.leave(exit)
}
