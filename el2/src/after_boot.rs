//! The end of boot: what only boot needs goes to the host.
//!
//! Its instructions, jump tables and stack, the host shim's file, the relocations: the first part of
//! the image (el2.ld). None of it is executable at EL2 from here on, and nothing that stays refers to
//! it: `scripts/link-el2.sh` makes the division, and the finished image is checked for it.

use board::AddrRange;
use el2::page_state::Owner;
use el2::psci::StartOrder;

use crate::arch::cpu;
use crate::arch::mem::{self, Image};
use crate::arch::{mmu, regs};
use crate::console::{fatal, say};
use crate::hypervisor::{self, Hypervisor};
use crate::protect::Pages;
use crate::smp;

/// Where entry.S comes from boot, on this core's stack, which is empty.
#[unsafe(no_mangle)]
extern "C" fn boot_is_over(entry: u64, context: u64) -> ! {
    let (Some(hypervisor), Some(cpu)) = (hypervisor::get(), cpu::this_cpu()) else {
        cpu::halt();
    };
    let image = Image::here();
    let boot = AddrRange::new(image.start, image.boot_end);
    if !boot.is_some_and(|boot| hand_over(hypervisor, boot)) {
        fatal(format_args!("what only boot needs can't be the host's"));
    }
    if let Some(tree) = hypervisor.machine.wipe_at_end {
        // The last that boot has used of what there was before the reset.
        mem::wipe(tree);
        hypervisor.overwrite.withdraw(&Pages);
    }
    say!(
        Info,
        "boot: {} ticks from entry to host, at {} Hz",
        regs::ticks().saturating_sub(hypervisor.machine.entered),
        regs::ticks_per_second()
    );
    smp::run_host(hypervisor, cpu, StartOrder { entry, context })
}

/// Makes memory of boot's ordinary memory of the host: never executable here, zero, and mapped there.
fn hand_over(hypervisor: &Hypervisor, boot: AddrRange) -> bool {
    if !mmu::make_data(boot) {
        return false;
    }
    mem::wipe(boot);
    mem::invalidate_icache();
    let (ownership, host) = (&hypervisor.ownership, hypervisor.host.map());
    ownership.give_back(host, boot, Owner::Hypervisor).is_ok()
}
