//! Base address registers: how much space a function wants, and where it gets it.

use board::{AddrRange, PAGE_SIZE, PciBridge, PciWindow};
use thiserror::Error;

use super::{ConfigSpace, Function, IO_SPACE, MEMORY_SPACE, command, identity, set_command};

/// Most base address registers of a function.
pub const MAX_BARS: usize = 6;
/// The first.
const FIRST: u16 = 0x10;
/// Bits of a memory register that are no address.
const MEMORY_FLAGS: u32 = 0xf;
/// The same of an I/O register.
const IO_FLAGS: u32 = 0x3;

/// Why a function's registers could not be placed.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum PciError {
    /// A base address register says what no specification allows.
    #[error("base address register {index} of {function} is of no known kind")]
    BadBar {
        /// Whose.
        function: Function,
        /// Its number.
        index: u8,
    },
    /// The bridge's windows have no more room.
    #[error("no window has room for the {size:#x} bytes of {function}")]
    NoRoom {
        /// Whose.
        function: Function,
        /// How much it wants.
        size: u64,
    },
}

/// Kind of space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; the next register has the upper half of the address.
    Memory64,
}

/// A base address register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bar {
    /// Its number, 0 to 5.
    pub index: u8,
    /// What it is.
    pub kind: BarKind,
    /// Reads have no effect, writes may be merged.
    pub prefetchable: bool,
    /// Bytes, a power of two.
    pub size: u64,
    /// Bus address that it has now; 0 if it was not placed.
    pub address: u64,
}

/// What a function's base address registers say, by their numbers; the one that follows a 64-bit
/// register is a part of it. The function does not answer while it is asked; its command register
/// is as before then.
///
/// # Errors
///
/// [`PciError::BadBar`].
pub fn bars(
    space: &impl ConfigSpace,
    function: Function,
) -> Result<[Option<Bar>; MAX_BARS], PciError> {
    let registers = match identity(space, function).map_or(0, |found| found.header) {
        0 => MAX_BARS,
        // PCI-to-PCI bridges have two (PCI Express 7.5.1.3).
        _ => 2,
    };
    let before = command(space, function);
    set_command(space, function, before & !(IO_SPACE | MEMORY_SPACE));
    let found = read_all(space, function, registers);
    set_command(space, function, before);
    found
}

fn read_all(
    space: &impl ConfigSpace,
    function: Function,
    registers: usize,
) -> Result<[Option<Bar>; MAX_BARS], PciError> {
    let mut found = [None; MAX_BARS];
    let mut skip = false;
    for (index, place) in (0..).zip(found.iter_mut().take(registers)) {
        if core::mem::take(&mut skip) {
            continue;
        }
        *place = read_one(space, function, index)?;
        let is_wide = |bar: &Bar| bar.kind == BarKind::Memory64;
        skip = place.as_ref().is_some_and(is_wide);
        if skip && usize::from(index) + 1 == registers {
            return Err(PciError::BadBar { function, index });
        }
    }
    Ok(found)
}

/// Sizes one register: of all ones, only those stick that are an address (PCI 3.0 6.2.5.1).
fn read_one(
    space: &impl ConfigSpace,
    function: Function,
    index: u8,
) -> Result<Option<Bar>, PciError> {
    let offset = FIRST + 4 * u16::from(index);
    let (low, low_mask) = probe(space, function, offset);
    let (kind, flags) = match low & 7 {
        0 => (BarKind::Memory32, MEMORY_FLAGS),
        4 => (BarKind::Memory64, MEMORY_FLAGS),
        bits if bits & 1 == 1 => (BarKind::Io, IO_FLAGS),
        _ => return Err(PciError::BadBar { function, index }),
    };
    let (high, high_mask) = match kind {
        BarKind::Memory64 if usize::from(index) + 1 < MAX_BARS => {
            probe(space, function, offset + 4)
        }
        // An I/O register may leave its upper half 0.
        BarKind::Io => (0, if low_mask == 0 { 0 } else { u32::MAX }),
        _ => (0, u32::MAX),
    };
    let mut mask = u64::from(high_mask) << 32 | u64::from(low_mask & !flags);
    if kind == BarKind::Io && low_mask >> 16 == 0 {
        mask |= 0xffff_0000;
    }
    if low_mask & !flags == 0 && (kind != BarKind::Memory64 || high_mask == 0) {
        return Ok(None);
    }
    let size = (!mask).wrapping_add(1);
    if !size.is_power_of_two() {
        return Err(PciError::BadBar { function, index });
    }
    Ok(Some(Bar {
        index,
        kind,
        prefetchable: kind != BarKind::Io && low & 1 << 3 != 0,
        size,
        address: u64::from(high) << 32 | u64::from(low & !flags),
    }))
}

