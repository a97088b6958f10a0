//! The VM.

use core::cell::Cell;
use core::sync::atomic::AtomicU32;
use std::vec::Vec;

use board::{AddrRange, MAX_MEMORY, PAGE_SIZE, RangeList};
use memslot::addr::Gfn;
use memslot::policy::{ArmCaches, ArmPolicy};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use memslot::vm::{GuestMemory, VmConfig, VmKind};
use stage2::testing::{Arch, FakeMachine};
use stage2::{ArmStage2, Pa, Stage2};

use crate::exits::is_memory;
use crate::features::{Features, IdRegisters};
use crate::guest::entropy::EntropySource;
use crate::guest::idregs::{GuestIds, HardwareIds, Model};
use crate::guest::protected::MmioGuard;
use crate::guest::psci::{Power, Turn};
use crate::guest::smccc::{Caller, Mitigation, Mitigations};
use crate::guest_frames::GuestFrames;
use crate::guest_memory::{Contents, GuestPages, VmMemory};
use crate::host_map::{self, HostMap};
use crate::ownership::Ownership;
use crate::page_state::{Owner, PageStates};
use crate::protection::Protection;
use crate::psci::StartOrder;
use crate::vgic::{GicVersion, Vgic};
use crate::vm_counters::VmCounters;

/// Where the guest's RAM begins, and how many pages it has. Of a protected VM's the first
/// [`OWNED_PAGES`] are donated, but page [`TAKEN_PAGE`], which the host has taken back.
pub const RAM: u64 = 0x4000_0000;
/// See [`RAM`].
pub const RAM_PAGES: u64 = 1024;
/// See [`RAM`].
pub const OWNED_PAGES: u64 = 512;
/// See [`RAM`].
pub const TAKEN_PAGE: u64 = 7;
/// A device of the board that is the guest's; not of a protected VM.
pub const DEVICE: u64 = 0x1000_0000;
/// Its pages.
pub const DEVICE_PAGES: u64 = 4;
/// Memory that the guest can't write; not of a protected VM.
pub const READ_ONLY: u64 = 0x5000_0000;
/// Its pages.
pub const READ_ONLY_PAGES: u64 = 4;
/// The virtual CPU interface of a GICv2, two pages.
pub const GICC: u64 = 0x0801_0000;

const VM: u8 = 3;
const GIB: u64 = 1 << 30;
/// Pages of the board, at 1 GiB: the guest's, and EL2's.
const PAGES: u64 = RAM_PAGES + READ_ONLY_PAGES + 16;

fn pages(first: u64, count: u64) -> AddrRange {
    AddrRange::with_size(GIB + first * PAGE_SIZE, count * PAGE_SIZE).expect("not empty")
}

/// The last pages of the board.
fn el2() -> AddrRange {
    pages(PAGES - 16, 16)
}

fn board() -> RangeList<MAX_MEMORY> {
    let mut ram = RangeList::new();
    ram.insert(pages(0, PAGES), "ram").expect("one");
    ram
}

fn format() -> ArmStage2 {
    let features = Features::decode(&IdRegisters {
        mmfr0: 0x10_1122,
        mmfr1: 0x1021_2122,
        ..IdRegisters::default()
    });
    host_map::format(&features).expect("a usual core")
}

/// What a VM is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// It is protected, and sealed.
    pub protected: bool,
    /// Its interrupt controller.
    pub gic: GicVersion,
    /// vCPUs, 1 to 8.
    pub vcpus: u8,
}

/// What lives as long as a VM: memory for tables, and the words of the board's pages.
pub struct Ground {
    hosts: FakeMachine,
    guests: FakeMachine,
    words: Vec<AtomicU32>,
}

impl core::fmt::Debug for Ground {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Ground").finish_non_exhaustive()
    }
}

impl Default for Ground {
    fn default() -> Self {
        Self::new()
    }
}

