//! What a core does: its vCPUs in turn, each for a slice of time.

use core::sync::atomic::Ordering;

use abi::{ErrorCode, Exit, KICK_SGI};

use super::devices::Devices;
use super::guest::{Guest, State, VcpuSlot, reason};
use super::{Vmm, console, random};
use crate::arch::{gic, ticks_per_second};
use crate::console::line;
use vmm::virtio::Host;
use vmm::virtio::transport::Progress;

/// Slices per second.
const SLICES: u64 = 100;

/// Runs this core's vCPUs until all guests are gone.
pub(super) fn run(vmm: &Vmm, core: usize) {
    if let Err(why) = gic::enable(&vmm.gic) {
        line(format_args!("host: core {core}: {why}"));
        return;
    }
    let slice = ticks_per_second() / SLICES;
    let keyboard = core == keeper(vmm);
    loop {
        if keyboard {
            console::poll(vmm);
        }
        let kicked = take_interrupts(vmm);
        let mut next = u64::MAX;
        for guest in &vmm.guests {
            next = next.min(turn(vmm, guest, core, kicked, slice));
        }
        if vmm.guests.iter().all(Guest::is_gone) {
            return;
        }
        if next > gic::now() {
            // Whoever looks after the keyboard looks again soon, others when they are woken.
            let limit = if keyboard {
                gic::now() + slice
            } else {
                gic::now() + ticks_per_second()
            };
            gic::set_timer(next.min(limit));
            gic::wait();
        }
    }
}

/// The core that looks after the keyboard: that of the first guest.
fn keeper(vmm: &Vmm) -> usize {
    vmm.guests
        .first()
        .and_then(|guest| guest.vcpus.first())
        .map_or(0, |vcpu| vcpu.core)
}

/// Takes what is pending; says whether EL2 or another core wants the vCPUs looked at.
fn take_interrupts(vmm: &Vmm) -> bool {
    let mut kicked = false;
    while let Some(id) = gic::take(&vmm.gic) {
        kicked |= id == KICK_SGI || id == gic::WAKE_SGI;
        if id >= gic::FIRST_SHARED {
            device_interrupt(vmm, id);
        }
    }
    kicked
}

/// A device's interrupt, which is masked now. It stays so until the VM has ended its own, and for
/// ever if no VM has the device.
fn device_interrupt(vmm: &Vmm, intid: u32) {
    let waiting = vmm.guests.iter().filter_map(|guest| guest.raise(intid));
    if waiting.reduce(|a, b| a | b) == Some(false) {
        gic::unmask(&vmm.gic, intid);
    }
}

/// A VM has ended an interrupt of a device of its own.
fn interrupt_ended(vmm: &Vmm, guest: &Guest, own: u32) {
    if let Some(intid) = guest.interrupt_ended(own)
        && !vmm.guests.iter().any(|guest| guest.waits_for(intid))
    {
        gic::unmask(&vmm.gic, intid);
    }
}

/// Gives each vCPU of a guest on this core its turn; tells when the next one is due.
fn turn(vmm: &Vmm, guest: &Guest, core: usize, kicked: bool, slice: u64) -> u64 {
    if let Some(what) = guest.attend(&vmm.memory, core) {
        line(format_args!("host: VM {}: {what}", guest.number));
        wake_all(vmm, core);
    }
    let mut next = u64::MAX;
    if guest.uses_core(core) && guest.backlog.load(Ordering::Acquire) {
        // Another core that holds the lock does it.
        if let Some(mut devices) = guest.devices.try_lock() {
            work(vmm, guest, &mut devices);
        }
        next = 0;
    }
    for vcpu in guest.vcpus.iter().filter(|vcpu| vcpu.core == core) {
        if guest.state() != State::Running {
            return u64::MAX;
        }
        let woken = vcpu.woken.swap(false, Ordering::AcqRel) || kicked;
        if woken || vcpu.until.load(Ordering::Relaxed) <= gic::now() {
            gic::set_timer(gic::now() + slice);
            guest.inside.fetch_add(1, Ordering::AcqRel);
            // The state again: who changes it waits for nobody to be inside.
            let until = if guest.state() == State::Running {
                step(vmm, guest, vcpu)
            } else {
                0
            };
            guest.inside.fetch_sub(1, Ordering::AcqRel);
            vcpu.until.store(until, Ordering::Relaxed);
        }
        next = next.min(vcpu.until.load(Ordering::Relaxed));
    }
    next
}

