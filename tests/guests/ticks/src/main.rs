//! Prints `ticks N of F Hz`: the virtual counter since reset, read in Linux's user space, and its frequency.
//!
//! A static program without any library: two counter reads and two system calls.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};

/// Longest line: two 20-digit numbers and the words between them.
const LINE: usize = 64;

/// Entry: the kernel gives a stack aligned to 16 bytes and zeroes every register (AAPCS64, ELF start-up).
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub extern "C" fn _start() -> ! {
    naked_asm!("mov x29, xzr", "mov x30, xzr", "b {main}", main = sym main)
}

extern "C" fn main() -> ! {
    let (now, frequency) = counter();
    let mut line = Line { bytes: [0; LINE], length: 0 };
    line.text(b"ticks ");
    line.number(now);
    line.text(b" of ");
    line.number(frequency);
    line.text(b" Hz\n");
    print(line.bytes.get(..line.length).unwrap_or_default());
    exit()
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

/// `write(1, bytes)`, Linux system call 64 on arm64. An error leaves nobody to tell.
fn print(bytes: &[u8]) {
    // SAFETY: the kernel only reads the slice's bytes; the call changes no register but x0.
    unsafe {
        asm!("svc #0", in("x8") 64, inlateout("x0") 1usize => _, in("x1") bytes.as_ptr(), in("x2") bytes.len(), options(nostack));
    }
}

/// `exit(0)`, Linux system call 93 on arm64.
fn exit() -> ! {
    loop {
        // SAFETY: ends the process; nothing of it is used afterwards.
        unsafe { asm!("svc #0", in("x8") 93, in("x0") 0, options(nostack)) }
    }
}

/// A line under construction; what does not fit is dropped.
struct Line {
    bytes: [u8; LINE],
    length: usize,
}

impl Line {
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
    exit()
}
