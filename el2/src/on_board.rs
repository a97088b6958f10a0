//! The board as the machine of the library's calls.

use abi::{Exit, VmConfig};
use board::{AddrRange, PAGE_SIZE};
use el2::host_map::HostMap;
use el2::machine::Machine;
use el2::vm_error::Refusal;
use el2::vm_table::Estate;

use crate::arch::frames::{self, FramePool};
use crate::arch::owned::Owned;
use crate::arch::regs;
use crate::arch::tables::Tables;
use crate::hypervisor::Hypervisor;
use crate::iommu::Functions;
use crate::protect::{self, Pages};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

impl Machine<'static> for &'static Hypervisor {
    type Vm = Owned<Vm>;
    type Host = HostMap<Tables>;
    type Contents = Pages;
    type Iommu = Functions;

    const VM_PAGES: u64 = Vm::PAGES;

    fn estate(&self) -> Estate<'_, 'static, HostMap<Tables>, Pages> {
        protect::estate(self)
    }

    fn has_guests(self) -> bool {
        self.gic.version() != 0
    }

    fn is_interrupted(self) -> bool {
        regs::interrupt_pending()
    }

    fn is_free_device(self, registers: AddrRange) -> bool {
        Hypervisor::is_free_device(self, registers)
    }

    fn iommu(self) -> Functions {
        Functions
    }

    fn add_to_heap(self, memory: AddrRange) {
        frames::add_to_el2_pool(memory);
    }

    fn build(self, index: u8, config: VmConfig, memory: AddrRange) -> Option<(Owned<Vm>, u64)> {
        let pool = FramePool::over_donated(memory);
        let vm = Vm::build(self, index, config, pool)?;
        let used = memory.size() - vm.shared.pool.free_bytes();
        Some((vm, used / PAGE_SIZE))
    }

    fn add_to_vm(self, vm: &Owned<Vm>, memory: AddrRange) {
        vm.shared.pool.add_donated(memory);
    }

    fn create_vcpu(self, vm: &Owned<Vm>, index: u8) -> Result<(), Refusal> {
        vm.create_vcpu(self, index)
    }

    fn run(
        self,
        vm: &Owned<Vm>,
        vcpu: &Vcpu,
        loaded: u64,
        wait_here: bool,
    ) -> Result<Exit, Refusal> {
        vcpu.run(self, vm, loaded, wait_here)
    }

    fn kick(self, vcpu: &Vcpu) {
        vcpu.kick(self);
    }

    fn reset_vcpus(
        self,
        vm: &Owned<Vm>,
        reset_rest: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        vm.reset_vcpus(self, reset_rest)
    }
}
