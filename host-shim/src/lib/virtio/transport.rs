//! The MMIO transport, version 2 (VIRTIO 1.2, section 4.2).

use alloc::vec::Vec;
use core::fmt;

use super::queue::{QUEUE_SIZE, Queue, QueueError, Request};
use super::{BadAddress, GuestMemory, Host};

const MAGIC: u64 = 0x7472_6976;
const VERSION: u64 = 2;
/// "RAVE", as letters from the lowest byte.
const VENDOR: u64 = 0x4556_4152;
/// Feature: this is no legacy device; a driver must accept it (section 6).
const VERSION_1: u64 = 1 << 32;

/// Registers (4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC: u64 = 0x080;
    pub(super) const QUEUE_DRIVER: u64 = 0x090;
    pub(super) const QUEUE_DEVICE: u64 = 0x0a0;
    pub(super) const SHM: core::ops::RangeInclusive<u64> = 0x0b0..=0x0bc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Bits of the status (2.1).
mod status {
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
}

/// Reasons of the interrupt (4.2.2, InterruptStatus).
const USED_BUFFER: u32 = 1;
const CONFIGURATION: u32 = 2;

/// Whether a device has done what it was asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Progress {
    /// Until the driver or the host has something new.
    Done,
    /// It has done enough for one call.
    More,
}

/// What differs between kinds of devices.
pub trait Device: fmt::Debug + Send {
    /// Device ID (section 5).
    const ID: u32;
    /// Number of queues.
    const QUEUES: usize;

    /// Features that are offered, beyond VERSION_1.
    fn features(&self) -> u64 {
        0
    }

    /// Configuration space; its bytes behind the end read as zero.
    fn config(&self) -> [u8; 64] {
        [0; 64]
    }

    /// Serves a queue: a bounded piece of work.
    ///
    /// # Errors
    ///
    /// [`QueueError`]: the driver broke a rule.
    fn work(
        &mut self,
        number: usize,
        queue: &mut Queue,
        memory: &dyn GuestMemory,
        host: &mut dyn Host,
    ) -> Result<Progress, QueueError>;

    /// The driver has reset the device.
    fn reset(&mut self);
}

/// Serves one request, if there is one; `serve` gives the bytes that it wrote. The others wait their turn with the
/// guest's other devices.
pub(super) fn one(
    queue: &mut Queue,
    memory: &dyn GuestMemory,
    serve: impl FnOnce(Request<'_>) -> Result<u64, BadAddress>,
) -> Result<Progress, QueueError> {
    let Some(request) = queue.next(memory)? else {
        return Ok(Progress::Done);
    };
    let head = request.head;
    let written = serve(request)?;
    queue.complete(memory, head, written)?;
    if queue.next(memory)?.is_some() {
        return Ok(Progress::More);
    }
    Ok(Progress::Done)
}

/// A device behind its registers.
#[derive(Debug)]
pub struct Transport<D> {
    device: D,
    queues: Vec<Queue>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt: u32,
    /// Queues that have something to do, as a bitmap.
    notified: u32,
}

/// A device's registers, whatever its kind.
pub trait Registers: fmt::Debug + Send {
    /// A read of `size` bytes. Registers have 32 bits; only configuration has other widths.
    fn read(&self, offset: u64, size: u8) -> u64;

    /// A write of `size` bytes. What is notified is done by [`Registers::work`].
    fn write(&mut self, offset: u64, size: u8, value: u64);

    /// Level of its interrupt.
    fn line(&self) -> bool;

    /// Whether [`Registers::work`] would do something.
    fn has_work(&self) -> bool;

    /// Does what is to be done, but not for long.
    fn work(&mut self, memory: &dyn GuestMemory, host: &mut dyn Host) -> Progress;

    /// Everything as after reset, for the driver's reset and the machine's.
    fn reset(&mut self);
}

impl<D: Device> Registers for Transport<D> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            return self.read_config(at, size);
        }
        if size != 4 {
            return 0;
        }
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => D::ID.into(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => self.selected().map_or(0, |_| QUEUE_SIZE.into()),
            register::QUEUE_READY => self.selected().map_or(0, |queue| queue.ready.into()),
            register::INTERRUPT_STATUS => self.interrupt.into(),
            register::STATUS => self.status.into(),
            // No shared memory: length and base are all ones.
            offset if register::SHM.contains(&offset) => 0xffff_ffff,
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        // The configuration of our devices has nothing to write.
        if size != 4 {
            return;
        }
        let [a, b, c, d, ..] = value.to_le_bytes();
        let value = u32::from_le_bytes([a, b, c, d]);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.accept(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY if (value as usize) < D::QUEUES => self.notified |= 1 << value,
            register::INTERRUPT_ACK => self.interrupt &= !value,
            register::STATUS => self.set_status(value),
            _ => self.set_up_queue(offset, value),
        }
    }

    fn line(&self) -> bool {
        self.interrupt != 0
    }

    fn has_work(&self) -> bool {
        self.notified != 0 && self.is_running()
    }

    fn work(&mut self, memory: &dyn GuestMemory, host: &mut dyn Host) -> Progress {
        if !self.is_running() {
            return Progress::Done;
        }
        match self.serve(memory, host) {
            Ok(()) if self.notified == 0 => Progress::Done,
            Ok(()) => Progress::More,
            Err(_) => {
                // 2.1.2: say so, and do nothing more until the reset.
                self.status |= status::NEEDS_RESET;
                self.interrupt |= CONFIGURATION;
                Progress::Done
            }
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(Queue::reset);
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.interrupt = 0;
        self.notified = 0;
    }
}

