//! The devices of a small PC: serial line, interrupt controllers, timer, clock. No PCI, no
//! keyboard, no ACPI: their ports read as ones.

mod pic;
mod pit;
mod uart;

pub use pic::Pic;
pub use pit::Pit;
pub use uart::Uart;

use crate::exit::Width;
use crate::ports::Ports;

/// Where a guest's serial line ends.
pub trait Console {
    /// The guest has sent a byte.
    fn send(&mut self, byte: u8);
    /// A byte for the guest.
    fn receive(&mut self) -> Option<u8>;
}

const COM1: u16 = 0x3f8;
const COM1_INPUT: u8 = 4;
const TIMER_INPUT: u8 = 0;
/// Keyboard controller: this command resets the machine.
const KEYBOARD: u16 = 0x64;
const PULSE_RESET: u32 = 0xfe;
/// Reset control of the chip set.
const RESET: u16 = 0xcf9;

/// The devices.
#[derive(Debug)]
pub struct Pc<C> {
    console: C,
    uart: Uart,
    pic: Pic,
    pit: Pit,
    clock_register: u8,
    speaker: u8,
    reset: bool,
}

impl<C: Console> Pc<C> {
    /// Devices beside a time-stamp counter of this frequency.
    pub fn new(console: C, tsc_hz: u32) -> Self {
        Self {
            console,
            uart: Uart::default(),
            pic: Pic::default(),
            pit: Pit::new(tsc_hz),
            clock_register: 0,
            speaker: 0,
            reset: false,
        }
    }

    fn settle(&mut self) {
        let level = self.uart.interrupts();
        self.pic.set_line(COM1_INPUT, level);
    }
}

/// The battery-backed clock at noon of 1 January 2026, in BCD: seconds to year, then the status
/// registers (24 hours, no update under way, power good).
fn clock(register: u8) -> u8 {
    match register & 0x7f {
        0x04 => 0x12,
        0x06 => 0x05,
        0x07 | 0x08 => 0x01,
        0x09 => 0x26,
        0x0a => 0x26,
        0x0b => 0x02,
        0x0d => 0x80,
        0x32 => 0x20,
        _ => 0,
    }
}

impl<C: Console> Ports for Pc<C> {
    fn output(&mut self, port: u16, _width: Width, value: u32, now: u64) {
        let [byte, ..] = value.to_le_bytes();
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 => self.pic.write(port, byte),
            0x40..=0x43 => self.pit.write(port, byte, now),
            0x61 => {
                self.speaker = byte & 3;
                self.pit.set_gate(byte & 1 != 0, now);
            }
            0x70 => self.clock_register = byte,
            COM1..=0x3ff => {
                if let Some(sent) = self.uart.write(port - COM1, byte) {
                    self.console.send(sent);
                }
                self.settle();
            }
            KEYBOARD if value == PULSE_RESET => self.reset = true,
            RESET if byte & 4 != 0 => self.reset = true,
            _ => {}
        }
    }

    fn input(&mut self, port: u16, width: Width, now: u64) -> u32 {
        let byte = match port {
            0x20 | 0x21 | 0xa0 | 0xa1 => self.pic.read(port),
            0x40..=0x42 => self.pit.read(port, now),
            0x61 => self.speaker | u8::from(self.pit.output(now)) << 5,
            0x71 => clock(self.clock_register),
            COM1..=0x3ff => {
                let value = self.uart.read(port - COM1);
                self.settle();
                value
            }
            // Trigger modes: all edge.
            0x4d0 | 0x4d1 => 0,
            _ => return u32::MAX >> (32 - 8 * u32::from(width.clamp(1, 4))),
        };
        byte.into()
    }

    fn poll(&mut self, now: u64) {
        if let Some(byte) = self.console.receive() {
            self.uart.receive(byte);
        }
        self.settle();
        if self.pit.poll(now) {
            self.pic.set_line(TIMER_INPUT, false);
            self.pic.set_line(TIMER_INPUT, true);
        }
    }

    fn interrupting(&self) -> bool {
        self.pic.interrupts()
    }

    fn acknowledge(&mut self) -> Option<u8> {
        Some(self.pic.acknowledge())
    }

    fn deadline(&self) -> Option<u64> {
        self.pit.deadline()
    }

    fn wants_reset(&self) -> bool {
        self.reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[derive(Default)]
    struct Lines(Vec<u8>, Vec<u8>);

    impl Console for Lines {
        fn send(&mut self, byte: u8) {
            self.0.push(byte);
        }
        fn receive(&mut self) -> Option<u8> {
            self.1.pop()
        }
    }

    #[test]
    fn input_on_the_line_interrupts_through_the_pic() {
        let mut pc = Pc::new(Lines(Vec::new(), std::vec![b'x']), 1_000_000);
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 1),
            (0x3fc, 8),
            (0x3f9, 1),
        ] {
            pc.output(port, 1, value, 0);
        }
        assert!(!pc.interrupting());
        pc.poll(0);
        assert!(pc.interrupting());
        assert_eq!(pc.acknowledge(), Some(0x34));
        assert_eq!(pc.input(0x3f8, 1, 0), u32::from(b'x'));
        pc.output(0x3f8, 1, u32::from(b'y'), 0);
        assert_eq!(pc.console.0, b"y");
    }

    #[test]
    fn the_timer_interrupts() {
        let mut pc = Pc::new(Lines::default(), 1_193_182);
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 1),
            (0x43, 0x34),
            (0x40, 10),
            (0x40, 0),
        ] {
            pc.output(port, 1, value, 0);
        }
        assert_eq!(pc.deadline(), Some(10));
        pc.poll(10);
        assert_eq!(pc.acknowledge(), Some(0x30));
    }

    #[test]
    fn a_missing_device_reads_as_ones_of_its_width() {
        let mut pc = Pc::new(Lines::default(), 1);
        assert_eq!(pc.input(0xcfc, 4, 0), u32::MAX);
        assert_eq!(pc.input(0x64, 1, 0), 0xff);
        assert!(!pc.wants_reset());
        pc.output(0x64, 1, 0xfe, 0);
        assert!(pc.wants_reset());
    }
}
