//! Prints `ticks N of F Hz`: the virtual counter since reset, read in Linux's user space, and its frequency.
//!
//! With a command behind its name it runs that, and prints `took N ticks of F Hz` and, where Linux can count them,
//! `, I instructions`: what CPU 0 has executed meanwhile at all exception levels, whoever's it was. Exits with 1 if the
//! command failed.
//!
//! A static program without any library: counter reads and system calls.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};

/// Longest line: three 20-digit numbers and the words between them.
const LINE: usize = 128;

/// System calls of Linux on arm64 (include/uapi/asm-generic/unistd.h).
mod call {
    pub(crate) const READ: usize = 63;
    pub(crate) const WRITE: usize = 64;
    pub(crate) const EXIT: usize = 93;
    pub(crate) const CLONE: usize = 220;
    pub(crate) const EXECVE: usize = 221;
    pub(crate) const PERF_EVENT_OPEN: usize = 241;
    pub(crate) const WAIT4: usize = 260;
}

/// Entry: the kernel gives a stack aligned to 16 bytes and zeroes every register (AAPCS64, ELF start-up). The stack holds
/// the number of arguments, their addresses and a zero, then the environment's.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub extern "C" fn _start() -> ! {
    naked_asm!("mov x29, xzr", "mov x30, xzr", "mov x0, sp", "b {main}", main = sym main)
}

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: the kernel's own layout: the number of arguments is there, and as many words and a zero follow.
    let (count, arguments) = unsafe { (stack.read(), stack.add(1)) };
    if count < 2 {
        let (now, frequency) = counter();
        let mut line = Line::new(b"ticks ");
        line.number(now);
        line.text(b" of ");
        line.number(frequency);
        line.text(b" Hz\n");
        line.print();
        exit(0)
    }
    // SAFETY: as above: the command begins at the second argument, the environment behind the zero.
    let (command, environment) = unsafe { (arguments.add(1), arguments.add(count + 1)) };
    exit(measure(command, environment))
}

/// Runs the command; gives its status, 0 or 1.
fn measure(command: *const usize, environment: *const usize) -> usize {
    let instructions = InstructionCounter::open();
    let before = instructions.as_ref().and_then(InstructionCounter::read);
    let (start, _) = counter();
    let status = run(command, environment);
    let (end, frequency) = counter();
    let after = instructions.as_ref().and_then(InstructionCounter::read);
    let mut line = Line::new(b"took ");
    line.number(end - start);
    line.text(b" ticks of ");
    line.number(frequency);
    line.text(b" Hz");
    if let (Some(before), Some(after)) = (before, after) {
        line.text(b", ");
        line.number(after - before);
        line.text(b" instructions");
    }
    line.text(b"\n");
    line.print();
    status
}

/// A child that becomes the command; waits for its end.
fn run(command: *const usize, environment: *const usize) -> usize {
    const SIGCHLD: usize = 17;
    // SAFETY: a child with a copy of everything, as fork makes it.
    let child = unsafe { system_call(call::CLONE, [SIGCHLD, 0, 0, 0, 0]) };
    if child == 0 {
        // SAFETY: the command is the address of a string, and the two lists end with zeros.
        unsafe {
            let program = command.read();
            system_call(call::EXECVE, [program, command.addr(), environment.addr(), 0, 0]);
        }
        exit(127)
    }
    let mut status = 1u32;
    if child > 0 {
        // SAFETY: writes the four bytes of `status`.
        unsafe { system_call(call::WAIT4, [child.unsigned_abs(), (&raw mut status).expose_provenance(), 0, 0, 0]) };
    }
    usize::from(status != 0)
}

/// Linux's counter of the instructions that CPU 0 executes.
struct InstructionCounter(usize);

impl InstructionCounter {
    /// `None` where the CPU or the kernel can't count them.
    fn open() -> Option<Self> {
        // struct perf_event_attr, first version, 64 bytes: type 0 is hardware, event 1 instructions; no flag excludes
        // anything, so EL2 counts.
        let attributes: [u64; 8] = [64 << 32, 1, 0, 0, 0, 0, 0, 0];
        let (any_process, cpu, no_group, flags) = (usize::MAX, 0, usize::MAX, 0);
        let attributes = (&raw const attributes).expose_provenance();
        // SAFETY: reads 64 bytes, which `attributes` has.
        let file = unsafe { system_call(call::PERF_EVENT_OPEN, [attributes, any_process, cpu, no_group, flags]) };
        usize::try_from(file).ok().map(Self)
    }

    fn read(&self) -> Option<u64> {
        let mut count = 0u64;
        // SAFETY: writes the eight bytes of `count`.
        let length = unsafe { system_call(call::READ, [self.0, (&raw mut count).expose_provenance(), 8, 0, 0]) };
        (length == 8).then_some(count)
    }
}

/// `CNTVCT_EL0` and `CNTFRQ_EL0` (Arm ARM D24.10), which Linux lets user space read.
fn counter() -> (u64, u64) {
    let (now, frequency): (u64, u64);
    // SAFETY: reads two registers that exist on every arm64 CPU and changes nothing; the barrier keeps the read
    // from moving up.
    unsafe {
        asm!("isb", "mrs {}, cntvct_el0", "mrs {}, cntfrq_el0", out(reg) now, out(reg) frequency, options(nomem, nostack));
    }
    (now, frequency)
}

/// A system call; negative results are errors.
///
/// # Safety
///
/// As the call needs it.
unsafe fn system_call(number: usize, arguments: [usize; 5]) -> isize {
    let [a, b, c, d, e] = arguments;
    let result;
    // SAFETY: the kernel changes no register but x0; the rest is the caller's promise.
    unsafe {
        asm!("svc #0", in("x8") number, inlateout("x0") a => result, in("x1") b, in("x2") c, in("x3") d, in("x4") e,
            options(nostack));
    }
    result
}

fn exit(status: usize) -> ! {
    loop {
        // SAFETY: ends the process; nothing of it is used afterwards.
        unsafe { system_call(call::EXIT, [status, 0, 0, 0, 0]) };
    }
}

/// A line under construction; what does not fit is dropped.
struct Line {
    bytes: [u8; LINE],
    length: usize,
}

impl Line {
    fn new(text: &[u8]) -> Self {
        let mut line = Self { bytes: [0; LINE], length: 0 };
        line.text(text);
        line
    }

    /// To standard output. An error leaves nobody to tell.
    fn print(&self) {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        let address = bytes.as_ptr().expose_provenance();
        // SAFETY: the kernel only reads the slice's bytes.
        unsafe { system_call(call::WRITE, [1, address, bytes.len(), 0, 0]) };
    }

    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(slot) = self.bytes.get_mut(self.length) {
                *slot = *byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, mut number: u64) {
        let mut digits = [0; 20];
        let mut first = digits.len();
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
            number /= 10;
            first -= 1;
            if number == 0 {
                break;
            }
        }
        self.text(digits.get(first..).unwrap_or_default());
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(1)
}
