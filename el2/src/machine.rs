//! What the host's calls ask of the machine that they run on.
//!
//! The board behind [`crate::calls`] is the image's, or one of fake memory in a test. Everything that
//! the library can decide is decided there; here are objects in memory, vCPUs that run, and devices.

use abi::{ErrorCode, Exit, VmConfig, VmCounter};
use board::AddrRange;
use stage2::Platform;

use crate::devices::Iommu;
use crate::guest_memory::Contents;
use crate::host_map::HostReach;
use crate::vgic::Vgic;
use crate::vm_error::Refusal;
use crate::vm_state::VmState;
use crate::vm_table::{Estate, Teardown};

/// A VM, as the machine makes it.
pub trait VirtualMachine<'s>: Teardown {
    /// Where its tables are.
    type Tables: Platform;
    /// A virtual CPU.
    type Vcpu;

    /// What the library knows of it.
    fn state(&self) -> &VmState<'s, Self::Tables>;

    /// Its interrupt controller.
    fn vgic(&self) -> &Vgic;

    /// The vCPU with this index.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotFound`] if it has not been created.
    fn vcpu(&self, index: u64) -> Result<&Self::Vcpu, ErrorCode>;

    /// The value of a counter.
    fn counter(&self, counter: VmCounter) -> u64;
}

/// The machine. It is passed around, so it is a reference to what there is.
pub trait Machine<'s>: Copy {
    /// What VMs are here.
    type Vm: VirtualMachine<'s>;
    /// The host's address space.
    type Host: HostReach;
    /// What is done to pages.
    type Contents: Contents;
    /// The IOMMU, if any.
    type Iommu: Iommu<'s>;

    /// Pages that a VM needs at once.
    const VM_PAGES: u64;

    /// Memory, and who has to agree about it.
    fn estate(&self) -> Estate<'_, 's, Self::Host, Self::Contents>;

    /// Whether guests can run here at all.
    fn has_guests(self) -> bool;

    /// Whether the host has an interrupt: a call ends as soon as it can then.
    fn is_interrupted(self) -> bool;

    /// Whether device registers are nobody's, so that a guest may have them.
    fn is_free_device(self, registers: AddrRange) -> bool;

    /// Who isolates DMA.
    fn iommu(self) -> Self::Iommu;

    /// Adds donated memory to EL2's heap.
    fn add_to_heap(self, memory: AddrRange);

    /// Builds the VM with this index in donated memory: it, and the pages that it took; `None` if
    /// the memory is not fit for it.
    fn build(self, index: u8, config: VmConfig, memory: AddrRange) -> Option<(Self::Vm, u64)>;

    /// Gives a VM more memory, which the host has donated, for its tables and vCPUs.
    fn add_to_vm(self, vm: &Self::Vm, memory: AddrRange);

    /// Makes a vCPU that is not there yet; its index is below the number in the VM's configuration.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NoMemory`].
    fn create_vcpu(self, vm: &Self::Vm, index: u8) -> Result<(), Refusal>;

    /// Runs a vCPU of a VM that may run, which first gets the value of the load that it waits for.
    ///
    /// # Errors
    ///
    /// As [`abi::Call::VcpuRun`].
    fn run(
        self,
        vm: &Self::Vm,
        vcpu: &<Self::Vm as VirtualMachine<'s>>::Vcpu,
        loaded: u64,
        wait_here: bool,
    ) -> Result<Exit, Refusal>;

    /// Makes a vCPU look at its interrupts.
    fn kick(self, vcpu: &<Self::Vm as VirtualMachine<'s>>::Vcpu);

    /// Keeps all vCPUs of a VM from running while `reset_rest` resets everything else; if that is complete,
    /// makes them as they were when they were created, and lets go of them.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Busy`] while one runs; or what `reset_rest` says.
    fn reset_vcpus(
        self,
        vm: &Self::Vm,
        reset_rest: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<(), Refusal>;
}
