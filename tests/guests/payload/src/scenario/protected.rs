//! What a Linux with `ARM_PKVM_GUEST` does in a protected VM: finds the vendor calls, guards its devices, and talks
//! to a virtio device over the pages that it shares, and over no others.

use crate::arch::cpu::{self, hvc};
use crate::arch::exceptions::catch;
use crate::arch::mem;
use crate::machine::{Arguments, Report};

/// KVM's vendor calls (Linux, `Documentation/virt/kvm/arm/hypercalls.rst`).
const VENDOR_UID: u64 = 0x8600_ff01;
const FEATURES: u64 = 0x8600_0000;
const HYP_MEMINFO: u64 = 0xc600_0002;
const MEM_SHARE: u64 = 0xc600_0003;
const MEM_UNSHARE: u64 = 0xc600_0004;
const GUARD_INFO: u64 = 0xc600_0005;
const GUARD_ENROLL: u64 = 0xc600_0006;
const GUARD_MAP: u64 = 0xc600_0007;
const MEM_RELINQUISH: u64 = 0xc600_0009;
const MEASUREMENT: u64 = 0xc600_0181;
/// INVALID_PARAMETER (DEN 0028 7.1).
const INVALID: u64 = u64::MAX - 2;

const PAGE: u64 = 4096;
const UART: u64 = 0x0900_0000;
/// The console device is the first one; all virtio devices are in one page.
const VIRTIO: u64 = 0x0a00_0000;
/// Registers of the MMIO transport (VIRTIO 1.2, 4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC: u64 = 0x080;
    pub(super) const QUEUE_DRIVER: u64 = 0x090;
    pub(super) const QUEUE_DEVICE: u64 = 0x0a0;
}
/// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, DEVICE_NEEDS_RESET (2.1).
const ACKNOWLEDGED: u64 = 3;
const FEATURES_OK: u64 = 8;
const DRIVER_OK: u64 = 4;
const NEEDS_RESET: u64 = 64;
/// The console's queue of output (5.3.2).
const TRANSMIT: u64 = 1;
const QUEUE_SIZE: u64 = 4;
/// Microseconds until a device must have answered.
const PATIENCE: u64 = 5_000_000;
const MESSAGE: &[u8] = b"hello through a shared page\n";

/// Calls, guard, sharing.
pub fn run(_: &Arguments, report: &mut Report) {
    calls(report);
    let pages = mem::free_memory().next_multiple_of(PAGE);
    guard(report);
    report.check("device reads what is shared", talk(pages, true));
    report.check(
        "device does not read what is not",
        !talk(pages + 4 * PAGE, false),
    );
    sharing(pages + 8 * PAGE, report);
}

fn calls(report: &mut Report) {
    let uid = hvc([VENDOR_UID, 0, 0, 0]);
    let kvm = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];
    report.expect("KVM's calls are there", uid, kvm);
    let [features, ..] = hvc([FEATURES, 0, 0, 0]);
    report.expect("those of a protected guest", features & 0xffc, 0xffc);
    report.expect("pages are 4 KiB", hvc([HYP_MEMINFO, 0, 0, 0])[0], PAGE);
    report.expect("guard's, too", hvc([GUARD_INFO, 0, 0, 0])[0], PAGE);
    let [first, a, b, _] = hvc([MEASUREMENT, 0, 0, 0]);
    let [second, c, d, _] = hvc([MEASUREMENT, 1, 0, 0]);
    let measured = [first, second] == [0, 0] && [a, b, c, d] != [0; 4];
    report.check("measurement is told", measured);
}

fn guard(report: &mut Report) {
    let mapped = [UART, VIRTIO].map(|page| hvc([GUARD_MAP, page, 0, 0])[0]);
    report.expect("devices are named", mapped, [0, 0]);
    report.expect("guard is up", hvc([GUARD_ENROLL, 0, 0, 0])[0], 0);
    report.check(
        "device that is named answers",
        mem::read32(VIRTIO) == 0x7472_6976,
    );
    let other = catch(|| {
        mem::read32(VIRTIO + PAGE);
    });
    report.check(
        "another is an abort",
        other.is_some_and(|caught| caught.is_external()),
    );
}

