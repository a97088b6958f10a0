//! A split virtqueue from the device's side (VIRTIO 1.2, section 2.7).

use core::sync::atomic::{Ordering, fence};

use alloc::vec::Vec;
use thiserror::Error;

use super::{BadAddress, GuestMemory};

/// Descriptors of a queue, and of a chain, at most.
pub const QUEUE_SIZE: u16 = 128;

const DESCRIPTOR: u64 = 16;
/// Flags of a descriptor (2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Flag of the available ring: the driver wants no interrupt (2.7.7).
const NO_INTERRUPT: u16 = 1;

/// How a driver broke the rules.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum QueueError {
    /// A ring or a buffer is not in its memory.
    #[error("{0}")]
    Address(#[from] BadAddress),
    /// More requests than the queue has descriptors.
    #[error("the available index ran from {from} to {to}")]
    Index {
        /// Where the device is.
        from: u16,
        /// What the driver wrote.
        to: u16,
    },
    /// A descriptor that does not exist.
    #[error("there is no descriptor {0}")]
    Descriptor(u16),
    /// More descriptors in a chain than in the queue: a loop.
    #[error("a chain of descriptors has no end")]
    Loop,
    /// A buffer to read behind one to write, or an indirect descriptor, which was not offered.
    #[error("descriptor {0} is not allowed where it is")]
    Order(u16),
}

/// A piece of a request's buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    ipa: u64,
    length: u32,
}

/// A queue. Addresses are what the driver has set.
#[derive(Debug)]
pub struct Queue {
    /// Descriptors: a power of two, at most [`QUEUE_SIZE`].
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    next_available: u16,
    next_used: u16,
    /// Something was put into the used ring since [`Queue::take_signal`].
    signal: bool,
    /// Segments of the request that is being served.
    segments: Vec<Segment>,
}

/// A request: its buffer is first read, then written.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its name for [`Queue::complete`].
    pub head: u16,
    /// What the device may read.
    pub readable: Pieces<'a>,
    /// What the device may write.
    pub writable: Pieces<'a>,
}

/// One buffer out of several pieces of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'a>(&'a [Segment]);

impl Default for Queue {
    fn default() -> Self {
        Self::new()
    }
}

impl Queue {
    /// A queue that is not set up.
    #[must_use]
    pub fn new() -> Self {
        Self {
            segments: Vec::with_capacity(QUEUE_SIZE.into()),
            ..Self::empty()
        }
    }

    /// Back to the state after reset.
    pub fn reset(&mut self) {
        let mut segments = core::mem::take(&mut self.segments);
        segments.clear();
        *self = Self {
            segments,
            ..Self::empty()
        };
    }

    const fn empty() -> Self {
        Self {
            size: 0,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
            signal: false,
            segments: Vec::new(),
        }
    }

    /// Enables it, if what the driver has set can be a queue (2.7: size and alignments).
    pub fn enable(&mut self) {
        self.ready = self.size.is_power_of_two()
            && self.size <= QUEUE_SIZE
            && self.descriptors.is_multiple_of(16)
            && self.available.is_multiple_of(2)
            && self.used.is_multiple_of(4);
    }

