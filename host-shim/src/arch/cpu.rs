//! Turning other cores on and off.

use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use board::{AddrRange, Gic, MAX_CPUS};
use smccc::Hvc;
use smccc::psci::{self, AffinityState, error::Error};

use super::mmu::Settings;
use super::{gic, mem, ticks, ticks_per_second};

const STACK: usize = 16384;

/// What a core starts with; entry.S reads it with the MMU off.
#[repr(C, align(64))]
struct CpuStart {
    stack_top: u64,
    settings: Settings,
    number: u64,
}

const _: () = assert!(offset_of!(CpuStart, settings) == 8);
const _: () = assert!(offset_of!(CpuStart, number) == 40);

#[repr(C, align(4096))]
struct Stacks([[u8; STACK]; MAX_CPUS]);

/// What each core starts with: static, since a suspended core comes back to it.
static mut STARTS: [CpuStart; MAX_CPUS] = [const {
    CpuStart {
        stack_top: 0,
        settings: Settings {
            ttbr0: 0,
            tcr: 0,
            mair: 0,
            sctlr: 0,
        },
        number: 0,
    }
}; MAX_CPUS];

static mut STACKS: Stacks = Stacks([[0; STACK]; MAX_CPUS]);

/// A core's mailbox.
struct Mailbox {
    /// How often it has come up.
    arrivals: AtomicU32,
    /// Its MPIDR as it sees it itself.
    mpidr: AtomicU64,
    /// What it shall do: one of the constants below.
    order: AtomicU32,
    /// The GIC whose timer interrupt ends its suspend: a `*const Gic` that stays valid.
    gic: AtomicU64,
}

const STAY: u32 = 0;
const TURN_OFF: u32 = 1;
const SUSPEND: u32 = 2;
/// CPU_SUSPEND's power state: a state that loses the core's context (DEN 0022 5.4.2).
const POWERDOWN: u32 = 1 << 16;

static MAILBOXES: [Mailbox; MAX_CPUS] = [const {
    Mailbox {
        arrivals: AtomicU32::new(0),
        mpidr: AtomicU64::new(0),
        order: AtomicU32::new(STAY),
        gic: AtomicU64::new(0),
    }
}; MAX_CPUS];

unsafe extern "C" {
    static secondary_start: u8;
    fn enter_kernel(kernel: u64, tree: u64) -> !;
}

/// The entry point for CPU_ON.
pub(crate) fn entry() -> u64 {
    (&raw const secondary_start).addr() as u64
}

/// Turns core `number` on and waits, [`PATIENCE`] at most, until it says so with the right identity.
pub(crate) fn turn_on(number: usize, mpidr: u64, settings: Settings) -> Result<(), &'static str> {
    let mailbox = MAILBOXES.get(number).ok_or("no such core")?;
    let before = mailbox.arrivals.load(Ordering::Acquire);
    let stack = (&raw mut STACKS).cast::<u8>();
    let start = CpuStart {
        stack_top: stack.expose_provenance() as u64 + ((number + 1) * STACK) as u64,
        settings,
        number: number as u64,
    };
    let context = start_of(number);
    let pointer = core::ptr::with_exposed_provenance_mut::<CpuStart>(context as usize);
    // SAFETY: in the static array (`number` has a mailbox); the core that reads it is off.
    unsafe { pointer.write(start) };
    if let Some(range) = AddrRange::with_size(context, size_of::<CpuStart>() as u64) {
        mem::clean_invalidate_to_poc(range);
    }
    psci::cpu_on::<Hvc>(mpidr, entry(), context).map_err(|_| "CPU_ON was refused")?;
    wait(
        || mailbox.arrivals.load(Ordering::Acquire) != before,
        "it did not arrive",
    )?;
    if mailbox.mpidr.load(Ordering::Relaxed) != mpidr {
        return Err("it has another core's MPIDR");
    }
    match psci::cpu_on::<Hvc>(mpidr, entry(), context) {
        Err(Error::AlreadyOn) => Ok(()),
        _ => Err("a second CPU_ON did not answer ALREADY_ON"),
    }
}

/// What a core does that [`start`] has turned on: the address of a `fn(usize) -> !`, 0 for none.
static WORK: AtomicUsize = AtomicUsize::new(0);

/// Turns core `number` on for good: it calls `work` with its number.
pub(crate) fn start(
    number: usize,
    mpidr: u64,
    settings: Settings,
    work: fn(usize) -> !,
) -> Result<(), &'static str> {
    WORK.store(work as usize, Ordering::Release);
    turn_on(number, mpidr, settings)
}

/// Turns this core off, which [`start`] has turned on, the only one; it can be turned on again.
pub(crate) fn retire() -> ! {
    WORK.store(0, Ordering::Release);
    // Comes back only if it was denied; then who waits for it waits in vain.
    let denied = psci::cpu_off::<Hvc>();
    debug_assert!(denied.is_ok());
    super::halt()
}

/// Makes core `number` turn itself off and waits until PSCI says so, as [`wait_for_off`].
pub(crate) fn turn_off(number: usize, mpidr: u64) -> Result<(), &'static str> {
    let mailbox = MAILBOXES.get(number).ok_or("no such core")?;
    if psci::affinity_info::<Hvc>(mpidr, psci::LowestAffinityLevel::All) != Ok(AffinityState::On) {
        return Err("AFFINITY_INFO does not say that it is on");
    }
    mailbox.order.store(TURN_OFF, Ordering::Release);
    wait_for_off(mpidr)
}

