//! The other CPUs: started once, then each waits for work.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use spin::Mutex;
use vmx::capability::Capabilities;
use vmx::shootdown::MAX_CPUS;

use super::{lapic, power, root, time};

/// What a CPU is asked to do.
type Job = Box<dyn FnOnce(&Cpu) + Send>;

/// A CPU in VMX root operation; only that CPU itself has one.
#[derive(Debug)]
pub(crate) struct Cpu {
    /// Its number, from 0.
    pub(crate) number: usize,
    /// What it offers.
    pub(crate) capabilities: Capabilities,
}

/// What others know of a CPU.
struct Seat {
    apic: AtomicU32,
    ready: AtomicBool,
    busy: AtomicBool,
    job: Mutex<Option<Job>>,
}

static SEATS: [Seat; MAX_CPUS] = [const {
    Seat {
        apic: AtomicU32::new(0),
        ready: AtomicBool::new(false),
        busy: AtomicBool::new(false),
        job: Mutex::new(None),
    }
}; MAX_CPUS];

/// CPUs that run; fixed after [`start_others`].
static COUNT: AtomicUsize = AtomicUsize::new(1);

unsafe extern "C" {
    /// CPUs that boot.S has counted, without the boot CPU.
    static other_cpus: AtomicU32;
}

/// Real-mode page of boot.S's entry for other CPUs.
const ENTRY_PAGE: u8 = 8;

/// Brings this CPU into VMX root operation, or says why that cannot be.
fn take_seat(number: usize) -> Cpu {
    let capabilities = match root::start() {
        Ok(capabilities) => capabilities,
        Err(missing) => power::fatal(format_args!("{missing}")),
    };
    let seat = &SEATS[number];
    seat.apic.store(lapic::enable(), Ordering::Relaxed);
    seat.ready.store(true, Ordering::Release);
    Cpu {
        number,
        capabilities,
    }
}

/// The boot CPU's seat.
pub(crate) fn boot_cpu() -> Cpu {
    take_seat(0)
}

/// Starts all other CPUs (SDM vol. 3A 9.4.4); how many CPUs there are then.
pub(crate) fn start_others() -> usize {
    lapic::init_others();
    time::wait_microseconds(10_000);
    for _ in 0..2 {
        lapic::start_others(ENTRY_PAGE);
        time::wait_microseconds(1_000);
    }
    // SAFETY: boot.S's counter is an aligned 32-bit word that is only changed atomically.
    let others = unsafe { &other_cpus }.load(Ordering::Acquire) as usize;
    let count = (others + 1).min(MAX_CPUS);
    for seat in &SEATS[1..count] {
        while !seat.ready.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
    }
    COUNT.store(count, Ordering::Relaxed);
    count
}

/// CPUs there are.
pub(crate) fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// What every other CPU does for good.
pub(super) fn serve(number: usize) -> ! {
    let cpu = take_seat(number);
    let seat = &SEATS[number];
    loop {
        let job = seat.job.lock().take();
        if let Some(job) = job {
            job(&cpu);
            seat.busy.store(false, Ordering::Release);
        }
        core::hint::spin_loop();
    }
}

/// Gives CPU `number` (1 or more) work; says whether it is there and was free.
pub(crate) fn run_on(number: usize, job: impl FnOnce(&Cpu) + Send + 'static) -> bool {
    if number == 0 || number >= count() {
        return false;
    }
    let seat = &SEATS[number];
    if seat.busy.swap(true, Ordering::Acquire) {
        return false;
    }
    *seat.job.lock() = Some(Box::new(job));
    true
}

/// Waits until CPU `number` has done its work; says whether it did within `microseconds`.
pub(crate) fn wait_for(number: usize, microseconds: u64) -> bool {
    let end = super::cpu::timestamp() + microseconds * time::hz() / 1_000_000;
    while SEATS[number].busy.load(Ordering::Acquire) {
        if super::cpu::timestamp() > end {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Drives a CPU out of the guest.
pub(crate) fn kick(number: usize) {
    lapic::kick(SEATS[number].apic.load(Ordering::Relaxed));
}

/// Ends the interrupt of the host that drove this CPU out.
pub(crate) fn end_of_interrupt() {
    lapic::end_of_interrupt();
}
