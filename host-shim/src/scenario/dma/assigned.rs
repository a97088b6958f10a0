//! A device that a guest drives by itself: its registers are a slot of the VM, and its DMA goes through
//! the VM's stage 2, while the host changes the VM's memory. The guest is the payload's `run=edu`,
//! which does what it is told, word by word.

use abi::SlotWord;
use board::{AddrRange, PAGE_SIZE};
use vmm::platform::RAM;

use super::setup::{Faults, Setup, faults};
use crate::arch::{gic, mem, ticks_per_second};
use crate::edu::{self, Direction, Edu, MAX_BYTES};
use crate::scenario::kit::{RAM_SLOT, end, expect, slot, words};
use crate::scenario::payload::{Event, Guest, device_page};
use crate::vm::{self, Vm};

const ARGUMENTS: &str = "run=edu";
/// Where the guest expects the device's registers.
const REGISTERS: u64 = 0x0c00_0000;
/// A page of its RAM that the device reads, and one that it writes.
const FROM: u64 = RAM + 0x80_0000;
const TO: u64 = RAM + 0x90_0000;
/// Memory that comes and goes: where it is first, and where it comes back.
const SPARE: u64 = 0x5000_0000;
const ELSEWHERE: u64 = 0x5800_0000;
/// Where the VM has nothing.
const HOLE: u64 = 0x6000_0000;
const SPARE_SLOT: SlotWord = slot(1);
const REGISTER_SLOT: SlotWord = SlotWord {
    device: true,
    ..slot(2)
};
const BLANK: u8 = 0x77;
/// Times that the spare memory goes while a transfer is due.
const REMOVALS: u64 = 16;

/// What the guest is told to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
enum Order {
    Fill = 1,
    Read = 2,
    Write = 3,
    Idle = 4,
    Pattern = 5,
}

/// The guest, its device, and how many checks it was told to make.
struct Driver<'a> {
    setup: &'a Setup<'a>,
    guest: Guest,
    device: Edu,
    checks: u32,
}

