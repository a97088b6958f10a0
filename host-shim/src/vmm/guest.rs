//! One VM as its monitor sees it.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use abi::{ErrorCode, VmConfig};
use alloc::boxed::Box;
use alloc::vec::Vec;
use board::{AddrRange, Gic};
use spin::Mutex;
use vmm::fit::GuestConfig;
use vmm::image::{self, Layout};
use vmm::virtio::block::Disk;

use super::assigned::Functions;
use super::devices::{self, Devices};
use super::ram::{disk, with_heap};
use super::{BLOCK, Memory};
use crate::console::line;
use crate::vm::{Refused, Vm};

/// Pages donated to a VM: its objects and first tables.
const STATE_PAGES: u64 = 64;
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

impl VcpuSlot {
    const fn new(index: u8, core: usize) -> Self {
        Self {
            index,
            core,
            alone: false,
            until: AtomicU64::new(0),
            woken: AtomicBool::new(false),
            loaded: AtomicU64::new(0),
        }
    }
}

/// A VM.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) number: u8,
    pub(crate) config: GuestConfig<'static>,
    /// Its handle: a protected VM that starts over is another one.
    pub(super) handle: AtomicU64,
    /// What was donated for its state at first.
    pub(super) state_pages: AddrRange,
    pub(crate) ram: AddrRange,
    pub(crate) vcpus: Vec<VcpuSlot>,
    pub(crate) devices: Mutex<Devices>,
    /// The devices have something left to do; changes under their lock.
    pub(crate) backlog: AtomicBool,
    /// PCI functions of the machine.
    pub(super) functions: Functions,
    pub(super) layout: Layout,
    pub(super) gic_v3: bool,
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
            VcpuSlot::new(index, core)
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

    /// The VM.
    pub(crate) fn vm(&self) -> Vm {
        Vm::from_handle(self.handle.load(Ordering::Acquire))
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
