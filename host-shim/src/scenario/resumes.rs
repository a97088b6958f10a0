//! What the host says when it resumes a vCPU: a value, which reaches the register of the load that waits
//! for it, in that load's width, and nothing else. Where no load waits it reaches nothing.

use abi::Exit;
use vmm::platform::{RAM, UART};

use super::guests::Memory;
use super::kit::{end, expect, words};
use super::remote;
use crate::arch::hostile;
use crate::report::Report;
use crate::vm::Vm;

/// Said at every resume: the lower 8, 16 and 32 bits are negative.
const FORGED: u64 = 0x8899_aabb_ccdd_eef0;
/// `x0` of a start, by [`Memory::vm`].
const CONTEXT: u64 = 0x1234;

/// What the guest does, in this order, under [`FORGED`].
const EXPECTED: [Event; 29] = [
    // At the start no register but x0 has a value.
    Event::Wrote(0, 0),
    Event::Wrote(0, 0),
    Event::Waits,
    // Behind a store and WFI none has changed.
    Event::Wrote(0, 0),
    // LDRB, LDRSB to w and x; LDRH, LDRSH to w and x; LDR w, LDRSW, LDR x.
    Event::Reads(1),
    Event::Wrote(8, 0xf0),
    Event::Reads(1),
    Event::Wrote(8, 0xffff_fff0),
    Event::Reads(1),
    Event::Wrote(8, 0xffff_ffff_ffff_fff0),
    Event::Reads(2),
    Event::Wrote(8, 0xeef0),
    Event::Reads(2),
    Event::Wrote(8, 0xffff_eef0),
    Event::Reads(2),
    Event::Wrote(8, 0xffff_ffff_ffff_eef0),
    Event::Reads(4),
    Event::Wrote(8, 0xccdd_eef0),
    Event::Reads(4),
    Event::Wrote(8, 0xffff_ffff_ccdd_eef0),
    Event::Reads(8),
    Event::Wrote(8, FORGED),
    // A load changes its own register only, and one to xzr none.
    Event::Reads(2),
    Event::Wrote(0, 0),
    Event::Reads(8),
    Event::Wrote(0, 0),
    Event::Reads(8),
    // What the last load gets, or the first words behind a reset.
    Event::Wrote(8, FORGED),
    Event::Wrote(0, 0),
];
/// Events before the host may reset the VM while a load waits.
const BEFORE_RESET: usize = 27;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    /// A doubleword to the device, at this offset.
    Wrote(u64, u64),
    /// So many bytes of the device.
    Reads(u8),
    /// WFI.
    Waits,
}

pub(super) fn run(memory: &Memory, report: &mut Report) {
    let result = [false, true].iter().try_for_each(|p| forged(memory, *p));
    report.check("a_forged_value_reaches_no_other_register", result);
    report.check("a_load_does_not_outlive_a_reset", reset(memory));
}

/// The guest's next event.
fn next(vm: Vm) -> Result<Event, &'static str> {
    for _ in 0..10_000 {
        return Ok(match words(vm.run(0, FORGED, false))? {
            Exit::Interrupted => continue,
            Exit::MmioRead { ipa: UART, size } => Event::Reads(size),
            Exit::WaitForInterrupt { .. } => Event::Waits,
            Exit::MmioWrite {
                ipa,
                size: 8,
                value,
            } if ipa & !0xff == UART => Event::Wrote(ipa - UART, value),
            other => {
                crate::console::line(format_args!("  unexpected {other:?}"));
                return Err("the guest left for another reason");
            }
        });
    }
    Err("the guest does not get on")
}

fn follow(vm: Vm, expected: &[Event]) -> Result<(), &'static str> {
    for (number, event) in expected.iter().enumerate() {
        let found = next(vm)?;
        if found != *event {
            crate::console::line(format_args!("  {number}: {found:x?}, not {event:x?}"));
            return Err("a value of the host's went elsewhere");
        }
    }
    Ok(())
}

fn forged(memory: &Memory, protected: bool) -> Result<(), &'static str> {
    let vm = remote::with_code(memory, hostile::resume(), protected)?;
    let result = follow(vm, &EXPECTED[..=BEFORE_RESET]);
    end(vm)?;
    result
}

/// The guest that starts behind a reset has never made the load that the host answers then.
fn reset(memory: &Memory) -> Result<(), &'static str> {
    let vm = remote::with_code(memory, hostile::resume(), false)?;
    let waiting = follow(vm, &EXPECTED[..BEFORE_RESET]);
    words(vm.reset())?;
    let off = words(vm.run(0, FORGED, false))?;
    words(vm.start_vcpu(0, RAM, CONTEXT))?;
    let started = follow(vm, &EXPECTED[BEFORE_RESET + 1..]);
    let again = follow(vm, &EXPECTED[1..BEFORE_RESET]);
    end(vm)?;
    waiting?;
    expect(off == Exit::VcpuOff, "it runs behind a reset")?;
    started.and(again)
}