/// A whole life with a device.
pub(super) fn driven(setup: &Setup<'_>) -> Result<(), &'static str> {
    with_guest(setup, |driver| {
        driver.inside(1)?;
        driver.outside()?;
        driver.end()
    })
}

/// The VM's memory changes while the device is at work.
pub(super) fn changes(setup: &Setup<'_>) -> Result<(), &'static str> {
    with_guest(setup, |driver| {
        driver.inside(2)?;
        for round in 0..REMOVALS {
            driver.remove(round)?;
        }
        driver.elsewhere()?;
        driver.edges()?;
        driver.inside(3)?;
        driver.end()
    })
}

/// Detached, attached again, reset with the device.
pub(super) fn comings_and_goings(setup: &Setup<'_>) -> Result<(), &'static str> {
    with_guest(setup, |driver| {
        driver.inside(4)?;
        driver.detach()?;
        driver.inside(5)?;
        driver.reset()?;
        driver.inside(6)?;
        driver.end()
    })
}

/// Runs a VM with a device, which it still has at its end; then the host has it back.
fn with_guest(
    setup: &Setup<'_>,
    story: fn(&mut Driver<'_>) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    let device = setup.devices[0];
    let function = device.function().requester();
    let guest = Guest::create_with_devices(&setup.memory, ARGUMENTS)?;
    let vm = guest.vm;
    let mut driver = Driver {
        setup,
        guest,
        device,
        checks: 0,
    };
    words(vm::take_device(function))?;
    let result = driver.give().and_then(|()| story(&mut driver));
    end(vm)?;
    let stays = still_taken(setup);
    words(vm::give_device(function))?;
    result?;
    stays?;
    // Back at the host, it does what the host wants.
    super::own::reached(setup)
}

/// The VM is gone: the device reaches neither what was its memory nor other memory of the host's.
fn still_taken(setup: &Setup<'_>) -> Result<(), &'static str> {
    let was_its = |ipa: u64| setup.memory.ram.start() + (ipa - RAM);
    let pages = [
        setup.page(0)?.start(),
        was_its(FROM),
        was_its(TO),
        setup.memory.more_state.start(),
    ];
    let ranges = pages.map(|start| AddrRange::with_size(start, PAGE_SIZE));
    for range in ranges.into_iter().flatten() {
        mem::bytes_mut(range).fill(BLANK);
    }
    for place in [pages[0], FROM, TO, SPARE] {
        setup.transfers(Direction::ToMemory, [place].into_iter(), MAX_BYTES)?;
    }
    let blank = |range: AddrRange| mem::bytes(range).iter().all(|byte| *byte == BLANK);
    expect(
        ranges.into_iter().flatten().all(blank),
        "a device of a dead VM writes memory",
    )
}

impl Driver<'_> {
    fn vm(&self) -> Vm {
        self.guest.vm
    }

    /// What is behind the slot that comes and goes.
    fn spare(&self) -> AddrRange {
        self.setup.memory.more_state
    }

    /// Gives the VM the device and its memory, and begins.
    fn give(&mut self) -> Result<(), &'static str> {
        let registers = device_page(self.device.registers())?;
        words(self.vm().create_slot(REGISTER_SLOT, REGISTERS, registers))?;
        words(self.vm().lock_slot(RAM_SLOT.id))?;
        self.add_spare(SPARE)?;
        self.attach(true)?;
        self.begin()
    }

    fn attach(&self, snooped: bool) -> Result<(), &'static str> {
        let function = self.device.function().requester();
        words(self.vm().attach_device(function, snooped))
    }

    fn add_spare(&self, ipa: u64) -> Result<(), &'static str> {
        words(self.vm().create_slot(SPARE_SLOT, ipa, self.spare()))?;
        words(self.vm().lock_slot(SPARE_SLOT.id))
    }

    fn remove_spare(&self) -> Result<(), &'static str> {
        words(self.vm().unlock_slot(SPARE_SLOT.id))?;
        words(self.vm().delete_slot(SPARE_SLOT.id))
    }

    /// The guest has found its device tree and its device.
    fn begin(&mut self) -> Result<(), &'static str> {
        self.checks = 2;
        self.asks(0)
    }

    fn asks(&mut self, answer: u32) -> Result<(), &'static str> {
        match self.guest.go_on(answer)? {
            Event::Asks => Ok(()),
            Event::Off(_) => Err("the guest has ended"),
        }
    }

    fn order(&mut self, order: Order, ipa: u64, byte: u8) -> Result<(), &'static str> {
        self.checks += u32::from(matches!(order, Order::Idle | Order::Pattern));
        self.asks(ipa as u32 | u32::from(byte) << 4 | order as u32)
    }

    /// A transfer that the guest starts; it is over then.
    fn transfer(&mut self, order: Order, ipa: u64) -> Result<(), &'static str> {
        self.order(order, ipa, 0)?;
        self.setup.finish()?;
        self.order(Order::Idle, 0, 0)
    }

    fn end(&mut self) -> Result<(), &'static str> {
        match self.guest.go_on(0)? {
            Event::Off(checks) if checks == self.checks => Ok(()),
            Event::Off(_) => Err("the guest made another number of checks"),
            Event::Asks => Err("the guest does not end"),
        }
    }

    /// From a page of its memory to others, both slots.
    fn inside(&mut self, pattern: u8) -> Result<(), &'static str> {
        let before = faults(self.device)?.count;
        self.order(Order::Fill, FROM, pattern)?;
        self.transfer(Order::Read, FROM)?;
        for page in [TO, SPARE] {
            self.transfer(Order::Write, page)?;
            self.order(Order::Pattern, page, pattern)?;
        }
        let after = faults(self.device)?.count;
        expect(after == before, "the device was refused its guest's memory")
    }

    /// Where the guest has nothing: not even its own VM's physical addresses, or the host's.
    fn outside(&mut self) -> Result<(), &'static str> {
        let el2 = self.setup.machine.el2.ok_or("nobody says where EL2 is")?;
        let page = self.setup.filled(0, BLANK)?;
        for place in [HOLE, SPARE + self.spare().size(), el2.start(), page.start()] {
            if (RAM..RAM + self.setup.memory.ram.size()).contains(&place) {
                continue;
            }
            for order in [Order::Write, Order::Read] {
                let before = faults(self.device)?;
                self.transfer(order, place)?;
                self.refused(before, order, place)?;
            }
        }
        let kept = mem::bytes(page).iter().all(|byte| *byte == BLANK);
        expect(kept, "a guest's device wrote the host's memory")
    }

    fn refused(&self, before: Faults, order: Order, place: u64) -> Result<(), &'static str> {
        let found = faults(self.device)?;
        let vmid = u64::from(found.last.vmid);
        let good = found.count > before.count
            && (place..place + MAX_BYTES).contains(&found.address)
            && found.last.write == (order == Order::Write)
            && found.last.event == 0x10
            && vmid == self.vm().handle() - FIRST_HANDLE + 1;
        if !good {
            crate::console::line(format_args!("  {order:?} of {place:#x}: {found:x?}"));
        }
        expect(good, "EL2 has no record, or another one")
    }

    /// Lets the spare memory go while a transfer to it is due: what comes later is refused. Then it is
    /// put back.
    fn remove(&mut self, round: u64) -> Result<(), &'static str> {
        mem::bytes_mut(self.first_spare_page()?).fill(BLANK);
        let due = edu::due();
        self.order(Order::Write, SPARE, 0)?;
        // From a long time before to some time after.
        let early = ticks_per_second() / 20_000 * (REMOVALS - round) / 4;
        if round > 0 {
            gic::sleep_until(&self.setup.gic, due.saturating_sub(early))?;
        }
        let before = faults(self.device)?;
        self.remove_spare()?;
        let there = checksum(self.first_spare_page()?);
        self.setup.finish()?;
        let later = checksum(self.first_spare_page()?);
        self.order(Order::Idle, 0, 0)?;
        expect(there == later, "a device wrote memory that had gone")?;
        if round == 0 {
            self.refused(before, Order::Write, SPARE)?;
        }
        self.add_spare(SPARE)
    }

    fn first_spare_page(&self) -> Result<AddrRange, &'static str> {
        AddrRange::with_size(self.spare().start(), PAGE_SIZE).ok_or("wraps")
    }

    /// The spare memory is at another address for a while.
    fn elsewhere(&mut self) -> Result<(), &'static str> {
        self.remove_spare()?;
        self.add_spare(ELSEWHERE)?;
        mem::bytes_mut(self.first_spare_page()?).fill(BLANK);
        let before = faults(self.device)?;
        self.transfer(Order::Write, SPARE)?;
        self.refused(before, Order::Write, SPARE)?;
        let blank = mem::bytes(self.first_spare_page()?);
        let kept = blank.iter().all(|byte| *byte == BLANK);
        self.transfer(Order::Write, ELSEWHERE)?;
        self.order(Order::Pattern, ELSEWHERE, 2)?;
        self.remove_spare()?;
        self.add_spare(SPARE)?;
        expect(kept, "memory was written at its old address")
    }

    /// A device that does not snoop comes and goes while a transfer is due. Locked memory stays mapped.
    fn edges(&mut self) -> Result<(), &'static str> {
        for (round, register) in (0..).zip([true, false, true, false]) {
            self.order(Order::Fill, FROM, 7 + round)?;
            self.transfer(Order::Read, FROM)?;
            let before = faults(self.device)?.count;
            let due = edu::due();
            self.order(Order::Write, TO, 0)?;
            gic::sleep_until(&self.setup.gic, due)?;
            words(self.vm().noncoherent_device(register))?;
            self.setup.finish()?;
            self.order(Order::Idle, 0, 0)?;
            let after = faults(self.device)?.count;
            expect(after == before, "an edge let a transfer fail")?;
            self.order(Order::Pattern, TO, 7 + round)?;
        }
        Ok(())
    }

    /// The VM is reset while a transfer is due, which finds the locked memory all the same.
    fn reset(&mut self) -> Result<(), &'static str> {
        let before = faults(self.device)?.count;
        self.order(Order::Fill, TO, 1)?;
        let due = edu::due();
        self.order(Order::Write, TO, 0)?;
        gic::sleep_until(&self.setup.gic, due)?;
        self.guest.restart(&self.setup.memory, ARGUMENTS)?;
        self.setup.finish()?;
        self.begin()?;
        self.order(Order::Pattern, TO, 5)?;
        let after = faults(self.device)?.count;
        expect(after == before, "a reset let a transfer fail")
    }

    /// Without its VM's tables the device reaches nothing, with them all again, also as one that does
    /// not snoop.
    fn detach(&mut self) -> Result<(), &'static str> {
        let function = self.device.function().requester();
        self.order(Order::Fill, TO, 9)?;
        words(self.vm().detach_device(function))?;
        self.transfer(Order::Write, TO)?;
        self.order(Order::Pattern, TO, 9)?;
        self.attach(false)
    }
}

/// Handle of the first VM, whose VMID is 1.
const FIRST_HANDLE: u64 = 0x1000;

fn checksum(page: AddrRange) -> u64 {
    let (words, _) = mem::bytes(page).as_chunks::<8>();
    words.iter().fold(0, |sum: u64, word| {
        sum.rotate_left(1) ^ u64::from_ne_bytes(*word)
    })
}
