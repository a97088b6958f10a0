//! Pages change hands while DMA to them is on its way. The transfers of all devices are timed so that
//! they happen while the host donates the pages, one after the other, or the guest gives them back.

use alloc::vec::Vec;
use board::PAGE_SIZE;
use vmm::platform::RAM;

use super::setup::{Setup, faults};
use crate::arch::{gic, mem, ticks};
use crate::console::line;
use crate::edu::{self, Direction};
use crate::scenario::kit::{end, expect, words};
use crate::scenario::protection::MEM_RELINQUISH;
use crate::scenario::remote::{self, Remote};
use abi::DonationKind;

/// Pages that are donated in all.
const DONATIONS: usize = 1000;
/// Pages that are given back in all.
const RETURNS: usize = 200;
/// Moments of a round at which the transfers happen, one after the other.
const MOMENTS: u64 = 16;
/// Bytes of a transfer: more than a page's first word, so that a part would be seen, too.
const BYTES: u64 = 64;
const CANARY: u8 = 0xc3;
const SECRET: u64 = 0x5ec2_e7de_adbe_ef01;
/// The first of the pages: the guest does not need them for its code.
const FIRST: u64 = RAM + 32 * PAGE_SIZE;

/// A VM whose pages come and go.
struct Race<'a> {
    setup: &'a Setup<'a>,
    guest: Remote,
    /// How long the last round's calls took, in ticks of the counter.
    length: u64,
    round: u64,
    /// Transfers that came too late, and those that did not.
    refused: usize,
    done: usize,
}

/// DMA writes while pages are donated: what comes after the donation is refused, what came before is
/// wiped by it. The guest finds zeros.
pub(super) fn donations(setup: &Setup<'_>) -> Result<(), &'static str> {
    raced(setup, DONATIONS, |race| race.donate())
}

/// DMA reads while pages are given back: they have been wiped before a device reaches them.
pub(super) fn returns(setup: &Setup<'_>) -> Result<(), &'static str> {
    raced(setup, RETURNS, |race| race.give_back())
}

fn raced(
    setup: &Setup<'_>,
    pages: usize,
    round: fn(&mut Race<'_>) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    let vm = remote::unsealed(&setup.guest)?;
    let mut race = Race {
        setup,
        guest: Remote::new(vm),
        length: 0,
        round: 0,
        refused: 0,
        done: 0,
    };
    let mut rounds = pages.div_ceil(setup.devices.len());
    let result = words(vm.seal(RAM, 0)).and_then(|()| {
        while rounds > 0 {
            round(&mut race)?;
            race.round += 1;
            rounds -= 1;
        }
        race.guest.off().map_err(Into::into)
    });
    end(vm)?;
    result?;
    let (refused, done) = (race.refused, race.done);
    line(format_args!(
        "  {done} transfers were in time, {refused} too late"
    ));
    // Else nothing was raced.
    expect(refused > 0, "no transfer met a donated page")?;
    expect(done > 0, "no transfer came before")
}

impl Race<'_> {
    /// The pages of a round, by their IPAs.
    fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let count = self.setup.devices.len() as u64;
        (0..count).map(|number| FIRST + number * PAGE_SIZE)
    }

    /// The host's address of a page.
    fn host_address(&self, ipa: u64) -> u64 {
        self.setup.guest.ram.start() + (ipa - RAM)
    }

    /// Where in its page this round's transfer goes: at the start, at the end, or between.
    fn offset(&self, ipa: u64) -> u64 {
        (ipa / PAGE_SIZE + self.round) % 3 * (PAGE_SIZE - BYTES) / 2
    }

    /// Starts a transfer to each page, all of which happen at one moment, and does `call` for each page,
    /// beginning so long before that another part of the calls comes too late in each round.
    fn meet(
        &mut self,
        direction: Direction,
        mut call: impl FnMut(&mut Remote, u64) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        let setup = self.setup;
        let before = self.counts()?;
        let due = edu::due();
        for (device, ipa) in setup.devices.iter().zip(self.pages()) {
            device.start(direction, self.host_address(ipa) + self.offset(ipa), BYTES);
        }
        let early = self.length * (self.round % MOMENTS + 1) / MOMENTS;
        gic::sleep_until(&setup.gic, due.saturating_sub(early))?;
        let from = ticks();
        for ipa in self.pages() {
            call(&mut self.guest, ipa)?;
        }
        self.length = ticks() - from;
        setup.finish()?;
        for (before, after) in before.iter().zip(self.counts()?) {
            if *before == after {
                self.done += 1;
            } else {
                self.refused += 1;
            }
        }
        Ok(())
    }

    fn counts(&self) -> Result<Vec<u64>, &'static str> {
        let devices = self.setup.devices.iter();
        devices.map(|device| Ok(faults(*device)?.count)).collect()
    }

    fn donate(&mut self) -> Result<(), &'static str> {
        let setup = self.setup;
        if self.round == 0 {
            let canary = setup.filled(0, CANARY)?.start();
            setup.transfers(Direction::FromMemory, core::iter::repeat(canary), BYTES)?;
        }
        self.meet(Direction::ToMemory, |guest, ipa| {
            words(guest.vm.donate_memory(ipa, 1, DonationKind::Zeros))
        })?;
        for ipa in self.pages() {
            let place = ipa + self.offset(ipa);
            for word in [0, BYTES - 8] {
                let found = self.guest.load(place + word)?;
                expect(found == 0, "DMA has changed a donated page")?;
            }
            let [answer, ..] = self.guest.call(MEM_RELINQUISH, [ipa, 0, 0])?;
            expect(answer == 0, "a page can't be given back")?;
        }
        Ok(())
    }

    fn give_back(&mut self) -> Result<(), &'static str> {
        let setup = self.setup;
        for ipa in self.pages() {
            words(self.guest.vm.donate_memory(ipa, 1, DonationKind::Zeros))?;
            let place = ipa + self.offset(ipa);
            for word in (0..BYTES).step_by(8) {
                self.guest.store(place + word, SECRET)?;
            }
        }
        self.meet(Direction::FromMemory, |guest, ipa| {
            let [answer, ..] = guest.call(MEM_RELINQUISH, [ipa, 0, 0])?;
            expect(answer == 0, "a page can't be given back")
        })?;
        let mut pages = Vec::new();
        for number in 0..setup.devices.len() {
            pages.push(setup.filled(1 + number, 0)?);
        }
        let places = pages.iter().map(|page| page.start());
        setup.transfers(Direction::ToMemory, places, BYTES)?;
        for page in pages {
            let (words, _) = mem::bytes(page).as_chunks::<8>();
            let clean = words.iter().all(|word| u64::from_ne_bytes(*word) != SECRET);
            expect(clean, "a device has read what a guest had")?;
        }
        Ok(())
    }
}
