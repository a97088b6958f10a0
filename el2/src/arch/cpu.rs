//! The cores: their data, parking, starting the others, and going down to EL1.

use core::mem::{MaybeUninit, offset_of};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use aarch64_cpu::registers::{ELR_EL2, TPIDR_EL2};
use aarch64_cpu::registers::{Readable, Writeable};
use board::MAX_CPUS;
use el2::kick::HostKick;
use el2::psci::{PowerSlot, StartOrder};
use spin::Once;

use super::controls::HostControls;
use super::mmu::Settings;
use super::{instructions, mem, regs};
use crate::boot::Boot;

/// SPSR_EL2 for a core that starts at EL1: EL1h, D, A, I and F masked.
const EL1H_MASKED: u64 = 0b00101 | 0xf << 6;

/// A core's data, on a page of its own; TPIDR_EL2 points to it.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct CpuData {
    stack_top: u64,
    emergency_top: u64,
    /// Branches that overwrite this core's branch history; 0 if nothing has to.
    history: AtomicU64,
    /// Number of the core, in the device tree's order.
    pub(crate) index: u64,
    /// Affinity fields of MPIDR_EL1.
    pub(crate) mpidr: u64,
    /// What ICC_SGI1R_EL1 takes to interrupt it, but the INTID (IHI 0069H 12.2.19).
    pub(crate) sgi_target: u64,
    /// Its power state.
    pub(crate) power: PowerSlot,
    /// A vCPU that this core's host lets sleep may be runnable: a kick is the host's.
    pub(crate) host_kick: HostKick,
    /// Where its private interrupts' registers are; 0 before they are prepared.
    pub(crate) gic_frame: AtomicU64,
    /// GICv2: the bit of its interface in target registers; 0 before it is prepared.
    pub(crate) gic_target: AtomicU8,
    /// The guest timer's physical interrupt is marked active.
    pub(crate) timer_active: AtomicBool,
    /// What EL2 tells it about the host, from before its first guest on.
    pub(crate) host_controls: Once<HostControls>,
    /// In what it differs from the core that booted, so that it is left out.
    pub(crate) differs: Once<&'static str>,
}

// entry.S and vectors.S use these.
const _: () = assert!(offset_of!(CpuData, stack_top) == 0);
const _: () = assert!(offset_of!(CpuData, emergency_top) == 8);
const _: () = assert!(offset_of!(CpuData, history) == 16);
const _: () = assert!(size_of::<CpuData>() <= board::PAGE_SIZE as usize);

impl CpuData {
    /// A core that has not come up: number and affinity `id`, in its block. Once per core, at boot.
    pub(crate) fn create(block: &el2::layout::CpuBlock, id: (u64, u64)) -> &'static Self {
        let address = block.data.start() as usize;
        let pointer = core::ptr::with_exposed_provenance_mut::<MaybeUninit<Self>>(address);
        let data = Self {
            stack_top: block.stack.end(),
            emergency_top: block.emergency.end(),
            history: AtomicU64::new(0),
            index: id.0,
            mpidr: id.1,
            sgi_target: sgi_target(id.1),
            power: PowerSlot::new(),
            host_kick: HostKick::new(),
            gic_frame: AtomicU64::new(0),
            gic_target: AtomicU8::new(0),
            timer_active: AtomicBool::new(false),
            host_controls: Once::new(),
            differs: Once::new(),
        };
        // SAFETY: the block is EL2's, mapped, this core's alone; a page is large enough (asserted).
        unsafe { &mut *pointer }.write(data)
    }

    /// Makes this core use the data.
    pub(crate) fn adopt(&'static self) {
        TPIDR_EL2.set(core::ptr::from_ref(self).expose_provenance() as u64);
    }

    /// Makes this core forget the branches of lower levels whenever it enters EL2, if it has to.
    pub(crate) fn forget_history(&'static self) {
        let branches = el2::features::history(&regs::id_registers());
        self.history.store(branches.into(), Ordering::Relaxed);
        if branches > 0 {
            regs::set_vectors((&raw const forgetful_vectors).addr() as u64);
        }
    }

    /// Whether `address` lies on this core's stack or emergency stack.
    pub(crate) fn on_a_stack(&self, address: u64) -> bool {
        let stack = self.stack_top - el2::layout::STACK..self.stack_top;
        let emergency = self.emergency_top - el2::layout::EMERGENCY..self.emergency_top;
        stack.contains(&address) || emergency.contains(&address)
    }

    /// Whether `address` is in the guard page below the stack.
    pub(crate) fn is_guard(&self, address: u64) -> bool {
        let bottom = self.stack_top - el2::layout::STACK;
        (bottom - board::PAGE_SIZE..bottom).contains(&address)
    }
}

/// Affinity fields of MPIDR_EL1 as ICC_SGI1R_EL1 has them: Aff3 to Aff1, range and target list of Aff0.
const fn sgi_target(mpidr: u64) -> u64 {
    let list = 1 << (mpidr & 0xf);
    let range = (mpidr >> 4 & 0xf) << 44;
    let cluster =
        (mpidr >> 8 & 0xff) << 16 | (mpidr >> 16 & 0xff) << 32 | (mpidr >> 32 & 0xff) << 48;
    cluster | range | list
}

