//! The configuration space that a VM sees of a function that is its own.
//!
//! What it must not change stays virtual: the function keeps its place on the machine's bus, its real
//! decoding, and its silence about message-signalled interrupts. What is only the function's own
//! affair goes through: the identity, the status, bus mastering, the interrupt pin's disable bit.
//!
//! Of the capabilities a VM sees the vendor's own, to read. MSI and MSI-X would let it write to the
//! machine's interrupt controller; power states and resets would lose the real addresses; PCI
//! Express's controls concern the machine's links. Without that capability a function is a
//! conventional one, so the extended space is empty.

#[cfg(test)]
mod tests;

use board::{AddrRange, PAGE_SIZE};

use super::bars::{BarKind, MAX_BARS};
use super::{
    BUS_MASTER, Bar, COMMAND, ConfigSpace, Function, ID, INTERRUPT, INTERRUPT_DISABLE,
    MEMORY_SPACE, capabilities, set_command,
};
use crate::platform::{MAX_ASSIGNED, PCI_ECAM, PCI_ECAM_SIZE, PCI_WINDOW, PCI_WINDOW_SIZE};

/// Registers of the configuration space, less the extended one: 32 bits each.
const REGISTERS: usize = 64;
/// First base address register, and the register behind the last one.
const FIRST_BAR: u16 = 0x10;
const BARS_END: u16 = 0x28;
/// Revision and class.
const CLASS: u16 = 0x08;
/// Subsystem.
const SUBSYSTEM: u16 = 0x2c;
/// Offset of the first capability.
const LIST: u16 = 0x34;
/// Status, in the register of the command: it asserts its interrupt; it has a list of capabilities.
const ASSERTS: u32 = 1 << (16 + 3);
const HAS_LIST: u32 = 1 << (16 + 4);
/// Status bits that are cleared by writing ones (PCI 3.0 6.2.3).
const CLEARED_BY_ONES: u32 = 0xf900 << 16;
/// ID of a vendor's capability; its third byte is its length (PCI 3.0 appendix H).
const VENDOR: u8 = 0x09;
/// Commands that go to the function.
const PASSED: u16 = BUS_MASTER | INTERRUPT_DISABLE;
/// Commands that a VM can set.
const SETTABLE: u16 = PASSED | MEMORY_SPACE;

/// A base address register as the VM sees it.
#[derive(Clone, Copy, Debug)]
struct VirtualBar {
    /// Bytes; the address is a multiple of it.
    size: u64,
    flags: u32,
    /// The next register is the upper half of the address.
    wide: bool,
    address: u64,
}

/// A function that is a VM's own.
#[derive(Clone, Debug)]
pub struct Assigned {
    function: Function,
    bars: [Option<VirtualBar>; MAX_BARS],
    command: u16,
    /// Interrupt line: a note of the VM's to itself.
    line: u8,
    /// Which registers belong to capabilities that the VM sees.
    shown: [bool; REGISTERS],
    /// Where the list of those begins, and where each goes on: offsets as in the first byte of the
    /// register with that number; 0 ends it.
    first: u8,
    next: [u8; REGISTERS],
}

impl Assigned {
    /// A function after its reset, with the base address registers that it really has. It answers
    /// in memory from now on, where the host has placed it; it does no DMA and asserts no interrupt
    /// before the VM lets it.
    pub fn new(
        space: &impl ConfigSpace,
        function: Function,
        bars: &[Option<Bar>; MAX_BARS],
    ) -> Self {
        let mut assigned = Self {
            function,
            bars: bars.map(|bar| bar.as_ref().and_then(VirtualBar::new)),
            command: 0,
            line: 0,
            shown: [false; REGISTERS],
            first: 0,
            next: [0; REGISTERS],
        };
        assigned.find_capabilities(space);
        assigned.reset(space);
        assigned
    }

    /// Which one it is on the machine's bus.
    #[must_use]
    pub const fn function(&self) -> Function {
        self.function
    }

    /// As after [`Self::new`]. The function must have been reset.
    pub fn reset(&mut self, space: &impl ConfigSpace) {
        self.command = 0;
        self.line = 0;
        for bar in self.bars.iter_mut().flatten() {
            bar.address = 0;
        }
        set_command(space, self.function, MEMORY_SPACE | INTERRUPT_DISABLE);
    }

