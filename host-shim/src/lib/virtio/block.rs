//! The block device (VIRTIO 1.2, section 5.2).

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use thiserror::Error;

use super::queue::{Queue, QueueError, Request};
use super::transport::{Device, Progress, one};
use super::{BadAddress, GuestMemory, Host};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Sectors that are copied at once.
const CHUNK: usize = 8 * SECTOR;
/// Bytes of a request, at most: what [`SIZE_MAX`] and [`SEG_MAX`] allow a driver.
const LONGEST: u64 = SIZE_MAX as u64 * SEG_MAX as u64;
const SIZE_MAX: u32 = 32 << 10;
/// Two descriptors of the queue are for header and status.
const SEG_MAX: u32 = 126;

/// Features (5.2.3).
const HAS_SIZE_MAX: u64 = 1 << 1;
const HAS_SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;

/// Kinds of requests (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_REQUEST: u32 = 4;
const GET_ID: u32 = 8;
/// Bytes of the answer to [`GET_ID`].
const ID_LENGTH: usize = 20;

/// Answers.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// The storage failed.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("the disk can't do that")]
pub struct DiskError;

/// Storage of whole sectors. `sector` and the buffer's length are inside the disk.
pub trait Disk: Send + fmt::Debug {
    /// How many sectors it has.
    fn sectors(&self) -> u64;

    /// Whether writes fail.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Reads whole sectors.
    ///
    /// # Errors
    ///
    /// [`DiskError`]: `to` is not valid.
    fn read(&mut self, sector: u64, to: &mut [u8]) -> Result<(), DiskError>;

    /// Writes whole sectors.
    ///
    /// # Errors
    ///
    /// [`DiskError`]: the sectors may hold anything.
    fn write(&mut self, sector: u64, from: &[u8]) -> Result<(), DiskError>;

