//! The request over memory that may lose its power behind any write.

use core::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const BASE: u64 = 0x4000_0000;
const SIZE: u64 = 0x40_0000;
const SECRET: u64 = 0x5ec2_e700_dead_beef;

/// Words that are not zero; writes after the last that there is power for do nothing.
#[derive(Default)]
struct Ram {
    words: RefCell<BTreeMap<u64, u64>>,
    writes: Cell<u32>,
    reads: Cell<u64>,
    power_for: Cell<u32>,
}

impl Ram {
    fn new() -> Self {
        let ram = Self::default();
        ram.power_for.set(u32::MAX);
        ram
    }

    fn write(&self, address: u64, value: u64) {
        if self.writes.get() < self.power_for.get() {
            self.writes.set(self.writes.get() + 1);
            if value == 0 {
                self.words.borrow_mut().remove(&address);
            } else {
                self.words.borrow_mut().insert(address, value);
            }
        }
    }

    fn secrets(&self) -> usize {
        let words = self.words.borrow();
        words.values().filter(|word| **word == SECRET).count()
    }
}

impl Memory for Ram {
    fn word(&self, address: u64) -> u64 {
        assert!(address.is_multiple_of(8));
        self.reads.set(self.reads.get() + 1);
        self.words.borrow().get(&address).copied().unwrap_or(0)
    }

    fn put(&self, address: u64, words: [u64; WORDS]) {
        for (at, word) in (address..).step_by(8).zip(words) {
            self.write(at, word);
        }
    }

    fn wipe(&self, range: AddrRange) {
        let words = self.words.borrow();
        let there: Vec<_> = words
            .range(range.start()..range.end())
            .map(|(at, _)| *at)
            .collect();
        drop(words);
        there.into_iter().for_each(|at| self.write(at, 0));
    }
}

fn range(start: u64, end: u64) -> AddrRange {
    AddrRange::new(start, end).unwrap()
}

fn list(ranges: &[AddrRange]) -> RangeList<8> {
    let mut list = RangeList::new();
    ranges
        .iter()
        .for_each(|range| list.insert(*range, "ranges").unwrap());
    list
}

fn whole() -> RangeList<8> {
    list(&[range(BASE, BASE + SIZE)])
}

/// EL2's memory of 1 MiB at `BASE + at`, and its copies.
fn el2(at: u64) -> (AddrRange, [u64; COPIES]) {
    let start = BASE + at;
    (
        range(start, start + 0x10_0000),
        [start + 0x2_0000, start + 0x7_0000, start + 0xf_0000],
    )
}

/// A boot with EL2 at `at`: looks, moves in, wipes; says whether it looked in vain.
fn boot(ram: &Ram, at: u64, taken: &RangeList<8>) -> bool {
    let found = is_requested(ram, &whole(), taken);
    let (there, copies) = el2(at);
    if found {
        carry_over(ram, there, &copies);
    }
    // The image, which does not reach to the copies.
    (there.start()..there.start() + 0x2_0000)
        .step_by(0x1000)
        .for_each(|at| ram.write(at, 1));
    let request = Request::new(copies, found);
    if found {
        let mut last = 0;
        let parts = whole().as_slice()[0].without(taken.as_slice(), there);
        wipe(ram, parts, |done| {
            assert!(done > last);
            last = done;
        });
        assert_eq!(last, SIZE - there.size() - taken.total());
        request.withdraw(ram);
    }
    !found
}

#[test]
fn a_request_stands_from_the_first_vm_to_the_last() {
    let ram = Ram::new();
    let none = list(&[]);
    let request = Request::new(el2(0).1, false);
    let requested = || is_requested(&ram, &whole(), &none);
    assert!(!requested());
    request.raise(&ram);
    request.raise(&ram);
    assert!(requested());
    request.withdraw(&ram);
    assert!(requested());
    request.withdraw(&ram);
    assert!(!requested());
    assert!(ram.words.borrow().is_empty(), "nothing is left of it");
}

