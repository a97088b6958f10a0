//! A board of fake memory for the library's calls: what tests and the fuzz target drive.
//!
//! RAM is some pages, whose contents are whatever a test keeps in their place; tables lie in machines
//! that check every step of the walkers' protocol ([`FakeMachine`]). vCPUs have no registers: a run is what
//! comes before the guest's first instruction. There is no IOMMU.

use std::boxed::Box;
use std::cell::{Cell, OnceCell};
use std::fmt;
use std::vec::Vec;

use abi::{Call, ErrorCode, Exit, MAX_VCPUS, VmConfig, VmCounter};
use board::{AddrRange, PAGE_SIZE, RangeList};
use memslot::error::Error;
use memslot::flush::OwedFlush;
use memslot::steps::Progress;
use stage2::testing::{Arch, FakeMachine};
use stage2::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Granule, Importer, Pa, Stage2,
    WideAddresses,
};

use crate::calls;
use crate::devices::Iommu;
use crate::features::{Features, IdRegisters};
use crate::guest::psci::Turn;
use crate::guest_memory::Contents;
use crate::host_map::{self, HostMap};
use crate::machine::{Machine, VirtualMachine};
use crate::ownership::Ownership;
use crate::page_state::{Owner, PageStates};
use crate::psci::StartOrder;
use crate::smmu::{Port, Smmu, Walk};
use crate::sync::AtomicU32;
use crate::vgic::{GicVersion, Vgic};
use crate::vm_error::Refusal;
use crate::vm_state::VmState;
use crate::vm_table::{Estate, Teardown, VmTable};

/// First address of RAM.
pub const RAM: u64 = 1 << 30;
/// Bits of a guest's addresses.
const IPA_BITS: u8 = 39;
/// Bits of an output address.
const OUTPUT_BITS: u8 = 40;
/// Pages for the tables of one VM.
const TABLES: usize = 8;

/// The pages of RAM from one, as addresses.
///
/// # Panics
///
/// For no page.
#[must_use]
pub fn page_range(first: usize, count: usize) -> AddrRange {
    AddrRange::with_size(RAM + first as u64 * PAGE_SIZE, count as u64 * PAGE_SIZE)
        .expect("not empty")
}

/// The format of guests' tables.
///
/// # Panics
///
/// Never: it is a usual one.
#[must_use]
pub fn guest_format() -> ArmStage2 {
    ArmStage2::new(&ArmConfig {
        granule: Granule::K4,
        input_bits: IPA_BITS,
        output_bits: OUTPUT_BITS,
        features: ArmFeatures {
            fwb: ForceWriteBack::Off,
            execute: Execute::Split,
            wide: WideAddresses::Off,
        },
        start: None,
    })
    .expect("a usual format")
}

/// What a test keeps in the place of pages' contents.
pub trait PageContents: Contents {
    /// EL2 makes objects in pages that were the host's.
    fn use_for_el2(&self, pages: AddrRange);
}

/// Nobody looks at what is in a page.
#[derive(Clone, Copy, Debug)]
pub struct NoContents;

impl Contents for NoContents {
    fn wipe(&self, _: AddrRange) {}

    fn settle(&self, _: AddrRange) {}

    fn show(&self, pages: AddrRange, to: &mut dyn FnMut(&[u8])) {
        let page = [0; 4096];
        (0..pages.size() / PAGE_SIZE).for_each(|_| to(&page));
    }
}

impl PageContents for NoContents {
    fn use_for_el2(&self, _: AddrRange) {}
}

/// Memory for the tables of the host and of VMs, and the words of the pages' states.
pub struct Ground {
    host: FakeMachine,
    guests: Vec<OnceCell<FakeMachine>>,
    words: Vec<AtomicU32>,
    els: AddrRange,
}

impl fmt::Debug for Ground {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ground").finish_non_exhaustive()
    }
}