impl Ground {
    /// For one VM.
    #[must_use]
    pub fn new() -> Self {
        let machine = || FakeMachine::new(Arch::arm_4k(1, 40, false), 24);
        Self {
            hosts: machine(),
            guests: machine(),
            words: (0..PAGES).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// Owners of the board's pages: the host, but of the last ones.
    ///
    /// # Panics
    ///
    /// If asked for twice.
    pub fn ownership(&self) -> Ownership<'_> {
        let states = PageStates::new(board(), &self.words).expect("as many words as pages");
        assert!(states.transfer(el2(), Owner::Host, Owner::Hypervisor));
        Ownership::new(states)
    }
}

/// Pages without bytes.
struct Unseen;

impl Contents for Unseen {
    fn wipe(&self, _: AddrRange) {}
    fn settle(&self, _: AddrRange) {}
    fn show(&self, _: AddrRange, _: &mut dyn FnMut(&[u8])) {}
}

/// Random numbers that count.
#[derive(Debug)]
struct Count(Cell<u64>);

impl EntropySource for Count {
    fn fill(&self, words: &mut [u64]) -> bool {
        for word in words {
            self.0.set(self.0.get() + 1);
            *word = self.0.get();
        }
        true
    }
}

type Table<'a> = Stage2<ArmStage2, &'a FakeMachine>;

/// A VM with the slots that the constants of this module name.
pub struct FakeVm<'a> {
    /// Its memory.
    pub memory: VmMemory<'a, &'a FakeMachine>,
    /// Its interrupt controller.
    pub vgic: Vgic,
    /// Power states of its vCPUs; the first one is on.
    pub power: Power,
    /// What it is told of the core.
    pub ids: GuestIds,
    /// Its protection, if it is protected.
    pub protection: Option<Protection>,
    /// What it is told of mitigations.
    pub mitigations: Mitigations,
    /// How it was made.
    pub shape: Shape,
    pub(super) counters: VmCounters,
    ownership: &'a Ownership<'a>,
    ground: &'a Ground,
    host: HostMap<&'a FakeMachine>,
    entropy: Count,
}

impl core::fmt::Debug for FakeVm<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FakeVm")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl<'a> FakeVm<'a> {
    /// A VM whose first vCPU runs.
    ///
    /// # Panics
    ///
    /// If `ownership` is not new.
    #[must_use]
    pub fn new(ground: &'a Ground, ownership: &'a Ownership<'a>, shape: Shape) -> Self {
        let host = HostMap::new(format(), &ground.hosts, Default::default(), board(), el2());
        let host = host.expect("there are tables");
        ground.hosts.attach(Pa::new(host.root()));
        let model = Model {
            ipa_bits: 39,
            gic_v3: shape.gic == GicVersion::V3,
        };
        let vm = Self {
            memory: memory(ground, ownership, shape.protected),
            vgic: Vgic::new(shape.gic, shape.vcpus),
            power: Power::new(shape.vcpus),
            ids: GuestIds::new(&HARDWARE, &model),
            protection: shape.protected.then(Protection::new),
            mitigations: Mitigations {
                workaround_1: Mitigation::Firmware,
                workaround_2: Mitigation::NotNeeded,
                workaround_3: Mitigation::Unknown,
            },
            shape,
            counters: VmCounters::new(),
            ownership,
            ground,
            host,
            entropy: Count(Cell::new(0)),
        };
        vm.create_slots();
        vm.start();
        if let Some(protection) = &vm.protection {
            vm.protect(protection);
        }
        vm
    }

    /// Turns all vCPUs off, and the first one on, which then runs.
    ///
    /// # Panics
    ///
    /// Never.
    pub fn start(&self) {
        let order = StartOrder {
            entry: RAM,
            context: 0,
        };
        self.power.reset();
        self.power.order(0, order).expect("it is off");
        assert_eq!(self.power.turn(0), Turn::Starts(order));
    }

    fn create_slots(&self) {
        let ram = SlotKind::Ram;
        self.create(0, (RAM, RAM_PAGES), GIB, SlotFlags::empty(), ram);
        if !self.shape.protected {
            let device = (DEVICE, DEVICE_PAGES);
            self.create(1, device, 0x2000_0000, SlotFlags::empty(), SlotKind::Mmio);
            let frames = GIB + RAM_PAGES * PAGE_SIZE;
            let fixed = (READ_ONLY, READ_ONLY_PAGES);
            self.create(2, fixed, frames, SlotFlags::READONLY, ram);
        }
        if self.shape.gic == GicVersion::V2 {
            let (empty, device) = (SlotFlags::empty(), SlotKind::Mmio);
            self.create(3, (GICC, 2), 0x3000_0000, empty, device);
        }
    }

    fn create(
        &self,
        id: u16,
        (ipa, pages): (u64, u64),
        backing: u64,
        flags: SlotFlags,
        kind: SlotKind,
    ) {
        let base = Gfn::try_new(ipa / PAGE_SIZE).expect("small");
        let first = backing / PAGE_SIZE;
        let slot = Memslot::new(SlotId(id), base, pages, first, flags, kind);
        let created = self.memory.create_slot(slot.expect("a slot"));
        created.expect("there is room");
    }

    fn protect(&self, protection: &Protection) {
        let start = crate::measure::Start {
            vcpus: self.shape.vcpus,
            entry: RAM,
            context: 0,
        };
        let donated = pages(0, OWNED_PAGES);
        self.ownership
            .donate(&self.host, donated, Owner::Guest(VM))
            .expect("they are the host's");
        let taken = self.pages().reclaim_page(pages(TAKEN_PAGE, 1));
        taken.expect("it is the guest's");
        protection.seal(&start, || Ok(())).expect("not sealed yet");
    }

    /// Its pages, for transitions.
    pub(super) fn pages(
        &self,
    ) -> GuestPages<'_, 'a, Table<'a>, HostMap<&'a FakeMachine>, impl Contents> {
        GuestPages {
            memory: &self.memory,
            ownership: self.ownership,
            host: &self.host,
            contents: &Unseen,
            index: VM,
        }
    }

    /// How many tables the VM may still take; `None` for all that there are.
    pub fn allow_tables(&self, left: Option<usize>) {
        self.ground.guests.allow_allocations(left);
    }

    /// Whether the VM's tables let the guest read or, with `write`, write at `ipa`.
    #[must_use]
    pub fn reaches(&self, ipa: u64, write: bool) -> bool {
        self.ground
            .guests
            .leaves()
            .iter()
            .any(|(start, level, leaf)| {
                let size = PAGE_SIZE << (9 * (3 - level));
                ipa.wrapping_sub(*start) < size && leaf.read && leaf.young && (leaf.write || !write)
            })
    }

    /// What its tables and the host's have done that tables must not do.
    #[must_use]
    pub fn violations(&self) -> Vec<std::string::String> {
        let _events = self.ground.guests.take_events();
        let _events = self.ground.hosts.take_events();
        let mut wrong = self.ground.guests.finish();
        wrong.extend(self.ground.hosts.finish());
        wrong
    }
}

