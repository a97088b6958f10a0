//! A VM's memory: what it is given, and what is loaded into it.

use abi::{DonationKind, ErrorCode, SlotWord};
use alloc::boxed::Box;
use board::PAGE_SIZE;
use vmm::fit::GuestConfig;
use vmm::image;
use vmm::platform::RAM;
use vmm::tree;
use vmm::virtio::block::{Disk, RamDisk};

use super::guest::{Guest, RAM_SLOT, reason};
use super::{Memory, random};
use crate::arch::mem;
use crate::console::line;
use crate::vm::{self, Refused};

/// Pages donated to EL2 itself when it asks for some.
const HEAP_PAGES: u64 = 64;

impl Guest {
    /// Gives the VM its slot and vCPUs; locked memory is mapped now.
    pub(super) fn populate(&self, memory: &mut Memory) -> Result<(), Refused> {
        self.create_ram(memory)?;
        if self.config.noncoherent {
            self.vm().noncoherent_device(true)?;
        }
        self.lock_and_create_vcpus(memory)
    }

    fn create_ram(&self, memory: &mut Memory) -> Result<(), Refused> {
        let word = SlotWord {
            id: RAM_SLOT,
            device: false,
            flags: 0,
        };
        self.with_pages(memory, || self.vm().create_slot(word, RAM, self.ram))
    }

    fn lock_and_create_vcpus(&self, memory: &mut Memory) -> Result<(), Refused> {
        if self.config.lock {
            self.with_pages(memory, || self.vm().lock_slot(RAM_SLOT))?;
        }
        for vcpu in &self.vcpus {
            self.with_pages(memory, || self.vm().create_vcpu(vcpu.index))?;
        }
        Ok(())
    }

    /// Loads a protected VM while its memory is still ours, donates that, and seals the VM: what
    /// was loaded is measured, the rest is zero.
    pub(super) fn protect(&self, memory: &mut Memory) -> Result<(), &'static str> {
        if self.config.noncoherent {
            return Err("a protected VM has no devices that are not coherent");
        }
        let loaded = self.write_payload()?;
        self.create_ram(memory).map_err(reason)?;
        let mut at = 0;
        for (start, end) in loaded {
            self.donate(memory, at, start, DonationKind::Zeros)?;
            self.donate(memory, start, end, DonationKind::Contents)?;
            at = end;
        }
        self.donate(memory, at, self.ram.size(), DonationKind::Zeros)?;
        self.lock_and_create_vcpus(memory).map_err(reason)?;
        let entry = RAM + self.layout.kernel;
        self.vm().seal(entry, RAM).map_err(reason)?;
        self.show_measurement();
        Ok(())
    }

    /// Donates a part of its RAM, in steps.
    fn donate(
        &self,
        memory: &mut Memory,
        start: u64,
        end: u64,
        kind: DonationKind,
    ) -> Result<(), &'static str> {
        let mut at = start;
        while at < end {
            let pages = ((end - at) / PAGE_SIZE).min(kind.max_pages());
            self.with_pages(memory, || self.vm().donate_memory(RAM + at, pages, kind))
                .map_err(reason)?;
            at += pages * PAGE_SIZE;
        }
        Ok(())
    }

    fn show_measurement(&self) {
        if let Ok(words) = self.vm().measurement() {
            let [a, b, c, d] = words.map(u64::swap_bytes);
            line(format_args!(
                "host: VM {} is protected, measurement {a:016x}{b:016x}{c:016x}{d:016x}",
                self.number
            ));
        }
    }

    /// Makes a call, with more pages for the VM if it lacks some.
    pub(super) fn with_pages(
        &self,
        memory: &mut Memory,
        call: impl Fn() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        match with_heap(memory, &call) {
            Err(refused) if refused.code == ErrorCode::NoMemory => {
                self.top_up(memory, refused.pages)?;
                with_heap(memory, &call)
            }
            result => result,
        }
    }

    /// Donates pages to the VM: as many as it asked for, and some more.
    pub(super) fn top_up(&self, memory: &mut Memory, wanted: u64) -> Result<(), Refused> {
        let mut left = wanted.max(1).next_multiple_of(16);
        while left > 0 {
            let count = left.min(512);
            let pages = memory.pages(count).ok_or(Refused {
                code: ErrorCode::NoMemory,
                pages: left,
            })?;
            self.vm().top_up(pages)?;
            left -= count;
        }
        Ok(())
    }

    /// Loads kernel, ramdisk and device tree, and turns the first vCPU on.
    ///
    /// The memory may be locked already: EL2 does the cache maintenance before the first run.
    pub(super) fn load(&self) -> Result<(), &'static str> {
        self.write_payload()?;
        self.vm()
            .start_vcpu(0, RAM + self.layout.kernel, RAM)
            .map_err(reason)
    }

    /// Writes kernel, ramdisk and device tree; gives the parts of its RAM that hold them, whole pages
    /// in order, zeros behind what was written.
    fn write_payload(&self) -> Result<[(u64, u64); 3], &'static str> {
        let ramdisk = self.config.ramdisk.unwrap_or_default();
        let start = RAM + self.layout.ramdisk;
        let protected = self.config.protected;
        let tree = tree::build(&tree::Guest {
            vcpus: self.config.vcpus,
            memory: self.config.memory,
            gic_v3: self.gic_v3,
            bootargs: self.config.bootargs,
            ramdisk: (!ramdisk.is_empty()).then(|| (start, start + ramdisk.len() as u64)),
            // What the host knows is no seed for a protected guest, and would change its measurement.
            seed: if protected { None } else { random::seed() },
            // Nor does it share its memory with devices unless it knows that it is protected.
            virtio: if protected {
                0
            } else {
                self.devices.lock().present()
            },
            pci: !self.config.assigned.is_empty(),
        });
        let tree = tree.map_err(|_| "the guest's device tree can't be built")?;
        if tree.len() as u64 > image::TREE_SIZE {
            return Err("the guest's device tree is too long");
        }
        let parts: [(u64, &[u8]); 3] = [
            (0, &tree),
            (self.layout.kernel, self.config.kernel),
            (self.layout.ramdisk, ramdisk),
        ];
        let ram = mem::bytes_mut(self.ram);
        let mut written = [(0, 0); 3];
        for ((at, bytes), part) in parts.into_iter().zip(&mut written) {
            *part = put(ram, at, bytes).ok_or("the payload does not fit")?;
        }
        Ok(written)
    }
}

