//! The entropy device (VIRTIO 1.2, section 5.4).

use super::queue::{Queue, QueueError};
use super::transport::{Device, Progress, one};
use super::{GuestMemory, Host};

/// Most bytes that one request gets; a driver that wants more asks again.
const MOST: usize = 256;

/// The device; all its state is its queue.
#[derive(Clone, Copy, Debug)]
pub struct Entropy;

impl Device for Entropy {
    const ID: u32 = 4;
    const QUEUES: usize = 1;

    fn work(
        &mut self,
        _: usize,
        queue: &mut Queue,
        memory: &dyn GuestMemory,
        host: &mut dyn Host,
    ) -> Result<Progress, QueueError> {
        one(queue, memory, |request| {
            let mut bytes = [0; MOST];
            host.random(&mut bytes);
            let written = request.writable.write(memory, 0, &bytes)?;
            Ok(written as u64)
        })
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, TestHost};
    use super::super::transport::{Registers, Transport, tests::start};
    use super::*;

    #[test]
    fn buffers_are_filled_and_long_ones_in_part() {
        let (mut transport, mut driver) = (Transport::new(Entropy), Driver::new());
        start(&mut transport, &driver, 0);
        driver.offer(&[(0x3000, 4, true), (0x3100, 4, true)]);
        driver.offer(&[(0x4000, 1000, true)]);
        driver.offer(&[(0x5000, 8, false)]);
        transport.write(0x50, 4, 0);
        let host = &mut TestHost::default();
        while transport.work(&driver.memory, host) == Progress::More {}
        assert_eq!(driver.used(), [(0, 8), (2, 256), (3, 0)]);
        assert_eq!(driver.memory.get(0x3000, 4), [1, 2, 3, 4]);
        assert_eq!(driver.memory.get(0x3100, 4), [5, 6, 7, 8]);
        assert_eq!(driver.memory.get(0x5000, 1), [0], "what is readable only");
    }
}