/// Prints a line by the virtio console, all of its memory from `at` on shared or none; says whether it was taken.
fn talk(at: u64, share: bool) -> bool {
    let (descriptors, driver, device, buffer) = (at, at + PAGE, at + 2 * PAGE, at + 3 * PAGE);
    if share && hvc([MEM_SHARE, at, 4, 0])[..2] != [0, 4] {
        return false;
    }
    for (place, byte) in (buffer..).zip(MESSAGE) {
        mem::write8(place, u64::from(*byte));
    }
    // One descriptor: address, length, no flags; made available as the first.
    mem::write64(descriptors, buffer);
    mem::write64(descriptors + 8, MESSAGE.len() as u64);
    mem::write64(driver, 0);
    mem::write64(device, 0);
    start(descriptors, driver, device);
    mem::write16(driver + 2, 1);
    mem::synchronise();
    mem::write32(VIRTIO + register::QUEUE_NOTIFY, TRANSMIT);
    let answered = || {
        let used = mem::read16(device + 2) == 1;
        used || mem::read32(VIRTIO + register::STATUS) & NEEDS_RESET != 0
    };
    cpu::wait(PATIENCE, answered);
    let taken = mem::read16(device + 2) == 1;
    mem::write32(VIRTIO + register::STATUS, 0);
    if share && hvc([MEM_UNSHARE, at, 4, 0])[..2] != [0, 4] {
        return false;
    }
    taken
}

/// Brings the console device up with one queue.
fn start(descriptors: u64, driver: u64, device: u64) {
    let set = |register: u64, value: u64| mem::write32(VIRTIO + register, value);
    let set_address = |register: u64, address: u64| {
        set(register, address & 0xffff_ffff);
        set(register + 4, address >> 32);
    };
    if mem::read32(VIRTIO + register::MAGIC) != 0x7472_6976
        || mem::read32(VIRTIO + register::DEVICE_ID) != 3
    {
        return;
    }
    set(register::STATUS, 0);
    set(register::STATUS, ACKNOWLEDGED);
    // VERSION_1, bit 32.
    set(register::DRIVER_FEATURES_SEL, 1);
    set(register::DRIVER_FEATURES, 1);
    set(register::DRIVER_FEATURES_SEL, 0);
    set(register::DRIVER_FEATURES, 0);
    set(register::STATUS, ACKNOWLEDGED | FEATURES_OK);
    set(register::QUEUE_SEL, TRANSMIT);
    set(register::QUEUE_SIZE, QUEUE_SIZE);
    set_address(register::QUEUE_DESC, descriptors);
    set_address(register::QUEUE_DRIVER, driver);
    set_address(register::QUEUE_DEVICE, device);
    set(register::QUEUE_READY, 1);
    set(register::STATUS, ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
}

fn sharing(at: u64, report: &mut Report) {
    let call = |id: u64, address: u64| hvc([id, address, 0, 0])[0];
    report.expect("page is shared", call(MEM_SHARE, at), 0);
    report.expect("once only", call(MEM_SHARE, at), INVALID);
    report.expect(
        "not given away meanwhile",
        call(MEM_RELINQUISH, at),
        INVALID,
    );
    report.expect("and taken back", call(MEM_UNSHARE, at), 0);
    mem::write64(at, 0x1234);
    report.expect("memory is kept", mem::read64(at), 0x1234);
    report.expect(
        "another page is given away",
        call(MEM_RELINQUISH, at + PAGE),
        0,
    );
    report.expect(
        "what is no memory is not shared",
        call(MEM_SHARE, UART),
        INVALID,
    );
}
