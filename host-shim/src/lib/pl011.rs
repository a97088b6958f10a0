//! A PL011 UART as a guest sees it.
//!
//! Output leaves at once, so the transmit FIFO is always empty; input waits in the receive FIFO.
//! Source: Arm PrimeCell UART (PL011), DDI 0183G, chapter 3.

/// Depth of the receive FIFO here: a paste of some length must not be lost.
const FIFO: usize = 256;

const DR: u64 = 0x00;
const RSR: u64 = 0x04;
const FR: u64 = 0x18;
const IBRD: u64 = 0x24;
const FBRD: u64 = 0x28;
const LCR_H: u64 = 0x2c;
const CR: u64 = 0x30;
const IFLS: u64 = 0x34;
const IMSC: u64 = 0x38;
const RIS: u64 = 0x3c;
const MIS: u64 = 0x40;
const ICR: u64 = 0x44;
const DMACR: u64 = 0x48;
/// UARTPeriphID0 to 3 and UARTPCellID0 to 3 (r1p5).
const IDS: [u8; 8] = [0x11, 0x10, 0x34, 0x00, 0x0d, 0xf0, 0x05, 0xb1];
const ID_BASE: u64 = 0xfe0;

/// UARTFR: transmit FIFO empty, receive FIFO full, receive FIFO empty.
const TXFE: u32 = 1 << 7;
const RXFF: u32 = 1 << 6;
const RXFE: u32 = 1 << 4;
/// Interrupts: receive time-out, transmit, receive.
const RT: u32 = 1 << 6;
const TX: u32 = 1 << 5;
const RX: u32 = 1 << 4;
const ALL: u32 = 0x7ff;

/// The UART.
#[derive(Debug)]
pub struct Pl011 {
    fifo: [u8; FIFO],
    first: usize,
    length: usize,
    baud: [u32; 2],
    line_control: u32,
    control: u32,
    trigger: u32,
    mask: u32,
    raised: u32,
}

impl Default for Pl011 {
    fn default() -> Self {
        Self::new()
    }
}

impl Pl011 {
    /// As after reset.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            fifo: [0; FIFO],
            first: 0,
            length: 0,
            baud: [0; 2],
            line_control: 0,
            control: 0x300,
            trigger: 0x12,
            mask: 0,
            raised: 0,
        }
    }

    /// Level of its interrupt.
    #[must_use]
    pub const fn line(&self) -> bool {
        self.raised & self.mask != 0
    }

    /// Whether there is room for input.
    #[must_use]
    pub const fn has_room(&self) -> bool {
        self.length < FIFO
    }

    /// A byte arrives; it is lost if there is no room.
    pub fn receive(&mut self, byte: u8) {
        if !self.has_room() {
            return;
        }
        if let Some(place) = self.fifo.get_mut((self.first + self.length) % FIFO) {
            *place = byte;
            self.length += 1;
        }
        // Whatever the trigger level: a person types one byte at a time.
        self.raised |= RX | RT;
    }

    /// A read of a register; the width does not matter.
    pub fn read(&mut self, offset: u64) -> u32 {
        match offset {
            DR => self.take().into(),
            FR => self.flags(),
            IBRD => self.baud[0],
            FBRD => self.baud[1],
            LCR_H => self.line_control,
            CR => self.control,
            IFLS => self.trigger,
            IMSC => self.mask,
            RIS => self.raised,
            MIS => self.raised & self.mask,
            ID_BASE.. => usize::try_from((offset - ID_BASE) / 4)
                .ok()
                .and_then(|n| IDS.get(n))
                .map_or(0, |id| u32::from(*id)),
            _ => 0,
        }
    }

    /// A write; gives the byte that is sent, if one is.
    pub fn write(&mut self, offset: u64, value: u32) -> Option<u8> {
        match offset {
            DR => {
                self.raised |= TX;
                return Some(value.to_le_bytes()[0]);
            }
            IBRD => self.baud[0] = value & 0xffff,
            FBRD => self.baud[1] = value & 0x3f,
            LCR_H => self.line_control = value & 0xff,
            CR => self.control = value & 0xffff,
            IFLS => self.trigger = value & 0x3f,
            IMSC => self.mask = value & ALL,
            ICR => self.raised &= !value,
            // Errors never happen, DMA is not offered; the rest is read-only.
            RSR | DMACR => {}
            _ => {}
        }
        None
    }

    fn flags(&self) -> u32 {
        let full = if self.has_room() { 0 } else { RXFF };
        let empty = if self.length == 0 { RXFE } else { 0 };
        TXFE | full | empty
    }

    fn take(&mut self) -> u8 {
        if self.length == 0 {
            return 0;
        }
        let byte = self.fifo.get(self.first).copied().unwrap_or(0);
        self.first = (self.first + 1) % FIFO;
        self.length -= 1;
        if self.length == 0 {
            self.raised &= !(RX | RT);
        }
        byte
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn output_leaves_at_once() {
        let mut uart = Pl011::new();
        assert_eq!(uart.read(FR), 0x90);
        assert_eq!(uart.write(DR, u32::from(b'A') | 0x100), Some(b'A'));
        assert_eq!(uart.read(FR), 0x90);
    }

    #[test]
    fn input_raises_the_interrupt_until_it_is_read() {
        let mut uart = Pl011::new();
        uart.receive(b'x');
        assert!(!uart.line(), "masked");
        uart.write(IMSC, RX);
        assert!(uart.line());
        assert_eq!((uart.read(RIS), uart.read(MIS)), (RX | RT, RX));
        assert_eq!(uart.read(FR) & RXFE, 0);
        assert_eq!(uart.read(DR), u32::from(b'x'));
        assert!(!uart.line());
        assert_eq!(uart.read(FR) & RXFE, RXFE);
    }

    #[test]
    fn sending_raises_the_transmit_interrupt_until_it_is_cleared() {
        let mut uart = Pl011::new();
        uart.write(IMSC, TX);
        assert!(!uart.line());
        uart.write(DR, 0);
        assert!(uart.line());
        uart.write(ICR, TX);
        assert!(!uart.line());
    }

    #[test]
    fn a_full_fifo_says_so_and_loses_what_comes_then() {
        let mut uart = Pl011::new();
        for byte in 0..=255u8 {
            assert!(uart.has_room());
            uart.receive(byte);
        }
        uart.receive(1);
        assert_eq!(uart.read(FR) & RXFF, RXFF);
        for byte in 0..=255u8 {
            assert_eq!(uart.read(DR), u32::from(byte));
        }
        assert_eq!(uart.read(DR), 0);
    }

    #[test]
    fn it_identifies_as_a_pl011() {
        let mut uart = Pl011::new();
        let id = [0xfe0, 0xfe4, 0xfe8, 0xff0, 0xff4, 0xff8, 0xffc].map(|at| uart.read(at));
        assert_eq!(id, [0x11, 0x10, 0x34, 0x0d, 0xf0, 0x05, 0xb1]);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(offset: u64, value: u32) {
            let mut uart = Pl011::new();
            uart.write(offset, value);
            let _: u32 = uart.read(offset);
        }
    }
}
