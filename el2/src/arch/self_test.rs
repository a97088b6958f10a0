//! Deliberate faults at EL2, asked for by `/chosen/ravelin,self-test`, to see the reports.

use crate::console::say;
use board::SelfTest;

use super::mem::Image;

/// Does what must not work. Returns only if it wrongly did.
#[inline(never)] // A frame of its own in the backtrace that the report shows.
pub(crate) fn provoke(test: SelfTest) {
    say!(Warn, "self-test: provoking {test:?}");
    match test {
        SelfTest::Panic => panic!("asked for by the device tree"),
        SelfTest::StackOverflow => {
            let depth = overflow(u64::MAX);
            say!(Error, "self-test: the stack held {depth} frames");
        }
        SelfTest::WriteText => store(Image::here().boot_end),
        SelfTest::ExecData => jump(Image::here().rodata_end),
        SelfTest::Null => store(0),
    }
    say!(Error, "self-test: {test:?} was not stopped");
}

#[inline(never)]
#[expect(
    unconditional_recursion,
    reason = "the point is to run into the guard page"
)]
fn overflow(depth: u64) -> u64 {
    let frame = core::hint::black_box([depth; 32]);
    overflow(frame[3].wrapping_sub(1)).wrapping_add(frame[7])
}

#[inline(never)]
fn store(address: u64) {
    // SAFETY: the store faults, which is what is being shown; if it did not, EL2 reports a defect.
    unsafe { core::arch::asm!("str xzr, [{}]", in(reg) address, options(nostack)) };
}

#[inline(never)]
fn jump(address: u64) {
    // SAFETY: the fetch faults, which is what is being shown.
    unsafe { core::arch::asm!("blr {}", in(reg) address, clobber_abi("C")) };
}
