//! The devices of one VM.

use alloc::boxed::Box;

use board::AddrRange;
use vmm::pl011::Pl011;
use vmm::platform::{RAM, UART, UART_INTID, UART_SIZE, VIRTIO, VIRTIO_INTID, VIRTIO_STRIDE};
use vmm::virtio::block::{Block, Disk};
use vmm::virtio::console::{self, Console};
use vmm::virtio::entropy::Entropy;
use vmm::virtio::transport::{Progress, Registers, Transport};
use vmm::virtio::{BadAddress, GuestMemory, Host};

use super::random;
use crate::arch::mem;
use crate::vm::Vm;

/// Virtio devices: console, disk, entropy, in the order of their registers.
const SLOTS: usize = 3;

/// The devices, and what their interrupt lines were last.
#[derive(Debug)]
pub(crate) struct Devices {
    uart: Pl011,
    console: Transport<Console>,
    disk: Option<Transport<Block>>,
    entropy: Option<Transport<Entropy>>,
    /// The UART's line, then those of the virtio devices, as EL2 knows them.
    lines: [bool; 1 + SLOTS],
    /// Where the guest printed last: keys go there.
    typing: Typing,
}

#[derive(Clone, Copy, Debug)]
enum Typing {
    Uart,
    Virtio,
}

/// There is no device at this address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoDevice;

/// A VM for its devices: lines and memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) vm: Vm,
    pub(crate) ram: AddrRange,
}

impl Machine {
    /// Where the guest's memory is ours; all of it, or nothing.
    fn place(&self, ipa: u64, length: usize) -> Result<u64, BadAddress> {
        let offset = ipa.checked_sub(RAM).ok_or(BadAddress(ipa))?;
        let end = offset.checked_add(length as u64).ok_or(BadAddress(ipa))?;
        if end > self.ram.size() {
            return Err(BadAddress(ipa));
        }
        Ok(self.ram.start() + offset)
    }
}

impl GuestMemory for Machine {
    fn read(&self, ipa: u64, to: &mut [u8]) -> Result<(), BadAddress> {
        mem::read_shared(self.place(ipa, to.len())?, to).map_err(|_| BadAddress(ipa))
    }

    fn write(&self, ipa: u64, from: &[u8]) -> Result<(), BadAddress> {
        mem::write_shared(self.place(ipa, from.len())?, from).map_err(|_| BadAddress(ipa))
    }
}

impl Devices {
    /// All after reset.
    pub(crate) fn new(disk: Option<Box<dyn Disk>>) -> Self {
        Self {
            uart: Pl011::new(),
            console: Transport::new(Console::new()),
            disk: disk.map(|disk| Transport::new(Block::new(disk))),
            entropy: random::exists().then(|| Transport::new(Entropy)),
            lines: [false; 1 + SLOTS],
            typing: Typing::Uart,
        }
    }

    /// Which virtio devices there are, as a bitmap.
    pub(crate) const fn present(&self) -> u32 {
        1 | (self.disk.is_some() as u32) << 1 | (self.entropy.is_some() as u32) << 2
    }

    /// All after reset, with the disk as it is. EL2 has reset its lines.
    pub(crate) fn reset(&mut self) {
        self.uart = Pl011::new();
        for number in 0..SLOTS {
            if let Some(device) = self.slot(number) {
                device.reset();
            }
        }
        self.lines = [false; 1 + SLOTS];
        self.typing = Typing::Uart;
    }

    fn slot(&mut self, number: usize) -> Option<&mut dyn Registers> {
        match number {
            0 => Some(&mut self.console),
            1 => self.disk.as_mut().map(|disk| disk as &mut dyn Registers),
            2 => self
                .entropy
                .as_mut()
                .map(|entropy| entropy as &mut dyn Registers),
            _ => None,
        }
    }

