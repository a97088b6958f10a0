//! Switching the machine off and resetting it: by firmware, or by the board's own block.

use board::uart::UartRegs;
use board::{Power, PsciConduit};

use crate::arch::mmio::Mmio;
use crate::arch::{cpu, firmware};
use crate::console;
use crate::console::say;
use crate::hypervisor::Machine;

const PSCI_SYSTEM_OFF: u64 = 0x8400_0008;
const PSCI_SYSTEM_RESET: u64 = 0x8400_0009;

/// Power management block of the Broadcom SoCs: reset control, reset status, watchdog. Every
/// write carries a password in its top byte.
const PM_RSTC: usize = 0x1c;
const PM_RSTS: usize = 0x20;
const PM_WDOG: usize = 0x24;
const PM_PASSWORD: u32 = 0x5a00_0000;
/// RSTC: bits 5:4 choose what the watchdog does; 2 is a full reset.
const RSTC_CONFIG: u32 = 0x30;
const RSTC_FULL_RESET: u32 = 0x20;
/// RSTS: boot partition 63, spread over bits 0, 2, 4 .. 10, tells the boot ROM to stay off.
const RSTS_HALT: u32 = 0x555;
/// Watchdog ticks (16 µs each) until it fires.
const WDOG_SOON: u32 = 10;

/// Switches the machine off.
pub(crate) fn off(machine: &Machine) -> ! {
    say!(Debug, "system off");
    end(machine, PSCI_SYSTEM_OFF, RSTS_HALT)
}

/// Resets the machine.
pub(crate) fn reset(machine: &Machine) -> ! {
    say!(Debug, "system reset");
    end(machine, PSCI_SYSTEM_RESET, 0)
}

fn end(machine: &Machine, call: u64, status: u32) -> ! {
    if machine.psci == Some(PsciConduit::Smc) {
        let answer = firmware::call(call, [0; 7]);
        say!(
            Error,
            "firmware did not end the machine: it answered {:#x}",
            answer[0]
        );
    }
    if let Some(Power::BcmPm(base)) = machine.power {
        let regs = Mmio::power(base);
        regs.write(
            PM_RSTS,
            PM_PASSWORD | (regs.read(PM_RSTS) & !RSTS_HALT) | status,
        );
        regs.write(PM_WDOG, PM_PASSWORD | WDOG_SOON);
        let control = regs.read(PM_RSTC) & !RSTC_CONFIG & 0x00ff_ffff;
        regs.write(PM_RSTC, PM_PASSWORD | control | RSTC_FULL_RESET);
    }
    // The watchdog needs its ticks; a board without any means stays here, and says so.
    if machine.psci.is_none() && machine.power.is_none() {
        say!(Error, "this board has no way to switch off or reset");
        console::print(format_args!("halted"));
    }
    cpu::halt()
}
