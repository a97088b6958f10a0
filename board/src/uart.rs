//! Console UARTs that firmware has already set up: output, and polled input.
//!
//! The baud rate is never touched: the clock that a device tree states need not be the clock that
//! firmware left running (spec: Raspberry Pi facts). Registers are reached through [`UartRegs`],
//! whose implementor decides how: under a hypervisor a store must be one that can be decoded.

use core::fmt;

use crate::{Console, UartKind};

/// 32-bit accesses to a UART's registers; `offset` in bytes.
pub trait UartRegs {
    /// Reads a register.
    fn read(&self, offset: usize) -> u32;
    /// Writes a register.
    fn write(&self, offset: usize, value: u32);
}

/// PL011 data register (Arm DDI 0183G 3.3.1).
const PL011_DR: usize = 0x00;
/// PL011 flag register (3.3.3): bit 5 transmit FIFO full, bit 4 receive FIFO empty.
const PL011_FR: usize = 0x18;
/// Mini UART data register, AUX_MU_IO_REG (BCM2711 peripherals 2.2.2).
const MINI_IO: usize = 0x00;
/// Mini UART line status, AUX_MU_LSR_REG: bit 5 transmitter has room, bit 0 data ready.
const MINI_LSR: usize = 0x14;

/// Polls before a byte is dropped: a UART without a clock must not hang the machine.
const PATIENCE: u32 = 1_000_000;

/// A console UART.
#[derive(Clone, Copy, Debug)]
pub struct Uart<R> {
    kind: UartKind,
    regs: R,
}

impl<R: UartRegs> Uart<R> {
    /// The UART of `console`, through `regs`.
    pub const fn new(console: Console, regs: R) -> Self {
        Self {
            kind: console.kind,
            regs,
        }
    }

    /// Sends a byte; waits while the transmitter is full, drops it if that takes too long.
    pub fn send(&self, byte: u8) {
        for _ in 0..PATIENCE {
            if self.can_send() {
                self.regs.write(self.data(), u32::from(byte));
                return;
            }
        }
    }

    /// A received byte, if there is one.
    #[must_use]
    pub fn receive(&self) -> Option<u8> {
        let ready = match self.kind {
            UartKind::Pl011 => self.regs.read(PL011_FR) & (1 << 4) == 0,
            UartKind::Mini => self.regs.read(MINI_LSR) & 1 != 0,
        };
        ready.then(|| self.regs.read(self.data()).to_le_bytes()[0])
    }

    fn can_send(&self) -> bool {
        match self.kind {
            UartKind::Pl011 => self.regs.read(PL011_FR) & (1 << 5) == 0,
            UartKind::Mini => self.regs.read(MINI_LSR) & (1 << 5) != 0,
        }
    }

    const fn data(&self) -> usize {
        match self.kind {
            UartKind::Pl011 => PL011_DR,
            UartKind::Mini => MINI_IO,
        }
    }
}

impl<R: UartRegs> fmt::Write for Uart<R> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.send(b'\r');
            }
            self.send(byte);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use core::cell::{Cell, RefCell};
    use core::fmt::Write;
    use std::vec::Vec;

    use super::*;

    /// A UART that is busy for `busy` polls before each byte.
    struct Fake {
        status: usize,
        ready: u32,
        blocked: u32,
        busy: u32,
        polls: Cell<u32>,
        sent: RefCell<Vec<u8>>,
    }

    impl UartRegs for &Fake {
        fn read(&self, offset: usize) -> u32 {
            assert_eq!(offset, self.status);
            self.polls.set(self.polls.get() + 1);
            if self.polls.get().is_multiple_of(self.busy + 1) {
                self.ready
            } else {
                self.blocked
            }
        }
        fn write(&self, offset: usize, value: u32) {
            assert_eq!(offset, 0);
            self.sent.borrow_mut().push(u8::try_from(value).unwrap());
        }
    }

    fn fake(status: usize, ready: u32, blocked: u32, busy: u32) -> Fake {
        Fake {
            status,
            ready,
            blocked,
            busy,
            polls: Cell::new(0),
            sent: RefCell::default(),
        }
    }

    fn uart(kind: UartKind, regs: &Fake) -> Uart<&Fake> {
        Uart::new(Console { kind, base: 0 }, regs)
    }

    #[test]
    fn pl011_waits_for_room_and_sends_cr_before_lf() {
        let regs = fake(0x18, 0, 0x20, 3);
        uart(UartKind::Pl011, &regs).write_str("a\n").unwrap();
        assert_eq!(*regs.sent.borrow(), b"a\r\n");
        assert_eq!(regs.polls.get(), 12);
    }

    #[test]
    fn mini_uart_waits_for_room() {
        let regs = fake(0x14, 0x20, 0, 2);
        uart(UartKind::Mini, &regs).write_str("ok").unwrap();
        assert_eq!(*regs.sent.borrow(), b"ok");
    }

    #[test]
    fn a_stuck_uart_drops_the_byte_instead_of_hanging() {
        let regs = fake(0x18, 0x20, 0x20, 0);
        uart(UartKind::Pl011, &regs).send(b'x');
        assert!(regs.sent.borrow().is_empty());
    }
}