/// Waits until PSCI says that a core is off, [`PATIENCE`] at most.
pub(crate) fn wait_for_off(mpidr: u64) -> Result<(), &'static str> {
    wait(
        || {
            psci::affinity_info::<Hvc>(mpidr, psci::LowestAffinityLevel::All)
                == Ok(AffinityState::Off)
        },
        "it did not go off",
    )
}

/// Where core `number`'s `CpuStart` is.
fn start_of(number: usize) -> u64 {
    let first = (&raw mut STARTS).cast::<CpuStart>();
    first.wrapping_add(number).expose_provenance() as u64
}

fn suspend_self(mailbox: &Mailbox, context: u64) {
    let gic =
        core::ptr::with_exposed_provenance::<Gic>(mailbox.gic.load(Ordering::Relaxed) as usize);
    // SAFETY: null, or set by `power_down` to the machine's GIC, which lives as long as the host.
    let gic = unsafe { gic.as_ref() };
    if gic.is_some_and(|gic| gic::arm_timer(gic, 5).is_ok()) {
        let refused = psci::cpu_suspend::<Hvc>(POWERDOWN, entry(), context);
        debug_assert!(refused.is_err());
    }
}

/// Suspends this core in a state that keeps its context, until its timer fires; gives the
/// microseconds that took.
pub(crate) fn standby(gic: &Gic, milliseconds: u64) -> Result<u64, &'static str> {
    let before = ticks();
    gic::arm_timer(gic, milliseconds)?;
    let result = psci::cpu_suspend::<Hvc>(0, 0, 0);
    let elapsed = (ticks() - before) * 1_000_000 / ticks_per_second();
    gic::disarm_timer(gic);
    result.map_err(|_| "CPU_SUSPEND was refused")?;
    Ok(elapsed)
}

/// Makes core `number`, which is on, suspend itself in a state that loses its context; it must
/// arrive again at its entry point. `gic` lives as long as the host.
pub(crate) fn power_down(number: usize, gic: &Gic) -> Result<(), &'static str> {
    let mailbox = MAILBOXES.get(number).ok_or("no such core")?;
    let before = mailbox.arrivals.load(Ordering::Acquire);
    let gic = core::ptr::from_ref(gic).expose_provenance() as u64;
    mailbox.gic.store(gic, Ordering::Relaxed);
    mailbox.order.store(SUSPEND, Ordering::Release);
    wait(
        || mailbox.arrivals.load(Ordering::Acquire) != before,
        "it did not come back",
    )
}

/// Seconds that another core may take for anything: an emulator's may not get to run for long.
const PATIENCE: u64 = 20;

fn wait(done: impl Fn() -> bool, why: &'static str) -> Result<(), &'static str> {
    let deadline = ticks() + PATIENCE * ticks_per_second();
    while ticks() < deadline {
        if done() {
            return Ok(());
        }
        core::hint::spin_loop();
    }
    Err(why)
}

/// Where another core arrives, on its own stack with its MMU on.
#[unsafe(no_mangle)]
extern "C" fn shim_secondary(number: u64) -> ! {
    if let Some(mailbox) = MAILBOXES.get(number as usize) {
        mailbox.order.store(STAY, Ordering::Relaxed);
        mailbox.mpidr.store(super::mpidr(), Ordering::Relaxed);
        mailbox.arrivals.fetch_add(1, Ordering::Release);
        let work = WORK.load(Ordering::Acquire);
        if work != 0 {
            // SAFETY: `start` stored exactly such a function.
            let work = unsafe { core::mem::transmute::<usize, fn(usize) -> !>(work) };
            work(number as usize)
        }
        let mut order = STAY;
        while order == STAY {
            core::hint::spin_loop();
            order = mailbox.order.load(Ordering::Acquire);
        }
        if order == SUSPEND {
            // Comes back only if it was refused: then the scenario's wait runs out.
            suspend_self(mailbox, start_of(number as usize));
        }
    }
    // Comes back only if it was denied; then the scenario's wait runs out.
    let denied = psci::cpu_off::<Hvc>();
    debug_assert!(denied.is_ok());
    super::halt()
}

/// Leaves the shim for good.
pub(crate) fn enter(kernel: u64, tree: u64) -> ! {
    // SAFETY: both are clean to the point of coherency; the shim is not needed again.
    unsafe { enter_kernel(kernel, tree) }
}

/// Puts a value into D8, which this binary uses for nothing.
pub(crate) fn set_d8(value: u64) {
    // SAFETY: opens FP for EL1, and no code of this binary uses it.
    unsafe {
        core::arch::asm!(".arch_extension fp", "mrs {t}, cpacr_el1", "orr {t}, {t}, #3 << 20",
            "msr cpacr_el1, {t}", "isb", "fmov d8, {v}", ".arch_extension nofp",
            t = out(reg) _, v = in(reg) value, options(nostack, preserves_flags));
    }
}

/// What is in it.
pub(crate) fn d8() -> u64 {
    let value;
    // SAFETY: `set_d8` has opened FP.
    unsafe {
        core::arch::asm!(".arch_extension fp", "fmov {v}, d8", ".arch_extension nofp",
            v = out(reg) value, options(nostack, preserves_flags));
    }
    value
}
