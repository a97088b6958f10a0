//! A 16550 UART: what a guest's driver of COM1 sees. Sending takes no time.

use alloc::collections::VecDeque;

const DATA: u16 = 0;
const INTERRUPTS: u16 = 1;
const IDENTITY: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;
const SCRATCH: u16 = 7;

const DIVISOR_LATCH: u8 = 1 << 7;
const LOOPBACK: u8 = 1 << 4;
const OUT2: u8 = 1 << 3;
/// Interrupt enable: received data, transmitter empty.
const ON_DATA: u8 = 1 << 0;
const ON_EMPTY: u8 = 1 << 1;
/// Interrupt identity.
const NOTHING: u8 = 1;
const EMPTY: u8 = 2;
const RECEIVED: u8 = 4;
const FIFOS: u8 = 0xc0;
/// Line status: data ready; transmitter empty in both senses.
const READY: u8 = 1 << 0;
const IDLE: u8 = 0x60;
/// Carrier, data set ready, clear to send.
const CONNECTED: u8 = 0xb0;
/// Bytes that wait at most; more are lost, as on the wire.
const CAPACITY: usize = 256;

/// The UART's state.
#[derive(Debug, Default)]
pub struct Uart {
    enabled: u8,
    fifos: bool,
    line: u8,
    modem: u8,
    scratch: u8,
    divisor: [u8; 2],
    empty_pending: bool,
    received: VecDeque<u8>,
}

impl Uart {
    /// The guest writes register 0 to 7; the byte that goes out, if one does.
    pub fn write(&mut self, register: u16, value: u8) -> Option<u8> {
        let latch = self.line & DIVISOR_LATCH != 0;
        match register {
            DATA | INTERRUPTS if latch => self.divisor[usize::from(register)] = value,
            DATA => {
                self.empty_pending = true;
                if self.modem & LOOPBACK == 0 {
                    return Some(value);
                }
                self.receive(value);
            }
            INTERRUPTS => {
                self.empty_pending |= value & !self.enabled & ON_EMPTY != 0;
                self.enabled = value & 0xf;
            }
            IDENTITY => {
                self.fifos = value & 1 != 0;
                if value & 2 != 0 {
                    self.received.clear();
                }
            }
            LINE_CONTROL => self.line = value,
            MODEM_CONTROL => self.modem = value & 0x1f,
            SCRATCH => self.scratch = value,
            _ => {}
        }
        None
    }

    /// The guest reads register 0 to 7.
    pub fn read(&mut self, register: u16) -> u8 {
        let latch = self.line & DIVISOR_LATCH != 0;
        match register {
            DATA | INTERRUPTS if latch => self.divisor[usize::from(register)],
            DATA => self.received.pop_front().unwrap_or(0),
            INTERRUPTS => self.enabled,
            IDENTITY => {
                let cause = self.cause();
                if cause == EMPTY {
                    self.empty_pending = false;
                }
                cause | if self.fifos { FIFOS } else { 0 }
            }
            LINE_CONTROL => self.line,
            MODEM_CONTROL => self.modem,
            LINE_STATUS => IDLE | if self.received.is_empty() { 0 } else { READY },
            MODEM_STATUS if self.modem & LOOPBACK != 0 => {
                // DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD.
                let m = self.modem;
                (m & 1) << 5 | (m & 2) << 3 | (m & 4) << 4 | (m & 8) << 4
            }
            MODEM_STATUS => CONNECTED,
            _ => self.scratch,
        }
    }

    /// A byte comes in.
    pub fn receive(&mut self, byte: u8) {
        if self.received.len() < CAPACITY {
            self.received.push_back(byte);
        }
    }

    /// Level of the interrupt line.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        self.modem & OUT2 != 0 && self.cause() != NOTHING
    }

    fn cause(&self) -> u8 {
        if self.enabled & ON_DATA != 0 && !self.received.is_empty() {
            RECEIVED
        } else if self.enabled & ON_EMPTY != 0 && self.empty_pending {
            EMPTY
        } else {
            NOTHING
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_and_come_in() {
        let mut u = Uart::default();
        assert_eq!(u.write(DATA, b'a'), Some(b'a'));
        assert_eq!(u.read(LINE_STATUS), IDLE);
        u.receive(b'b');
        assert_eq!(u.read(LINE_STATUS), IDLE | READY);
        assert_eq!(u.read(DATA), b'b');
        assert_eq!(u.read(LINE_STATUS), IDLE);
    }

    #[test]
    fn the_transmitter_interrupts_once_for_each_cause() {
        let mut u = Uart::default();
        u.write(MODEM_CONTROL, OUT2);
        u.write(INTERRUPTS, ON_EMPTY);
        assert!(u.interrupts());
        assert_eq!(u.read(IDENTITY), EMPTY);
        assert!(!u.interrupts());
        assert_eq!(u.read(IDENTITY), NOTHING);
        u.write(DATA, 0);
        assert!(u.interrupts());
        u.write(MODEM_CONTROL, 0);
        assert!(!u.interrupts(), "OUT2 gates the line");
    }

    #[test]
    fn the_loopback_test_of_drivers_passes() {
        let mut u = Uart::default();
        u.write(MODEM_CONTROL, LOOPBACK | 0x0a);
        assert_eq!(u.read(MODEM_STATUS) & 0xf0, 0x90);
        assert_eq!(u.write(DATA, 7), None);
        assert_eq!(u.read(DATA), 7);
    }

    #[test]
    fn the_divisor_hides_data_and_interrupts() {
        let mut u = Uart::default();
        u.write(LINE_CONTROL, DIVISOR_LATCH);
        assert_eq!(u.write(DATA, 1), None);
        u.write(INTERRUPTS, 2);
        assert_eq!((u.read(DATA), u.read(INTERRUPTS)), (1, 2));
        u.write(LINE_CONTROL, 3);
        assert_eq!(u.read(INTERRUPTS), 0);
    }
}