impl Ground {
    /// RAM of so many pages, of which page `els` is EL2's, and room for so many VMs.
    #[must_use]
    pub fn new(pages: usize, els: usize, vms: usize) -> Self {
        Self {
            host: FakeMachine::new(Arch::arm_4k(1, OUTPUT_BITS.into(), false), 16),
            guests: (0..vms).map(|_| OnceCell::new()).collect(),
            words: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            els: page_range(els, 1),
        }
    }

    fn memory(&self) -> RangeList<{ board::MAX_MEMORY }> {
        let mut memory = RangeList::new();
        let ram = page_range(0, self.words.len());
        memory.insert(ram, "ram").expect("one");
        memory
    }

    /// States of all pages.
    ///
    /// # Panics
    ///
    /// When it is called twice.
    #[must_use]
    pub fn ownership(&self) -> Ownership<'_> {
        let pages = PageStates::new(self.memory(), &self.words).expect("as many words as pages");
        assert!(pages.transfer(self.els, Owner::Host, Owner::Hypervisor));
        Ownership::new(pages)
    }

    /// The host's tables.
    #[must_use]
    pub fn host(&self) -> &FakeMachine {
        &self.host
    }

    /// The tables of the VM with this index, once it has had some.
    #[must_use]
    pub fn guest(&self, index: usize) -> Option<&FakeMachine> {
        self.guests.get(index).and_then(OnceCell::get)
    }

    /// All of them.
    pub fn machines(&self) -> impl Iterator<Item = &FakeMachine> {
        let guests = self.guests.iter().filter_map(OnceCell::get);
        guests.chain([&self.host])
    }

    fn tables_of(&self, index: u8) -> Option<&FakeMachine> {
        let arch = || Arch::arm_4k(1, IPA_BITS.into(), false);
        let machine = self.guests.get(usize::from(index));
        machine.map(|machine| machine.get_or_init(|| FakeMachine::new(arch(), TABLES)))
    }
}

/// A VM.
pub struct FakeVm<'a> {
    state: VmState<'a, &'a FakeMachine>,
    vgic: OnceCell<Box<Vgic>>,
    vcpus: [OnceCell<FakeVcpu>; MAX_VCPUS as usize],
}

impl fmt::Debug for FakeVm<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeVm")
            .field("state", &self.state)
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

/// A vCPU without registers.
#[derive(Debug)]
pub struct FakeVcpu {
    index: u8,
    runs: Cell<bool>,
}

/// The first step of a VM's end is still to come; and what it owes.
#[derive(Debug)]
pub struct Rest(bool, OwedFlush);

impl Teardown for FakeVm<'_> {
    type Left = Rest;

    fn begin(&self) -> Rest {
        Rest(true, self.state.flush_at_end())
    }

    fn go_on(&self, Rest(first, owed): &mut Rest) -> Progress {
        if core::mem::take(first) {
            return Progress::More;
        }
        if self.state.memory.flush_in_steps(owed, || true) == Progress::More {
            return Progress::More;
        }
        let machine = |table: &Stage2<_, &FakeMachine>| table.platform().detach();
        self.state.memory.with_table(machine);
        Progress::Done
    }
}

impl<'a> VirtualMachine<'a> for FakeVm<'a> {
    type Tables = &'a FakeMachine;
    type Vcpu = FakeVcpu;

    fn state(&self) -> &VmState<'a, &'a FakeMachine> {
        &self.state
    }

    fn vgic(&self) -> &Vgic {
        let vcpus = self.state.config.vcpus;
        self.vgic
            .get_or_init(|| Box::new(Vgic::new(GicVersion::V3, vcpus)))
    }

    fn vcpu(&self, index: u64) -> Result<&FakeVcpu, ErrorCode> {
        let vcpu = usize::try_from(index).ok();
        let vcpu = vcpu.and_then(|index| self.vcpus.get(index));
        vcpu.and_then(OnceCell::get).ok_or(ErrorCode::NotFound)
    }

    fn counter(&self, counter: VmCounter) -> u64 {
        match counter {
            VmCounter::PendingRuns => self.state.memory.counters().pending_runs,
            _ => 0,
        }
    }
}