    /// Where in the bridge's window the VM has placed base address register `index`, while it lets
    /// the function decode.
    #[must_use]
    pub fn placed(&self, index: usize) -> Option<AddrRange> {
        let bar = self.bars.get(index)?.as_ref()?;
        let range = AddrRange::with_size(bar.address, bar.size)?;
        let window = AddrRange::with_size(PCI_WINDOW, PCI_WINDOW_SIZE)?;
        let decodes = self.command & MEMORY_SPACE != 0;
        (decodes && window.contains_range(range)).then_some(range)
    }

    /// Whether the function asserts its interrupt pin.
    pub fn asserts(&self, space: &impl ConfigSpace) -> bool {
        self.command & INTERRUPT_DISABLE == 0 && space.read(self.function, COMMAND) & ASSERTS != 0
    }

    /// A read of `size` bytes; all ones of a width or alignment that the bus does not have.
    pub fn read(&self, space: &impl ConfigSpace, offset: u16, size: u8) -> u32 {
        match lanes(offset, size) {
            Some((shift, mask)) => self.register(space, offset & !3) >> shift & mask,
            None => u32::MAX,
        }
    }

    /// A write, without effect where [`Self::read`] gives ones or the register is only to be read.
    pub fn write(&mut self, space: &impl ConfigSpace, offset: u16, size: u8, value: u32) {
        let Some((shift, mask)) = lanes(offset, size) else {
            return;
        };
        let (ones, value) = (mask << shift, (value & mask) << shift);
        match offset & !3 {
            COMMAND => self.write_command(space, ones, value),
            register @ FIRST_BAR..BARS_END => {
                let index = usize::from((register - FIRST_BAR) / 4);
                let merged = self.bar(index) & !ones | value;
                self.write_bar(index, merged);
            }
            INTERRUPT if ones & 0xff != 0 => self.line = value.to_le_bytes()[0],
            _ => {}
        }
    }

    fn write_command(&mut self, space: &impl ConfigSpace, ones: u32, value: u32) {
        let merged = u32::from(self.command) & !ones | value;
        let [a, b, ..] = merged.to_le_bytes();
        self.command = u16::from_le_bytes([a, b]) & SETTABLE;
        let real = MEMORY_SPACE | self.command & PASSED;
        let cleared = value & CLEARED_BY_ONES;
        space.write(self.function, COMMAND, u32::from(real) | cleared);
    }

    /// A whole register; `offset` is a multiple of 4.
    fn register(&self, space: &impl ConfigSpace, offset: u16) -> u32 {
        match offset {
            ID | CLASS | SUBSYSTEM => space.read(self.function, offset),
            COMMAND => {
                let status = space.read(self.function, COMMAND) & 0xffff_0000 & !HAS_LIST;
                let list = if self.first == 0 { 0 } else { HAS_LIST };
                status | list | u32::from(self.command)
            }
            FIRST_BAR..BARS_END => self.bar(usize::from((offset - FIRST_BAR) / 4)),
            LIST => self.first.into(),
            // Whichever pin it has, to the VM it is the first one.
            INTERRUPT => {
                let [_, pin, ..] = space.read(self.function, INTERRUPT).to_le_bytes();
                u32::from(self.line) | if pin == 0 { 0 } else { 1 << 8 }
            }
            _ => self.capability(space, offset),
        }
    }

    fn capability(&self, space: &impl ConfigSpace, offset: u16) -> u32 {
        let number = usize::from(offset / 4);
        if !self.shown.get(number).is_some_and(|shown| *shown) {
            return 0;
        }
        let value = space.read(self.function, offset);
        match self.next.get(number) {
            // A capability's own first register: ID, then where the next one is.
            Some(next) if self.begins(number) => value & 0xffff_00ff | u32::from(*next) << 8,
            _ => value,
        }
    }

    /// Whether a capability that the VM sees begins in this register.
    fn begins(&self, number: usize) -> bool {
        let is_here = |offset: &u8| usize::from(*offset) == 4 * number;
        is_here(&self.first) || self.next.iter().any(is_here)
    }