    /// The next request, which stays the next one until [`Queue::complete`].
    ///
    /// # Errors
    ///
    /// [`QueueError`]: the driver broke a rule.
    pub fn next(&mut self, memory: &dyn GuestMemory) -> Result<Option<Request<'_>>, QueueError> {
        let to = read_u16(memory, offset(self.available, 2)?)?;
        if to == self.next_available {
            return Ok(None);
        }
        if to.wrapping_sub(self.next_available) > self.size {
            let from = self.next_available;
            return Err(QueueError::Index { from, to });
        }
        // The ring's entries were written before the index (2.7.13).
        fence(Ordering::Acquire);
        let slot = u64::from(self.next_available & (self.size - 1));
        let head = read_u16(memory, offset(self.available, 4 + 2 * slot)?)?;
        let split = self.collect(memory, head)?;
        let (readable, writable) = self.segments.split_at(split);
        Ok(Some(Request {
            head,
            readable: Pieces(readable),
            writable: Pieces(writable),
        }))
    }

    /// Reads a chain into `segments`; gives where the writable ones begin.
    fn collect(&mut self, memory: &dyn GuestMemory, head: u16) -> Result<usize, QueueError> {
        self.segments.clear();
        let mut split = None;
        let mut index = head;
        for _ in 0..self.size {
            let (segment, flags, next) = self.descriptor(memory, index)?;
            if flags & INDIRECT != 0 {
                return Err(QueueError::Order(index));
            }
            match (flags & WRITE != 0, split) {
                (true, None) => split = Some(self.segments.len()),
                (false, Some(_)) => return Err(QueueError::Order(index)),
                _ => {}
            }
            self.segments.push(segment);
            if flags & NEXT == 0 {
                return Ok(split.unwrap_or(self.segments.len()));
            }
            index = next;
        }
        Err(QueueError::Loop)
    }

    fn descriptor(
        &self,
        memory: &dyn GuestMemory,
        index: u16,
    ) -> Result<(Segment, u16, u16), QueueError> {
        if index >= self.size {
            return Err(QueueError::Descriptor(index));
        }
        let mut raw = [0; 16];
        let place = offset(self.descriptors, u64::from(index) * DESCRIPTOR)?;
        memory.read(place, &mut raw)?;
        let [ipa @ .., a, b, c, d, e, f, g, h] = raw;
        let segment = Segment {
            ipa: u64::from_le_bytes(ipa),
            length: u32::from_le_bytes([a, b, c, d]),
        };
        Ok((
            segment,
            u16::from_le_bytes([e, f]),
            u16::from_le_bytes([g, h]),
        ))
    }

    /// Gives the next request back; `written` bytes of its writable part are valid.
    ///
    /// # Errors
    ///
    /// [`QueueError::Address`].
    pub fn complete(
        &mut self,
        memory: &dyn GuestMemory,
        head: u16,
        written: u64,
    ) -> Result<(), QueueError> {
        let slot = u64::from(self.next_used & (self.size - 1));
        let entry = u64::from(head) | written << 32;
        memory.write(offset(self.used, 4 + 8 * slot)?, &entry.to_le_bytes())?;
        self.next_available = self.next_available.wrapping_add(1);
        self.next_used = self.next_used.wrapping_add(1);
        // The entry and the buffer before the index.
        fence(Ordering::Release);
        memory.write(offset(self.used, 2)?, &self.next_used.to_le_bytes())?;
        self.signal = true;
        Ok(())
    }

    /// Whether the driver must be told that requests came back.
    ///
    /// # Errors
    ///
    /// [`QueueError::Address`].
    pub fn take_signal(&mut self, memory: &dyn GuestMemory) -> Result<bool, QueueError> {
        if !core::mem::take(&mut self.signal) {
            return Ok(false);
        }
        // The index before the flags (2.7.7): a driver that enables interrupts looks again.
        fence(Ordering::SeqCst);
        Ok(read_u16(memory, self.available)? & NO_INTERRUPT == 0)
    }
}

impl Pieces<'_> {
    /// Bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.length)).sum()
    }

    /// Copies from `at` on into `to`; gives how much there was.
    ///
    /// # Errors
    ///
    /// [`BadAddress`].
    pub fn read(
        &self,
        memory: &dyn GuestMemory,
        at: u64,
        to: &mut [u8],
    ) -> Result<usize, BadAddress> {
        self.walk(at, to.len(), |ipa, done, length| {
            to.get_mut(done..done + length)
                .map_or(Ok(()), |piece| memory.read(ipa, piece))
        })
    }

    /// Copies `from` to `at` and behind; gives how much there was room for.
    ///
    /// # Errors
    ///
    /// [`BadAddress`].
    pub fn write(
        &self,
        memory: &dyn GuestMemory,
        at: u64,
        from: &[u8],
    ) -> Result<usize, BadAddress> {
        self.walk(at, from.len(), |ipa, done, length| {
            from.get(done..done + length)
                .map_or(Ok(()), |piece| memory.write(ipa, piece))
        })
    }

    /// Calls `copy` with the address, the bytes done before and the length of each piece.
    fn walk(
        &self,
        at: u64,
        length: usize,
        mut copy: impl FnMut(u64, usize, usize) -> Result<(), BadAddress>,
    ) -> Result<usize, BadAddress> {
        let (mut skip, mut done) = (at, 0);
        for segment in self.0 {
            let size = u64::from(segment.length);
            if skip >= size {
                skip -= size;
                continue;
            }
            let here = usize::try_from(size - skip).unwrap_or(usize::MAX);
            let here = here.min(length - done);
            if here > 0 {
                copy(offset(segment.ipa, skip)?, done, here)?;
            }
            skip = 0;
            done += here;
        }
        Ok(done)
    }
}

fn offset(address: u64, bytes: u64) -> Result<u64, BadAddress> {
    address.checked_add(bytes).ok_or(BadAddress(address))
}

