//! The time-stamp counter's frequency, measured once against the 8254 timer.

use core::sync::atomic::{AtomicU64, Ordering};

use super::cpu::{in8, out8, timestamp};

/// Timer 2's gate and output, and the speaker (ISA port 61h).
const GATE: u16 = 0x61;
const GATE_ON: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const OUTPUT: u8 = 1 << 5;
/// Control word: timer 2, low then high byte, one shot.
const COMMAND: u16 = 0x43;
const ONE_SHOT: u8 = 0xb0;
const TIMER_2: u16 = 0x42;
/// Ticks of 1193182 Hz in 10 ms.
const TICKS: u16 = 11932;
/// Looks at the output before the timer is given up on.
const PATIENCE: u32 = 100_000_000;

static HZ: AtomicU64 = AtomicU64::new(0);

fn read(port: u16) -> u8 {
    // SAFETY: the timer and port 61h are the hypervisor's, and touch no memory.
    unsafe { in8(port) }
}

fn write(port: u16, value: u8) {
    // SAFETY: as in `read`.
    unsafe { out8(port, value) };
}

/// Measures. Called once, at boot.
pub(super) fn calibrate() {
    let [low, high] = TICKS.to_le_bytes();
    write(GATE, read(GATE) & !SPEAKER | GATE_ON);
    write(COMMAND, ONE_SHOT);
    write(TIMER_2, low);
    write(TIMER_2, high);
    let start = timestamp();
    let fired = (0..PATIENCE).any(|_| read(GATE) & OUTPUT != 0);
    if !fired {
        super::power::fatal(format_args!("the 8254 timer does not count"));
    }
    HZ.store(100 * (timestamp() - start), Ordering::Relaxed);
}

/// Ticks of the time-stamp counter in a second.
pub(crate) fn hz() -> u64 {
    HZ.load(Ordering::Relaxed)
}

/// Waits.
pub(crate) fn wait_microseconds(microseconds: u64) {
    let end = timestamp() + microseconds * hz() / 1_000_000;
    while timestamp() < end {
        core::hint::spin_loop();
    }
}