/// No IOMMU.
#[derive(Clone, Copy, Debug)]
pub struct NoIommu;

/// The registers that it does not have.
#[derive(Debug)]
pub enum NoPort {}

impl Port for NoPort {
    fn read(&self, _: u32) -> u32 {
        match *self {}
    }

    fn write(&self, _: u32, _: u32) {
        match *self {}
    }

    fn load(&self, _: u64) -> u64 {
        match *self {}
    }

    fn store(&self, _: u64, _: u64) {
        match *self {}
    }

    fn publish(&self) {
        match *self {}
    }

    fn alloc(&self, _: u64) -> Option<u64> {
        match *self {}
    }
}

impl<'a> Iommu<'a> for NoIommu {
    type Port = NoPort;

    fn function(self, _: u16) -> Option<(&'a Smmu<NoPort>, u32)> {
        None
    }

    fn importer(self, _: u16, _: u8) -> Importer {
        unreachable!("there is no function to attach")
    }

    fn poll(self) {}
}

/// The board, with at most `N` VMs.
pub struct FakeBoard<'a, C, const N: usize> {
    /// The host's map.
    pub host: HostMap<&'a FakeMachine>,
    /// Owners of pages.
    pub ownership: &'a Ownership<'a>,
    /// Contents of pages.
    pub contents: C,
    /// All VMs.
    pub vms: VmTable<FakeVm<'a>, N>,
    /// Guests can run here.
    pub has_guests: Cell<bool>,
    /// The host has an interrupt, always: every call takes one step.
    pub interrupted: Cell<bool>,
    /// The vCPU that was kicked last.
    pub kicked: Cell<Option<u8>>,
    /// What the vCPU that was started last began with.
    pub started: Cell<Option<StartOrder>>,
    /// The value to load and whether to wait, of the last run that was asked for.
    pub run_with: Cell<Option<(u64, bool)>>,
    ground: &'a Ground,
}

impl<C, const N: usize> fmt::Debug for FakeBoard<'_, C, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeBoard").finish_non_exhaustive()
    }
}

impl<'a, C: PageContents, const N: usize> FakeBoard<'a, C, N> {
    /// A board without VMs.
    ///
    /// # Panics
    ///
    /// Never: there is memory for the first tables.
    pub fn new(ground: &'a Ground, ownership: &'a Ownership<'a>, contents: C) -> Self {
        let features = Features::decode(&IdRegisters {
            mmfr0: 0x10_1122,
            mmfr1: 0x1021_2122,
            ..IdRegisters::default()
        });
        let format = host_map::format(&features).expect("a usual core");
        let (machine, memory) = (&ground.host, ground.memory());
        let host = HostMap::new(format, machine, Default::default(), memory, ground.els);
        let host = host.expect("there are tables");
        machine.attach(Pa::new(host.root()));
        Self {
            host,
            ownership,
            contents,
            vms: VmTable::new(),
            has_guests: Cell::new(true),
            interrupted: Cell::new(true),
            kicked: Cell::new(None),
            started: Cell::new(None),
            run_with: Cell::new(None),
            ground,
        }
    }

    /// The host's call, from registers to registers.
    pub fn call(&self, call: Call, args: [u64; 6]) -> [u64; 4] {
        calls::perform(self, &self.vms, call, args)
    }

    /// What `meanwhile` gives while another CPU runs a vCPU.
    ///
    /// # Errors
    ///
    /// If it can't run now.
    pub fn while_it_runs<R>(
        &self,
        (handle, index): (u64, u64),
        meanwhile: impl FnOnce() -> R,
    ) -> Result<R, Refusal> {
        self.vms.with(handle, |vm| {
            let vcpu = vm.vcpu(index)?;
            let _inside = vm.state.memory.enter()?;
            vcpu.runs.set(true);
            let result = meanwhile();
            vcpu.runs.set(false);
            Ok(result)
        })
    }
}

