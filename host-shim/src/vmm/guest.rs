//! One VM as its monitor sees it.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use abi::{DonationKind, ErrorCode, SlotWord, VmConfig};
use alloc::boxed::Box;
use alloc::vec::Vec;
use board::{AddrRange, Gic, PAGE_SIZE};
use spin::Mutex;
use vmm::fit::GuestConfig;
use vmm::image::{self, Layout};
use vmm::platform::RAM;
use vmm::tree;
use vmm::virtio::block::{Disk, RamDisk};

use super::assigned::Functions;
use super::devices::{self, Devices};
use super::{BLOCK, Memory, random};
use crate::arch::mem;
use crate::console::line;
use crate::vm::{self, Refused, Vm};

/// Pages donated to a VM: its objects and first tables.
const STATE_PAGES: u64 = 64;
/// Pages donated to EL2 itself when it asks for some.
const HEAP_PAGES: u64 = 64;
/// Number of the slot that is the guest's RAM.
pub(super) const RAM_SLOT: u16 = 0;

/// What a VM is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum State {
    /// Its vCPUs run.
    Running = 0,
    /// The console has paused it.
    Paused = 1,
    /// It is to start over, when no vCPU is inside any more.
    Resetting = 2,
    /// It has powered itself off; to be destroyed when no vCPU is inside any more.
    PoweredOff = 3,
    /// The console, or an error, has ended it; as above.
    Stopped = 4,
    /// Powered off, and destroyed.
    Gone = 5,
    /// Stopped, and destroyed.
    Killed = 6,
}

impl State {
    const ALL: [Self; 7] = [
        Self::Running,
        Self::Paused,
        Self::Resetting,
        Self::PoweredOff,
        Self::Stopped,
        Self::Gone,
        Self::Killed,
    ];

    /// For the console.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Resetting => "resetting",
            Self::PoweredOff | Self::Gone => "powered off",
            Self::Stopped | Self::Killed => "stopped",
        }
    }
}

/// One vCPU.
#[derive(Debug)]
pub(crate) struct VcpuSlot {
    pub(crate) index: u8,
    /// The core that runs it.
    pub(crate) core: usize,
    /// No other vCPU has that core.
    pub(crate) alone: bool,
    /// Not to be run before this time, in ticks, unless it is woken.
    pub(crate) until: AtomicU64,
    /// Something happened that it may wait for.
    pub(crate) woken: AtomicBool,
    /// What its last read of a device gave.
    pub(crate) loaded: AtomicU64,
}

/// A VM.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) number: u8,
    pub(crate) config: GuestConfig<'static>,
    /// Its handle: a protected VM that starts over is another one.
    handle: AtomicU64,
    /// What was donated for its state at first.
    state_pages: AddrRange,
    pub(crate) ram: AddrRange,
    pub(crate) vcpus: Vec<VcpuSlot>,
    pub(crate) devices: Mutex<Devices>,
    /// The devices have something left to do; changes under their lock.
    pub(crate) backlog: AtomicBool,
    /// PCI functions of the machine.
    pub(super) functions: Functions,
    layout: Layout,
    gic_v3: bool,
    state: AtomicU8,
    /// vCPUs inside a run.
    pub(crate) inside: AtomicU32,
}

