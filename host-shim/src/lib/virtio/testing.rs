//! A driver's side of a queue, for tests.

use std::cell::RefCell;
use std::vec;
use std::vec::Vec;

use super::queue::Queue;
use super::{BadAddress, GuestMemory, Host};

/// Bytes of the memory, which starts at 0.
pub(super) const RAM: u64 = 0x1_0000;
const SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x2800;

#[derive(Debug)]
pub(super) struct Memory(RefCell<Vec<u8>>);

impl Memory {
    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.write(at, bytes).unwrap();
    }

    pub(super) fn get(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(at, &mut bytes).unwrap();
        bytes
    }

    fn range(ipa: u64, length: usize) -> Result<core::ops::Range<usize>, BadAddress> {
        let end = ipa.checked_add(length as u64);
        match end {
            Some(end) if end <= RAM => {
                Ok(usize::try_from(ipa).unwrap()..usize::try_from(end).unwrap())
            }
            _ => Err(BadAddress(ipa)),
        }
    }
}

impl GuestMemory for Memory {
    fn read(&self, ipa: u64, to: &mut [u8]) -> Result<(), BadAddress> {
        let range = Self::range(ipa, to.len())?;
        to.copy_from_slice(&self.0.borrow()[range]);
        Ok(())
    }

    fn write(&self, ipa: u64, from: &[u8]) -> Result<(), BadAddress> {
        let range = Self::range(ipa, from.len())?;
        self.0.borrow_mut()[range].copy_from_slice(from);
        Ok(())
    }
}

/// Collects what is printed; its random numbers count.
#[derive(Debug, Default)]
pub(super) struct TestHost {
    pub(super) printed: Vec<u8>,
    random: u8,
}

impl Host for TestHost {
    fn print(&mut self, bytes: &[u8]) {
        self.printed.extend_from_slice(bytes);
    }

    fn random(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.random = self.random.wrapping_add(1);
            *byte = self.random;
        }
    }
}

/// Memory with one queue of 16 descriptors in it.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) memory: Memory,
    offered: u16,
    free: u16,
}

impl Driver {
    pub(super) fn new() -> Self {
        Self {
            memory: Memory(RefCell::new(vec![0; usize::try_from(RAM).unwrap()])),
            offered: 0,
            free: 0,
        }
    }

    pub(super) const fn available(&self) -> u64 {
        AVAILABLE
    }

    /// Addresses of the rings, as a driver writes them into registers.
    pub(super) const fn rings(&self) -> [u64; 3] {
        [DESCRIPTORS, AVAILABLE, USED]
    }

    pub(super) fn queue(&self) -> Queue {
        let mut queue = Queue::new();
        queue.size = SIZE;
        [queue.descriptors, queue.available, queue.used] = self.rings();
        queue.enable();
        assert!(queue.ready);
        queue
    }

    /// Offers a request of these buffers: address, length, whether the device writes it.
    pub(super) fn offer(&mut self, buffers: &[(u64, u32, bool)]) {
        let head = self.free;
        for (n, (ipa, length, write)) in buffers.iter().enumerate() {
            let last = n + 1 == buffers.len();
            let flags = u16::from(!last) | u16::from(*write) << 1;
            let mut raw = ipa.to_le_bytes().to_vec();
            raw.extend(length.to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend((self.free + 1).to_le_bytes());
            self.memory
                .put(DESCRIPTORS + 16 * u64::from(self.free), &raw);
            self.free += 1;
        }
        assert!(self.free <= SIZE, "the test's driver is out of descriptors");
        let slot = u64::from(self.offered % SIZE);
        self.memory
            .put(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.memory.put(AVAILABLE + 2, &self.offered.to_le_bytes());
    }

    /// All descriptors are free again.
    pub(super) fn reclaim(&mut self) {
        self.free = 0;
    }

    /// Makes descriptor `from` continue with `to`.
    pub(super) fn link(&self, from: u16, to: u16) {
        self.flags(from, 1);
        self.memory
            .put(DESCRIPTORS + 16 * u64::from(from) + 14, &to.to_le_bytes());
    }

    pub(super) fn flags(&self, index: u16, flags: u16) {
        let place = DESCRIPTORS + 16 * u64::from(index) + 12;
        self.memory.put(place, &flags.to_le_bytes());
    }

    /// What came back: head and written bytes.
    pub(super) fn used(&self) -> Vec<(u16, u32)> {
        let count = self.memory.get(USED + 2, 2);
        let count = u64::from(u16::from_le_bytes([count[0], count[1]]));
        let entry = |n| {
            let raw = self.memory.get(USED + 4 + 8 * (n % u64::from(SIZE)), 8);
            let head = u16::from_le_bytes([raw[0], raw[1]]);
            (head, u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]]))
        };
        (0..count).map(entry).collect()
    }
}