/// Copies `bytes` to an offset, with zeros around them in their pages; gives those.
fn put(ram: &mut [u8], at: u64, bytes: &[u8]) -> Option<(u64, u64)> {
    let start = at - at % PAGE_SIZE;
    let end = (at + bytes.len() as u64).next_multiple_of(PAGE_SIZE);
    let place = ram.get_mut(start as usize..end as usize)?;
    let (before, place) = place.split_at_mut_checked((at - start) as usize)?;
    let (place, behind) = place.split_at_mut_checked(bytes.len())?;
    before.fill(0);
    mem::copy(bytes, place);
    behind.fill(0);
    Some((start, end))
}

/// Makes a call, with more memory for EL2 itself if it lacks some.
pub(super) fn with_heap<T>(
    memory: &mut Memory,
    call: impl Fn() -> Result<T, Refused>,
) -> Result<T, Refused> {
    match call() {
        Err(refused) if refused.code == ErrorCode::NoHeap => {
            let pages = memory.pages(HEAP_PAGES).ok_or(refused)?;
            vm::donate_heap(pages)?;
            call()
        }
        result => result,
    }
}

/// The disk that a configuration asks for: a copy of its own of what the FIT holds, or the host's.
pub(super) fn disk(
    config: &GuestConfig<'_>,
    memory: &mut Memory,
    host: &mut Option<Box<dyn Disk>>,
) -> Result<Option<Box<dyn Disk>>, &'static str> {
    let Some(contents) = config.disk else {
        return Ok(host.take_if(|_| config.host_disk));
    };
    let place = memory
        .take(contents.len().max(1) as u64, PAGE_SIZE)
        .ok_or("the host has no memory for its disk")?;
    let place = mem::bytes_mut(place)
        .get_mut(..contents.len())
        .ok_or("its disk has no room")?;
    mem::copy(contents, place);
    Ok(Some(Box::new(RamDisk(place))))
}
