//! The virtual machine monitor: several VMs, each with several vCPUs, over all cores.
//!
//! Every core runs the same loop ([`sched`]) over the vCPUs that are its own; nothing migrates. A
//! VM's devices are behind one lock each. Interrupts are never taken by exception: they end a
//! guest's run or a WFI and are acknowledged by hand.

mod assigned;
mod console;
mod devices;
mod guest;
mod life;
mod ram;
mod random;
mod sched;

use alloc::boxed::Box;
use alloc::vec::Vec;

use board::{AddrRange, Gic, MAX_RESERVED, PAGE_SIZE, Placement, RangeList, Tree, highest_free};
use spin::{Mutex, Once};
use vmm::fit::{self, FitError};
use vmm::virtio::block::Disk;

use crate::arch::mmu::Settings;
use crate::arch::{cpu, disk, heap, mem};
use crate::console::line;
use crate::machine::Machine;
use guest::Guest;

/// Bytes of the heap.
const HEAP: u64 = 4 << 20;
/// A guest's memory starts at a multiple of this, so that blocks map it.
const BLOCK: u64 = 2 << 20;

/// Free memory of the host.
#[derive(Debug)]
struct Memory {
    ram: RangeList<{ board::MAX_MEMORY }>,
    taken: RangeList<MAX_RESERVED>,
}

impl Memory {
    fn take(&mut self, size: u64, align: u64) -> Option<AddrRange> {
        let want = Placement {
            size,
            align,
            limit: u64::MAX,
        };
        let range = highest_free(&self.ram, &self.taken, want)?;
        self.taken.insert(range, "allocations").ok()?;
        Some(range)
    }

    /// Pages to donate.
    fn pages(&mut self, count: u64) -> Option<AddrRange> {
        self.take(count * PAGE_SIZE, PAGE_SIZE)
    }
}

/// Everything that the cores share.
#[derive(Debug)]
pub(crate) struct Vmm {
    guests: Vec<Guest>,
    /// How many the FIT names.
    wanted: usize,
    gic: Gic,
    /// Affinities of the cores.
    cores: Vec<u64>,
    memory: Mutex<Memory>,
    console: Mutex<console::Console>,
}

/// Why [`run`] did not begin: the file has no guests.
pub(crate) const NO_GUESTS: &str = "the FIT image has no guests";

static VMM: Once<Vmm> = Once::new();

/// Runs the guests of the FIT until all have ended; says how that went, or why it could not begin.
pub(crate) fn run(
    machine: &Machine,
    configs: impl FnOnce() -> Result<Vec<fit::Guest<'static>>, &'static str>,
) -> Result<(), &'static str> {
    let gic = machine
        .board
        .gic
        .ok_or("no interrupt controller that is known")?;
    let mut memory = Memory {
        ram: machine.board.memory.clone(),
        taken: machine.board.reserved.clone(),
    };
    let heap = memory.take(HEAP, PAGE_SIZE).ok_or("no memory for a heap")?;
    heap::give(heap);
    let configs = configs()?;
    if configs.is_empty() {
        return Err(NO_GUESTS);
    }
    let cores: Vec<u64> = machine.board.cpus.iter().map(|cpu| cpu.mpidr).collect();
    let boot_core = cores
        .iter()
        .position(|mpidr| *mpidr == crate::arch::mpidr())
        .ok_or("this core is not in the device tree")?;
    random::start(machine);
    let mut host_disk = host_disk(machine);
    let mut guests = Vec::new();
    let wanted = configs.len();
    let mut next_core = boot_core;
    for (config, number) in configs.into_iter().zip(1..) {
        let create = |config| {
            Guest::create(
                number,
                config,
                &gic,
                &mut memory,
                &cores,
                &mut next_core,
                &mut host_disk,
            )
        };
        let guest = config.map_err(wrong).and_then(create).and_then(|guest| {
            match guest.assign(machine, &cores, &mut memory) {
                Ok(()) => Ok(guest),
                Err(why) => Err(guest.give_up(why)),
            }
        });
        // The others run all the same.
        match guest {
            Ok(guest) => guests.push(guest),
            Err(why) => line(format_args!("host: VM {number} is left out: {why}")),
        }
    }
    if guests.is_empty() {
        return Err("no VM could be created");
    }
    let uses: Vec<usize> = guests
        .iter()
        .flat_map(|guest| guest.vcpus.iter().map(|vcpu| vcpu.core))
        .collect();
    for vcpu in guests.iter_mut().flat_map(|guest| guest.vcpus.iter_mut()) {
        vcpu.alone = uses.iter().filter(|core| **core == vcpu.core).count() == 1;
    }
    let labelled = wanted > 1;
    let vmm = VMM.call_once(|| Vmm {
        guests,
        wanted,
        gic,
        cores,
        memory: Mutex::new(memory),
        console: Mutex::new(console::Console::new(labelled)),
    });
    start_cores(vmm, boot_core, machine.settings);
    sched::run(vmm, boot_core);
    vmm.verdict()
}

/// The machine's own disk.
fn host_disk(machine: &Machine) -> Option<Box<dyn Disk>> {
    let tree = Tree::new(mem::bytes(machine.tree_range)).ok()?;
    let disk = disk::find(&tree.virtio_mmio())?;
    line(format_args!("host: a disk of {} sectors", disk.sectors()));
    Some(disk)
}

/// Says what is wrong with a configuration of the FIT.
fn wrong(error: FitError) -> &'static str {
    line(format_args!("host: {error}"));
    "its configuration can't be used"
}

/// Turns on the cores that have vCPUs.
fn start_cores(vmm: &'static Vmm, boot_core: usize, settings: Settings) {
    for (number, mpidr) in vmm.cores.iter().enumerate() {
        let has_work = vmm.guests.iter().any(|guest| guest.uses_core(number));
        if number == boot_core || !has_work {
            continue;
        }
        if let Err(why) = cpu::start(number, *mpidr, settings, secondary) {
            line(format_args!("host: core {number}: {why}"));
        }
    }
}

/// Where another core arrives.
fn secondary(number: usize) -> ! {
    match VMM.get() {
        Some(vmm) => sched::run(vmm, number),
        None => line(format_args!("host: core {number} came too early")),
    }
    crate::arch::halt()
}

impl Vmm {
    /// Whether every guest has powered itself off.
    fn verdict(&self) -> Result<(), &'static str> {
        let clean = self
            .guests
            .iter()
            .filter(|guest| guest.ended_well())
            .count();
        let all = self.wanted;
        if clean == all {
            line(format_args!("host: all {all} guests powered off"));
            return Ok(());
        }
        for guest in self.guests.iter().filter(|guest| !guest.ended_well()) {
            line(format_args!(
                "host: VM {} ({}) did not power itself off",
                guest.number, guest.config.name
            ));
        }
        line(format_args!(
            "host: only {clean} of {all} guests powered off"
        ));
        Err("a guest did not power itself off")
    }
}