impl Guest {
    /// Creates the VM, gives it its memory, and makes it ready to run.
    pub(super) fn create(
        number: u8,
        config: GuestConfig<'static>,
        gic: &Gic,
        memory: &mut Memory,
        cores: &[u64],
        next_core: &mut usize,
        host_disk: &mut Option<Box<dyn Disk>>,
    ) -> Result<Self, &'static str> {
        let ramdisk = config.ramdisk.map_or(0, |disk| disk.len() as u64);
        let layout = image::layout(config.kernel, ramdisk, config.memory).map_err(|error| {
            line(format_args!("host: VM {number}: {error}"));
            "kernel and ramdisk do not fit into its memory"
        })?;
        let ram = memory
            .take(config.memory, BLOCK)
            .ok_or("the host has not so much free memory in one piece")?;
        let state = memory
            .pages(STATE_PAGES)
            .ok_or("the host has no memory left")?;
        let vm_config = VmConfig {
            vcpus: config.vcpus,
            protected: config.protected,
            devices: !config.assigned.is_empty(),
        };
        let disk = disk(&config, memory, host_disk)?;
        let vm = with_heap(memory, || Vm::create(vm_config, state)).map_err(reason)?;
        let vcpus = (0..config.vcpus).map(|index| {
            let core = *next_core;
            *next_core = (core + 1) % cores.len();
            VcpuSlot {
                index,
                core,
                alone: false,
                until: AtomicU64::new(0),
                woken: AtomicBool::new(false),
                loaded: AtomicU64::new(0),
            }
        });
        let guest = Self {
            number,
            vcpus: vcpus.collect(),
            config,
            handle: AtomicU64::new(vm.handle()),
            state_pages: state,
            ram,
            devices: Mutex::new(Devices::new(disk)),
            backlog: AtomicBool::new(false),
            functions: Functions::default(),
            layout,
            gic_v3: matches!(gic, Gic::V3 { .. }),
            state: AtomicU8::new(State::Running as u8),
            inside: AtomicU32::new(0),
        };
        let ready = if guest.config.protected {
            guest.protect(memory)
        } else {
            let populated = guest.populate(memory).map_err(reason);
            populated.and_then(|()| guest.load())
        };
        match ready {
            Ok(()) => Ok(guest),
            Err(why) => Err(guest.give_up(why)),
        }
    }

    /// Ends a VM that has never run; gives the reason back.
    pub(super) fn give_up(&self, why: &'static str) -> &'static str {
        self.stop();
        self.bury(State::Stopped, State::Killed);
        why
    }

    /// The VM.
    pub(crate) fn vm(&self) -> Vm {
        Vm::from_handle(self.handle.load(Ordering::Acquire))
    }

    /// Gives the VM its slot and vCPUs; locked memory is mapped now.
    fn populate(&self, memory: &mut Memory) -> Result<(), Refused> {
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
    fn protect(&self, memory: &mut Memory) -> Result<(), &'static str> {
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

    pub(crate) fn state(&self) -> State {
        let state = self.state.load(Ordering::Acquire);
        State::ALL
            .into_iter()
            .find(|s| *s as u8 == state)
            .unwrap_or(State::Killed)
    }

    /// Changes the state if it is `from`; says whether it was.
    pub(crate) fn change(&self, from: State, to: State) -> bool {
        self.state
            .compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// What its devices see of it.
    pub(crate) fn machine(&self) -> devices::Machine {
        devices::Machine {
            vm: self.vm(),
            ram: self.ram,
        }
    }

    /// Ends it, whatever it does now.
    pub(crate) fn stop(&self) {
        for from in [State::Running, State::Paused, State::Resetting] {
            if self.change(from, State::Stopped) {
                return;
            }
        }
    }

    /// Nothing is left of it in EL2.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.state(), State::Gone | State::Killed)
    }

    /// It powered itself off.
    pub(crate) fn ended_well(&self) -> bool {
        self.state() == State::Gone
    }

    /// Whether a core runs one of its vCPUs.
    pub(crate) fn uses_core(&self, core: usize) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.core == core)
    }

    /// What is due when no vCPU is inside: the core of its first vCPU does it.
    pub(super) fn attend(&self, memory: &Mutex<Memory>, core: usize) -> Option<&'static str> {
        let mine = self.vcpus.first().is_some_and(|vcpu| vcpu.core == core);
        if !mine || self.inside.load(Ordering::Acquire) != 0 {
            return None;
        }
        match self.state() {
            State::Resetting => {
                if let Err(why) = self.start_over(&mut memory.lock()) {
                    self.change(State::Resetting, State::Stopped);
                    return Some(why);
                }
                self.change(State::Resetting, State::Running);
                Some("reset")
            }
            State::PoweredOff => self.bury(State::PoweredOff, State::Gone),
            State::Stopped => self.bury(State::Stopped, State::Killed),
            State::Running | State::Paused | State::Gone | State::Killed => None,
        }
    }

    fn start_over(&self, memory: &mut Memory) -> Result<(), &'static str> {
        // First: their DMA must not meet what is loaded.
        self.reset_functions(memory)?;
        if self.config.protected {
            self.build_again(memory)?;
        } else {
            self.vm().reset().map_err(reason)?;
        }
        self.devices.lock().reset();
        for vcpu in &self.vcpus {
            vcpu.until.store(0, Ordering::Relaxed);
        }
        if self.config.protected {
            self.protect(memory)
        } else {
            self.load()
        }
    }

    /// A protected VM is not reset, what is in it is its own: it ends, and another one begins.
    fn build_again(&self, memory: &mut Memory) -> Result<(), &'static str> {
        self.end().map_err(reason)?;
        let config = VmConfig {
            vcpus: self.config.vcpus,
            protected: true,
            devices: false,
        };
        let vm = with_heap(memory, || Vm::create(config, self.state_pages)).map_err(reason)?;
        self.handle.store(vm.handle(), Ordering::Release);
        Ok(())
    }

    /// Destroys the VM and takes everything back.
    fn end(&self) -> Result<(), Refused> {
        self.release_functions();
        self.vm().destroy()?;
        while self.vm().reclaim()?.is_some() {}
        Ok(())
    }

    fn bury(&self, from: State, to: State) -> Option<&'static str> {
        match self.end() {
            Ok(()) => {
                self.change(from, to);
                Some(to.name())
            }
            // Somebody is still on the way out, or there is more to do: again with the next round.
            Err(refused) if matches!(refused.code, ErrorCode::Busy | ErrorCode::Again) => None,
            Err(_) => {
                self.change(from, State::Killed);
                Some("can't be destroyed")
            }
        }
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
fn with_heap<T>(memory: &mut Memory, call: impl Fn() -> Result<T, Refused>) -> Result<T, Refused> {
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
fn disk(
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

/// A refusal for the log.
pub(crate) fn reason(refused: Refused) -> &'static str {
    match refused.code {
        ErrorCode::NotPermitted => "EL2 refuses: not permitted",
        ErrorCode::NotFound => "EL2 refuses: there is no such VM, vCPU or slot",
        ErrorCode::Again => "EL2 asks to try again",
        ErrorCode::NoMemory => "EL2 lacks pages of the VM",
        ErrorCode::Busy => "EL2 refuses: in use",
        ErrorCode::Exists => "EL2 refuses: it exists already",
        ErrorCode::Invalid => "EL2 refuses: a wrong argument",
        ErrorCode::NoSpace => "EL2 has no free handle",
        ErrorCode::NoHeap => "EL2's heap is used up",
        ErrorCode::Mismatch => "EL2 refuses: its measurement is not the expected one",
        _ => "EL2 refuses",
    }
}
