//! A defect of the hypervisor: says where, and ends the run.

use core::panic::PanicInfo;

use crate::arch::{power, serial};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::print_in_panic(format_args!("ravelin: PANIC {info}\nravelin: halted\n"));
    power::off(power::Status::Failure)
}