impl Caller for &FakeVm<'_> {
    fn power(&self) -> &Power {
        &self.power
    }

    fn ids(&self) -> &GuestIds {
        &self.ids
    }

    fn mitigations(&self) -> &Mitigations {
        &self.mitigations
    }

    fn entropy(&self) -> Option<&dyn EntropySource> {
        Some(&self.entropy)
    }

    fn guard(&self) -> Option<&MmioGuard> {
        self.protection.as_ref().map(|p| &p.guard)
    }

    fn is_memory(&self, ipa: u64) -> bool {
        is_memory(&self.memory, ipa)
    }
}

fn memory<'a>(
    ground: &'a Ground,
    ownership: &'a Ownership<'a>,
    protected: bool,
) -> VmMemory<'a, &'a FakeMachine> {
    let table = Stage2::new(format(), &ground.guests, Default::default());
    let table = table.expect("there are tables");
    ground.guests.attach(table.root());
    let states = ownership.pages();
    let (kind, frames) = if protected {
        (VmKind::Protected, GuestFrames::owned(states, VM))
    } else {
        (VmKind::Unprotected, GuestFrames::leased(states))
    };
    let config = VmConfig {
        max_slots: 8,
        gfn_limit: 1 << 27,
        kind,
    };
    let policy = ArmPolicy {
        caches: ArmCaches::Maintenance,
    };
    GuestMemory::new(config, policy, frames, table)
}

/// A core with a GICv3 interface.
const HARDWARE: HardwareIds = HardwareIds {
    pfr0: 0x0000_0000_0100_0011,
    pfr1: 0,
    isar0: 0,
    isar1: 0,
    isar2: 0,
    mmfr0: 0x10_1122,
    mmfr1: 0x1021_2122,
    mmfr2: 0,
};
