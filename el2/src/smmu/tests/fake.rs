//! An SMMU that does what IHI 0070 says, as far as the driver uses it.

use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::vec::Vec;

use super::*;

pub(super) const CR0: u32 = 0x20;
pub(super) const GBPA: u32 = 0x44;
pub(super) const CMDQ_PROD: u32 = 0x98;
pub(super) const CMDQ_CONS: u32 = 0x9c;
pub(super) const EVENTQ_PROD: u32 = 0x1_00a8;
pub(super) const EVENTQ_CONS: u32 = 0x1_00ac;

/// IDR0 with all that is needed: S2P, TTF AArch64, COHACC, VMID16, little-endian, two levels.
pub(super) const IDR0: u32 = 1 | 2 << 2 | 1 << 4 | 1 << 18 | 2 << 21 | 1 << 27;
/// IDR1: 16 bits of streams, queues of at most 2^19.
pub(super) const IDR1: u32 = 16 | 19 << 16 | 19 << 21;
/// IDR3: RIL.
pub(super) const IDR3: u32 = 1 << 10;
/// IDR5: 44 bits, 4 KiB.
pub(super) const IDR5: u32 = 4 | 1 << 4;

/// An SMMU: registers, memory, and what it has cached.
#[derive(Default)]
pub(super) struct Fake {
    pub(super) registers: RefCell<BTreeMap<u32, u32>>,
    pub(super) memory: RefCell<BTreeMap<u64, u64>>,
    pub(super) next: Cell<u64>,
    /// Allocations left.
    pub(super) room: Cell<usize>,
    /// Commands that it has taken.
    pub(super) taken: RefCell<Vec<[u64; 2]>>,
    /// Entries that it has cached, by stream.
    pub(super) cached: RefCell<BTreeMap<u32, [u64; 8]>>,
    /// Whether stores were made since the last publish.
    pub(super) unpublished: Cell<bool>,
    pub(super) wrong: RefCell<Vec<&'static str>>,
    /// Takes no commands.
    pub(super) stuck: Cell<bool>,
    /// Stops at the next command with an error.
    pub(super) fails: Cell<bool>,
}

pub(super) type Shared = &'static Fake;

pub(super) fn fake() -> Shared {
    let fake = Fake::default();
    fake.room.set(100);
    fake.next.set(0x4000_0000);
    let ids = [(0, IDR0), (4, IDR1), (0xc, IDR3), (0x14, IDR5)];
    fake.registers.borrow_mut().extend(ids);
    Box::leak(Box::new(fake))
}

impl Fake {
    pub(super) fn reg(&self, offset: u32) -> u32 {
        self.registers.borrow().get(&offset).copied().unwrap_or(0)
    }

    pub(super) fn set(&self, offset: u32, value: u32) {
        self.registers.borrow_mut().insert(offset, value);
    }

    pub(super) fn reg64(&self, offset: u32) -> u64 {
        u64::from(self.reg(offset)) | u64::from(self.reg(offset + 4)) << 32
    }

    pub(super) fn word(&self, address: u64) -> u64 {
        self.memory.borrow().get(&address).copied().unwrap_or(0)
    }

    pub(super) fn consume(&self) {
        if self.stuck.get() || self.reg(CR0) & 8 == 0 {
            return;
        }
        if self.unpublished.get() {
            self.wrong
                .borrow_mut()
                .push("PROD before the stores are seen");
        }
        let base = self.reg64(0x90);
        let size = 1u32 << (base & 0x1f);
        while self.reg(CMDQ_CONS) & (2 * size - 1) != self.reg(CMDQ_PROD) & (2 * size - 1) {
            if self.fails.get() {
                self.set(0x60, self.reg(0x60) ^ 1);
                return;
            }
            let cons = self.reg(CMDQ_CONS);
            let at = (base & 0x000f_ffff_ffff_ffe0) + u64::from(cons & (size - 1)) * 16;
            let command = [self.word(at), self.word(at + 8)];
            self.taken.borrow_mut().push(command);
            match command[0] & 0xff {
                3 => drop(
                    self.cached
                        .borrow_mut()
                        .remove(&((command[0] >> 32) as u32)),
                ),
                4 => self.cached.borrow_mut().clear(),
                _ => {}
            }
            self.set(CMDQ_CONS, (cons + 1) & (2 * size - 1));
        }
    }

    /// The entry that the SMMU uses for a stream: from its cache, or by a walk that caches it.
    pub(super) fn entry(&self, stream: u32) -> [u64; 8] {
        if let Some(cached) = self.cached.borrow().get(&stream) {
            return *cached;
        }
        let config = self.reg(0x88);
        let base = self.reg64(0x80) & 0x000f_ffff_ffff_ffc0;
        if stream >> (config & 0x3f) != 0 {
            return [0; 8];
        }
        let table = if config >> 16 & 3 == 1 {
            let descriptor = self.word(base + u64::from(stream >> 8) * 8);
            assert_eq!(descriptor & 0x1f, 9, "a span of 256");
            (descriptor & !0x3f) + u64::from(stream & 0xff) * 64
        } else {
            base + u64::from(stream) * 64
        };
        let words = core::array::from_fn(|at| self.word(table + 8 * at as u64));
        self.cached.borrow_mut().insert(stream, words);
        words
    }

    /// VMID of the walk that an access of a stream takes; `None`: it aborts.
    pub(super) fn goes_through(&self, stream: u32) -> Option<u16> {
        if self.reg(CR0) & 1 == 0 {
            assert_ne!(self.reg(GBPA) & 1 << 20, 0, "off, and everything passes");
            return None;
        }
        let words = self.entry(stream);
        (words[0] & 0xf == 0xd).then_some((words[2] & 0xffff) as u16)
    }

    /// Records an event.
    pub(super) fn event(&self, words: [u64; 4]) {
        let base = self.reg64(0xa0);
        let size = 1u32 << (base & 0x1f);
        let (prod, cons) = (self.reg(EVENTQ_PROD), self.reg(EVENTQ_CONS));
        if (prod ^ cons) & (2 * size - 1) == size {
            self.set(EVENTQ_PROD, prod & !(1 << 31) | (!cons & 1 << 31));
            return;
        }
        let at = (base & 0x000f_ffff_ffff_ffe0) + u64::from(prod & (size - 1)) * 32;
        for (word, value) in words.into_iter().enumerate() {
            self.memory.borrow_mut().insert(at + 8 * word as u64, value);
        }
        self.set(EVENTQ_PROD, prod & 1 << 31 | (prod + 1) & (2 * size - 1));
    }
}

impl Port for Shared {
    fn read(&self, offset: u32) -> u32 {
        self.reg(offset)
    }

    fn write(&self, offset: u32, value: u32) {
        self.set(offset, value);
        match offset {
            CR0 => self.set(0x24, value),
            GBPA => self.set(GBPA, value & !(1 << 31)),
            CMDQ_PROD => self.consume(),
            _ => {}
        }
    }

    fn load(&self, address: u64) -> u64 {
        self.word(address)
    }

    fn store(&self, address: u64, value: u64) {
        self.unpublished.set(true);
        self.memory.borrow_mut().insert(address, value);
    }

    fn publish(&self) {
        self.unpublished.set(false);
    }

    fn alloc(&self, size: u64) -> Option<u64> {
        self.room.set(self.room.get().checked_sub(1)?);
        let start = self.next.get().next_multiple_of(size);
        self.next.set(start + size);
        Some(start)
    }
}
