//! The shim's emulated devices: registers in any order, and rings and descriptors that lie.

use arbitrary::{Result, Unstructured};
use std::cell::RefCell;
use vmm::pl011::Pl011;
use vmm::virtio::block::{Block, Disk, DiskError, SECTOR};
use vmm::virtio::console::Console;
use vmm::virtio::entropy::Entropy;
use vmm::virtio::transport::{Progress, Registers, Transport};
use vmm::virtio::{BadAddress, GuestMemory, Host};

/// Bytes of the guest's memory, which starts at 0.
const RAM: usize = 0x1_0000;
/// Descriptor table, available ring, used ring of a driver that does it right.
const RINGS: [u64; 3] = [0x1000, 0x2000, 0x3000];
/// Descriptors of its queue.
const SIZE: u16 = 16;
/// Flags of a descriptor (2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Sectors of the disk.
const SECTORS: usize = 8;
/// Pieces of work after each step: a device may have more to do, but never needs to be asked for ever.
const WORKS: usize = 64;

struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn range(ipa: u64, length: usize) -> std::result::Result<std::ops::Range<usize>, BadAddress> {
        let start = usize::try_from(ipa).ok().filter(|start| *start <= RAM);
        let start = start.ok_or(BadAddress(ipa))?;
        match start.checked_add(length) {
            Some(end) if end <= RAM => Ok(start..end),
            _ => Err(BadAddress(ipa)),
        }
    }

    fn put(&self, ipa: u64, bytes: &[u8]) {
        let _: std::result::Result<(), _> = self.write(ipa, bytes);
    }
}

impl GuestMemory for Memory {
    fn read(&self, ipa: u64, to: &mut [u8]) -> std::result::Result<(), BadAddress> {
        let range = Self::range(ipa, to.len())?;
        to.copy_from_slice(&self.0.borrow()[range]);
        Ok(())
    }

    fn write(&self, ipa: u64, from: &[u8]) -> std::result::Result<(), BadAddress> {
        let range = Self::range(ipa, from.len())?;
        self.0.borrow_mut()[range].copy_from_slice(from);
        Ok(())
    }
}

/// Whole sectors only, all of them on the disk: what the device promises.
#[derive(Debug)]
struct Sectors(Vec<u8>);

impl Sectors {
    fn range(sector: u64, length: usize) -> std::ops::Range<usize> {
        assert!(
            length.is_multiple_of(SECTOR) && length != 0,
            "{length} bytes"
        );
        let start = usize::try_from(sector).expect("a sector of the disk") * SECTOR;
        assert!(
            start + length <= SECTORS * SECTOR,
            "sector {sector}, {length} bytes"
        );
        start..start + length
    }
}

impl Disk for Sectors {
    fn sectors(&self) -> u64 {
        SECTORS as u64
    }

    fn read(&mut self, sector: u64, to: &mut [u8]) -> std::result::Result<(), DiskError> {
        to.copy_from_slice(&self.0[Self::range(sector, to.len())]);
        Ok(())
    }

    fn write(&mut self, sector: u64, from: &[u8]) -> std::result::Result<(), DiskError> {
        self.0[Self::range(sector, from.len())].copy_from_slice(from);
        Ok(())
    }
}

struct Outside;

impl Host for Outside {
    fn print(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= RAM);
    }

    fn random(&mut self, bytes: &mut [u8]) {
        bytes.fill(0xa5);
    }
}

/// Runs one input.
pub(crate) fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let memory = Memory(RefCell::new(vec![0; RAM]));
    match input.int_in_range(0..=3u8) {
        Ok(0) => drive(&mut input, &memory, Transport::new(Entropy), |_, _| {}),
        Ok(1) => {
            let disk = Box::new(Sectors(vec![0; SECTORS * SECTOR]));
            drive(
                &mut input,
                &memory,
                Transport::new(Block::new(disk)),
                |_, _| {},
            );
        }
        Ok(2) => {
            let console = Transport::new(Console::new());
            drive(&mut input, &memory, console, |console, byte| {
                console.feed(0).press(byte);
            });
        }
        _ => serial(&mut input),
    }
}