impl<'a, C: PageContents, const N: usize> Machine<'a> for &FakeBoard<'a, C, N> {
    type Vm = FakeVm<'a>;
    type Host = HostMap<&'a FakeMachine>;
    type Contents = C;
    type Iommu = NoIommu;

    const VM_PAGES: u64 = 1;

    fn estate(&self) -> Estate<'_, 'a, Self::Host, C> {
        Estate {
            ownership: self.ownership,
            host: &self.host,
            contents: &self.contents,
        }
    }

    fn has_guests(self) -> bool {
        self.has_guests.get()
    }

    fn is_interrupted(self) -> bool {
        self.interrupted.get()
    }

    fn is_free_device(self, registers: AddrRange) -> bool {
        let ram = self.ownership.pages().memory();
        ram.as_slice().iter().all(|ram| !ram.overlaps(registers))
    }

    fn iommu(self) -> NoIommu {
        NoIommu
    }

    fn add_to_heap(self, memory: AddrRange) {
        self.contents.use_for_el2(memory);
    }

    fn build(self, index: u8, config: VmConfig, memory: AddrRange) -> Option<(FakeVm<'a>, u64)> {
        self.contents.use_for_el2(memory);
        let machine = self.ground.tables_of(index)?;
        let table = Stage2::new(guest_format(), machine, Default::default()).ok()?;
        machine.attach(table.root());
        let walk = Walk {
            vmid: u16::from(index) + 1,
            vtcr: 0,
            root: table.root().get(),
            output_bits: OUTPUT_BITS,
            fwb: false,
        };
        let states = self.ownership.pages();
        let vm = FakeVm {
            state: VmState::new((index, config), states, table, walk),
            vgic: OnceCell::new(),
            vcpus: [const { OnceCell::new() }; MAX_VCPUS as usize],
        };
        Some((vm, 1))
    }

    fn add_to_vm(self, _: &FakeVm<'a>, memory: AddrRange) {
        self.contents.use_for_el2(memory);
    }

    fn create_vcpu(self, vm: &FakeVm<'a>, index: u8) -> Result<(), Refusal> {
        let runs = Cell::new(false);
        let made = vm.vcpus[usize::from(index)].set(FakeVcpu { index, runs });
        made.map_err(|_| ErrorCode::Exists.into())
    }

    fn run(
        self,
        vm: &FakeVm<'a>,
        vcpu: &FakeVcpu,
        loaded: u64,
        wait: bool,
    ) -> Result<Exit, Refusal> {
        self.run_with.set(Some((loaded, wait)));
        if vcpu.runs.get() {
            return Err(ErrorCode::Busy.into());
        }
        match vm.state.power.turn(vcpu.index) {
            Turn::IsOff => return Ok(Exit::VcpuOff),
            Turn::Starts(order) => self.started.set(Some(order)),
            Turn::GoesOn => {}
        }
        let interrupted = self.interrupted.get();
        match vm.state.memory.enter_in_steps(|| !interrupted) {
            Ok(_) => Ok(Exit::Interrupted),
            Err(Error::InUse(_)) => Err(ErrorCode::Again.into()),
            Err(error) => Err(error.into()),
        }
    }

    fn kick(self, vcpu: &FakeVcpu) {
        self.kicked.set(Some(vcpu.index));
    }

    fn reset_vcpus(
        self,
        vm: &FakeVm<'a>,
        reset_rest: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut vcpus = vm.vcpus.iter().filter_map(OnceCell::get);
        if vcpus.any(|vcpu| vcpu.runs.get()) {
            return Err(ErrorCode::Busy.into());
        }
        reset_rest()?;
        let mut vcpus = 0..vm.state.config.vcpus;
        let is_on = vcpus.any(|vcpu| vm.state.power.is_runnable(vcpu));
        assert!(!is_on, "a vCPU on empty registers would run");
        Ok(())
    }
}

impl<C, const N: usize> Drop for FakeBoard<'_, C, N> {
    fn drop(&mut self) {
        self.ground.machines().for_each(FakeMachine::detach);
    }
}