#[test]
fn each_copy_alone_is_a_request_and_half_a_one_is_none() {
    let copies = el2(0x5_0000).1;
    for alone in copies {
        let ram = Ram::new();
        Request::new(copies, false).raise(&ram);
        for other in copies.iter().filter(|at| **at != alone) {
            ram.put(*other, [0; WORDS]);
        }
        assert!(is_requested(&ram, &whole(), &list(&[])));
        for word in 0..WORDS as u64 - 1 {
            let kept = ram.word(alone + 8 * word);
            ram.write(alone + 8 * word, kept ^ 1 << 63);
            assert!(!is_requested(&ram, &whole(), &list(&[])), "word {word}");
            ram.write(alone + 8 * word, kept);
        }
        ram.write(alone + 8 * (WORDS as u64 - 1), 0xffff);
        assert!(
            is_requested(&ram, &whole(), &list(&[])),
            "of a later version"
        );
    }
}

#[test]
fn constants_elsewhere_are_no_request() {
    let ram = Ram::new();
    let at = BASE + 0x3_0000;
    ram.put(at, copy_for(at + STRIDE));
    ram.put(at + 64, copy_for(at + 64));
    assert!(!is_requested(&ram, &whole(), &list(&[])));
}

#[test]
fn what_is_taken_is_not_looked_at() {
    let ram = Ram::new();
    let at = BASE + 0x3_0000;
    ram.put(at, copy_for(at));
    let taken = |start, end| list(&[range(start, end)]);
    assert!(!is_requested(&ram, &whole(), &taken(at - 1, at + 1)));
    assert!(is_requested(&ram, &whole(), &taken(at - 0x8000, at)));
    assert!(is_requested(
        &ram,
        &whole(),
        &taken(at + 0x1000, at + 0x8000)
    ));
}

#[test]
fn a_boot_without_a_request_reads_a_word_in_64_kib_and_writes_nothing() {
    let ram = Ram::new();
    assert!(!is_requested(&ram, &whole(), &list(&[])));
    assert_eq!((ram.reads.get(), ram.writes.get()), (SIZE / STRIDE, 0));
}

#[test]
fn a_wipe_ends_at_what_is_spared_to_the_byte() {
    let ram = Ram::new();
    Request::new(el2(0).1, false).raise(&ram);
    let initrd = range(BASE + 0x20_0008, BASE + 0x20_0010);
    for at in (BASE + 0x1f_fff0..BASE + 0x20_0030).step_by(8) {
        ram.write(at, SECRET);
    }
    assert!(!boot(&ram, 0, &list(&[initrd])));
    assert_eq!(ram.secrets(), 1);
    assert_eq!(ram.word(initrd.start()), SECRET);
}

proptest! {
    /// Whatever write the power ends behind: while a secret is left, the next boot finds a request; and
    /// when one has ended, none is left, in whichever places EL2 was.
    #[test]
    fn no_reset_on_the_way_loses_the_request(
        places in prop::collection::vec((0u64..=0x30, 0u32..700), 1..4), last in 0u64..=0x30,
        secrets in prop::collection::btree_set(0u64..SIZE / 64, 1..20),
    ) {
        let ram = Ram::new();
        let (first, copies) = el2(places[0].0 << 16);
        Request::new(copies, false).raise(&ram);
        for at in secrets {
            let at = BASE + at * 64;
            if !first.contains(at) {
                ram.write(at, SECRET);
            }
        }
        for (at, writes) in places {
            ram.power_for.set(ram.writes.get() + writes);
            let in_vain = boot(&ram, at << 16, &list(&[]));
            prop_assert!(!in_vain || ram.secrets() == 0);
        }
        ram.power_for.set(u32::MAX);
        let _: bool = boot(&ram, last << 16, &list(&[]));
        prop_assert_eq!(ram.secrets(), 0);
        prop_assert!(!is_requested(&ram, &whole(), &list(&[])));
    }
}