    fn find_capabilities(&mut self, space: &impl ConfigSpace) {
        let mut last: Option<usize> = None;
        for found in capabilities(space, self.function).filter(|found| found.id == VENDOR) {
            let number = usize::from(found.offset / 4);
            let (Ok(offset), Some(false)) = (u8::try_from(found.offset), self.shown.get(number))
            else {
                // A list that runs in circles ends here.
                return;
            };
            let [_, _, length, _] = space.read(self.function, found.offset).to_le_bytes();
            let end = (number + usize::from(length).div_ceil(4)).max(number + 1);
            let inside = self.shown.iter_mut().take(end).skip(number);
            inside.for_each(|shown| *shown = true);
            match last.and_then(|last| self.next.get_mut(last)) {
                Some(next) => *next = offset,
                None => self.first = offset,
            }
            last = Some(number);
        }
    }

    /// The register with number `index`: a base address, or the upper half of the one before it.
    fn bar(&self, index: usize) -> u32 {
        if let Some(bar) = self.bars.get(index).and_then(Option::as_ref) {
            return low(bar.address) | bar.flags;
        }
        let before = index.checked_sub(1).and_then(|n| self.bars.get(n));
        let wide = before.and_then(Option::as_ref).filter(|bar| bar.wide);
        wide.map_or(0, |bar| low(bar.address >> 32))
    }

    fn write_bar(&mut self, index: usize, value: u32) {
        let value = u64::from(value);
        if let Some(bar) = self.bars.get_mut(index).and_then(Option::as_mut) {
            bar.place(bar.address & !0xffff_ffff | value);
        } else if let Some(bar) = index.checked_sub(1).and_then(|n| self.bars.get_mut(n))
            && let Some(bar) = bar.as_mut().filter(|bar| bar.wide)
        {
            bar.place(bar.address & 0xffff_ffff | value << 32);
        }
    }
}

impl VirtualBar {
    /// `None` for what a VM can't be given: I/O ports, and what the host has not placed. To a VM
    /// none is smaller than a page: less can't be mapped.
    fn new(bar: &Bar) -> Option<Self> {
        if bar.kind == BarKind::Io || bar.address == 0 {
            return None;
        }
        let wide = bar.kind == BarKind::Memory64;
        let flags = if wide { 4 } else { 0 } | if bar.prefetchable { 8 } else { 0 };
        Some(Self {
            size: bar.size.max(PAGE_SIZE),
            flags,
            wide,
            address: 0,
        })
    }

    /// Sets as much of the address as can be set.
    fn place(&mut self, address: u64) {
        let all = if self.wide { u64::MAX } else { 0xffff_ffff };
        self.address = address & all & !(self.size - 1);
    }
}

/// Which function and register of a VM's configuration space an IPA is: `None` outside of it, and a
/// function of `None` where the VM has none. The first one is device 1; device 0 is the bridge's own
/// and absent.
#[must_use]
pub fn register_at(ipa: u64) -> Option<(Option<usize>, u16)> {
    let offset = ipa.checked_sub(PCI_ECAM).filter(|o| *o < PCI_ECAM_SIZE)?;
    let [a, b, c, ..] = offset.to_le_bytes();
    let register = u16::from_le_bytes([a, b & 0xf]);
    // Device in bits 7:3, function in 2:0.
    let place = b >> 4 | c << 4;
    let index = usize::from(place >> 3).wrapping_sub(1);
    let exists = place & 7 == 0 && index < MAX_ASSIGNED;
    Some((exists.then_some(index), register))
}

/// The lower half.
fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Where `size` bytes at `offset` are in their register: a shift, and a mask for it. Configuration
/// space has bytes, words and doublewords, each aligned to its size.
fn lanes(offset: u16, size: u8) -> Option<(u32, u32)> {
    let mask = match size {
        1 => 0xff,
        2 => 0xffff,
        4 => u32::MAX,
        _ => return None,
    };
    let aligned = offset.is_multiple_of(u16::from(size)) && offset < 4096;
    aligned.then(|| (u32::from(offset & 3) * 8, mask))
}
