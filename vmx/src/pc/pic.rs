//! The two 8259 interrupt controllers, the second behind input 2 of the first. Edge triggered.

const ICW1: u8 = 1 << 4;
const NEEDS_ICW4: u8 = 1 << 0;
const OCW3: u8 = 1 << 3;
const END: u8 = 1 << 5;
const SPECIFIC: u8 = 1 << 6;
const CASCADE: u8 = 2;
/// Input that a spurious interrupt seems to come from.
const SPURIOUS: u8 = 7;

/// One controller.
#[derive(Debug, Default)]
struct Chip {
    lines: u8,
    requested: u8,
    in_service: u8,
    masked: u8,
    base: u8,
    /// Which initialisation word comes next at the data port: 2, 3, 4; 0 for none.
    step: u8,
    needs_icw4: bool,
    reads_in_service: bool,
}

impl Chip {
    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        if high && self.lines & bit == 0 {
            self.requested |= bit;
        } else if !high {
            self.requested &= !bit;
        }
        self.lines = if high {
            self.lines | bit
        } else {
            self.lines & !bit
        };
    }

    /// The most urgent request above what is in service: inputs count upwards.
    fn pending(&self) -> Option<u8> {
        let waiting = self.requested & !self.masked;
        let input = u8::try_from(waiting.trailing_zeros()).ok()?;
        let running = u8::try_from(self.in_service.trailing_zeros()).ok()?;
        (waiting != 0 && input < running).then_some(input)
    }

    fn accept(&mut self, input: u8) {
        self.requested &= !(1 << input);
        self.in_service |= 1 << input;
    }

    fn command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            let lines = self.lines;
            *self = Self {
                lines,
                step: 2,
                needs_icw4: value & NEEDS_ICW4 != 0,
                ..Self::default()
            };
        } else if value & OCW3 != 0 {
            if value & 2 != 0 {
                self.reads_in_service = value & 1 != 0;
            }
        } else if value & END != 0 {
            let input = if value & SPECIFIC != 0 {
                value & 7
            } else {
                u8::try_from(self.in_service.trailing_zeros()).unwrap_or(8)
            };
            self.in_service &= !1u8.checked_shl(input.into()).unwrap_or(0);
        }
    }

    fn data(&mut self, value: u8) {
        match self.step {
            2 => {
                self.base = value & !7;
                self.step = 3;
            }
            3 => self.step = if self.needs_icw4 { 4 } else { 0 },
            4 => self.step = 0,
            _ => self.masked = value,
        }
    }

    fn status(&self) -> u8 {
        if self.reads_in_service {
            self.in_service
        } else {
            self.requested
        }
    }
}

/// Both.
#[derive(Debug, Default)]
pub struct Pic {
    first: Chip,
    second: Chip,
}

impl Pic {
    /// Sets the level of input 0 to 15.
    pub fn set_line(&mut self, input: u8, high: bool) {
        if input < 8 {
            self.first.set_line(input, high);
        } else {
            self.second.set_line(input & 7, high);
        }
        let cascade = self.second.pending().is_some();
        self.first.set_line(CASCADE, cascade);
    }

    /// Whether the CPU should take an interrupt.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        self.first.pending().is_some()
    }

    /// The CPU takes the most urgent interrupt: its vector.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.first.pending() else {
            return self.first.base | SPURIOUS;
        };
        self.first.accept(input);
        if input != CASCADE {
            return self.first.base | input;
        }
        let input = self.second.pending();
        if let Some(input) = input {
            self.second.accept(input);
        }
        self.first.set_line(CASCADE, false);
        self.second.base | input.unwrap_or(SPURIOUS)
    }

    /// The guest writes port 20h, 21h, a0h or a1h.
    pub fn write(&mut self, port: u16, value: u8) {
        let chip = if port < 0xa0 {
            &mut self.first
        } else {
            &mut self.second
        };
        if port & 1 == 0 {
            chip.command(value);
        } else {
            chip.data(value);
        }
        let cascade = self.second.pending().is_some();
        self.first.set_line(CASCADE, cascade);
    }

    /// The guest reads one of these ports.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        let chip = if port < 0xa0 {
            &self.first
        } else {
            &self.second
        };
        if port & 1 == 0 {
            chip.status()
        } else {
            chip.masked
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initialised() -> Pic {
        let mut pic = Pic::default();
        for (port, words) in [(0x20, [0x11, 0x30, 4, 1]), (0xa0, [0x11, 0x38, 2, 1])] {
            pic.write(port, words[0]);
            words[1..].iter().for_each(|w| pic.write(port + 1, *w));
        }
        pic
    }

    #[test]
    fn an_edge_interrupts_once_until_its_end() {
        let mut pic = initialised();
        pic.set_line(0, true);
        assert!(pic.interrupts());
        assert_eq!(pic.acknowledge(), 0x30);
        assert!(!pic.interrupts());
        pic.set_line(0, false);
        pic.set_line(0, true);
        assert!(!pic.interrupts(), "in service");
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x30);
    }

    #[test]
    fn lower_inputs_are_more_urgent() {
        let mut pic = initialised();
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.set_line(6, true);
        assert!(!pic.interrupts());
        pic.set_line(1, true);
        assert_eq!(pic.acknowledge(), 0x31);
    }

    #[test]
    fn the_second_chip_comes_through_the_first() {
        let mut pic = initialised();
        pic.set_line(8, true);
        assert_eq!(pic.acknowledge(), 0x38);
        pic.set_line(8, false);
        pic.write(0xa0, 0x60);
        pic.write(0x20, 0x62);
        pic.set_line(8, true);
        assert!(pic.interrupts());
        pic.write(0xa1, 0xff);
        assert!(!pic.interrupts(), "masked");
    }

    #[test]
    fn masks_read_back_and_nothing_pending_is_spurious() {
        let mut pic = initialised();
        pic.write(0x21, 0xfb);
        assert_eq!(pic.read(0x21), 0xfb);
        assert_eq!(pic.acknowledge(), 0x37);
    }
}
