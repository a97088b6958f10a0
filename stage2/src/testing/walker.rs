//! Raw descriptors, decoded a second time: retyped from the manuals and from nothing else.

use std::prelude::rust_2024::*;
/// Where output address bits above 47 are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HighBits {
    /// Nowhere.
    None,
    /// Bits 9:8 hold 51:50.
    Lpa2,
    /// Bits 15:12 hold 51:48.
    Lpa,
    /// In place, as on x86.
    InPlace,
}

/// How a table is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// EPT instead of Arm stage 2.
    pub ept: bool,
    /// Arm: HCR_EL2.FWB.
    pub fwb: bool,
    /// Arm: FEAT_XNX.
    pub xnx: bool,
    /// High address bits.
    pub high: HighBits,
    /// 12, 14 or 16.
    pub page_shift: u32,
    /// log2 of the entries of a table.
    pub index_bits: u32,
    /// First level.
    pub start: i8,
    /// Input bits.
    pub input_bits: u32,
}

/// One decoded word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawEntry {
    /// Not valid.
    Invalid,
    /// Address of a table.
    Table(u64),
    /// A mapping.
    Leaf(RawLeaf),
}

/// What a leaf says, in the manual's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawLeaf {
    /// Output address.
    pub pa: u64,
    /// Data reads.
    pub read: bool,
    /// Data writes.
    pub write: bool,
    /// Fetches by the guest's kernel.
    pub exec_kernel: bool,
    /// Fetches by the guest's user space.
    pub exec_user: bool,
    /// MemAttr, or EPT bits 6:3.
    pub mem: u8,
    /// Access flag.
    pub young: bool,
}

impl Arch {
    /// The usual: 4 KiB pages.
    #[must_use]
    pub const fn arm_4k(start: i8, input_bits: u32, fwb: bool) -> Self {
        Self {
            ept: false,
            fwb,
            xnx: true,
            high: HighBits::None,
            page_shift: 12,
            index_bits: 9,
            start,
            input_bits,
        }
    }

    /// EPT of four levels.
    #[must_use]
    pub const fn ept_4k() -> Self {
        Self {
            ept: true,
            xnx: false,
            high: HighBits::InPlace,
            ..Self::arm_4k(0, 48, false)
        }
    }

    /// log2 of what an entry spans.
    #[must_use]
    pub fn shift(&self, level: i8) -> u32 {
        self.page_shift + self.index_bits * u32::from((3 - level).unsigned_abs())
    }

    /// Entries of the root.
    #[must_use]
    pub fn root_entries(&self) -> usize {
        (1usize << (self.input_bits - self.shift(self.start))).max(1 << self.index_bits)
    }

    fn output(&self, raw: u64) -> u64 {
        let field = |high: u32, low: u32| raw >> low & ((1 << (high - low + 1)) - 1);
        let low = self.page_shift;
        match self.high {
            HighBits::None => field(47, low) << low,
            HighBits::Lpa2 => field(49, low) << low | field(9, 8) << 50,
            HighBits::Lpa => field(47, 16) << 16 | field(15, 12) << 48,
            HighBits::InPlace => field(51, 12) << 12,
        }
    }

    /// Reads a word.
    #[must_use]
    pub fn decode(&self, raw: u64, level: i8) -> RawEntry {
        if self.ept {
            self.decode_ept(raw, level)
        } else {
            self.decode_arm(raw, level)
        }
    }

    fn decode_arm(&self, raw: u64, level: i8) -> RawEntry {
        match (raw & 0b11, level) {
            (0b00 | 0b10, _) | (0b01, 3) => RawEntry::Invalid,
            (0b11, -1..=2) => RawEntry::Table(self.output(raw)),
            _ => {
                let (xn1, xn0) = (raw >> 54 & 1 == 1, raw >> 53 & 1 == 1 && self.xnx);
                RawEntry::Leaf(RawLeaf {
                    pa: self.output(raw) & !((1 << self.shift(level)) - 1),
                    read: raw & 0x40 != 0,
                    write: raw & 0x80 != 0,
                    exec_kernel: xn1 == xn0,
                    exec_user: !xn1,
                    mem: (raw >> 2 & 0xf) as u8,
                    young: raw & 0x400 != 0,
                })
            }
        }
    }

    fn decode_ept(&self, raw: u64, level: i8) -> RawEntry {
        if raw & 7 == 0 {
            return RawEntry::Invalid;
        }
        if level < 3 && raw & 0x80 == 0 {
            return RawEntry::Table(self.output(raw));
        }
        RawEntry::Leaf(RawLeaf {
            pa: self.output(raw) & !((1 << self.shift(level)) - 1),
            read: raw & 1 != 0,
            write: raw & 2 != 0,
            exec_kernel: raw & 4 != 0,
            exec_user: raw & 4 != 0,
            mem: (raw >> 3 & 0xf) as u8,
            young: true,
        })
    }

