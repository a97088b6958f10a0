//! The console device (VIRTIO 1.2, section 5.3): one port.

use alloc::collections::VecDeque;

use super::queue::{Queue, QueueError};
use super::transport::{Device, Progress};
use super::{GuestMemory, Host};

/// Queue of input.
pub const RECEIVE: usize = 0;
/// Input that waits for a buffer, at most; what comes then is lost.
const WAITING: usize = 256;
/// Bytes of output in one piece of work.
const CHUNK: usize = 128;

/// The device.
#[derive(Debug)]
pub struct Console {
    input: VecDeque<u8>,
    /// How much of the next request has been printed.
    printed: u64,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// Nothing typed yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            input: VecDeque::with_capacity(WAITING),
            printed: 0,
        }
    }

    /// A key was pressed.
    pub fn press(&mut self, byte: u8) {
        if self.input.len() < WAITING {
            self.input.push_back(byte);
        }
    }

    fn receive(
        &mut self,
        queue: &mut Queue,
        memory: &dyn GuestMemory,
    ) -> Result<Progress, QueueError> {
        while !self.input.is_empty() {
            let Some(request) = queue.next(memory)? else {
                break;
            };
            let head = request.head;
            let written = request
                .writable
                .write(memory, 0, self.input.make_contiguous())?;
            self.input.drain(..written);
            queue.complete(memory, head, written as u64)?;
        }
        Ok(Progress::Done)
    }

    fn transmit(
        &mut self,
        queue: &mut Queue,
        memory: &dyn GuestMemory,
        host: &mut dyn Host,
    ) -> Result<Progress, QueueError> {
        let Some(request) = queue.next(memory)? else {
            return Ok(Progress::Done);
        };
        let mut bytes = [0; CHUNK];
        let count = request.readable.read(memory, self.printed, &mut bytes)?;
        host.print(bytes.get(..count).unwrap_or(&[]));
        self.printed += count as u64;
        if self.printed >= request.readable.length() {
            let head = request.head;
            self.printed = 0;
            queue.complete(memory, head, 0)?;
            if queue.next(memory)?.is_none() {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::More)
    }
}

impl Device for Console {
    const ID: u32 = 3;
    const QUEUES: usize = 2;

    fn work(
        &mut self,
        number: usize,
        queue: &mut Queue,
        memory: &dyn GuestMemory,
        host: &mut dyn Host,
    ) -> Result<Progress, QueueError> {
        if number == RECEIVE {
            self.receive(queue, memory)
        } else {
            self.transmit(queue, memory, host)
        }
    }

    fn reset(&mut self) {
        self.input.clear();
        self.printed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, TestHost};
    use super::super::transport::{Registers, Transport, tests::start};
    use super::*;
    use std::vec;

    #[test]
    fn output_of_any_length_is_printed_once_in_order() {
        let (mut transport, mut driver) = (Transport::new(Console::new()), Driver::new());
        start(&mut transport, &driver, 1);
        driver.memory.put(0x3000, &vec![b'a'; 3000]);
        driver.memory.put(0x5000, b"end");
        driver.offer(&[(0x3000, 3000, false)]);
        driver.offer(&[(0x5000, 3, false), (0x5000, 0, false)]);
        transport.write(0x50, 4, 1);
        let host = &mut TestHost::default();
        let mut calls = 1;
        while transport.work(&driver.memory, host) == Progress::More {
            calls += 1;
        }
        assert_eq!(calls, 25);
        let mut expected = vec![b'a'; 3000];
        expected.extend(b"end");
        assert_eq!(host.printed, expected);
        assert_eq!(driver.used(), [(0, 0), (1, 0)]);
    }

    #[test]
    fn input_waits_for_buffers_and_fills_them() {
        let (mut transport, mut driver) = (Transport::new(Console::new()), Driver::new());
        start(&mut transport, &driver, 0);
        let host = &mut TestHost::default();
        for byte in *b"hello" {
            transport.feed(RECEIVE).press(byte);
        }
        assert_eq!(transport.work(&driver.memory, host), Progress::Done);
        assert!(driver.used().is_empty() && !transport.line());
        driver.offer(&[(0x3000, 2, true)]);
        driver.offer(&[(0x4000, 64, true)]);
        transport.write(0x50, 4, 0);
        transport.work(&driver.memory, host);
        assert_eq!(driver.used(), [(0, 2), (1, 3)]);
        assert_eq!(driver.memory.get(0x3000, 2), b"he");
        assert_eq!(driver.memory.get(0x4000, 3), b"llo");
        assert!(transport.line());
    }

    #[test]
    fn too_much_input_is_lost_at_the_end() {
        let mut console = Console::new();
        (0..=255u8)
            .chain(0..10)
            .for_each(|byte| console.press(byte));
        assert_eq!(console.input.len(), 256);
        assert_eq!(console.input.back(), Some(&255));
    }
}
