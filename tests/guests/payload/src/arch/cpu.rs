//! This CPU and the others: identity, time, PSCI, and tasks for secondaries.

use super::{instruction, mem, mmu, mrs};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Most CPUs there can be.
pub const MAX: usize = 8;

/// Number of this CPU: affinity 0.
pub fn index() -> usize {
    (mrs!("mpidr_el1") & 7) as usize
}

/// The virtual counter.
pub fn ticks() -> u64 {
    instruction!("isb");
    mrs!("cntvct_el0")
}

/// Counts of the counter per second.
pub fn frequency() -> u64 {
    mrs!("cntfrq_el0")
}

/// Counts in this many microseconds.
pub fn micros(count: u64) -> u64 {
    count * frequency() / 1_000_000
}

/// Waits until `done` or for `limit` microseconds; says whether it was done.
pub fn wait(limit: u64, done: impl Fn() -> bool) -> bool {
    let end = ticks() + micros(limit);
    while !done() {
        if ticks() > end {
            return done();
        }
        instruction!("yield");
    }
    true
}

/// Lets interrupts in.
pub fn unmask() {
    instruction!("msr daifclr, #2");
    instruction!("isb");
}

/// Keeps interrupts out.
pub fn mask() {
    instruction!("msr daifset, #2");
}

/// HVC #0 with four registers; gives `x0` to `x3`.
#[inline(always)]
pub fn hvc(x: [u64; 4]) -> [u64; 4] {
    let [mut a, mut b, mut c, mut d] = x;
    // SAFETY: the calling convention keeps all other registers (Arm DEN 0028).
    unsafe {
        asm!("hvc #0", inout("x0") a, inout("x1") b, inout("x2") c, inout("x3") d, options(nostack));
    }
    [a, b, c, d]
}

/// PSCI functions (Arm DEN 0022), 64-bit where there are two.
pub mod psci {
    pub const VERSION: u64 = 0x8400_0000;
    pub const CPU_SUSPEND: u64 = 0xc400_0001;
    pub const CPU_OFF: u64 = 0x8400_0002;
    pub const CPU_ON: u64 = 0xc400_0003;
    pub const AFFINITY_INFO: u64 = 0xc400_0004;
    pub const MIGRATE_INFO_TYPE: u64 = 0x8400_0006;
    pub const SYSTEM_OFF: u64 = 0x8400_0008;
    pub const SYSTEM_RESET: u64 = 0x8400_0009;
    pub const FEATURES: u64 = 0x8400_000a;
    pub const SYSTEM_RESET2: u64 = 0xc400_0012;
    pub const NOT_SUPPORTED: i64 = -1;
    pub const INVALID_PARAMETERS: i64 = -2;
    pub const ALREADY_ON: i64 = -4;
    pub const INVALID_ADDRESS: i64 = -9;

    /// A call; its answer is signed, of 32 or 64 bits.
    pub fn call(id: u64, a: u64, b: u64, c: u64) -> i64 {
        super::hvc([id, a, b, c])[0].cast_signed()
    }

    /// Whether CPU `index` is on (0), off (1) or about to be on (2); negative: there is none.
    pub fn affinity_info(index: usize) -> i64 {
        call(AFFINITY_INFO, index as u64, 0, 0)
    }
}

/// CPUs that PSCI knows.
pub fn count() -> usize {
    (0..MAX)
        .take_while(|&index| psci::affinity_info(index) >= 0)
        .count()
}

static TASKS: [AtomicUsize; MAX] = [const { AtomicUsize::new(0) }; MAX];
/// Set while a CPU owes the end of its task. AFFINITY_INFO alone is not enough: QEMU's own PSCI calls a CPU off until
/// it has really started.
static BUSY: [AtomicBool; MAX] = [const { AtomicBool::new(false) }; MAX];

unsafe extern "C" {
    fn secondary_entry();
    static stacks: u8;
}

/// Bytes of a CPU's stack; entry.S has it, too.
const STACK: u64 = 16384;

/// Address at which a CPU must be started.
pub fn entry_point() -> u64 {
    secondary_entry as *const () as u64
}

/// Turns CPU `index` on; it runs `task` with its number, MMU on and interrupts masked, and turns itself off after.
pub fn start(index: usize, task: fn(usize)) -> i64 {
    TASKS[index].store(task as usize, Ordering::SeqCst);
    BUSY[index].store(true, Ordering::SeqCst);
    // It stores there with its MMU off, past what the caches hold of its last turn.
    let stack = (&raw const stacks).addr() as u64 + index as u64 * STACK;
    let line = 4 << (mrs!("ctr_el0") >> 16 & 0xf);
    for address in (stack..stack + STACK).step_by(line) {
        mem::clean_invalidate(address);
    }
    instruction!("dsb sy");
    psci::call(psci::CPU_ON, index as u64, entry_point(), index as u64)
}

/// Waits until CPU `index` has done its task and is off.
pub fn join(index: usize) -> bool {
    wait(10_000_000, || {
        !BUSY[index].load(Ordering::SeqCst) && psci::affinity_info(index) == 1
    })
}

/// Runs `task` on all other CPUs, then here; says whether all of them started and ended.
pub fn everywhere(task: fn(usize)) -> bool {
    let others = 1..count();
    let started = others.clone().all(|other| start(other, task) == 0);
    task(0);
    started && others.clone().all(join)
}

#[unsafe(no_mangle)]
extern "C" fn guest_secondary(index: usize) -> ! {
    mmu::enable();
    let task = TASKS[index].load(Ordering::SeqCst);
    // SAFETY: `start` has stored a function of this type before it turned this CPU on.
    let task: fn(usize) = unsafe { core::mem::transmute(task) };
    task(index);
    mask();
    BUSY[index].store(false, Ordering::SeqCst);
    psci::call(psci::CPU_OFF, 0, 0, 0);
    halt()
}

/// Waits for ever.
pub fn halt() -> ! {
    mask();
    loop {
        instruction!("wfi");
    }
}