/// This core's data, or `None` before it has any.
pub(crate) fn this_cpu() -> Option<&'static CpuData> {
    if !regs::mmu_is_on() {
        return None;
    }
    running()
}

/// This core's data, for code that runs with the MMU on: what guests and the host cause.
#[inline]
pub(crate) fn running() -> Option<&'static CpuData> {
    let pointer = core::ptr::with_exposed_provenance::<CpuData>(TPIDR_EL2.get() as usize);
    // SAFETY: TPIDR_EL2 is 0 or was set by `adopt` (or entry.S) to data that lives for ever; the
    // host can't write it.
    unsafe { pointer.as_ref() }
}

unsafe extern "C" {
    static forgetful_vectors: u8;
    fn enter_el1(stack_top: u64, context: u64) -> !;
    fn switch_stack(top: u64, boot: *mut ()) -> !;
    fn leave_boot(stack_top: u64, entry: u64, context: u64) -> !;
}

/// Leaves EL2's stack empty and enters the host on this core.
pub(crate) fn enter_host(cpu: &CpuData, order: StartOrder) -> ! {
    ELR_EL2.set(order.entry);
    regs::return_as(EL1H_MASKED);
    // SAFETY: nothing on the stack is needed again; the host runs behind its stage 2, and what it
    // enters with are ELR, SPSR and x0 as set here.
    unsafe { enter_el1(cpu.stack_top, order.context) }
}

/// Continues on this core's own stack in `boot_main`, with its argument on the stack that is left.
pub(crate) fn continue_boot(cpu: &CpuData, boot: &mut Boot) -> ! {
    let argument = core::ptr::from_mut(boot).cast();
    // SAFETY: this core's own stack is mapped and empty; the frame with the argument is on the boot
    // stack, which nobody uses again. entry.S passes the argument to `boot_main`, which takes it.
    unsafe { switch_stack(cpu.stack_top, argument) }
}

/// Leaves boot for good, for `boot_is_over`, on this core's stack, which is empty then.
pub(crate) fn end_boot(cpu: &CpuData, order: StartOrder) -> ! {
    // SAFETY: nothing on the stack is needed again, and `boot_is_over` takes the two numbers.
    unsafe { leave_boot(cpu.stack_top, order.entry, order.context) }
}

/// What the entry code of secondary cores reads with their MMU off. The layout is entry.S's.
#[repr(C)]
struct SecondaryBoot {
    settings: Settings,
    table: u64,
    count: u64,
    cpus: [(u64, u64); MAX_CPUS],
}

const _: () = assert!(offset_of!(SecondaryBoot, table) == 32);
const _: () = assert!(offset_of!(SecondaryBoot, count) == 40);

#[unsafe(no_mangle)]
static mut SECONDARY_BOOT: SecondaryBoot = SecondaryBoot {
    settings: Settings {
        ttbr0: 0,
        tcr: 0,
        mair: 0,
        sctlr: 0,
    },
    table: 0,
    count: 0,
    cpus: [(0, 0); MAX_CPUS],
};

/// Publishes what secondary cores need, to the point of coherency.
pub(crate) fn publish_secondary_boot(settings: Settings, cpus: &[&'static CpuData]) {
    let boot = &raw mut SECONDARY_BOOT;
    let mut table = [(0, 0); MAX_CPUS];
    for (entry, cpu) in table.iter_mut().zip(cpus) {
        *entry = (
            cpu.mpidr,
            core::ptr::from_ref(*cpu).expose_provenance() as u64,
        );
    }
    let value = SecondaryBoot {
        settings,
        table: boot.expose_provenance() as u64 + offset_of!(SecondaryBoot, cpus) as u64,
        count: cpus.len() as u64,
        cpus: table,
    };
    // SAFETY: no other core runs EL2 code yet, so nobody reads or writes it now.
    unsafe { boot.write(value) };
    let size = size_of::<SecondaryBoot>() as u64;
    if let Some(range) = board::AddrRange::with_size(boot.expose_provenance() as u64, size) {
        mem::clean_invalidate_to_poc(range);
    }
}

/// Wakes all cores that wait in [`wait_for_event`].
pub(crate) fn send_event() {
    // The woken see what was stored before.
    instructions::dsb_ish();
    instructions::sev();
}

/// Waits for an event; may return without one.
pub(crate) fn wait_for_event() {
    instructions::wfe();
}

/// Waits until an interrupt is pending for this core, without taking it.
///
/// HCR_EL2.IMO and FMO are set meanwhile, so that physical interrupts target EL2, where PSTATE
/// masks them: only then is it certain that they wake the core (Arm ARM D1.6.2).
pub(crate) fn wait_for_interrupt() {
    const IMO_FMO: u64 = 1 << 4 | 1 << 3;
    let hcr = regs::mrs!("hcr_el2");
    regs::set_hcr(hcr | IMO_FMO);
    instructions::isb();
    instructions::dsb_sy();
    instructions::wfi();
    regs::set_hcr(hcr);
}

/// Waits for an interrupt in the place of a guest that is loaded: with its HCR_EL2, interrupts
/// target EL2, which masks them.
pub(crate) fn wait_as_guest() {
    instructions::dsb_sy();
    instructions::wfi();
}

/// Stops this core for ever.
pub(crate) fn halt() -> ! {
    loop {
        instructions::mask_exceptions();
        instructions::wfi();
    }
}
