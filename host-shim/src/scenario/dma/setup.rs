//! The devices, and the memory with which they are tried.

use abi::{DmaFault, Features};
use alloc::vec::Vec;
use board::{AddrRange, Gic, PAGE_SIZE};

use crate::arch::{gic, mem, ticks, ticks_per_second};
use crate::console::line;
use crate::edu::{self, DELAY, Direction, Edu};
use crate::machine::Machine;
use crate::pci::Pci;
use crate::scenario::guests;
use crate::scenario::kit::words;
use crate::scenario::payload;
use crate::vm;

/// Milliseconds that transfers may take, on an emulator that has little time.
const PATIENCE: u64 = 20_000;

/// Looks after which EL2 has seen all records of a full queue.
const RECORDS_IN_PIECES: u32 = 32;

/// What the checks use.
pub(in crate::scenario) struct Setup<'a> {
    pub(super) machine: &'a Machine,
    pub(super) gic: Gic,
    /// 24 MiB of the host's; only `other`, where nothing else says so.
    pub(in crate::scenario) memory: payload::Memory,
    /// For a protected VM: in the part of the above that is not `other`.
    pub(super) guest: guests::Memory,
    /// At least one.
    pub(in crate::scenario) devices: Vec<Edu>,
    pci: Pci,
}

/// What is known of a device's refused accesses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Faults {
    pub(super) count: u64,
    pub(super) address: u64,
    pub(super) last: DmaFault,
}

impl<'a> Setup<'a> {
    /// The `edu` devices of the machine, turned on; `None` if it has none.
    pub(in crate::scenario) fn find(machine: &'a Machine) -> Option<Self> {
        let gic = machine.board.gic?;
        let memory = payload::Memory::find(machine)?;
        let guest = guests::Memory::find(machine)?;
        let pci = Pci::start(machine)?;
        let (vendor, device) = edu::ID;
        let open = |device| Edu::open(&pci, device);
        let devices: Vec<Edu> = pci.of(vendor, device).filter_map(open).collect();
        let first = devices.first()?.function();
        let interrupt = pci.interrupt(first).unwrap_or(0);
        line(format_args!(
            "  {} edu devices from {first} on, whose INTID is {interrupt}",
            devices.len()
        ));
        Some(Self {
            machine,
            gic,
            memory,
            guest,
            devices,
            pci,
        })
    }

    /// Silences the devices, for what comes next.
    pub(in crate::scenario) fn end(&self) {
        for device in &self.pci.devices {
            self.pci.reset(device);
        }
    }

    /// Page `number` of the host's own, at most 512.
    pub(super) fn page(&self, number: usize) -> Result<AddrRange, &'static str> {
        let start = self.memory.other.start() + number as u64 * PAGE_SIZE;
        let page = AddrRange::with_size(start, PAGE_SIZE);
        page.filter(|page| self.memory.other.contains_range(*page))
            .ok_or("no page is left")
    }

    /// The page, every byte of which is this.
    pub(super) fn filled(&self, number: usize, byte: u8) -> Result<AddrRange, &'static str> {
        let page = self.page(number)?;
        mem::bytes_mut(page).fill(byte);
        Ok(page)
    }

    /// Starts one transfer for each place, on a device each, and waits until they are over.
    pub(super) fn transfers(
        &self,
        direction: Direction,
        places: impl Iterator<Item = u64>,
        bytes: u64,
    ) -> Result<(), &'static str> {
        for (device, place) in self.devices.iter().zip(places) {
            device.start(direction, place, bytes);
        }
        self.finish()
    }

    /// Waits until no device has anything to do.
    pub(super) fn finish(&self) -> Result<(), &'static str> {
        let millisecond = ticks_per_second() / 1000;
        let mut next = ticks() + DELAY * millisecond;
        let deadline = next + PATIENCE * millisecond;
        while self.devices.iter().any(|device| device.is_busy()) {
            if ticks() > deadline {
                return Err("a transfer does not end");
            }
            gic::sleep_until(&self.gic, next)?;
            next = ticks() + millisecond;
        }
        self.settle()
    }

    /// Lets EL2 look at every record that the IOMMU has written: it takes a bounded number at a time.
    fn settle(&self) -> Result<(), &'static str> {
        if !self.machine.has(Features::DMA_ISOLATION) {
            return Ok(());
        }
        (0..RECORDS_IN_PIECES).try_for_each(|_| faults(self.devices[0]).map(drop))
    }
}

/// What EL2 has refused this device so far.
pub(super) fn faults(device: Edu) -> Result<Faults, &'static str> {
    let (count, address, last) = words(vm::device_faults(device.function().requester()))?;
    Ok(Faults {
        count,
        address,
        last,
    })
}
