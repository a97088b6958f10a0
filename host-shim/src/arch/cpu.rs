//! Turning other cores on and off.

use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use board::{AddrRange, MAX_CPUS};
use smccc::Hvc;
use smccc::psci::{self, AffinityState, error::Error};

use super::mmu::Settings;
use super::{mem, ticks, ticks_per_second};

const STACK: usize = 4096;

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

static mut STACKS: Stacks = Stacks([[0; STACK]; MAX_CPUS]);

/// A core's mailbox.
struct Mailbox {
    /// How often it has come up.
    arrivals: AtomicU32,
    /// Its MPIDR as it sees it itself.
    mpidr: AtomicU64,
    /// It shall turn itself off.
    leave: AtomicU32,
}

static MAILBOXES: [Mailbox; MAX_CPUS] = [const {
    Mailbox {
        arrivals: AtomicU32::new(0),
        mpidr: AtomicU64::new(0),
        leave: AtomicU32::new(0),
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

/// Turns core `number` on and waits up to a second until it says so with the right identity.
pub(crate) fn turn_on(number: usize, mpidr: u64, settings: Settings) -> Result<(), &'static str> {
    let mailbox = MAILBOXES.get(number).ok_or("no such core")?;
    let before = mailbox.arrivals.load(Ordering::Acquire);
    let stack = (&raw mut STACKS).cast::<u8>();
    let start = CpuStart {
        stack_top: stack.expose_provenance() as u64 + ((number + 1) * STACK) as u64,
        settings,
        number: number as u64,
    };
    let context = (&raw const start).expose_provenance() as u64;
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

/// Makes core `number` turn itself off and waits up to a second until PSCI says so.
pub(crate) fn turn_off(number: usize, mpidr: u64) -> Result<(), &'static str> {
    let mailbox = MAILBOXES.get(number).ok_or("no such core")?;
    if psci::affinity_info::<Hvc>(mpidr, psci::LowestAffinityLevel::All) != Ok(AffinityState::On) {
        return Err("AFFINITY_INFO does not say that it is on");
    }
    mailbox.leave.store(1, Ordering::Release);
    wait(
        || {
            psci::affinity_info::<Hvc>(mpidr, psci::LowestAffinityLevel::All)
                == Ok(AffinityState::Off)
        },
        "it did not go off",
    )
}

fn wait(done: impl Fn() -> bool, why: &'static str) -> Result<(), &'static str> {
    let deadline = ticks() + 2 * ticks_per_second();
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
        mailbox.leave.store(0, Ordering::Relaxed);
        mailbox.mpidr.store(super::mpidr(), Ordering::Relaxed);
        mailbox.arrivals.fetch_add(1, Ordering::Release);
        while mailbox.leave.load(Ordering::Acquire) == 0 {
            core::hint::spin_loop();
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