    /// Whether memory of the leaf can be seen around the data cache.
    #[must_use]
    pub fn owes_data(&self, leaf: &RawLeaf) -> bool {
        if self.ept {
            // UC that honours the guest is how devices are mapped; WB with ignore-PAT is forced.
            leaf.mem != 0 && leaf.mem != (6 | 8)
        } else {
            let device = leaf.mem & 0b1100 == 0;
            !(device || self.fwb && leaf.mem == 0b0110)
        }
    }

    /// Whether instructions may be fetched from memory through the leaf.
    #[must_use]
    pub fn executable(&self, leaf: &RawLeaf) -> bool {
        let device = if self.ept {
            leaf.mem == 0
        } else {
            leaf.mem & 0b1100 == 0
        };
        (leaf.exec_kernel || leaf.exec_user) && !device
    }
}

/// Something that holds tables.
pub trait Tables {
    /// Word `index` of the table at `table`.
    fn word(&self, table: u64, index: usize) -> u64;
}

/// Who is told of what a walk finds, and where it looks.
pub struct Found<'f> {
    /// Input addresses that matter.
    pub within: (u64, u64),
    /// Of every leaf: input address, level, what it says.
    pub leaf: &'f mut dyn FnMut(u64, i8, RawLeaf),
    /// Of every table: its address, input address, level of its entries.
    pub table: &'f mut dyn FnMut(u64, u64, i8),
}

impl std::fmt::Debug for Found<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Found")
            .field("within", &self.within)
            .finish_non_exhaustive()
    }
}

impl Arch {
    /// Tells of every leaf and every table below an entry at an input address and a level.
    pub fn enumerate<T: Tables + ?Sized>(
        &self,
        tables: &T,
        raw: u64,
        (at, level): (u64, i8),
        found: Found<'_>,
    ) {
        match self.decode(raw, level) {
            RawEntry::Invalid => {}
            RawEntry::Leaf(leaf) => (found.leaf)(at, level, leaf),
            RawEntry::Table(pa) => {
                (found.table)(pa, at, level + 1);
                for index in self.reached(at, level + 1, found.within) {
                    let place = (at + ((index as u64) << self.shift(level + 1)), level + 1);
                    let below = Found {
                        within: found.within,
                        leaf: &mut *found.leaf,
                        table: &mut *found.table,
                    };
                    self.enumerate(tables, tables.word(pa, index), place, below);
                }
            }
        }
    }

    /// Entries of a table at an input address that reach into a range.
    fn reached(&self, at: u64, level: i8, within: (u64, u64)) -> std::ops::Range<usize> {
        let shift = self.shift(level);
        let entries = 1 << self.index_bits;
        let first = within.0.saturating_sub(at) >> shift;
        let behind = within.1.saturating_sub(at).div_ceil(1 << shift);
        first.min(entries) as usize..behind.min(entries) as usize
    }

    /// Every leaf of a space, in order.
    pub fn leaves<T: Tables + ?Sized>(&self, tables: &T, root: u64) -> Vec<(u64, i8, RawLeaf)> {
        let mut leaves = Vec::new();
        for index in 0..self.root_entries() {
            let at = (index as u64) << self.shift(self.start);
            let found = Found {
                within: (0, u64::MAX),
                leaf: &mut |at, level, leaf| leaves.push((at, level, leaf)),
                table: &mut |_, _, _| {},
            };
            let raw = tables.word(root, index);
            self.enumerate(tables, raw, (at, self.start), found);
        }
        leaves
    }

    /// What the hardware would find for one address.
    pub fn walk<T: Tables + ?Sized>(
        &self,
        tables: &T,
        root: u64,
        at: u64,
    ) -> Option<(u64, RawLeaf)> {
        let (mut table, mut level, mut entries) = (root, self.start, self.root_entries());
        loop {
            let index = (at >> self.shift(level)) as usize & (entries - 1);
            match self.decode(tables.word(table, index), level) {
                RawEntry::Invalid => return None,
                RawEntry::Leaf(leaf) => {
                    let within = at & ((1 << self.shift(level)) - 1);
                    return Some((leaf.pa + within, leaf));
                }
                RawEntry::Table(below) => {
                    (table, level, entries) = (below, level + 1, 1 << self.index_bits);
                }
            }
        }
    }
}
