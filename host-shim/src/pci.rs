//! The machine's PCI functions. The host is the only one who configures them: nobody has before.

use alloc::vec::Vec;

use board::{AddrRange, PciBridge, Tree};
use vmm::pci::{self, Bar, Function, Identity, MAX_BARS, Windows};

use crate::arch::pci::Ecam;
use crate::arch::{Mmio, mem, ticks, ticks_per_second};
use crate::console::line;
use crate::machine::Machine;

/// A function whose registers have their places.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device {
    /// What it is.
    pub(crate) identity: Identity,
    /// Its base address registers.
    pub(crate) bars: [Option<Bar>; MAX_BARS],
}

impl Device {
    /// Which function it is.
    pub(crate) const fn function(&self) -> Function {
        self.identity.function
    }
}

/// A host bridge and what is on its first bus.
#[derive(Debug)]
pub(crate) struct Pci {
    /// The functions' configuration spaces.
    pub(crate) space: Ecam,
    /// Every function that is no bridge. They are silent: no decoding, no DMA, no interrupt.
    pub(crate) devices: Vec<Device>,
    bridge: PciBridge,
    windows: Windows,
}

impl Pci {
    /// Finds the machine's bridge, silences the functions on its first bus and places their
    /// registers. `None` without a bridge. The heap must have memory.
    pub(crate) fn start(machine: &Machine) -> Option<Self> {
        let tree = Tree::new(mem::bytes(machine.tree_range)).ok()?;
        let bridge = tree.pci_bridge()?;
        let space = Ecam::new(&bridge);
        let mut windows = Windows::new(&bridge);
        // All are silenced before the first is placed: none may answer where another one will.
        let found: Vec<Identity> = pci::functions(&space, bridge.first_bus)
            .filter(|identity| identity.header == 0)
            .inspect(|identity| pci::quiesce(&space, identity.function))
            .collect();
        let mut devices = Vec::new();
        for identity in found {
            match pci::place(&space, identity.function, &mut windows) {
                Ok(bars) => devices.push(Device { identity, bars }),
                Err(why) => line(format_args!("host: {why}: it is left out")),
            }
        }
        Some(Self {
            space,
            devices,
            bridge,
            windows,
        })
    }

    /// The functions of this vendor and device ID.
    pub(crate) fn of(&self, vendor: u16, device: u16) -> impl Iterator<Item = &Device> {
        let wanted = move |found: &Identity| (found.vendor, found.device) == (vendor, device);
        self.devices
            .iter()
            .filter(move |device| wanted(&device.identity))
    }

    /// Where a device's register `index` is, by whole pages.
    pub(crate) fn registers(&self, device: &Device, index: usize) -> Option<AddrRange> {
        self.windows.cpu(device.bars.get(index)?.as_ref()?)
    }

    /// Lets a function answer in memory, and do DMA.
    pub(crate) fn enable(&self, function: Function) {
        pci::set_command(
            &self.space,
            function,
            pci::MEMORY_SPACE | pci::BUS_MASTER | pci::INTERRUPT_DISABLE,
        );
    }

    /// INTID of the interrupt that a function asserts by its pin, if it has one.
    pub(crate) fn interrupt(&self, function: Function) -> Option<u32> {
        let pin = pci::interrupt_pin(&self.space, function)?;
        self.bridge.interrupt(function.device(), pin)
    }

    /// Silences a function and resets it, if it can be reset alone; its registers keep their places.
    /// Says whether it was reset: one that can't be may still have what its last driver told it.
    pub(crate) fn reset(&self, device: &Device) -> bool {
        let function = device.function();
        pci::quiesce(&self.space, function);
        let done = pci::reset_function(&self.space, function, || {
            let _ = within_100_ms(|| false);
        });
        if done {
            pci::restore(&self.space, function, &device.bars);
        }
        done || self.reset_virtio(device)
    }

    /// Resets a virtio device by its status.
    fn reset_virtio(&self, device: &Device) -> bool {
        let function = device.function();
        let status = pci::virtio_status(&self.space, function);
        let Some((bar, offset)) = status else {
            return false;
        };
        let registers = self.registers(device, bar.into());
        let offset = u64::from(offset);
        let Some(registers) = registers.filter(|range| offset < range.size()) else {
            return false;
        };
        pci::set_command(
            &self.space,
            function,
            pci::MEMORY_SPACE | pci::INTERRUPT_DISABLE,
        );
        let status = Mmio::new(registers.start() + offset);
        status.write_byte(0, 0);
        let done = within_100_ms(|| status.read_byte(0) == 0);
        pci::quiesce(&self.space, function);
        done
    }
}

/// Waits until something is so, at most 100 ms; says whether it is.
fn within_100_ms(is_so: impl Fn() -> bool) -> bool {
    let deadline = ticks() + ticks_per_second() / 10;
    while !is_so() {
        if ticks() >= deadline {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}