/// Runs a vCPU until it has to wait or its slice is over; gives the time before which it need not
/// run again.
fn step(vmm: &Vmm, guest: &Guest, vcpu: &VcpuSlot) -> u64 {
    loop {
        let exit = guest
            .vm()
            .run(vcpu.index, vcpu.loaded.load(Ordering::Relaxed), vcpu.alone);
        let exit = match exit {
            Ok(exit) => exit,
            Err(refused) if matches!(refused.code, ErrorCode::Again | ErrorCode::Busy) => return 0,
            Err(refused) => return fail(guest, vcpu, reason(refused)),
        };
        match exit {
            Exit::Interrupted => return 0,
            Exit::WaitForInterrupt { until } => return until,
            Exit::VcpuOff => return u64::MAX,
            Exit::MmioRead { ipa, size } => {
                vcpu.loaded.store(read(guest, ipa, size), Ordering::Relaxed);
            }
            Exit::MmioWrite { ipa, size, value } => write(vmm, guest, ipa, size, value),
            Exit::IrqDone { intid } => interrupt_ended(vmm, guest, intid),
            Exit::NeedPages { pages } => {
                if let Err(refused) = guest.top_up(&mut vmm.memory.lock(), pages) {
                    if refused.code == ErrorCode::Busy {
                        return 0;
                    }
                    return fail(guest, vcpu, reason(refused));
                }
            }
            Exit::NeedHeap { pages } => {
                let memory = vmm.memory.lock().pages(pages.clamp(16, 512));
                let given = memory.map(crate::vm::donate_heap);
                if !matches!(given, Some(Ok(()))) {
                    return fail(guest, vcpu, "EL2's heap is used up, and so is our memory");
                }
            }
            Exit::VcpuOn { index } => wake(vmm, guest, index),
            Exit::SystemOff => {
                guest.change(State::Running, State::PoweredOff);
                return 0;
            }
            Exit::SystemReset { .. } => {
                guest.change(State::Running, State::Resetting);
                return 0;
            }
            Exit::MemoryMissing { ipa } => {
                line(format_args!(
                    "host: VM {}: nothing at {ipa:#x}",
                    guest.number
                ));
                return fail(guest, vcpu, "it touched memory that is not there");
            }
            Exit::Broken { esr } => {
                line(format_args!("host: VM {}: ESR {esr:#x}", guest.number));
                return fail(guest, vcpu, "EL2 can't go on with it");
            }
            _ => return fail(guest, vcpu, "EL2 gave an exit that this host does not know"),
        }
    }
}

/// A guest's read of a device. An address without one reads as all ones.
fn read(guest: &Guest, ipa: u64, size: u8) -> u64 {
    guest.read_config(ipa, size).unwrap_or_else(|| {
        let value = guest.devices.lock().read(guest.vm(), ipa, size);
        value.unwrap_or(u64::MAX)
    })
}

/// A guest's write to a device, and what it starts.
fn write(vmm: &Vmm, guest: &Guest, ipa: u64, size: u8, value: u64) {
    if guest.write_config(&vmm.memory, ipa, size, value) {
        return;
    }
    let mut devices = guest.devices.lock();
    let sent = devices.write(guest.vm(), ipa, size, value);
    if let Ok(Some(byte)) = sent {
        vmm.console.lock().output(guest.number, byte);
    } else if devices.has_work() {
        work(vmm, guest, &mut devices);
    }
}

/// Lets a guest's virtio devices work, for less than a slice of time; the rest is its backlog.
pub(super) fn work(vmm: &Vmm, guest: &Guest, devices: &mut Devices) {
    let deadline = gic::now() + ticks_per_second() / SLICES / 2;
    let mut services = Services { vmm, guest };
    let machine = guest.machine();
    let mut progress = Progress::More;
    while progress == Progress::More && gic::now() < deadline {
        progress = devices.work(&machine, &mut services);
    }
    let more = progress == Progress::More;
    guest.backlog.store(more, Ordering::Release);
}

/// What a guest's devices need.
struct Services<'a> {
    vmm: &'a Vmm,
    guest: &'a Guest,
}

impl Host for Services<'_> {
    fn print(&mut self, bytes: &[u8]) {
        let mut console = self.vmm.console.lock();
        for byte in bytes {
            console.output(self.guest.number, *byte);
        }
    }

    fn random(&mut self, bytes: &mut [u8]) {
        random::fill(bytes);
    }
}

/// Stops a guest that can't go on.
fn fail(guest: &Guest, vcpu: &VcpuSlot, why: &str) -> u64 {
    line(format_args!(
        "host: VM {} vCPU {}: {why}",
        guest.number, vcpu.index
    ));
    guest.stop();
    0
}

/// Makes the core of a vCPU look at it.
fn wake(vmm: &Vmm, guest: &Guest, index: u8) {
    let Some(vcpu) = guest.vcpus.get(usize::from(index)) else {
        return;
    };
    vcpu.woken.store(true, Ordering::Release);
    if let Some(mpidr) = vmm.cores.get(vcpu.core) {
        gic::wake(&vmm.gic, vcpu.core, *mpidr);
    }
}

/// Makes every other core look at its vCPUs.
fn wake_all(vmm: &Vmm, me: usize) {
    for (core, mpidr) in vmm.cores.iter().enumerate() {
        if core != me && vmm.guests.iter().any(|guest| guest.uses_core(core)) {
            gic::wake(&vmm.gic, core, *mpidr);
        }
    }
}
