//! Pages whose contents are donated and measured while DMA writes to them is on its way: what is
//! measured is what the guest finds, whether the device was in time or not.

use abi::DonationKind;
use board::{AddrRange, PAGE_SIZE};
use sha2::{Digest, Sha256};
use vmm::platform::RAM;

use super::setup::Setup;
use crate::arch::{gic, guest, mem, ticks};
use crate::edu::{self, Direction};
use crate::scenario::kit::{end, expect, words};
use crate::scenario::remote::{self, CODE_PAGES, Remote};
use crate::vm::Vm;

/// VMs that are measured.
const ROUNDS: u64 = 12;
/// Bytes that a device writes at the start of each page.
const BYTES: u64 = 64;
const CANARY: u8 = 0xc3;
const BLANK: u8 = 0x77;
/// The first of the pages.
const FIRST: u64 = RAM + CODE_PAGES * PAGE_SIZE;

pub(super) fn contents(setup: &Setup<'_>) -> Result<(), &'static str> {
    let canary = setup.filled(0, CANARY)?.start();
    setup.transfers(Direction::FromMemory, core::iter::repeat(canary), BYTES)?;
    let (mut length, mut late, mut pages) = (0, 0, 0);
    for round in 0..ROUNDS {
        let vm = remote::unsealed(&setup.guest)?;
        let early = length * (round % ROUNDS + 1) / ROUNDS;
        let result = donate(setup, vm, early).and_then(|ticks| {
            length = ticks;
            compare(setup, vm)
        });
        end(vm)?;
        late += result?;
        pages += setup.devices.len();
    }
    let done = pages - late;
    crate::console::line(format_args!(
        "  {done} transfers were in time, {late} too late"
    ));
    // Else nothing was raced.
    expect(late > 0, "no transfer met a donated page")?;
    expect(done > 0, "no transfer came before")
}

/// The pages of a round, by their IPAs.
fn pages(setup: &Setup<'_>) -> impl Iterator<Item = u64> + use<> {
    let count = setup.devices.len() as u64;
    (0..count).map(|number| FIRST + number * PAGE_SIZE)
}

/// Donates all pages, beginning so long before the transfers to them; says how long that took.
fn donate(setup: &Setup<'_>, vm: Vm, early: u64) -> Result<u64, &'static str> {
    let first = setup.guest.ram.start() + (FIRST - RAM);
    let size = setup.devices.len() as u64 * PAGE_SIZE;
    mem::bytes_mut(AddrRange::with_size(first, size).ok_or("wraps")?).fill(BLANK);
    let due = edu::due();
    for (device, ipa) in setup.devices.iter().zip(pages(setup)) {
        device.start(Direction::ToMemory, first + (ipa - FIRST), BYTES);
    }
    gic::sleep_until(&setup.gic, due.saturating_sub(early))?;
    let from = ticks();
    for ipa in pages(setup) {
        words(vm.donate_memory(ipa, 1, DonationKind::Contents))?;
    }
    let length = ticks() - from;
    setup.finish()?;
    Ok(length)
}

/// Compares what the guest finds with its measurement; says how many pages no device has written.
fn compare(setup: &Setup<'_>, vm: Vm) -> Result<usize, &'static str> {
    words(vm.seal(RAM, 0))?;
    let told = words(vm.measurement())?;
    let mut guest = Remote::new(vm);
    let mut measurement = Measurement::default();
    measurement.pages(guest::remote(), 0, CODE_PAGES);
    let mut late = 0;
    for ipa in pages(setup) {
        let found = [guest.load(ipa)?, guest.load(ipa + BYTES - 8)?];
        let [byte, ..] = found[0].to_le_bytes();
        let whole = u64::from_le_bytes([byte; 8]);
        let known = byte == BLANK || byte == CANARY;
        expect(known && found == [whole; 2], "a page has changed in part")?;
        late += usize::from(byte == BLANK);
        measurement.pages(&[byte; BYTES as usize], BLANK, 1);
    }
    guest.off()?;
    expect(
        told == measurement.end(),
        "the measurement is of something else",
    )?;
    Ok(late)
}

/// A measurement by its definition (docs/protection.md): of contents from [`RAM`] on without a gap.
#[derive(Default)]
struct Measurement {
    hash: Sha256,
    size: u64,
}

impl Measurement {
    /// The next pages: these bytes, then `filler`.
    fn pages(&mut self, bytes: &[u8], filler: u8, pages: u64) {
        let size = pages * PAGE_SIZE;
        self.hash.update(bytes);
        (bytes.len() as u64..size).for_each(|_| self.hash.update([filler]));
        self.size += size;
    }

    fn words(&mut self, words: &[u64]) {
        words
            .iter()
            .for_each(|word| self.hash.update(word.to_le_bytes()));
    }

    fn end(mut self) -> [u64; 4] {
        self.words(&[1, RAM, self.size]);
        self.words(&[0x5241_5645_4c49_4e01, 1, RAM, 0]);
        let bytes: [u8; 32] = self.hash.finalize().into();
        let mut words = [0; 4];
        for (word, eight) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*eight);
        }
        words
    }
}
