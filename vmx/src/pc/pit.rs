//! The 8254 timer: channel 0 interrupts, channel 2 is read through port 61h.

/// Its frequency in Hz.
const HZ: u64 = 1_193_182;

/// One counter.
#[derive(Clone, Copy, Debug, Default)]
struct Channel {
    mode: u8,
    access: u8,
    reload: u16,
    low: Option<u8>,
    latched: Option<u16>,
    high_next: bool,
    /// Time-stamp at which it was loaded.
    start: u64,
    running: bool,
}

/// The timer.
#[derive(Debug)]
pub struct Pit {
    tsc_hz: u64,
    channels: [Channel; 3],
    /// When channel 0 interrupts next.
    due: Option<u64>,
    gate: bool,
}

impl Channel {
    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Ticks from load to the end of a period.
    fn period(&self) -> u64 {
        if self.reload == 0 {
            0x1_0000
        } else {
            self.reload.into()
        }
    }
}

impl Pit {
    /// A stopped timer beside a time-stamp counter of this frequency (not 0).
    #[must_use]
    pub fn new(tsc_hz: u32) -> Self {
        Self {
            tsc_hz: u64::from(tsc_hz.max(1)),
            channels: [Channel::default(); 3],
            due: None,
            gate: false,
        }
    }

    fn ticks(&self, from: u64, to: u64) -> u64 {
        let passed = u128::from(to.saturating_sub(from)) * u128::from(HZ);
        u64::try_from(passed / u128::from(self.tsc_hz)).unwrap_or(u64::MAX)
    }

    fn stamps(&self, ticks: u64) -> u64 {
        (ticks * self.tsc_hz).div_ceil(HZ)
    }

    /// The guest writes port 40h to 43h.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        if port == 0x43 {
            self.control(value, now);
            return;
        }
        let Some(channel) = self.channels.get_mut(usize::from(port & 3)) else {
            return;
        };
        let reload = match (channel.access, channel.low.take()) {
            (1, _) => u16::from(value),
            (2, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from_le_bytes([low, value]),
            (_, None) => {
                channel.low = Some(value);
                return;
            }
        };
        channel.reload = reload;
        channel.start = now;
        channel.running = true;
        if port == 0x40 {
            self.due = Some(now + self.stamps(self.channels[0].period()));
        }
    }

    fn control(&mut self, value: u8, now: u64) {
        let number = usize::from(value >> 6);
        let count = self.count(number, now);
        let Some(channel) = self.channels.get_mut(number) else {
            return;
        };
        if value >> 4 & 3 == 0 {
            channel.latched.get_or_insert(count);
            return;
        }
        *channel = Channel {
            mode: (value >> 1 & 7) & if value & 0x8 != 0 { 3 } else { 7 },
            access: value >> 4 & 3,
            ..Channel::default()
        };
        if number == 0 {
            self.due = None;
        }
    }

    /// What a channel counts at this moment.
    fn count(&self, number: usize, now: u64) -> u16 {
        let Some(channel) = self.channels.get(number).filter(|c| c.running) else {
            return 0;
        };
        let passed = self.ticks(channel.start, now);
        let left = channel.period() - passed % channel.period();
        let [low, high, ..] = left.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// The guest reads port 40h to 42h.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        let number = usize::from(port & 3);
        let live = self.count(number, now);
        let Some(channel) = self.channels.get_mut(number) else {
            return 0xff;
        };
        let [low, high] = channel.latched.unwrap_or(live).to_le_bytes();
        match channel.access {
            1 => {
                channel.latched = None;
                low
            }
            2 => {
                channel.latched = None;
                high
            }
            _ if channel.high_next => {
                channel.high_next = false;
                channel.latched = None;
                high
            }
            _ => {
                channel.high_next = true;
                low
            }
        }
    }

    /// Bits 1:0 of port 61h: the gate of channel 2.
    pub fn set_gate(&mut self, on: bool, now: u64) {
        if on && !self.gate {
            self.channels[2].start = now;
        }
        self.gate = on;
    }

    /// Bit 5 of port 61h: channel 2 has reached its end.
    #[must_use]
    pub fn output(&self, now: u64) -> bool {
        let channel = &self.channels[2];
        channel.running && self.ticks(channel.start, now) >= channel.period()
    }

    /// Whether channel 0 has interrupted since the last call.
    pub fn poll(&mut self, now: u64) -> bool {
        let Some(due) = self.due.filter(|due| *due <= now) else {
            return false;
        };
        let period = self.stamps(self.channels[0].period()).max(1);
        // Interrupts that a guest missed are not made up for.
        let missed = (now - due) / period;
        let periodic = self.channels[0].is_periodic();
        self.due = periodic.then(|| due + period * (missed + 1));
        true
    }

    /// When channel 0 interrupts next.
    #[must_use]
    pub const fn deadline(&self) -> Option<u64> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A time-stamp counter as fast as the timer makes ticks and stamps equal.
    fn pit(control: u8, port: u16, reload: u16) -> Pit {
        let mut pit = Pit::new(1_193_182);
        pit.write(0x43, control, 0);
        let [low, high] = reload.to_le_bytes();
        pit.write(port, low, 0);
        pit.write(port, high, 0);
        pit
    }

    #[test]
    fn rate_mode_interrupts_again_and_again() {
        let mut p = pit(0x34, 0x40, 1000);
        assert!(!p.poll(999));
        assert!(p.poll(1000));
        assert_eq!(p.deadline(), Some(2000));
        assert!(p.poll(4500), "missed ones are one");
        assert_eq!(p.deadline(), Some(5000));
    }

    #[test]
    fn one_shot_interrupts_once() {
        let mut p = pit(0x38, 0x40, 100);
        assert!(p.poll(100));
        assert!(!p.poll(1000));
        assert_eq!(p.deadline(), None);
    }

    #[test]
    fn counts_are_latched_whole() {
        let mut p = pit(0x34, 0x40, 0x1234);
        p.write(0x43, 0x00, 4);
        assert_eq!(p.read(0x40, 99), 0x30);
        assert_eq!(p.read(0x40, 999), 0x12);
        assert_ne!(p.read(0x40, 999), 0x30);
    }

    #[test]
    fn channel_2_is_seen_at_port_61() {
        let mut p = pit(0xb0, 0x42, 500);
        p.set_gate(true, 100);
        assert!(!p.output(599));
        assert!(p.output(600));
    }

    #[test]
    fn no_write_panics() {
        for value in 0..=255 {
            let mut p = Pit::new(1);
            for port in 0x40..=0x43 {
                p.write(port, value, u64::MAX / 4);
                p.write(port, value, u64::MAX / 4);
                let _ = p.read(port, u64::MAX / 4);
                let _ = p.poll(u64::MAX / 4);
            }
        }
    }
}