    /// The virtio device at this address, and the offset in its registers.
    fn virtio(&mut self, ipa: u64) -> Result<(&mut dyn Registers, u64), NoDevice> {
        let offset = ipa.checked_sub(VIRTIO).ok_or(NoDevice)?;
        let number = usize::try_from(offset / VIRTIO_STRIDE).map_err(|_| NoDevice)?;
        let device = self.slot(number).ok_or(NoDevice)?;
        Ok((device, offset % VIRTIO_STRIDE))
    }

    /// A read by the guest.
    pub(crate) fn read(&mut self, vm: Vm, ipa: u64, size: u8) -> Result<u64, NoDevice> {
        let Ok(offset) = uart_offset(ipa) else {
            let (device, offset) = self.virtio(ipa)?;
            return Ok(device.read(offset, size));
        };
        let value = self.uart.read(offset);
        self.update_uart(vm);
        Ok(value.into())
    }

    /// A write; gives the byte that the UART sends. [`Devices::work`] does what it starts.
    pub(crate) fn write(
        &mut self,
        vm: Vm,
        ipa: u64,
        size: u8,
        value: u64,
    ) -> Result<Option<u8>, NoDevice> {
        let Ok(offset) = uart_offset(ipa) else {
            let (device, offset) = self.virtio(ipa)?;
            device.write(offset, size, value);
            self.update_virtio(vm);
            return Ok(None);
        };
        let sent = self.uart.write(offset, value as u32);
        if sent.is_some() {
            self.typing = Typing::Uart;
        }
        self.update_uart(vm);
        Ok(sent)
    }

    /// A key for the guest; [`Devices::work`] hands it over.
    pub(crate) fn type_key(&mut self, vm: Vm, byte: u8) {
        match self.typing {
            Typing::Uart => self.uart.receive(byte),
            Typing::Virtio => self.console.feed(console::RECEIVE).press(byte),
        }
        self.update_uart(vm);
    }

    /// Whether [`Devices::work`] would do something.
    pub(crate) fn has_work(&mut self) -> bool {
        (0..SLOTS).any(|n| self.slot(n).is_some_and(|device| device.has_work()))
    }

    /// Does what the virtio devices were asked, but not for long.
    pub(crate) fn work(&mut self, machine: &Machine, host: &mut dyn Host) -> Progress {
        let mut progress = Progress::Done;
        let mut host = Tap {
            host,
            printed: false,
        };
        for number in 0..SLOTS {
            if let Some(device) = self.slot(number)
                && device.work(machine, &mut host) == Progress::More
            {
                progress = Progress::More;
            }
        }
        if host.printed {
            self.typing = Typing::Virtio;
        }
        self.update_virtio(machine.vm);
        progress
    }

    /// Tells EL2 the lines of the virtio devices that have changed.
    fn update_virtio(&mut self, vm: Vm) {
        for number in 0..SLOTS {
            let level = self.slot(number).is_some_and(|device| device.line());
            self.set_line(vm, 1 + number, VIRTIO_INTID + number as u32, level);
        }
    }

    fn update_uart(&mut self, vm: Vm) {
        self.set_line(vm, 0, UART_INTID, self.uart.line());
    }

    fn set_line(&mut self, vm: Vm, number: usize, intid: u32, level: bool) {
        if let Some(known) = self.lines.get_mut(number)
            && *known != level
            && vm.set_line(intid, level).is_ok()
        {
            *known = level;
        }
    }
}

/// Passes on what the console prints, and remembers that it did.
struct Tap<'a> {
    host: &'a mut dyn Host,
    printed: bool,
}

impl Host for Tap<'_> {
    fn print(&mut self, bytes: &[u8]) {
        self.printed = true;
        self.host.print(bytes);
    }

    fn random(&mut self, bytes: &mut [u8]) {
        self.host.random(bytes);
    }
}

fn uart_offset(ipa: u64) -> Result<u64, NoDevice> {
    ipa.checked_sub(UART)
        .filter(|offset| *offset < UART_SIZE)
        .ok_or(NoDevice)
}
