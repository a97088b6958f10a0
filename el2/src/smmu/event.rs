//! Event records (IHI 0070 7.3).

/// Words of a record.
pub(super) const EVENT_WORDS: usize = 4;

/// What a record says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// Its number.
    pub number: u8,
    /// Stream of the access.
    pub stream: u32,
    /// It was a read; anything else is a write.
    pub read: bool,
    /// Address as the device gave it.
    pub address: u64,
}

impl Event {
    /// From the words of a record.
    #[must_use]
    pub const fn decode(words: [u64; EVENT_WORDS]) -> Self {
        let [number, _, _, _, a, b, c, d] = words[0].to_le_bytes();
        Self {
            number,
            stream: u32::from_le_bytes([a, b, c, d]),
            read: words[1] >> 35 & 1 != 0,
            address: words[2],
        }
    }
}

/// An event in words.
#[must_use]
pub const fn describe(number: u8) -> &'static str {
    match number {
        0x01 => "unsupported transaction",
        0x02 => "unknown stream",
        0x03 => "stream entry not readable",
        0x04 => "bad stream entry",
        0x05 => "translated by the device itself",
        0x06 => "stream is not enabled",
        0x07 => "translated access of a stream that may not",
        0x0b => "walk failed",
        0x10 => "translation fault",
        0x11 => "address size fault",
        0x12 => "access flag fault",
        0x13 => "permission fault",
        _ => "refused",
    }
}