    /// Everything that was written lasts from now on.
    ///
    /// # Errors
    ///
    /// [`DiskError`]: it may not.
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// A disk in memory. What is behind its last whole sector is not reachable.
#[derive(Debug)]
pub struct RamDisk(pub &'static mut [u8]);

impl RamDisk {
    fn range(&mut self, sector: u64, length: usize) -> Result<&mut [u8], DiskError> {
        let start = usize::try_from(sector)
            .ok()
            .and_then(|n| n.checked_mul(SECTOR));
        let start = start.ok_or(DiskError)?;
        let end = start.checked_add(length).ok_or(DiskError)?;
        self.0.get_mut(start..end).ok_or(DiskError)
    }
}

impl Disk for RamDisk {
    fn sectors(&self) -> u64 {
        (self.0.len() / SECTOR) as u64
    }

    fn read(&mut self, sector: u64, to: &mut [u8]) -> Result<(), DiskError> {
        to.copy_from_slice(self.range(sector, to.len())?);
        Ok(())
    }

    fn write(&mut self, sector: u64, from: &[u8]) -> Result<(), DiskError> {
        self.range(sector, from.len())?.copy_from_slice(from);
        Ok(())
    }
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Box<dyn Disk>,
    chunk: Vec<u8>,
}

/// Why a request is not served.
enum Refusal {
    /// It is answered with an error.
    Answer(u8),
    /// Its buffers are not memory.
    Address(BadAddress),
}

impl From<BadAddress> for Refusal {
    fn from(bad: BadAddress) -> Self {
        Self::Address(bad)
    }
}

impl From<DiskError> for Refusal {
    fn from(_: DiskError) -> Self {
        Self::Answer(IO_ERROR)
    }
}

impl Block {
    /// A device for this disk.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>) -> Self {
        Self {
            disk,
            chunk: vec![0; CHUNK],
        }
    }

    /// Serves a request; gives how many bytes of its writable part are valid.
    fn serve(&mut self, request: Request<'_>, memory: &dyn GuestMemory) -> Result<u64, BadAddress> {
        let Some(room) = request.writable.length().checked_sub(1) else {
            return Ok(0); // Not even room for an answer.
        };
        let (answer, written) = match self.execute(request, room, memory) {
            Ok(written) => (OK, written),
            Err(Refusal::Answer(answer)) => (answer, 0),
            Err(Refusal::Address(bad)) => return Err(bad),
        };
        request.writable.write(memory, room, &[answer])?;
        Ok(written + 1)
    }

    /// `room`: bytes to write before the answer.
    fn execute(
        &mut self,
        request: Request<'_>,
        room: u64,
        memory: &dyn GuestMemory,
    ) -> Result<u64, Refusal> {
        let mut header = [0; 16];
        if request.readable.read(memory, 0, &mut header)? < header.len() {
            return Err(Refusal::Answer(IO_ERROR));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([a, b, c, d]) {
            IN => {
                self.check(sector, room)?;
                self.read(sector, room, request, memory)?;
                Ok(room)
            }
            OUT => {
                let length = request.readable.length() - header.len() as u64;
                self.check(sector, length)?;
                self.write(sector, length, request, memory)?;
                Ok(0)
            }
            FLUSH_REQUEST => {
                self.disk.flush()?;
                Ok(0)
            }
            GET_ID => {
                let mut id = [0; ID_LENGTH];
                id[..7].copy_from_slice(b"ravelin");
                let id = id.get(..at_most(ID_LENGTH, room)).unwrap_or(&[]);
                Ok(request.writable.write(memory, 0, id)? as u64)
            }
            _ => Err(Refusal::Answer(UNSUPPORTED)),
        }
    }

    /// Whether `length` bytes from `sector` on are whole sectors of the disk.
    fn check(&self, sector: u64, length: u64) -> Result<(), Refusal> {
        let count = length / SECTOR as u64;
        let fits = sector
            .checked_add(count)
            .is_some_and(|end| end <= self.disk.sectors());
        if fits && length.is_multiple_of(SECTOR as u64) && length <= LONGEST {
            Ok(())
        } else {
            Err(Refusal::Answer(IO_ERROR))
        }
    }

    fn read(
        &mut self,
        sector: u64,
        length: u64,
        request: Request<'_>,
        memory: &dyn GuestMemory,
    ) -> Result<(), Refusal> {
        for at in (0..length).step_by(CHUNK) {
            let here = at_most(CHUNK, length - at);
            let chunk = self.chunk.get_mut(..here).ok_or(DiskError)?;
            self.disk.read(sector + at / SECTOR as u64, chunk)?;
            request.writable.write(memory, at, chunk)?;
        }
        Ok(())
    }

    fn write(
        &mut self,
        sector: u64,
        length: u64,
        request: Request<'_>,
        memory: &dyn GuestMemory,
    ) -> Result<(), Refusal> {
        if self.disk.is_read_only() {
            return Err(Refusal::Answer(IO_ERROR));
        }
        for at in (0..length).step_by(CHUNK) {
            let here = at_most(CHUNK, length - at);
            let chunk = self.chunk.get_mut(..here).ok_or(DiskError)?;
            request.readable.read(memory, 16 + at, chunk)?;
            self.disk.write(sector + at / SECTOR as u64, chunk)?;
        }
        Ok(())
    }
}

/// The smaller of the two.
fn at_most(limit: usize, length: u64) -> usize {
    usize::try_from(length).map_or(limit, |length| length.min(limit))
}

impl Device for Block {
    const ID: u32 = 2;
    const QUEUES: usize = 1;

    fn features(&self) -> u64 {
        let read_only = if self.disk.is_read_only() {
            READ_ONLY
        } else {
            0
        };
        HAS_SIZE_MAX | HAS_SEG_MAX | FLUSH | read_only
    }

    /// Capacity, then the limits of a request (5.2.4).
    fn config(&self) -> [u8; 64] {
        let mut config = [0; 64];
        config[..8].copy_from_slice(&self.disk.sectors().to_le_bytes());
        config[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config
    }

    fn work(
        &mut self,
        _: usize,
        queue: &mut Queue,
        memory: &dyn GuestMemory,
        _: &mut dyn Host,
    ) -> Result<Progress, QueueError> {
        one(queue, memory, |request| self.serve(request, memory))
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, TestHost};
    use super::super::transport::{Registers, Transport, tests::start};
    use super::*;

    const HEADER: u64 = 0x3000;
    const DATA: u64 = 0x4000;
    const STATUS: u64 = 0x3100;

    /// A disk of 20 sectors; byte 0 of sector n is n.
    fn disk() -> Transport<Block> {
        let mut bytes = vec![0xee; 20 * SECTOR + 100];
        for (n, sector) in bytes.chunks_mut(SECTOR).enumerate() {
            sector[0] = u8::try_from(n).unwrap();
        }
        Transport::new(Block::new(Box::new(RamDisk(bytes.leak()))))
    }

    #[derive(Debug)]
    struct Stone;

    impl Disk for Stone {
        fn sectors(&self) -> u64 {
            8
        }

        fn is_read_only(&self) -> bool {
            true
        }

        fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), DiskError> {
            Err(DiskError)
        }

        fn write(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
            panic!("it is read-only");
        }
    }

    /// One request; gives the status byte and the length that came back.
    fn ask(
        transport: &mut Transport<Block>,
        driver: &mut Driver,
        kind: u32,
        sector: u64,
        data: Option<(u32, bool)>,
    ) -> (u8, u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        driver.memory.put(HEADER, &header);
        driver.memory.put(STATUS, &[0xff]);
        let mut buffers = vec![(HEADER, 16, false), (STATUS, 1, true)];
        if let Some((length, write)) = data {
            buffers.insert(1, (DATA, length, write));
        }
        driver.offer(&buffers);
        transport.write(0x50, 4, 0);
        let host = &mut TestHost::default();
        while transport.work(&driver.memory, host) == Progress::More {}
        driver.reclaim();
        let (_, length) = *driver.used().last().unwrap();
        (driver.memory.get(STATUS, 1)[0], length)
    }

    fn started(mut transport: Transport<Block>) -> (Transport<Block>, Driver) {
        let driver = Driver::new();
        start(&mut transport, &driver, 0);
        (transport, driver)
    }

    #[test]
    fn capacity_is_in_whole_sectors() {
        let transport = disk();
        assert_eq!(transport.read(0x100, 8), 20);
        assert_eq!(
            (transport.read(0x100, 4), transport.read(0x104, 4)),
            (20, 0)
        );
        assert_eq!(transport.read(0x10c, 4), 126);
        assert_eq!(transport.read(0x200, 8), 0);
    }

    #[test]
    fn what_was_written_is_read_across_chunks() {
        let (mut transport, mut driver) = started(disk());
        let pattern: Vec<u8> = (0..=250).cycle().take(9 * SECTOR).collect();
        driver.memory.put(DATA, &pattern);
        let length = u32::try_from(pattern.len()).unwrap();
        let answer = ask(&mut transport, &mut driver, OUT, 3, Some((length, false)));
        assert_eq!(answer, (OK, 1));
        driver.memory.put(DATA, &vec![0; pattern.len()]);
        let answer = ask(&mut transport, &mut driver, IN, 3, Some((length, true)));
        assert_eq!(answer, (OK, length + 1));
        assert_eq!(driver.memory.get(DATA, pattern.len()), pattern);
        ask(&mut transport, &mut driver, IN, 12, Some((512, true)));
        assert_eq!(driver.memory.get(DATA, 1), [12], "the sector behind");
    }

    #[test]
    fn the_last_sector_is_reached_and_nothing_behind_it() {
        let (mut transport, mut driver) = started(disk());
        let mut read = |sector, length| {
            ask(
                &mut transport,
                &mut driver,
                IN,
                sector,
                Some((length, true)),
            )
            .0
        };
        assert_eq!(read(19, 512), OK);
        for (sector, length) in [(20, 512), (19, 1024), (u64::MAX, 512), (0, 100), (0, 513)] {
            assert_eq!(read(sector, length), IO_ERROR, "{sector} {length}");
        }
    }

    #[test]
    fn flush_identification_and_unknown_requests_are_answered() {
        let (mut transport, mut driver) = started(disk());
        assert_eq!(
            ask(&mut transport, &mut driver, FLUSH_REQUEST, 0, None).0,
            OK
        );
        let answer = ask(&mut transport, &mut driver, GET_ID, 0, Some((20, true)));
        assert_eq!(answer, (OK, 21));
        assert_eq!(&driver.memory.get(DATA, 8), b"ravelin\0");
        assert_eq!(ask(&mut transport, &mut driver, 77, 0, None).0, UNSUPPORTED);
    }

    #[test]
    fn a_disk_that_fails_or_is_read_only_gives_an_error() {
        let (mut transport, mut driver) = started(Transport::new(Block::new(Box::new(Stone))));
        for (kind, write) in [(IN, true), (OUT, false)] {
            let answer = ask(&mut transport, &mut driver, kind, 0, Some((512, write)));
            assert_eq!(answer.0, IO_ERROR, "{kind}");
        }
        transport.write(0x14, 4, 0);
        assert_eq!(transport.read(0x10, 4) & 1 << 5, 1 << 5);
    }

    #[test]
    fn a_request_without_header_or_status_comes_back() {
        let (mut transport, mut driver) = started(disk());
        driver.offer(&[(HEADER, 15, false), (STATUS, 1, true)]);
        driver.offer(&[(HEADER, 16, false)]);
        transport.write(0x50, 4, 0);
        let host = &mut TestHost::default();
        while transport.work(&driver.memory, host) == Progress::More {}
        assert_eq!(driver.used(), [(0, 1), (2, 0)]);
        assert_eq!(driver.memory.get(STATUS, 1), [IO_ERROR]);
    }

    #[test]
    fn a_buffer_that_is_no_memory_needs_a_reset() {
        let (mut transport, mut driver) = started(disk());
        driver.offer(&[(HEADER, 16, false), (1 << 40, 512, true), (STATUS, 1, true)]);
        driver.memory.put(HEADER, &[0; 16]);
        transport.write(0x50, 4, 0);
        transport.work(&driver.memory, &mut TestHost::default());
        assert_eq!(transport.read(0x70, 4) & 64, 64);
    }
}