fn read_u16(memory: &dyn GuestMemory, ipa: u64) -> Result<u16, BadAddress> {
    let mut bytes = [0; 2];
    memory.read(ipa, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, RAM};
    use super::*;
    use std::vec;

    #[test]
    fn a_chain_is_read_then_written_across_its_pieces() {
        let mut driver = Driver::new();
        driver.memory.put(0x3000, b"abc");
        driver.memory.put(0x4000, b"defg");
        driver.offer(&[
            (0x3000, 3, false),
            (0x4000, 4, false),
            (0x5000, 2, true),
            (0x6000, 9, true),
        ]);
        let mut queue = driver.queue();
        let request = queue.next(&driver.memory).unwrap().unwrap();
        let mut text = [0; 5];
        let memory = &driver.memory;
        assert_eq!(request.readable.read(memory, 1, &mut text).unwrap(), 5);
        assert_eq!(&text, b"bcdef");
        assert_eq!(
            (request.readable.length(), request.writable.length()),
            (7, 11)
        );
        assert_eq!(request.writable.write(memory, 1, b"xyz").unwrap(), 3);
        assert_eq!(driver.memory.get(0x5001, 1), b"x");
        assert_eq!(driver.memory.get(0x6000, 2), b"yz");
        assert_eq!(request.writable.write(memory, 10, b"xyz").unwrap(), 1);
        let head = request.head;
        queue.complete(&driver.memory, head, 3).unwrap();
        assert_eq!(driver.used(), vec![(head, 3)]);
        assert!(queue.next(&driver.memory).unwrap().is_none());
        assert!(queue.take_signal(&driver.memory).unwrap());
        assert!(!queue.take_signal(&driver.memory).unwrap());
    }

    #[test]
    fn requests_come_in_order_when_the_index_wraps() {
        let mut driver = Driver::new();
        let mut queue = driver.queue();
        for round in 0..70_000u32 {
            driver.offer(&[(0x3000, round % 100, true)]);
            let request = queue.next(&driver.memory).unwrap().unwrap();
            assert_eq!(request.writable.length(), u64::from(round % 100));
            let head = request.head;
            queue.complete(&driver.memory, head, round.into()).unwrap();
            driver.reclaim();
        }
    }

    #[test]
    fn no_interrupt_is_sent_to_who_wants_none() {
        let mut driver = Driver::new();
        driver.offer(&[(0x3000, 1, true)]);
        let mut queue = driver.queue();
        let head = queue.next(&driver.memory).unwrap().unwrap().head;
        queue.complete(&driver.memory, head, 0).unwrap();
        driver.memory.put(driver.available(), &[1, 0]);
        assert!(!queue.take_signal(&driver.memory).unwrap());
    }

    #[test]
    fn a_loop_ends() {
        let mut driver = Driver::new();
        driver.offer(&[(0x3000, 1, false), (0x3000, 1, false)]);
        driver.link(1, 0);
        let mut queue = driver.queue();
        assert_eq!(queue.next(&driver.memory).unwrap_err(), QueueError::Loop);
    }

    #[test]
    fn wrong_order_indirect_and_missing_descriptors_are_refused() {
        let mut driver = Driver::new();
        driver.offer(&[(0x3000, 1, true), (0x3000, 1, false)]);
        let mut queue = driver.queue();
        let refused = queue.next(&driver.memory).unwrap_err();
        assert_eq!(refused, QueueError::Order(1));
        driver.link(0, 16);
        let refused = queue.next(&driver.memory).unwrap_err();
        assert_eq!(refused, QueueError::Descriptor(16));
        driver.flags(0, INDIRECT);
        let refused = queue.next(&driver.memory).unwrap_err();
        assert_eq!(refused, QueueError::Order(0));
    }

    #[test]
    fn an_index_that_ran_away_is_refused() {
        let driver = Driver::new();
        driver.memory.put(driver.available() + 2, &[17, 0]);
        let mut queue = driver.queue();
        let refused = queue.next(&driver.memory).unwrap_err();
        assert_eq!(refused, QueueError::Index { from: 0, to: 17 });
    }

    #[test]
    fn rings_and_buffers_outside_memory_are_refused() {
        let mut driver = Driver::new();
        driver.offer(&[(u64::MAX - 1, 8, false), (RAM - 1, 4, true)]);
        let mut queue = driver.queue();
        let request = queue.next(&driver.memory).unwrap().unwrap();
        let memory = &driver.memory;
        assert!(request.readable.read(memory, 4, &mut [0; 4]).is_err());
        assert!(request.readable.read(memory, 0, &mut [0; 4]).is_err());
        assert!(request.writable.write(memory, 0, &[0; 4]).is_err());
        for place in [!15, RAM] {
            let mut queue = driver.queue();
            (queue.available, queue.used) = (place, place);
            assert!(queue.next(&driver.memory).is_err(), "{place:#x}");
            assert!(queue.complete(&driver.memory, 0, 0).is_err(), "{place:#x}");
        }
    }

    #[test]
    fn only_sizes_and_alignments_of_the_standard_are_enabled() {
        let try_with = |size, descriptors, available, used| {
            let mut queue = Queue::new();
            queue.size = size;
            (queue.descriptors, queue.available, queue.used) = (descriptors, available, used);
            queue.enable();
            queue.ready
        };
        assert!(try_with(128, 16, 2, 4) && try_with(1, 0, 0, 0));
        assert!(!try_with(0, 0, 0, 0) && !try_with(3, 0, 0, 0) && !try_with(256, 0, 0, 0));
        assert!(!try_with(8, 8, 0, 0) && !try_with(8, 0, 1, 0) && !try_with(8, 0, 0, 2));
    }
}