/// What a register has, and what is left of all ones.
fn probe(space: &impl ConfigSpace, function: Function, offset: u16) -> (u32, u32) {
    let value = space.read(function, offset);
    space.write(function, offset, u32::MAX);
    let mask = space.read(function, offset);
    space.write(function, offset, value);
    (value, mask)
}

/// What is left of a window: bus addresses from `next` to `end`.
#[derive(Clone, Copy, Debug)]
struct Room {
    window: PciWindow,
    next: u64,
    end: u64,
}

impl Room {
    fn new(window: PciWindow) -> Option<Self> {
        let free = window.bus_range()?;
        Some(Self {
            window,
            // Address 0 would be one that was not placed.
            next: free.start().max(PAGE_SIZE),
            end: free.end(),
        })
    }

    /// Bus address of `size` bytes, aligned to it and to pages: what is in one page belongs to one
    /// function, and so it can be given to a VM.
    fn take(&mut self, size: u64) -> Option<u64> {
        let size = size.max(PAGE_SIZE);
        let start = self.next.checked_next_multiple_of(size)?;
        let next = start.checked_add(size).filter(|next| *next <= self.end)?;
        self.next = next;
        Some(start)
    }
}

/// The bridge's windows, and what of them is in use.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    low: Option<Room>,
    high: Option<Room>,
}

impl Windows {
    /// All of the bridge's memory windows are free.
    #[must_use]
    pub fn new(bridge: &PciBridge) -> Self {
        Self {
            low: bridge.memory32.and_then(Room::new),
            high: bridge.memory64.and_then(Room::new),
        }
    }

    /// Where the CPU finds a register that was placed, by whole pages; `None` if it was not.
    #[must_use]
    pub fn cpu(&self, bar: &Bar) -> Option<AddrRange> {
        let rooms = [self.low, self.high];
        rooms.into_iter().flatten().find_map(|room| {
            let size = bar.size.max(PAGE_SIZE);
            let wanted = AddrRange::with_size(bar.address, size)?;
            let window = room.window.bus_range()?;
            let inside = bar.kind != BarKind::Io && window.contains_range(wanted);
            let offset = bar.address.checked_sub(room.window.bus)?;
            let start = room.window.cpu.start().checked_add(offset)?;
            inside.then(|| AddrRange::with_size(start, size))?
        })
    }

    fn take(&mut self, kind: BarKind, size: u64) -> Option<u64> {
        let wide = (kind == BarKind::Memory64).then_some(&mut self.high);
        let high = wide.and_then(|room| room.as_mut()?.take(size));
        high.or_else(|| self.low.as_mut()?.take(size))
    }
}

/// Places all of a function's memory registers. Its decoding is off afterwards; the caller turns
/// it on ([`super::set_command`]). I/O registers are left alone.
///
/// # Errors
///
/// Those of [`bars`], and [`PciError::NoRoom`]: nothing was written then, though the windows have less room.
pub fn place(
    space: &impl ConfigSpace,
    function: Function,
    windows: &mut Windows,
) -> Result<[Option<Bar>; MAX_BARS], PciError> {
    let before = command(space, function);
    set_command(space, function, before & !(IO_SPACE | MEMORY_SPACE));
    let mut found = bars(space, function)?;
    for bar in found.iter_mut().flatten() {
        if bar.kind == BarKind::Io {
            continue;
        }
        let size = bar.size;
        bar.address = windows
            .take(bar.kind, size)
            .ok_or(PciError::NoRoom { function, size })?;
    }
    restore(space, function, &found);
    Ok(found)
}

/// Writes the addresses of memory registers that have one, as after a reset. The function must not
/// decode.
pub fn restore(space: &impl ConfigSpace, function: Function, bars: &[Option<Bar>]) {
    let memory = |bar: &&Bar| bar.kind != BarKind::Io && bar.address != 0;
    for bar in bars.iter().flatten().filter(memory) {
        let offset = FIRST + 4 * u16::from(bar.index);
        let [low, high] = [bar.address & 0xffff_ffff, bar.address >> 32]
            .map(|half| u32::try_from(half).unwrap_or(0));
        space.write(function, offset, low);
        if bar.kind == BarKind::Memory64 {
            space.write(function, offset + 4, high);
        }
    }
}
