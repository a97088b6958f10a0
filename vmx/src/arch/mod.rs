//! Everything that names an instruction or a register of x86.

pub(crate) mod cpu;
mod ept;
pub(crate) mod guests;
mod lapic;
mod memory;
pub(crate) mod payload;
pub(crate) mod power;
mod root;
pub(crate) mod serial;
pub(crate) mod smp;
mod tables;
pub(crate) mod time;
mod vmcs;
mod world;

pub(crate) use ept::EptMachine;
pub(crate) use ept::driven_out;
pub(crate) use memory::{FRAME, Frames, GuestRam, read_table, spoil_type, total as total_memory};
pub(crate) use root::{MsrBitmap, invept, invvpid};
pub(crate) use smp::Cpu;
pub(crate) use vmcs::LoadedVmcs;
pub(crate) use world::{DebugRegisters, FpuState, SwappedMsrs, enter, unblock_nmi};

core::arch::global_asm!(include_str!("boot.S"), options(att_syntax));
core::arch::global_asm!(include_str!("guests.S"), options(att_syntax));
core::arch::global_asm!(include_str!("world.S"), options(att_syntax));

/// Where boot.S hands over on the boot CPU: 64-bit mode, one stack, nothing else.
#[unsafe(no_mangle)]
extern "C" fn boot_main() -> ! {
    serial::init();
    memory::init();
    tables::load();
    time::calibrate();
    crate::start()
}

/// Where boot.S hands over on every other CPU; `number` counts from 1.
#[unsafe(no_mangle)]
extern "C" fn other_main(number: u32) -> ! {
    tables::load();
    smp::serve(number as usize)
}