impl<D: Device> Transport<D> {
    /// The device after reset.
    pub fn new(device: D) -> Self {
        Self {
            device,
            queues: (0..D::QUEUES).map(|_| Queue::new()).collect(),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            interrupt: 0,
            notified: 0,
        }
    }

    const fn is_running(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// The device, for what its host gives it; `queue` then has something to do.
    pub fn feed(&mut self, queue: usize) -> &mut D {
        self.notified |= 1 << queue;
        &mut self.device
    }

    fn read_config(&self, at: u64, size: u8) -> u64 {
        let config = self.device.config();
        let byte = |n: u64| usize::try_from(n).ok().and_then(|n| config.get(n));
        (0..u64::from(size.min(8)))
            .map(|n| u64::from(byte(at.saturating_add(n)).copied().unwrap_or(0)) << (8 * n))
            .sum()
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn accept(&mut self, value: u32) {
        if self.status & status::FEATURES_OK == 0 && self.driver_features_sel < 2 {
            let shift = 32 * self.driver_features_sel;
            self.driver_features &= !(0xffff_ffff << shift);
            self.driver_features |= u64::from(value) << shift;
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = value & 0xff | self.status & status::NEEDS_RESET;
        // FEATURES_OK stays clear if the driver's choice can't be served (3.1.1 step 6).
        let known = self.driver_features & !self.offered() == 0;
        if !known || self.driver_features & VERSION_1 == 0 {
            new &= !(status::FEATURES_OK | status::DRIVER_OK);
        }
        self.status = new;
    }

    /// Registers of the selected queue, which can't change while it is enabled.
    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let selected = usize::try_from(self.queue_sel).ok();
        let Some(queue) = selected.and_then(|n| self.queues.get_mut(n)) else {
            return;
        };
        if offset == register::QUEUE_READY {
            if value & 1 == 0 {
                queue.reset();
            } else {
                queue.enable();
            }
            return;
        }
        if queue.ready {
            return;
        }
        match offset {
            // A size beyond 16 bits is none.
            register::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            _ => {
                let (base, address) = match offset & !4 {
                    register::QUEUE_DESC => (register::QUEUE_DESC, &mut queue.descriptors),
                    register::QUEUE_DRIVER => (register::QUEUE_DRIVER, &mut queue.available),
                    register::QUEUE_DEVICE => (register::QUEUE_DEVICE, &mut queue.used),
                    _ => return,
                };
                let shift = if offset == base { 0 } else { 32 };
                *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
        }
    }

    fn serve(&mut self, memory: &dyn GuestMemory, host: &mut dyn Host) -> Result<(), QueueError> {
        for (number, queue) in self.queues.iter_mut().enumerate() {
            if self.notified & 1 << number == 0 {
                continue;
            }
            let progress = if queue.ready {
                self.device.work(number, queue, memory, host)?
            } else {
                Progress::Done
            };
            if progress == Progress::Done {
                self.notified &= !(1 << number);
            }
            if queue.ready && queue.take_signal(memory)? {
                self.interrupt |= USED_BUFFER;
            }
        }
        Ok(())
    }
}

/// 32 of 64 bits.
fn half(value: u64, which: u32) -> u64 {
    match which {
        0 => value & 0xffff_ffff,
        1 => value >> 32,
        _ => 0,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::entropy::Entropy;
    use super::super::testing::{Driver, TestHost};
    use super::*;
    use proptest::prelude::*;

    /// Does what a driver does to a device with one queue that matters.
    pub(in super::super) fn start<D: Device>(
        transport: &mut Transport<D>,
        driver: &Driver,
        queue: u64,
    ) {
        transport.write(0x70, 4, 3);
        transport.write(0x24, 4, 1);
        transport.write(0x20, 4, 1);
        transport.write(0x70, 4, 0xb);
        assert_eq!(transport.read(0x70, 4), 0xb, "FEATURES_OK");
        transport.write(0x30, 4, queue);
        assert_eq!(transport.read(0x34, 4), 128);
        transport.write(0x38, 4, 16);
        for (at, address) in [0x80, 0x90, 0xa0].into_iter().zip(driver.rings()) {
            transport.write(at, 4, address);
            transport.write(at + 4, 4, 0);
        }
        transport.write(0x44, 4, 1);
        assert_eq!(transport.read(0x44, 4), 1, "QueueReady");
        transport.write(0x70, 4, 0xf);
    }

    #[test]
    fn identifies_as_a_modern_device() {
        let transport = Transport::new(Entropy);
        let read = |at| transport.read(at, 4);
        assert_eq!([read(0), read(4), read(8)], [0x7472_6976, 2, 4]);
        assert_eq!(read(0x10), 0);
        assert_eq!(read(0xb0), 0xffff_ffff, "no shared memory");
    }

    #[test]
    fn features_are_in_two_halves_and_must_hold_version_1() {
        let mut transport = Transport::new(Entropy);
        transport.write(0x14, 4, 1);
        assert_eq!(transport.read(0x10, 4), 1);
        transport.write(0x70, 4, 0xb);
        assert_eq!(transport.read(0x70, 4), 3, "nothing was accepted");
        transport.write(0x24, 4, 1);
        transport.write(0x20, 4, 3);
        transport.write(0x70, 4, 0xb);
        assert_eq!(transport.read(0x70, 4), 3, "more than was offered");
        transport.write(0x20, 4, 1);
        transport.write(0x70, 4, 0xb);
        assert_eq!(transport.read(0x70, 4), 0xb);
    }

    #[test]
    fn a_request_raises_the_interrupt_until_it_is_acknowledged() {
        let (mut transport, mut driver) = (Transport::new(Entropy), Driver::new());
        start(&mut transport, &driver, 0);
        driver.offer(&[(0x3000, 8, true)]);
        transport.write(0x50, 4, 0);
        assert!(transport.has_work() && !transport.line());
        let host = &mut TestHost::default();
        assert_eq!(transport.work(&driver.memory, host), Progress::Done);
        assert!(transport.line());
        assert_eq!(transport.read(0x60, 4), 1);
        assert_eq!(driver.used(), [(0, 8)]);
        transport.write(0x64, 4, 1);
        assert!(!transport.line());
    }

    #[test]
    fn nothing_is_done_before_the_driver_is_ready() {
        let (mut transport, mut driver) = (Transport::new(Entropy), Driver::new());
        driver.offer(&[(0x3000, 8, true)]);
        transport.write(0x50, 4, 0);
        transport.work(&driver.memory, &mut TestHost::default());
        assert!(!transport.has_work() && driver.used().is_empty());
    }

    #[test]
    fn a_broken_queue_needs_a_reset() {
        let (mut transport, mut driver) = (Transport::new(Entropy), Driver::new());
        start(&mut transport, &driver, 0);
        driver.memory.put(driver.available() + 2, &[99, 0]);
        transport.write(0x50, 4, 0);
        let host = &mut TestHost::default();
        transport.work(&driver.memory, host);
        assert_eq!(transport.read(0x70, 4), 0x4f);
        assert_eq!(transport.read(0x60, 4), 2);
        transport.write(0x70, 4, 0xf);
        assert_eq!(transport.read(0x70, 4), 0x4f, "only a reset clears it");
        transport.write(0x70, 4, 0);
        assert_eq!((transport.read(0x70, 4), transport.line()), (0, false));
        driver = Driver::new();
        start(&mut transport, &driver, 0);
        driver.offer(&[(0x3000, 1, true)]);
        transport.write(0x50, 4, 0);
        transport.work(&driver.memory, host);
        assert_eq!(driver.used().len(), 1);
    }

    #[test]
    fn an_enabled_queue_stays_where_it_is() {
        let (mut transport, mut driver) = (Transport::new(Entropy), Driver::new());
        start(&mut transport, &driver, 0);
        transport.write(0x80, 4, 0x9000);
        transport.write(0x38, 4, 4);
        driver.offer(&[(0x3000, 1, true)]);
        transport.write(0x50, 4, 0);
        transport.work(&driver.memory, &mut TestHost::default());
        assert_eq!(driver.used().len(), 1);
    }

    proptest! {
        #[test]
        fn any_accesses_are_answered(
            accesses in prop::collection::vec((0u64..0x200, prop::sample::select(&[1u8, 2, 4, 8][..]), any::<u64>()), 0..200),
            ring in prop::collection::vec(any::<u8>(), 0x800),
        ) {
            let (mut transport, driver) = (Transport::new(Entropy), Driver::new());
            start(&mut transport, &driver, 0);
            driver.memory.put(0x1000, &ring);
            driver.memory.put(0x2000, &ring);
            let host = &mut TestHost::default();
            for (offset, size, value) in accesses {
                transport.write(offset, size, value);
                transport.read(offset, size);
                transport.work(&driver.memory, host);
            }
        }
    }
}