fn drive<D>(
    input: &mut Unstructured<'_>,
    memory: &Memory,
    mut device: Transport<D>,
    press: impl Fn(&mut Transport<D>, u8),
) where
    Transport<D>: Registers,
{
    let mut offered = 0u16;
    let begun = match input.ratio(3, 4u8) {
        Ok(true) => set_up(input, &mut device),
        other => other.map(drop),
    };
    while begun.is_ok() && !input.is_empty() {
        let step = match input.int_in_range(0..=8u8) {
            Ok(0) => access(input, &mut device),
            Ok(1) => set_up(input, &mut device),
            Ok(2) => scribble(input, memory),
            Ok(3) => input.arbitrary().map(|byte| press(&mut device, byte)),
            Ok(4 | 5) => descriptor(input, memory),
            Ok(6) => block_request(input, memory, &mut device, &mut offered),
            Ok(_) => offer(input, memory, &mut device, &mut offered),
            Err(error) => Err(error),
        };
        if step.is_err() {
            return;
        }
        work(memory, &mut device);
    }
    device.reset();
    assert!(!device.line() && !device.has_work());
}

fn work(memory: &Memory, device: &mut impl Registers) {
    for _ in 0..WORKS {
        if device.work(memory, &mut Outside) == Progress::Done {
            return;
        }
    }
}

fn access(input: &mut Unstructured<'_>, device: &mut impl Registers) -> Result<()> {
    let offset = u64::from(input.arbitrary::<u16>()? & 0x1ff);
    let size = *input.choose(&[4, 4, 4, 1, 2, 8])?;
    let value = device.read(offset, size);
    assert!(
        size == 8 || value >> (8 * size) == 0,
        "{value:#x} of {size} bytes"
    );
    if input.arbitrary()? {
        device.write(offset, size, input.arbitrary()?);
    }
    Ok(())
}

/// Initialises the device as 3.1.1 and 4.2.3 say, but for one register perhaps.
fn set_up(input: &mut Unstructured<'_>, device: &mut impl Registers) -> Result<()> {
    let queue = input.int_in_range(0..=2u64)?;
    let [descriptors, available, used] = RINGS;
    let writes = [
        (0x70, 0),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, queue),
        (0x38, SIZE.into()),
        (0x80, descriptors),
        (0x90, available),
        (0xa0, used),
        (0x44, 1),
        (0x70, 15),
    ];
    let odd = input.int_in_range(0..=4 * writes.len())?;
    for (index, (offset, value)) in writes.into_iter().enumerate() {
        let value = if index == odd {
            input.arbitrary()?
        } else {
            value
        };
        device.write(offset, 4, value);
    }
    Ok(())
}

fn scribble(input: &mut Unstructured<'_>, memory: &Memory) -> Result<()> {
    let at = input.choose(&RINGS)? + u64::from(input.arbitrary::<u8>()?);
    let bytes: [u8; 8] = input.arbitrary()?;
    memory.put(at, &bytes);
    Ok(())
}

/// One descriptor (2.7.5), and perhaps the header of a block request where it points.
fn descriptor(input: &mut Unstructured<'_>, memory: &Memory) -> Result<()> {
    let index = input.int_in_range(0..=SIZE - 1)?;
    let ipa = match input.int_in_range(0..=7u8)? {
        0 => input.arbitrary()?,
        1 => u64::MAX - u64::from(input.arbitrary::<u8>()?),
        2 => RAM as u64 - u64::from(input.arbitrary::<u8>()?),
        _ => 0x4000 + u64::from(input.arbitrary::<u8>()?) * 0x80,
    };
    let length = match input.int_in_range(0..=7u8)? {
        0 => input.arbitrary()?,
        1 | 2 => 16,
        3 => 1,
        _ => u32::from(input.arbitrary::<u8>()?) * 0x80,
    };
    let flags = u16::from(input.arbitrary::<u8>()? & 7);
    let flags = if input.ratio(1, 8u8)? {
        flags
    } else {
        flags & 3
    };
    let next = input.int_in_range(0..=20u16)?;
    put_descriptor(memory, index, (ipa, length, flags), next);
    if input.arbitrary()? {
        let header = block_header(input)?;
        memory.put(ipa, &header);
    }
    Ok(())
}

