//! Bringing up the other cores, and parking those that are off.

use core::sync::atomic::Ordering;

use board::{Board, Cpu, PsciConduit, StartMethod};
use el2::features::Features;
use el2::psci::StartOrder;
use spin::Once;

use crate::arch::cpu::{self, CpuData};
use crate::arch::mem::Image;
use crate::arch::{firmware, host_regs, mem, regs};
use crate::console::say;
use crate::hypervisor::{self, Hypervisor};

const PSCI_CPU_OFF: u64 = 0x8400_0002;
const PSCI_CPU_ON: u64 = 0xc400_0003;
const PSCI_ALREADY_ON: i32 = -4;

/// What the core that booted can do: what every other one must be able to do, too.
static BOOT_FEATURES: Once<Features> = Once::new();

/// Starts every core but this one, one after the other, and waits for each up to a second.
/// A core that does not come up is named, and left out.
pub(crate) fn start_others(
    board: &Board<'_>,
    features: Features,
    cpus: &[&'static CpuData],
    entry: u64,
) {
    BOOT_FEATURES.call_once(|| features);
    let me = regs::mpidr();
    for (node, data) in board.cpus.iter().zip(cpus) {
        if data.mpidr == me {
            data.power.start_on();
        } else if let Err(reason) = start(board, node, entry).and_then(|()| came_up(data)) {
            say!(
                Error,
                "CPU {} (mpidr {:#x}) did not come up, going on without it: {reason}",
                data.index,
                data.mpidr
            );
        }
    }
    if board.cpus_left_out > 0 {
        say!(
            Error,
            "{} more CPUs than EL2 can hold are left off",
            board.cpus_left_out
        );
    }
}

fn start(board: &Board<'_>, cpu: &Cpu, entry: u64) -> Result<(), &'static str> {
    match cpu.start {
        StartMethod::Psci if board.psci == Some(PsciConduit::Smc) => {
            let answer = firmware::call(PSCI_CPU_ON, [cpu.mpidr, entry, 0, 0, 0, 0, 0]);
            match answer[0].cast_signed() as i32 {
                0 => Ok(()),
                -2 => Err("firmware's CPU_ON says INVALID_PARAMETERS: no such CPU"),
                -4 => Err("firmware's CPU_ON says ALREADY_ON"),
                -6 => Err("firmware's CPU_ON says INTERNAL_FAILURE"),
                _ => Err("firmware's CPU_ON failed"),
            }
        }
        StartMethod::Psci => {
            Err("it wants PSCI, but the device tree has no psci node with method smc")
        }
        StartMethod::SpinTable(word) => release(board, word, entry),
        StartMethod::Unknown => Err("the device tree gives no enable-method for it"),
    }
}

/// Writes a core's spin-table word (arm64 boot protocol: clean to the PoC, then SEV).
fn release(board: &Board<'_>, word: u64, entry: u64) -> Result<(), &'static str> {
    if !word.is_multiple_of(8) || board.memory.find(word).is_none() {
        return Err("its cpu-release-addr is not an aligned address in RAM");
    }
    mem::release_core(word, entry);
    cpu::send_event();
    Ok(())
}

fn came_up(cpu: &CpuData) -> Result<(), &'static str> {
    let deadline = regs::ticks().saturating_add(regs::ticks_per_second());
    while regs::ticks() < deadline {
        if cpu.power.is_alive() {
            return Ok(());
        }
        if let Some(field) = cpu.differs.get() {
            log::error!("CPU {}: not as the boot core: {field}", cpu.index);
            return Err("it is another kind of core");
        }
        core::hint::spin_loop();
    }
    Err("it was started but did not arrive within a second")
}

/// Where a secondary core arrives from entry.S, on its own stack with its MMU on: the first time,
/// and each time that firmware turns it on again.
#[unsafe(no_mangle)]
extern "C" fn boot_secondary() -> ! {
    let Some(cpu) = cpu::this_cpu() else {
        cpu::halt();
    };
    if !cpu.power.is_alive() {
        let here = Features::decode(&regs::id_registers());
        let differs = BOOT_FEATURES.get().and_then(|boot| boot.mismatch(&here));
        if let Some(field) = differs {
            cpu.differs.call_once(|| field);
            cpu::halt();
        }
        cpu.power.park();
    }
    wait_for_order(cpu)
}

/// Turns this core off until someone turns it on; then it enters the host.
pub(crate) fn park() -> ! {
    let Some(cpu) = cpu::this_cpu() else {
        cpu::halt();
    };
    cpu.power.park();
    wait_for_order(cpu)
}

/// An off core: with firmware that gives it back it is really off, and comes back through entry.S;
/// else it waits here. Waiting costs power on a board, and on an emulator, where WFE does not wait, it slows
/// down every TLB invalidation that the other cores broadcast.
fn wait_for_order(cpu: &'static CpuData) -> ! {
    loop {
        if let Some(hypervisor) = hypervisor::get() {
            if let Some(order) = cpu.power.take_order() {
                run_host(hypervisor, cpu, order);
            }
            if hypervisor.parks_in_firmware() {
                let answer = firmware::call(PSCI_CPU_OFF, [0; 7]);
                say!(Debug, "firmware's CPU_OFF came back: {:#x}", answer[0]);
            }
        }
        cpu::wait_for_event();
    }
}

/// Wakes a core that has an order: an event, and where firmware turned it off, firmware's CPU_ON.
///
/// The core may still be on its way down: then firmware says ALREADY_ON, and it is asked again
/// until the core has taken its order, at most a second.
pub(crate) fn wake(hypervisor: &Hypervisor, cpu: &CpuData) {
    cpu::send_event();
    if !hypervisor.parks_in_firmware() {
        return;
    }
    let entry = Image::here().secondary_entry;
    let deadline = regs::ticks().saturating_add(regs::ticks_per_second());
    while cpu.power.has_order() && regs::ticks() < deadline {
        let answer = firmware::call(PSCI_CPU_ON, [cpu.mpidr, entry, 0, 0, 0, 0, 0]);
        if answer[0].cast_signed() as i32 != PSCI_ALREADY_ON {
            return;
        }
        core::hint::spin_loop();
    }
}

/// Enters the host on this core, from its beginning.
pub(crate) fn run_host(
    hypervisor: &'static Hypervisor,
    cpu: &'static CpuData,
    order: StartOrder,
) -> ! {
    host_regs::configure(&hypervisor.features, hypervisor.host.registers());
    cpu.forget_history();
    // Firmware disables private interrupts when it turns a core on: the first guest's run prepares them.
    cpu.gic_frame.store(0, Ordering::Relaxed);
    cpu::enter_host(cpu, order)
}