fn put_descriptor(memory: &Memory, index: u16, (ipa, length, flags): (u64, u32, u16), next: u16) {
    let mut raw = ipa.to_le_bytes().to_vec();
    raw.extend(length.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw.extend(next.to_le_bytes());
    memory.put(RINGS[0] + 16 * u64::from(index), &raw);
}

/// The header of a block request (5.2.6): kind, sector.
fn block_header(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut header = input.choose(&[0u32, 1, 4, 8, 11])?.to_le_bytes().to_vec();
    header.extend([0; 4]);
    let sector = match input.int_in_range(0..=7u8)? {
        0 => u64::MAX - u64::from(input.arbitrary::<u8>()?),
        _ => u64::from(input.arbitrary::<u8>()? & 0xf),
    };
    header.extend(sector.to_le_bytes());
    Ok(header)
}

/// A block request that is right as far as its chain goes: header, whole sectors, answer.
fn block_request(
    input: &mut Unstructured<'_>,
    memory: &Memory,
    device: &mut impl Registers,
    offered: &mut u16,
) -> Result<()> {
    let first = input.int_in_range(0..=SIZE - 3)?;
    let sectors = input.int_in_range(0..=9u32)?;
    let device_writes = if input.arbitrary()? { WRITE } else { 0 };
    let chain = [
        (0x4000u64, 16u32, NEXT),
        (0x5000, sectors * 512, NEXT | device_writes),
        (0x8000, 1, WRITE),
    ];
    for (index, (ipa, length, flags)) in (first..).zip(chain) {
        put_descriptor(memory, index, (ipa, length, flags), index + 1);
    }
    let header = block_header(input)?;
    memory.put(0x4000, &header);
    make_available(memory, offered, first, 1);
    device.write(0x50, 4, 0);
    Ok(())
}

/// Makes a chain available (2.7.13) and notifies.
fn offer(
    input: &mut Unstructured<'_>,
    memory: &Memory,
    device: &mut impl Registers,
    offered: &mut u16,
) -> Result<()> {
    let head = input.int_in_range(0..=17u16)?;
    make_available(memory, offered, head, input.int_in_range(0..=17)?);
    device.write(0x50, 4, input.int_in_range(0..=2)?);
    Ok(())
}

fn make_available(memory: &Memory, offered: &mut u16, head: u16, count: u16) {
    let slot = u64::from(*offered % SIZE);
    memory.put(RINGS[1] + 4 + 2 * slot, &head.to_le_bytes());
    *offered = offered.wrapping_add(count);
    memory.put(RINGS[1] + 2, &offered.to_le_bytes());
}

/// The PL011: any access, any key.
fn serial(input: &mut Unstructured<'_>) {
    let mut uart = Pl011::new();
    let mut step = || -> Result<()> {
        let offset = u64::from(input.arbitrary::<u16>()?);
        match input.int_in_range(0..=2u8)? {
            0 => drop(uart.read(offset)),
            1 => drop(uart.write(offset, input.arbitrary()?)),
            _ if uart.has_room() => uart.receive(input.arbitrary()?),
            _ => {}
        }
        let _: bool = uart.line();
        if input.is_empty() {
            Err(arbitrary::Error::NotEnoughData)
        } else {
            Ok(())
        }
    };
    while step().is_ok() {}
}
